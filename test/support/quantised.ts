// Folders of weights in 8 bits, made of the fixtures: as ComfyUI, bitsandbytes and plain casts store them.
import { cp, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { readSafetensorsHeader } from "../../lib/checkpoint/index.js";
import type { StoredDType } from "../../lib/common/tensor.js";
import { widen } from "../../lib/common/widen.js";
import { fixture } from "./fixtures.js";

export interface RawTensor {
  readonly dtype: string;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}
export type RawTensors = Record<string, RawTensor>;

export async function readRaw(file: string): Promise<RawTensors> {
  const bytes = await readFile(file);
  const tensors: RawTensors = {};
  for (const [name, { dtype, shape, offset, length }] of await readSafetensorsHeader(file))
    tensors[name] = { dtype, shape, bytes: bytes.subarray(offset, offset + length) };
  return tensors;
}

/** @returns the file */
export async function writeRaw(
  file: string,
  tensors: Readonly<RawTensors>,
  metadata?: Readonly<Record<string, string>>,
): Promise<string> {
  const header: Record<string, unknown> = metadata ? { __metadata__: metadata } : {};
  let end = 0;
  for (const [name, { dtype, shape, bytes }] of Object.entries(tensors)) {
    header[name] = { dtype, shape, data_offsets: [end, end + bytes.length] };
    end += bytes.length;
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  await writeFile(file, Buffer.concat([length, json, ...Object.values(tensors).map(({ bytes }) => bytes)]));
  return file;
}

export const f32 = (shape: readonly number[], values: ArrayLike<number>): RawTensor => ({
  dtype: "F32",
  shape,
  bytes: new Uint8Array(Float32Array.from(values).buffer),
});

export const int8 = (shape: readonly number[], values: ArrayLike<number>): RawTensor => ({
  dtype: "I8",
  shape,
  bytes: new Uint8Array(Int8Array.from(values).buffer),
});

export function valuesOf({ dtype, shape, bytes }: RawTensor): Float32Array {
  const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
  widen(bytes, dtype as StoredDType, values);
  return values;
}

type Float8 = "F8_E4M3" | "F8_E5M2";
/** The finite values of a float8 type with their codes, in order: by torch (test/fixtures/float8.json). */
const tables = new Map<Float8, { values: number[]; codes: number[] }>();

async function tableOf(dtype: Float8) {
  let table = tables.get(dtype);
  if (!table) {
    const json = JSON.parse(await readFile(fixture("float8.json"), "utf8")) as Record<Float8, unknown[]>;
    const finite = json[dtype].flatMap((value, code) =>
      typeof value === "number" && code !== 128 ? [[value, code]] : [],
    );
    finite.sort(([a], [b]) => (a as number) - (b as number));
    table = { values: finite.map(([value]) => value as number), codes: finite.map(([, code]) => code as number) };
    tables.set(dtype, table);
  }
  return table;
}

/** The nearest values of the type, ties to the even code, as torch rounds. */
export async function asFloat8(shape: readonly number[], values: Float32Array, dtype: Float8): Promise<RawTensor> {
  const table = await tableOf(dtype);
  const bytes = Uint8Array.from(values, (value) => {
    let [low, high] = [0, table.values.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (table.values[middle]! <= value) low = middle;
      else high = middle;
    }
    const [below, above] = [value - table.values[low]!, table.values[high]! - value];
    const upper = below === above ? table.codes[high]! % 2 === 0 : above < below;
    return table.codes[upper ? high : low]!;
  });
  return { dtype, shape, bytes };
}

/** The linear weights of T5 in scaled E4M3, as ComfyUI stores them: the largest magnitude is 448. */
export async function scaledT5(tensors: RawTensors): Promise<RawTensors> {
  const result: RawTensors = { scaled_fp8: { dtype: "F8_E4M3", shape: [0], bytes: new Uint8Array() } };
  for (const [name, tensor] of Object.entries(tensors)) {
    result[name] = tensor;
    if (!/\.(SelfAttention\.[qkvo]|DenseReluDense\.w\w+)\.weight$/.test(name)) continue;
    const values = valuesOf(tensor);
    const scale = Math.fround(values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / 448);
    const scaled = values.map((value) => value / scale);
    result[name] = await asFloat8(tensor.shape, scaled, "F8_E4M3");
    result[name.replace(/weight$/, "scale_weight")] = f32([], [scale]);
  }
  return result;
}

/** A copy of a fixture's model in `folder`, with one file of weights changed. */
export async function modelWith(
  folder: string,
  name: "large" | "medium" | "sd3",
  file: string,
  change: (tensors: RawTensors) => RawTensors | Promise<RawTensors>,
): Promise<string> {
  await cp(fixture(name, "model"), folder, { recursive: true });
  await writeRaw(path.join(folder, file), await change(await readRaw(fixture(name, "model", file))));
  return folder;
}
