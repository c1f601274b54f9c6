/**
 * Makes a checkpoint of SD3.5-medium's width whose activations are as hard to round as those of large trained networks: a few channels are 50
 * to 200 times as large as the others, the same ones in all blocks, by the biases of the modulation; hidden units of the MLP and of attention's
 * values have such channels of their own; weights are Student-t distributed with 4 degrees of freedom; and some tokens are far larger than the
 * others. Or one without all that, with normal weights. Blocks count in both: their gates are about one half.
 */

import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import path from "node:path";
import { narrow } from "../lib/common/narrow.js";
import { elementCount } from "../lib/common/tensor.js";
import { NoiseGenerator } from "../lib/generation/noise.js";
import { headerOf, type Shapes, tensorShapes } from "./random-checkpoint.js";
import { root } from "./support.js";

export interface TailsOptions {
  readonly layers: number;
  /** Of 64 channels each. Default: 24, SD3.5-medium's. */
  readonly heads?: number;
  /** Layers with a second attention, from the first. Default: 0. */
  readonly dual?: number;
  /** Without, weights are normal and no channel is larger than the others. */
  readonly heavy: boolean;
}

/** Channels that are larger than the others, of each vector. */
const outliers = 8;
/** Degrees of freedom. */
const freedom = 4;
/** Values that are drawn; tensors take them from one place or another. */
const drawn = 1 << 21;
const version = 1;

/** @returns the folder, which is made once */
export async function checkpointWithTails(
  { layers, heads = 24, dual = 0, heavy }: TailsOptions,
  work = path.join(root, "bench/.work"),
): Promise<string> {
  const folder = path.join(
    work,
    `${heavy ? "heavy" : "ordinary"}-tails-${heads * 64}-${layers}-dual${dual}-v${version}`,
  );
  const file = path.join(folder, "transformer/diffusion_pytorch_model.safetensors");
  if (existsSync(path.join(folder, "made"))) return folder;
  const fixture = path.join(root, "test/fixtures/medium/model");
  const config = JSON.parse(readFileSync(path.join(fixture, "transformer/config.json"), "utf8"));
  Object.assign(config, {
    num_layers: layers,
    num_attention_heads: heads,
    attention_head_dim: 64,
    caption_projection_dim: heads * 64,
    dual_attention_layers: Array.from({ length: dual }, (_, layer) => layer),
    pos_embed_max_size: 96,
  });
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(path.dirname(folder), { recursive: true });
  cpSync(fixture, folder, { recursive: true });
  rmSync(path.join(folder, "refiner"), { recursive: true });
  writeFileSync(path.join(folder, "transformer/config.json"), JSON.stringify(config, null, 2));
  await writeWeights(file, tensorShapes(config), heads * 64, heavy);
  writeFileSync(path.join(folder, "made"), "");
  return folder;
}

async function writeWeights(file: string, shapes: Shapes, width: number, heavy: boolean): Promise<void> {
  const pool = heavy ? studentT(drawn) : new NoiseGenerator(3).draw(drawn);
  const handle = await open(file, "w");
  try {
    await handle.write(headerOf(shapes).start);
    for (const [index, [name, shape]] of Object.entries(shapes).entries()) {
      const values = new Float32Array(elementCount(shape));
      const spread = spreadOf(name, shape);
      const start = (index * 1_000_003) % drawn;
      for (let i = 0; i < values.length; i++) values[i] = spread * pool[(start + i) % drawn]!;
      if (/norm_(added_)?[qk]\.weight$/.test(name)) values.fill(1.2);
      if (/norm1(_context)?\.linear\.bias$/.test(name)) modulate(values, width, heavy);
      if (heavy && /(to_v|add_v_proj|net\.0\.proj)\.bias$/.test(name)) enlarge(values, index, 10, 40);
      if (heavy && name === "pos_embed.pos_embed")
        for (let token = 0; token < values.length / width; token += 37) {
          for (let i = 0; i < width; i++) values[token * width + i]! *= 50;
        }
      await handle.write(narrow(values, "BF16"));
    }
  } finally {
    await handle.close();
  }
}

/** Standard deviation: that of 1 / √inputs for weights, so that layers keep sizes. */
function spreadOf(name: string, shape: readonly number[]): number {
  if (name.endsWith(".bias")) return 0.02;
  if (name === "pos_embed.pos_embed") return 0.5;
  return elementCount(shape.slice(1)) ** -0.5;
}

/** Biases of the modulation's vectors: gates of about one half, and scales that enlarge the same few channels in each block. */
function modulate(values: Float32Array, width: number, heavy: boolean): void {
  const vectors = values.length / width;
  // (shift, scale, gate) for attention, MLP and second attention; the last block's text has (scale, shift) alone.
  const [scale, gate] = vectors === 2 ? [0, -1] : [1, 2];
  for (let vector = 0; vector < vectors; vector++) {
    const own = values.subarray(vector * width, (vector + 1) * width);
    if (vector % 3 === gate) for (let i = 0; i < width; i++) own[i]! += i % 2 === 0 ? 0.5 : -0.5;
    if (heavy && vector % 3 === scale) enlarge(own, 0, 50, 200);
  }
}

/** Adds values from `least` to `most` in a few channels. @param seed which of them */
function enlarge(values: Float32Array, seed: number, least: number, most: number): void {
  for (let k = 0; k < outliers; k++) {
    const channel = (seed * 7919 + k * 104729 + 17) % values.length;
    values[channel]! += least * (most / least) ** (k / (outliers - 1)) * (k % 2 === 0 ? 1 : -1);
  }
}

/** Student-t distributed values of variance 1. */
function studentT(count: number): Float32Array {
  const normal = new NoiseGenerator(5).draw(count * (freedom + 1));
  const scale = Math.sqrt((freedom - 2) / freedom);
  return Float32Array.from({ length: count }, (_, i) => {
    let square = 0;
    for (let k = 1; k <= freedom; k++) square += normal[i * (freedom + 1) + k]! ** 2;
    return (scale * normal[i * (freedom + 1)]!) / Math.sqrt(square / freedom);
  });
}
