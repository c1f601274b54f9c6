// Fixtures and comparison, shared by the tests.
import path from "node:path";
import { readSafetensorsHeader, readTensor } from "../../lib/checkpoint/index.js";
import type { FloatTensor } from "../../lib/common/tensor.js";

export const root = path.resolve(import.meta.dirname, "../..");
export const fixtureNames = ["large", "medium", "sd3"] as const;

export const fixture = (...parts: string[]) => path.join(root, "test/fixtures", ...parts);

/** All tensors of a small .safetensors file. */
export async function readAll(file: string): Promise<Record<string, FloatTensor>> {
  const header = await readSafetensorsHeader(file);
  const tensors: Record<string, FloatTensor> = {};
  for (const [name, entry] of header) tensors[name] = await readTensor(file, entry);
  return tensors;
}

/** Largest difference, as a part of the reference's largest absolute value; NaN anywhere is infinite. */
export function relativeError(actual: FloatTensor, expected: FloatTensor): number {
  if (actual.shape.join() !== expected.shape.join()) return Number.POSITIVE_INFINITY;
  let largest = 0;
  let worst = 0;
  for (let i = 0; i < expected.data.length; i++) {
    const difference = Math.abs(actual.data[i]! - expected.data[i]!);
    if (Number.isNaN(difference)) return Number.POSITIVE_INFINITY;
    largest = Math.max(largest, Math.abs(expected.data[i]!));
    worst = Math.max(worst, difference);
  }
  return worst / largest;
}
