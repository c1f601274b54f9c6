/**
 * T5's linear weights in int8, made once for a checkpoint and kept in the cache: for each block of 16 values of a row its largest
 * magnitude / 127, and the values in units of it. Weights of 8 bits stay as they are, with their scales. The file is written as a stream of a few megabytes at a time, since the weights of
 * T5-XXL are 9.5 GB, and it is mapped like any other weights afterwards. It holds all that the network needs, so that a graph has its
 * weights in one place.
 */

import { createHash } from "node:crypto";
import type { FileVersion } from "../common/files.js";
import type { Logger } from "../common/logger.js";
import { elementCount, is8Bit, type StoredTensor } from "../common/tensor.js";
import type { Part } from "./checkpoint.js";
import type { T5Config } from "./configs.js";
import { readElements } from "./quantised.js";
import { type HeaderEntry, readBytes, readTensor, type SafetensorsHeader } from "./safetensors.js";
import { modelFingerprint } from "./schedules.js";
import { cachedWeights } from "./weight-cache.js";
import { locatedWeights, type Weights } from "./weights.js";

/** Values that share a scale. Smaller blocks are nearer to the weights, and have more scales. */
const block = 16;
/** Changes when files of an older form must not be taken. */
const format = 1;
/** Values that are read at a time. */
const piece = 1 << 20;

const scaleSuffix = ".scales";
const isLinear = (name: string) =>
  /^encoder\.block\.\d+\.layer\.\d+\.\w+\.(q|k|v|o|wi|wi_0|wi_1|wo)\.weight$/.test(name);
const isNeeded = (name: string) => /^(shared|encoder)\.(.*\.)?weight$/.test(name);

/**
 * The encoder with its linear weights in int8, from the cache, or quantised into it: one to two minutes for T5-XXL on two cores.
 *
 * @param cache folder of the caches
 * Weights that are in 8 bits already stay so: in int8 they would take more, and be rounded a second time.
 * @returns null, and nothing is written, where there are no others
 * @throws CheckpointError if the weights cannot be read, OutputError if the cache cannot be written; `signal.reason` after an abort
 */
export async function quantisedT5(
  { config, weights }: Part<T5Config>,
  cache: string,
  { signal, logger }: { signal?: AbortSignal | undefined; logger?: Logger | undefined } = {},
): Promise<Part<T5Config> | null> {
  const tensors = weights.names.filter(isNeeded).flatMap((name) => weights.find(name) ?? []);
  if (!tensors.some(isQuantised)) return null;
  const { entries, bytes } = plan(tensors);
  const header = Buffer.from(JSON.stringify(Object.fromEntries(entries)));
  const key = createHash("sha256")
    .update(`${format};${await modelFingerprint(config, weights.files)};`)
    .update(header);
  const planned = {
    ...{ digest: key.digest("hex"), bytes, title: "T5's weights in int8" },
    remedy: "Name another folder (cache), or load them as they are stored.",
    content: () => quantised(tensors, header, signal),
  };
  const { version, header: written } = await cachedWeights(cache, planned, { signal, logger });
  return { config, weights: source(version, written) };
}

/** Why the weights are left as they are stored, for a warning. */
export const leftAsStored = ({ weights: { origin, bytesByDType } }: Part<T5Config>): string =>
  `T5's weights in ${origin} are used as they are stored (${Object.keys(bytesByDType).join(", ")}): t5Weights "int8" quantises only those of more than 8 bits.`;

const isQuantised = ({ name, dtype, shape }: StoredTensor) =>
  isLinear(name) && !is8Bit(dtype) && shape.length === 2 && shape[1]! % block === 0;

/** What a file of these tensors holds: the entries of its header, and its bytes. */
function plan(tensors: readonly StoredTensor[]) {
  let end = 0;
  const entries: [string, unknown][] = [];
  const add = (name: string, dtype: string, shape: readonly number[], length: number) => {
    entries.push([name, { dtype, shape, data_offsets: [end, end + length] }]);
    end += length;
  };
  for (const tensor of tensors) {
    const { name, shape, dtype, length, scale } = tensor;
    const count = elementCount(shape);
    if (isQuantised(tensor)) {
      add(name, "I8", shape, count);
      add(`${name}${scaleSuffix}`, "F32", [shape[0]!, shape[1]! / block], (4 * count) / block);
    } else {
      add(name, dtype, shape, length);
      if (scale) add(`${name}${scaleSuffix}`, "F32", scale.tensor.shape, 4 * elementCount(scale.tensor.shape));
    }
  }
  const header = Buffer.byteLength(JSON.stringify(Object.fromEntries(entries)));
  return { entries, bytes: 8 + header + end };
}

async function* quantised(
  tensors: readonly StoredTensor[],
  header: Buffer,
  signal: AbortSignal | undefined,
): AsyncGenerator<Uint8Array> {
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  yield length;
  yield header;
  for (const tensor of tensors) {
    const count = elementCount(tensor.shape);
    const quantise = isQuantised(tensor);
    const scales = new Float32Array(quantise ? count / block : 0);
    for (let first = 0; first < count; first += piece) {
      signal?.throwIfAborted();
      const size = Math.min(piece, count - first);
      if (quantise) {
        const values = await readElements(tensor, first, size);
        yield quantiseBlocks(values, scales.subarray(first / block, (first + size) / block));
      } else {
        const each = tensor.length / count;
        yield await readBytes(tensor.file, tensor.offset + first * each, size * each);
      }
    }
    if (quantise) yield bytesOf(scales);
    else if (tensor.scale) {
      const { tensor: stored, factor } = tensor.scale;
      yield bytesOf((await readTensor(stored.file, stored)).data.map((scale) => scale * factor));
    }
  }
}

/** Whole blocks of values in units of their scales. @param scales receives a scale for each block */
function quantiseBlocks(values: Float32Array, scales: Float32Array): Uint8Array {
  const codes = new Int8Array(values.length);
  for (let at = 0; at < scales.length; at++) {
    let most = 0;
    for (let i = at * block; i < (at + 1) * block; i++) most = Math.max(most, Math.abs(values[i]!));
    scales[at] = most / 127;
    const units = most === 0 ? 0 : 127 / most;
    for (let i = at * block; i < (at + 1) * block; i++) codes[i] = Math.round(values[i]! * units);
  }
  return bytesOf(codes);
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array | Int8Array) =>
  new Uint8Array(buffer, byteOffset, byteLength);

function source(version: FileVersion, header: SafetensorsHeader): Weights {
  const { file } = version;
  const located = [...header].map(([name, entry]) => [name, { file, entry }] as const);
  // The file is this module's own: what is in it has been checked.
  const stored = ({ name, dtype, shape, offset, length }: HeaderEntry) =>
    ({ name, dtype, shape, file, offset, length }) as StoredTensor;
  return {
    ...locatedWeights(file, [version], new Map(located)),
    find(name) {
      const entry = header.get(name);
      if (!entry) return undefined;
      const scales = header.get(`${name}${scaleSuffix}`);
      return scales ? { ...stored(entry), scale: { tensor: stored(scales), factor: 1 } } : stored(entry);
    },
  };
}
