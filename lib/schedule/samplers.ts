/**
 * The samplers, one row each: a name for a way to make schedules out of a number of steps. Option values, flags, help
 * texts and defaults follow from this table.
 */

import { table } from "../common/table.js";
import type { Block } from "./blocks.js";
import { dpmSolverSigmas, type Grid, type GridName, uniPCSigmas } from "./sigmas.js";
import { type GuidedStep, isMild, taperedScale } from "./stiffness.js";

export interface SamplerRow {
  /** Number of blocks where none is given. */
  readonly steps: number;
  /** Noise levels where none are named, for the sampler's own blocks. Given blocks are on those of `blocksGrid`. */
  readonly grid: GridName;
  /** Whether blocks may be given in place of a number of steps. */
  readonly takesBlocks: boolean;
  /** The grid "diffusers", where diffusers' scheduler of that name has one of its own. */
  readonly diffusersSigmas?: Grid;
  /** Whether the networks get the noise level in whole training steps, as in diffusers. */
  readonly wholeTimesteps?: boolean;
  /** The blocks for a number of steps, at least 1, the largest guidance scale, 1 without guidance; the name of its noise levels, by default its own. */
  readonly blocks: (steps: number, guidance: number, grid?: string) => Block[];
  /** The guidance scale of a step of its own blocks, where one scale is named for all. Absent where that scale is taken as it is. */
  readonly scale?: (step: GuidedStep) => number;
}

const repeat = (block: Block, times: number) => new Array<Block>(times).fill(block);

const rows = table<SamplerRow>()({
  /** What comes nearest to many steps without calibration, over guidance scales and numbers of steps (bench/results/quality.md). */
  flowturbo: {
    steps: 10,
    grid: "eased",
    takesBlocks: true,
    blocks: (steps, guidance) => repeat(isMild(guidance) ? "U" : "M", steps),
    scale: taperedScale,
  },
  euler: { steps: 28, grid: "diffusers", takesBlocks: false, blocks: (steps) => repeat("E", steps) },
  dpmpp_2m: {
    ...{ steps: 20, grid: "diffusers", takesBlocks: false, blocks: (steps) => repeat("D", steps) },
    ...{ diffusersSigmas: dpmSolverSigmas, wholeTimesteps: true },
  },
  unipc: {
    ...{ steps: 20, grid: "diffusers", takesBlocks: false, blocks: (steps) => repeat("U", steps) },
    ...{ diffusersSigmas: uniPCSigmas, wholeTimesteps: true },
  },
  heun: {
    ...{ steps: 28, grid: "shifted", takesBlocks: false },
    // diffusers' last step, to 0, is Euler's.
    blocks: (steps, _, grid) => (grid === "diffusers" ? [...repeat("H", steps - 1), "E"] : repeat("H", steps)),
  },
});

/** Name of a sampler: see the option `sampler`. */
export type SamplerName = keyof typeof rows;

/** The table of samplers by name. */
export const samplers: Record<string, SamplerRow> = rows;

export const defaultSampler = "flowturbo" satisfies SamplerName;

/**
 * The guidance scales that a sampler's own blocks run with, where one scale is named for all of them.
 * @param sigmas one more than steps
 * @param scales the named one for each step that is guided, null for the others
 */
export function ownScales(
  { scale }: SamplerRow,
  sigmas: readonly number[],
  scales: readonly (number | null)[],
): readonly (number | null)[] {
  if (!scale) return scales;
  return scales.map((guidance, step) => {
    const [from, to] = [sigmas[step]!, sigmas[step + 1]!];
    return guidance === null ? null : scale({ from, to, steps: scales.length, guidance });
  });
}

/** Samplers that blocks may be given for. */
export function samplersWithBlocks(): string[] {
  return Object.keys(samplers).filter((name) => samplers[name]!.takesBlocks);
}

/** What a preset stands for: see the option `quality`. */
export interface QualityRow {
  /** Number of steps. */
  readonly steps: number;
  /** Which schedule of a model's own ladder it is: an index from 0, the richest, of so many. */
  readonly rung: (rungs: number) => number;
}

const qualityRows = table<QualityRow>()({
  fast: { steps: 6, rung: (rungs) => rungs - 1 },
  balanced: { steps: 10, rung: (rungs) => Math.floor((rungs - 1) / 2) },
  best: { steps: 20, rung: () => 0 },
});

/** Name of a preset of the number of steps: see the option `quality`. */
export type QualityName = keyof typeof qualityRows;

/** The presets of the number of steps, for the default sampler. */
export const qualities: Record<string, QualityRow> = qualityRows;

/** Noise levels of blocks that are given, where none are named. */
export const blocksGrid = "shifted" satisfies GridName;

/** Numbers of steps to choose from for a time limit, where nobody has ranked or calibrated schedules for the model. */
export const ladderSteps: readonly number[] = [28, 20, 14, 10, 8, 6, 5, 4, 3, 2, 1];
