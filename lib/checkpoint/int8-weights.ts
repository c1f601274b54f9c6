/**
 * Weights of linear layers for products of 8-bit integers, made once of a checkpoint's own and kept in the cache: for each output its
 * largest magnitude / 127, and the values in units of it, transposed as the kernels read them. The file is written as a stream, a layer at
 * a time, and is mapped like any other weights afterwards.
 */

import { createHash, type Hash } from "node:crypto";
import type { FileVersion } from "../common/files.js";
import type { Logger } from "../common/logger.js";
import { elementCount, type Int8Linear, type StoredTensor } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import { CheckpointError } from "../errors.js";
import type { Part } from "./checkpoint.js";
import { readElements } from "./quantised.js";
import { readBytes, type SafetensorsHeader } from "./safetensors.js";
import { cachedWeights, layOut, type TensorPlan } from "./weight-cache.js";
import type { Weights } from "./weights.js";

/** Changes when files of an older form must not be taken. */
const format = 1;

/** The linear layers of attention and MLP, by the network: those of transformer, refiner and ControlNets are alike. */
const candidates = {
  mmdit:
    /^transformer_blocks\.\d+\.(attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2))$/,
  clip: /^text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$/,
  t5: /^encoder\.block\.\d+\.layer\.\d+\.\w+\.(q|k|v|o|wi|wi_0|wi_1|wo)$/,
} as const;

/** A network as far as the names of its layers go. */
export type Int8Kind = keyof typeof candidates;

/**
 * Names of the linear layers that may be multiplied in 8 bits, without ".weight": those of attention and MLP. What turns timesteps and
 * pooled text into modulation, embeddings and last layers are not among them.
 */
export function int8Candidates(kind: Int8Kind, { names, find }: Pick<Weights, "names" | "find">): string[] {
  const layers = names.filter((name) => name.endsWith(".weight")).map((name) => name.slice(0, -".weight".length));
  return layers.filter((layer) => {
    const shape = candidates[kind].test(layer) ? find(`${layer}.weight`)?.shape : undefined;
    return shape?.length === 2 && shape[0]! % wordRows === 0;
  });
}

interface QuantiseOptions {
  /** What the part is called, with its article: "the transformer". */
  readonly title: string;
  readonly signal?: AbortSignal | undefined;
  /** `info` is told when a file is written, and how long it took. */
  readonly logger?: Logger | undefined;
}

/** A linear layer that is to be quantised. */
interface Layer {
  readonly name: string;
  readonly weight: StoredTensor;
  readonly smooth: Float32Array | null;
}

/**
 * The part with some of its linear layers in 8 bits, from the cache, or quantised into it: some seconds for a billion weights.
 *
 * @param layers that are quantised, by name without ".weight": what their inputs are multiplied by, [in], or null for 1
 * @param cache folder of the caches
 * @returns the part itself where there are none
 * @throws CheckpointError if weights cannot be read or are not finite, OutputError if the cache cannot be written; `signal.reason` after an abort
 */
export async function quantisedWeights<P extends Part<unknown>>(
  part: P,
  layers: ReadonlyMap<string, Float32Array | null>,
  cache: string,
  { title, signal, logger }: QuantiseOptions,
): Promise<P> {
  const { weights } = part;
  const found = [...layers].map(([name, smooth]) => ({ name, smooth, weight: weights.find(`${name}.weight`)! }));
  if (found.length === 0) return part;
  const { start, bytes } = layOut(found.flatMap(tensorsOf));
  const planned = {
    ...{ digest: await digestOf(weights, start, found, signal), bytes, title: `${title}'s weights in int8` },
    remedy: 'Name another folder (cache), or load the model without weights: "int8".',
    content: () => written(start, found, signal),
  };
  const { version, header } = await cachedWeights(cache, planned, { signal, logger });
  return { ...part, weights: withInt8(weights, [...layers.keys()], version, header) };
}

/** Names of a layer's tensors in the file. */
const codesOf = (layer: string) => `${layer}.weight.int8`;
const scalesOf = (layer: string) => `${layer}.weight.scales`;
const smoothOf = (layer: string) => `${layer}.smooth`;

/** In the order in which they lie in the file. */
function tensorsOf({ name, weight: { shape }, smooth }: Layer): TensorPlan[] {
  const [outputs, inputs] = shape as [number, number];
  return [
    { name: scalesOf(name), dtype: "F32", shape: [outputs] },
    ...(smooth ? [{ name: smoothOf(name), dtype: "F32", shape: [inputs] } as const] : []),
    { name: codesOf(name), dtype: "I8", shape: [inputs, outputs] },
  ];
}

/** Bytes of a weight that tell one from another whose file has the same size and time, as copies and layers of images may have. */
const sample = 4096;
const sampleOf = ({ file, offset, length }: StoredTensor) => readBytes(file, offset, Math.min(length, sample));

/** What the file's content follows from: versions of the weights' files, samples of the weights, and what inputs are multiplied by. */
async function digestOf(
  { files }: Weights,
  start: Buffer,
  layers: readonly Layer[],
  signal: AbortSignal | undefined,
): Promise<string> {
  const hash: Hash = createHash("sha256")
    .update(`int8;${format};${JSON.stringify(files)};`)
    .update(start);
  for (const { weight, smooth } of layers) {
    signal?.throwIfAborted();
    const { dtype, scale } = weight;
    hash.update(`${dtype};`).update(await sampleOf(weight));
    if (scale) hash.update(`${scale.factor};`).update(await sampleOf(scale.tensor));
    if (smooth) hash.update(bytesOf(smooth));
  }
  return hash.digest("hex");
}

async function* written(
  start: Buffer,
  layers: readonly Layer[],
  signal: AbortSignal | undefined,
): AsyncGenerator<Uint8Array> {
  yield start;
  const largest = layers.reduce((most, { weight }) => Math.max(most, elementCount(weight.shape)), 0);
  // What was yielded has been written when the next layer is asked for.
  const buffer = new Int32Array(largest / wordRows);
  for (const { weight, smooth } of layers) {
    const [outputs, inputs] = weight.shape as [number, number];
    const words = buffer.subarray(0, (outputs * inputs) / wordRows);
    const scales = new Float32Array(outputs);
    const rows = tile * Math.max(1, Math.floor(piece / (tile * inputs)));
    for (let first = 0; first < outputs; first += rows) {
      signal?.throwIfAborted();
      const count = Math.min(rows, outputs - first);
      const values = await readElements(weight, first * inputs, count * inputs);
      for (let row = 0; row < count; row += tile) {
        const some = values.subarray(row * inputs, Math.min(count, row + tile) * inputs);
        if (smooth) divideColumns(some, smooth);
        quantiseRows(some, inputs, first + row, words, scales);
        if (isDue()) await rest();
      }
    }
    checkFinite(scales, weight);
    yield bytesOf(scales);
    if (smooth) yield bytesOf(smooth);
    yield bytesOf(words);
  }
}

function checkFinite(scales: Float32Array, weight: StoredTensor): void {
  const row = scales.findIndex((scale) => !Number.isFinite(scale));
  if (row >= 0) throw notFinite(weight, row);
}

function notFinite({ name, file }: StoredTensor, row: number): CheckpointError {
  return new CheckpointError(
    file,
    `${file}: the tensor "${name}" has values that are not finite in row ${row}, so that it cannot be quantised. The file is damaged: download it again.`,
  );
}

/**
 * Reads the weights of linear layers, to say which of them the results that are not finite come from.
 * @throws CheckpointError that names the first one with values that are not finite; `signal.reason` after an abort
 */
export async function checkFiniteWeights(
  { find }: Weights,
  layers: readonly string[],
  signal: AbortSignal | undefined,
): Promise<void> {
  for (const layer of layers) {
    const weight = find(`${layer}.weight`)!;
    const [outputs, inputs] = weight.shape as [number, number];
    const rows = Math.max(1, Math.floor(piece / inputs));
    for (let first = 0; first < outputs; first += rows) {
      signal?.throwIfAborted();
      const values = await readElements(weight, first * inputs, Math.min(rows, outputs - first) * inputs);
      const at = values.findIndex((value) => !Number.isFinite(value));
      if (at >= 0) throw notFinite(weight, first + Math.floor(at / inputs));
      if (isDue()) await rest();
    }
  }
}

/** Values that are read at a time. */
const piece = 1 << 18;
/** Rows that are transposed together: their codes for one input are a line of the processor's cache. */
const tile = 64;
/** Columns that are transposed together: lines that are written in turn. */
const tileColumns = 32;
/** Rows whose codes for one input are one word. */
const wordRows = 4;
/** Rows of less are zeros: float32 has no exact numbers there. */
const leastScale = 1e-36;
/** Bits of infinity: those of NaN are more. */
const infinity = 0x7f800000;

function divideColumns(values: Float32Array, smooth: Float32Array): void {
  for (let at = 0; at < values.length; at += smooth.length)
    for (let column = 0; column < smooth.length; column++) values[at + column]! /= smooth[column]!;
}

/**
 * Some rows of a weight in units of their scales.
 * @param values whole rows, `inputs` values each: a multiple of four rows
 * @param first number of the first of them among all rows
 * @param words receives them: codes of [inputs, outputs], four in a word
 * @param scales receives one for each row, [outputs]
 */
function quantiseRows(
  values: Float32Array,
  inputs: number,
  first: number,
  words: Int32Array,
  scales: Float32Array,
): void {
  const stride = scales.length / wordRows;
  const units = new Float64Array(values.length / inputs);
  for (let row = 0; row < units.length; row += wordRows) largestOf(values, row, inputs, scales, first);
  for (let row = 0; row < units.length; row++) units[row] = scales[first + row] === 0 ? 0 : 1 / scales[first + row]!;
  for (let left = 0; left < inputs; left += tileColumns) {
    const width = Math.min(inputs - left, tileColumns);
    for (let row = 0; row < units.length; row += wordRows) {
      const [a, b, c, d] = [units[row]!, units[row + 1]!, units[row + 2]!, units[row + 3]!];
      let to = left * stride + (first + row) / wordRows;
      let at = row * inputs + left;
      for (const end = at + width; at < end; at++, to += stride) {
        // To the nearest of what is positive; then 128 less, in two's complement.
        const ofA = (values[at]! * a + 128.5) | 0;
        const ofB = (values[at + inputs]! * b + 128.5) | 0;
        const ofC = (values[at + 2 * inputs]! * c + 128.5) | 0;
        const ofD = (values[at + 3 * inputs]! * d + 128.5) | 0;
        words[to] = (ofA | (ofB << 8) | (ofC << 16) | (ofD << 24)) ^ 0x80808080;
      }
    }
  }
}

/** Puts the largest magnitudes of four rows, / 127, into `scales`; NaN for a row with values that are not finite. */
function largestOf(values: Float32Array, row: number, inputs: number, scales: Float32Array, first: number): void {
  // Magnitudes are in the order of their bits.
  const bits = new Int32Array(values.buffer, values.byteOffset, values.length);
  const most = new Int32Array(wordRows);
  let a = 0;
  let b = 0;
  let c = 0;
  let d = 0;
  const end = (row + 1) * inputs;
  for (let at = row * inputs; at < end; at++) {
    const ofA = bits[at]! & 0x7fffffff;
    const ofB = bits[at + inputs]! & 0x7fffffff;
    const ofC = bits[at + 2 * inputs]! & 0x7fffffff;
    const ofD = bits[at + 3 * inputs]! & 0x7fffffff;
    if (ofA > a) a = ofA;
    if (ofB > b) b = ofB;
    if (ofC > c) c = ofC;
    if (ofD > d) d = ofD;
  }
  most.set([a, b, c, d]);
  new Float32Array(most.buffer).forEach((each, i) => {
    const scale = each / 127;
    scales[first + row + i] = most[i]! >= infinity ? Number.NaN : scale < leastScale ? 0 : scale;
  });
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array | Int32Array) =>
  new Uint8Array(buffer, byteOffset, byteLength);

/** The weights, with those of a file of this module beside them. */
function withInt8(
  weights: Weights,
  names: readonly string[],
  version: FileVersion,
  header: SafetensorsHeader,
): Weights {
  // What is in the file is this module's own.
  const stored = (name: string) => ({ ...header.get(name), file: version.file }) as StoredTensor;
  const layers = new Map<string, Int8Linear>();
  for (const name of names) {
    const smooth = header.has(smoothOf(name)) ? stored(smoothOf(name)) : undefined;
    layers.set(name, { codes: stored(codesOf(name)), scales: stored(scalesOf(name)), smooth });
  }
  return { ...weights, derived: [version], int8: (layer) => layers.get(layer) };
}
