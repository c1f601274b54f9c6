/**
 * LoRAs merged into a checkpoint's weights: W + Σ scale · (alpha / r) · up · down, in float32, rounded once to the type that the weight is stored in.
 * What changes is written once, as a stream, into a file of the cache, and mapped from there; all else stays in the checkpoint's own
 * files. Weights of 8 bits are restored, and stored in 16, since their scales fit the old values only.
 */

import { createHash, type Hash } from "node:crypto";
import type { Logger } from "../../common/logger.js";
import { narrow } from "../../common/narrow.js";
import { type ComputedDType, elementCount, is8Bit, type StoredTensor } from "../../common/tensor.js";
import { isDue, rest } from "../../common/turns.js";
import { CheckpointError } from "../../errors.js";
import type { Checkpoint, Part } from "../checkpoint.js";
import { isBesideWeights, readElements } from "../quantised.js";
import { readBytes } from "../safetensors.js";
import { cachedWeights, layOut } from "../weight-cache.js";
import { locatedWeights, type Weights } from "../weights.js";
import { type LoraPart, loraParts, partTitles } from "./layers.js";
import { LowRankSum, type Term } from "./product.js";
import type { Lora } from "./read.js";

/** A LoRA with how much of it is merged. */
export interface ScaledLora {
  readonly lora: Lora;
  /** 1 as it was trained, 0 none of it. */
  readonly scale: number;
}

/** Changes when files of an older form must not be taken. */
const format = 1;
/** Values that are read and written at a time. */
const piece = 1 << 18;

interface MergeOptions {
  readonly signal?: AbortSignal | undefined;
  /** `info` is told when a file is written, and how long it took. */
  readonly logger?: Logger | undefined;
}

/**
 * The checkpoint with LoRAs in its weights. Those with scale 0 are left out, so that without others it is the same checkpoint.
 * @param cache folder of the caches
 * @throws CheckpointError if weights cannot be read, or a sum is beyond the type that they are stored in; OutputError if the cache cannot be written;
 *   `signal.reason` after an abort
 */
export async function mergeLoras(
  checkpoint: Checkpoint,
  loras: readonly ScaledLora[],
  cache: string,
  options: MergeOptions = {},
): Promise<Checkpoint> {
  const merged = loras.filter(({ scale }) => scale !== 0);
  if (merged.length === 0) return checkpoint;
  const parts: Partial<Record<LoraPart, Part<unknown>>> = {};
  for (const key of loraParts) {
    const part: Part<unknown> | null = checkpoint[key];
    if (part && merged.some(({ lora }) => lora.parts.get(key)?.size))
      parts[key] = { ...part, weights: await mergedWeights(key, part.weights, merged, cache, options) };
  }
  const { schedulesFile } = checkpoint;
  return {
    ...checkpoint,
    ...(parts as Partial<Checkpoint>),
    // What is calibrated for the sum is not for the model in the folder.
    schedulesFile: parts.transformer ? null : schedulesFile,
    loras: [...checkpoint.loras, ...merged.map(({ lora: { name, file }, scale }) => ({ name, file, scale }))],
  };
}

/** A weight that changes. */
interface Sum {
  readonly base: StoredTensor;
  /** That it is written in. */
  readonly dtype: ComputedDType;
  readonly terms: readonly Term[];
  /** Of the LoRAs that change it, for messages. */
  readonly files: readonly string[];
}

async function mergedWeights(
  part: LoraPart,
  weights: Weights,
  loras: readonly ScaledLora[],
  cache: string,
  { signal, logger }: MergeOptions,
): Promise<Weights> {
  const sums = sumsOf(part, weights, loras);
  const { start, bytes } = layOut(sums.map(({ base: { name, shape }, dtype }) => ({ name, dtype, shape })));
  const names = loras.map(({ lora: { name }, scale }) => `${name} (${scale})`).join(", ");
  const planned = {
    ...{ digest: await digestOf(weights, start, sums, signal), bytes },
    title: `the ${partTitles[part]}'s weights with the LoRAs ${names}`,
    remedy: "Name another folder (cache).",
    content: () => written(start, sums, signal),
  };
  const { version, header: changed } = await cachedWeights(cache, planned, { signal, logger });
  const located = [...changed].map(([name, entry]) => [name, { file: version.file, entry }] as const);
  return overlaid(weights, locatedWeights(version.file, [version], new Map(located)));
}

function sumsOf(part: LoraPart, weights: Weights, loras: readonly ScaledLora[]): Sum[] {
  const { F16 = 0, BF16 = 0 } = weights.bytesByDType;
  const sixteenBit = F16 > BF16 ? "F16" : "BF16";
  return weights.names.flatMap((name): Sum[] => {
    if (!name.endsWith(".weight")) return [];
    const layer = name.slice(0, -".weight".length);
    const found = loras.flatMap(({ lora, scale }) => {
      const added = lora.parts.get(part)?.get(layer);
      return added ? [{ file: lora.file, term: { ...added, factor: added.scale * scale } }] : [];
    });
    const base = found.length > 0 ? weights.find(name) : undefined;
    if (!base) return [];
    const dtype = is8Bit(base.dtype) ? sixteenBit : base.dtype;
    return [{ base, dtype, terms: found.map(({ term }) => term), files: found.map(({ file }) => file) }];
  });
}

/** Bytes of a weight that tell one from another whose file has the same size and time, as copies and layers of images may have. */
const sample = 4096;

/** What the file's content follows from: versions of the weights' files, samples of the weights, and what the LoRAs add. */
async function digestOf(
  weights: Weights,
  start: Buffer,
  sums: readonly Sum[],
  signal: AbortSignal | undefined,
): Promise<string> {
  const hash: Hash = createHash("sha256")
    .update(`lora;${format};${JSON.stringify(weights.files)};`)
    .update(start.subarray(8));
  for (const { base, terms } of sums) {
    hash.update(await readBytes(base.file, base.offset, Math.min(base.length, sample)));
    for (const { down, up, rank, factor } of terms) {
      signal?.throwIfAborted();
      if (isDue()) await rest();
      hash.update(`${base.name};${rank};${factor};`);
      for (const { buffer, byteOffset, byteLength } of [down, up])
        hash.update(new Uint8Array(buffer, byteOffset, byteLength));
    }
  }
  return hash.digest("hex");
}

async function* written(
  start: Buffer,
  sums: readonly Sum[],
  signal: AbortSignal | undefined,
): AsyncGenerator<Uint8Array> {
  yield start;
  const products = new LowRankSum();
  for (const sum of sums) {
    const { base, dtype, terms } = sum;
    const [rows, ...inner] = base.shape as [number, ...number[]];
    const columns = elementCount(inner);
    const addTo = products.of(terms, columns);
    const rowsAtOnce = Math.max(1, Math.floor(piece / columns));
    for (let first = 0; first < rows; first += rowsAtOnce) {
      signal?.throwIfAborted();
      const count = Math.min(rowsAtOnce, rows - first);
      const values = await readElements(base, first * columns, count * columns);
      for (const _ of addTo(values, first)) if (isDue()) await rest();
      checkRange(values, sum);
      yield narrow(values, dtype);
      if (isDue()) await rest();
    }
  }
}

/** Bits of the least magnitude that a type has no number for: those of larger ones, of infinities and of NaN are larger. */
const limits: Readonly<Record<ComputedDType, number>> = { F16: 0x477ff000, BF16: 0x7f7f8000, F32: 0x7f800000 };

function checkRange(values: Float32Array, { base, dtype, files }: Sum): void {
  const bits = new Int32Array(values.buffer, values.byteOffset, values.length);
  const limit = limits[dtype];
  for (let i = 0; i < bits.length; i++) {
    if ((bits[i]! & 0x7fffffff) < limit) continue;
    throw new CheckpointError(
      files[0]!,
      `With ${files.join(" and ")} the weight "${base.name}" of ${base.file} has the value ${values[i]}, which ${dtype} cannot hold. Give the LoRA a smaller scale, or pass another one.`,
    );
  }
}

/** The weights with some of them in another file. What quantisation kept beside those that changed is not asked for any more. */
function overlaid(base: Weights, changed: Weights): Weights {
  const isChanged = new Set(changed.names);
  const bytesByDType: Record<string, number> = { ...base.bytesByDType };
  const add = (dtype: string, bytes: number) => {
    bytesByDType[dtype] = (bytesByDType[dtype] ?? 0) + bytes;
  };
  for (const name of changed.names) {
    const old = base.find(name)!;
    const now = changed.find(name)!;
    add(old.dtype, -old.length);
    if (old.scale) add(old.scale.tensor.dtype, -old.scale.tensor.length);
    add(now.dtype, now.length);
  }
  return {
    ...base,
    bytesByDType: Object.fromEntries(Object.entries(bytesByDType).filter(([, bytes]) => bytes > 0)),
    files: [...base.files, ...changed.files],
    names: base.names.filter((name) => !isBesideWeights(name) || !isChanged.has(name.replace(/\.\w+$/, ".weight"))),
    find: (name) => (isChanged.has(name) ? changed.find(name) : base.find(name)),
  };
}
