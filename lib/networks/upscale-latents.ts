/**
 * Upscaling between two stages in latents, without the autoencoder: RALU (arXiv 2507.08422, "noise-timestep
 * rescheduling"; the correlated noise is that of Pyramidal Flow Matching, 2410.05954). The stage before stops while there
 * is still noise, its state is repeated to the larger size (nearest neighbour), and new noise fills up what the repeated
 * noise lacks, so that the next stage starts from a state that its network knows.
 *
 * Per channel, with ↑ for repeating: the stage before ends at x = (1 − σ_e)·z + σ_e·ε. ↑x has the noise σ_e·↑ε, which is
 * the same for all elements that come from one: its covariance is σ_e²·J, J with ones within such a block of m elements
 * and zeros elsewhere. A network expects (1 − σ)·z' + σ·ε' with white ε', of covariance I. So
 *
 *   x' = β·↑x + σ·n,   β·(1 − σ_e) = 1 − σ,   β²·σ_e²·J + σ²·Cov(n) = σ²·I   ⇒   Cov(n) = I − J/Z²,  Z = σ/(β·σ_e).
 *
 * J has the eigenvalue m for the mean of a block, and 0 for all else. Such an n exists only if m ≤ Z² for every block: the
 * smallest Z, which leaves the most of what the stage before has drawn, is the root of the largest m (2 for twice the
 * size), the *jump*. Solved for the level before and the factor:
 *
 *   σ_e = σ / (Z − (Z − 1)·σ),   β = 1 − σ + σ/Z.
 *
 * That is σ shifted back by Z, as schedules are shifted for larger pictures: to the next stage the same state is noisier,
 * since it averages over more elements. From white noise ε', n = ε' − κ·(mean of ε' in the block) with
 * κ = 1 − √(1 − m/Z²): along a block's mean the variance is (1 − κ)² = 1 − m/Z², elsewhere it is 1. Where all blocks are
 * equal κ is 1: the noise of the means is what was there before. Sizes need not be multiples: then blocks differ in m.
 */

import { LruCache } from "../common/lru-cache.js";
import { float32, type Tensor } from "../common/tensor.js";
import { GraphBuilder, type OnnxGraph, type Value } from "../onnx/index.js";
import { perRow } from "./layers.js";

/** Height and width in latents. */
type Area = readonly [height: number, width: number];

/** Which element each of `to` is repeated from, where there are `from`: that at the same place, seen from the middle. */
function sources(from: number, to: number): number[] {
  return Array.from({ length: to }, (_, index) => Math.floor(((2 * index + 1) * from) / (2 * to)));
}

/** How often each element is repeated. */
function counts(from: number, to: number): number[] {
  const counts = new Array<number>(from).fill(0);
  for (const source of sources(from, to)) counts[source]!++;
  return counts;
}

/** Z: what noise seems larger by from one size to the next, at least 1. */
export function upscaleJump([height, width]: Area, [nextHeight, nextWidth]: Area): number {
  return Math.sqrt(Math.max(...counts(height, nextHeight)) * Math.max(...counts(width, nextWidth)));
}

/** σ_e, the noise level at which a stage has to end for the next one to start at `sigma`. */
export function sigmaBeforeUpscale(sigma: number, jump: number): number {
  return sigma / (jump - (jump - 1) * sigma);
}

/** β, the factor of the latents. */
export function upscaleScale(sigma: number, jump: number): number {
  return 1 - sigma + sigma / jump;
}

export interface UpscaleConstants {
  /** [H, h], 1 where a row is repeated from a row. */
  readonly vertical: Tensor;
  /** [W, w], 1 where a column is repeated from a column. */
  readonly horizontal: Tensor;
  /** [h, w], κ/m: what is taken from each element of a block for the sum of its noise. */
  readonly weights: Tensor;
}

/** Those of the latest few sizes: programs that hold the same arrays can share launches. */
const knownConstants = new LruCache<UpscaleConstants>(8);

/** The operands of the graph that depend on nothing but the sizes. */
export function upscaleConstants(before: Area, next: Area): UpscaleConstants {
  const key = [before, next].join();
  return knownConstants.get(key) ?? knownConstants.set(key, newConstants(before, next));
}

function newConstants([height, width]: Area, [nextHeight, nextWidth]: Area): UpscaleConstants {
  const repeats = (from: number, to: number) => {
    const data = new Float32Array(to * from);
    for (const [index, source] of sources(from, to).entries()) data[index * from + source] = 1;
    return float32([to, from], data);
  };
  const [rows, columns] = [counts(height, nextHeight), counts(width, nextWidth)];
  const most = Math.max(...rows) * Math.max(...columns);
  const weights = rows.flatMap((row) => columns.map((column) => weightOf(row * column, most)));
  return {
    vertical: repeats(height, nextHeight),
    horizontal: repeats(width, nextWidth),
    weights: float32([height, width], Float32Array.from(weights)),
  };
}

/** κ/m for a block of m elements, where the largest has `most`. */
function weightOf(m: number, most: number): number {
  return (1 - Math.sqrt(1 - m / most)) / m;
}

/**
 * Inputs (float32): latents [B, C, h, w], the state that the stage before ended with; noise [B, C, H, W]; sigma [B], where
 * the next stage starts; scale [B], β; vertical [H, h], horizontal [W, w] and weights [h, w] as `upscaleConstants` makes them.
 * Output: x [B, C, H, W]. Sums and repeats are products with the sparse matrices: every runtime has a kernel for those, at any size.
 */
export function emitUpscaleLatents(name: string, channels: number): OnnxGraph {
  const g = new GraphBuilder(name);
  const latents = g.input("latents", "float32", ["rows", channels, "height", "width"]);
  const noise = g.input("noise", "float32", ["rows", channels, "next_height", "next_width"]);
  const sigma = perRow(g, g.input("sigma", "float32", ["rows"]));
  const scale = perRow(g, g.input("scale", "float32", ["rows"]));
  const vertical = g.input("vertical", "float32", ["next_height", "height"]);
  const horizontal = g.input("horizontal", "float32", ["next_width", "width"]);
  const weights = g.input("weights", "float32", ["height", "width"]);
  const turned = (matrix: Value) => g.op("Transpose", [matrix], { perm: [1, 0] });
  const between = (left: Value, x: Value, right: Value) => g.op("MatMul", [g.op("MatMul", [left, x]), right]);
  // x' = ↑(β·x − σ·κ·mean(ε')) + σ·ε': repeated once.
  const means = g.op("Mul", [weights, between(turned(vertical), noise, horizontal)]);
  const kept = g.op("Sub", [g.op("Mul", [scale, latents]), g.op("Mul", [sigma, means])]);
  const repeated = between(vertical, kept, turned(horizontal));
  const x = g.op("Add", [repeated, g.op("Mul", [sigma, noise])]);
  g.output("x", x, ["rows", channels, "next_height", "next_width"]);
  return g.build();
}
