/**
 * Files of weights that are made of a checkpoint's own, once, and kept in the cache: in int8, and with LoRAs in them. Each is
 * called by a digest of all that its content follows from, and is mapped like any other weights.
 */

import { realpath, stat } from "node:fs/promises";
import path from "node:path";
import { type FileVersion, filesNamed, makeFolders, removeFiles, writeFileAtomic } from "../common/files.js";
import type { Logger } from "../common/logger.js";
import { bytesPerElement, elementCount, type StoredDType } from "../common/tensor.js";
import { CheckpointError, OutputError } from "../errors.js";
import { readSafetensorsHeader, type SafetensorsHeader } from "./safetensors.js";

/** Folder of weights in a cache. */
export const weightsFolder = (cache: string): string => path.join(cache, "weights");

/** Bytes of the files of weights in a cache, by their paths. */
export async function listCachedWeights(cache: string): Promise<{ readonly file: string; readonly bytes: number }[]> {
  return (await weightsIn(cache)).map(({ file, bytes }) => ({ file, bytes }));
}

const weightsIn = (cache: string) => filesNamed(weightsFolder(cache), /\.safetensors(\.[0-9a-f]+\.tmp)?$/);

/** Removes them, the plans that they follow from, and what an interrupted load left. @returns how many files of weights there were, and their bytes */
export async function clearCachedWeights(cache: string): Promise<{ readonly files: number; readonly bytes: number }> {
  const removed = await removeFiles(await weightsIn(cache));
  await removeFiles(await filesNamed(weightsFolder(cache), /\.plan\.json(\.[0-9a-f]+\.tmp)?$/));
  return removed;
}

/** A file that is in the cache, or is to be. */
interface PlannedWeights {
  /** Digest of all that its content follows from, in hexadecimal digits. */
  readonly digest: string;
  /** Of the whole file: one of another length is not whole. */
  readonly bytes: number;
  /** What is in it, as the subject of a sentence with "are", within it: "T5's weights in int8", "the weights with …". */
  readonly title: string;
  /** What else can be done where it cannot be written, as a sentence. */
  readonly remedy: string;
  /** Its bytes, a few megabytes at a time. */
  content(): AsyncIterable<Uint8Array>;
}

/** A tensor that a file is to have. */
export interface TensorPlan {
  readonly name: string;
  readonly dtype: StoredDType;
  readonly shape: readonly number[];
}

/**
 * A .safetensors file of tensors that lie one behind the other, in their order.
 * @returns what stands before the tensors, and the bytes of the whole file
 */
export function layOut(tensors: readonly TensorPlan[]): { readonly start: Buffer; readonly bytes: number } {
  let end = 0;
  const entries = tensors.map(({ name, dtype, shape }) => {
    const begin = end;
    end += elementCount(shape) * bytesPerElement[dtype];
    return [name, { dtype, shape, data_offsets: [begin, end] }];
  });
  const json = JSON.stringify(Object.fromEntries(entries));
  // Spaces behind the JSON align the tensors to 8 bytes.
  const header = Buffer.from(json.padEnd(Math.ceil(json.length / 8) * 8));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  const start = Buffer.concat([length, header]);
  return { start, bytes: start.length + end };
}

/** A file of the cache, opened. */
export interface CachedWeights {
  readonly version: FileVersion;
  readonly header: SafetensorsHeader;
}

/**
 * A file of weights in a cache, which is written if it is not there.
 * @throws OutputError if it cannot be written; what `content` throws; `signal.reason` after an abort
 */
export async function cachedWeights(
  cache: string,
  { digest, bytes, title, remedy, content }: PlannedWeights,
  { signal, logger = {} }: { signal?: AbortSignal | undefined; logger?: Logger | undefined },
): Promise<CachedWeights> {
  const folder = weightsFolder(cache);
  const file = path.join(folder, `${digest.slice(0, 32)}.safetensors`);
  const known = await openWhole(file, bytes);
  if (known) return known;
  logger.info?.(`${capital(title)} are written, once, into ${file}.`);
  const start = performance.now();
  try {
    await makeFolders(folder);
    // What is found later by its size alone has to be on the disk before it has its name.
    // One that another process wrote meanwhile stays: it may have opened it, and would find another version in its place.
    const isKept = async () => (await openWhole(file, bytes)) !== undefined;
    await writeFileAtomic(file, content(), { flush: true, isKept });
  } catch (cause) {
    if (cause instanceof CheckpointError || signal?.aborted) throw cause;
    const message = `Cannot write ${title} (${bytes} bytes) to ${file}: ${(cause as Error).message}. ${remedy}`;
    throw new OutputError(file, message, { cause });
  }
  logger.info?.(`${capital(title)} were written in ${((performance.now() - start) / 1000).toFixed(1)} s.`);
  const written = await openWhole(file, bytes);
  if (written) return written;
  throw new OutputError(file, `${file} was removed or changed while it was opened. Load the model again.`);
}

const capital = (title: string) => title[0]!.toUpperCase() + title.slice(1);

/** Undefined where there is no whole file of that size. */
async function openWhole(file: string, bytes: number): Promise<CachedWeights | undefined> {
  const found = await stat(file).catch(() => undefined);
  if (found?.size !== bytes) return undefined;
  const real = await realpath(file);
  const header = await readSafetensorsHeader(real).catch(() => undefined);
  return header && { version: { file: real, size: found.size, mtimeMs: found.mtimeMs }, header };
}
