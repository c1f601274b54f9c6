/**
 * The noise levels that a schedule visits: n + 1 of them for n blocks, from 1 (noise) to 0 (image). Two spacings are in
 * use: the evenly shifted one, and the one that diffusers' FlowMatchEulerDiscreteScheduler arrives at, for exact parity.
 */

import { table } from "../common/table.js";

/** What noise levels depend on: values of the checkpoint's scheduler. */
export interface SigmaSettings {
  /** Shift towards noise, 3 for SD3. */
  readonly shift: number;
  /** Steps that the model was trained with, 1000. */
  readonly numTrainTimesteps: number;
}

/** σ = s·u / (1 + (s − 1)·u): the resolution-dependent shift of SD3 (Esser et al. 2024, section 5.3.2). */
export function shiftSigma(u: number, shift: number): number {
  return (shift * u) / (1 + (shift - 1) * u);
}

/** u_i = 1 − i/n, shifted once. The last two points are far enough apart to be worth an evaluation. */
export function shiftedSigmas(blocks: number, { shift }: Pick<SigmaSettings, "shift">): number[] {
  return Array.from({ length: blocks + 1 }, (_, i) => shiftSigma(1 - i / blocks, shift));
}

/**
 * FlowMatchEulerDiscreteScheduler.set_timesteps(n): that scheduler shifts twice, once when it finds its smallest σ and
 * once more over the linear spacing down to it. n = 4, shift 3: 1, .857692, .602151, .008929, 0.
 */
export function diffusersSigmas(blocks: number, { shift, numTrainTimesteps }: SigmaSettings): number[] {
  const smallest = shiftSigma(1 / numTrainTimesteps, shift);
  const points = Array.from({ length: blocks }, (_, i) => {
    const even = blocks === 1 ? 1 : 1 + ((smallest - 1) * i) / (blocks - 1);
    return shiftSigma(even, shift);
  });
  return [...points, 0];
}

/** Noise levels for a number of blocks. */
type Grid = (blocks: number, settings: SigmaSettings) => number[];

const rows = table<Grid>()({ shifted: shiftedSigmas, diffusers: diffusersSigmas });

/** Name of a spacing of noise levels: see the option `grid`. */
export type GridName = keyof typeof rows;

/** The table of spacings, by the values of the option `grid`. */
export const sigmaGrids: Record<string, Grid> = rows;

/**
 * The noise levels of one of several stages: as `shiftedSigmas`, but from `sigma` instead of 1 where it starts from a
 * re-noised picture, and to `end` instead of 0 where the next one takes noise over.
 * u_0 = σ / (s − (s − 1)·σ), u_n likewise of the end, u_i = u_0 + (u_n − u_0)·i/n.
 */
export function upscaleSigmas(
  blocks: number,
  { shift }: Pick<SigmaSettings, "shift">,
  sigma: number,
  end = 0,
): number[] {
  const [first, last] = [sigma, end].map((level) => level / (shift - (shift - 1) * level)) as [number, number];
  return Array.from({ length: blocks + 1 }, (_, i) => {
    if (i === 0) return sigma;
    return i === blocks ? end : shiftSigma(last + (first - last) * (1 - i / blocks), shift);
  });
}

/**
 * How many blocks of a full schedule an image-to-image run of some strength skips: as diffusers, ⌊n − min(n·strength, n)⌋.
 * @param strength in (0, 1]; at least one block is left
 */
export function skippedBlocks(blocks: number, strength: number): number {
  return Math.floor(Math.max(blocks - Math.min(blocks * strength, blocks), 0));
}
