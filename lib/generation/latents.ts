/** Tensors of several pictures, one row each: noise from seeds, rows taken out, results put together. */

import type { Seed } from "../common/seed.js";
import { elementCount, type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import { NoiseGenerator } from "./noise.js";

/** Noise of each shape, [B, C, h, w], for B pictures: each has one generator, which draws for one shape after another. */
export async function noiseOf(seeds: readonly Seed[], shapes: readonly (readonly number[])[]): Promise<FloatTensor[]> {
  const tensors = shapes.map((shape) => float32(shape, new Float32Array(elementCount(shape))));
  for (const [row, seed] of seeds.entries()) {
    const generator = new NoiseGenerator(seed);
    for (const { data } of tensors) {
      const size = data.length / seeds.length;
      await generator.fill(data.subarray(row * size, (row + 1) * size));
    }
  }
  return tensors;
}

/** Row `row` of a tensor as a tensor of one row. */
export function rowOf(tensor: FloatTensor, row: number): FloatTensor {
  const [, ...rest] = tensor.shape;
  const size = elementCount(rest);
  return float32([1, ...rest], tensor.data.subarray(row * size, (row + 1) * size));
}

/** Tensors of one row as one tensor. It holds no memory but its own: what a process sends is one buffer for all values of a message. */
export async function stacked(rows: readonly Tensor[]): Promise<FloatTensor> {
  const [first] = rows as [FloatTensor];
  const [, ...shape] = first.shape;
  if (rows.length === 1 && first.data.byteLength === first.data.buffer.byteLength) return first;
  const size = elementCount(shape);
  const data = new Float32Array(rows.length * size);
  for (const [row, tensor] of rows.entries()) {
    data.set((tensor as FloatTensor).data, row * size);
    if (isDue()) await rest();
  }
  return float32([rows.length, ...shape], data);
}
