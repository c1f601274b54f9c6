/**
 * The samplers, one row each: a name for a way to make schedules out of a number of steps. Option values, flags, help
 * texts and defaults follow from this table.
 */

import { table } from "../common/table.js";
import type { Block } from "./blocks.js";
import { countEvaluations } from "./schedule.js";
import { dpmSolverSigmas, type Grid, type GridName, uniPCSigmas } from "./sigmas.js";

export interface SamplerRow {
  /** Number of blocks where none is given. */
  readonly steps: number;
  /** Noise levels where none are named. */
  readonly grid: GridName;
  /** Whether blocks may be given in place of a number of steps. */
  readonly takesBlocks: boolean;
  /** The grid "diffusers", where diffusers' scheduler of that name has one of its own. */
  readonly diffusersSigmas?: Grid;
  /** Whether the networks get the noise level in whole training steps, as in diffusers. */
  readonly wholeTimesteps?: boolean;
  /** The blocks for a number of steps, at least 1. */
  readonly blocks: (steps: number, hasRefiner: boolean) => Block[];
}

const repeat = (block: Block, times: number) => new Array<Block>(times).fill(block);

const rows = table<SamplerRow>()({
  /**
   * One Heun block, since the pseudo corrector needs a velocity to start from; pseudo corrector blocks; and where there
   * is a refiner, refiner blocks for the last fifth, as in the paper (more without P between collapses, table 4).
   */
  flowturbo: {
    steps: 10,
    grid: "shifted",
    takesBlocks: true,
    blocks: (steps, hasRefiner) => {
      const refined = hasRefiner ? Math.min(Math.round(steps / 5), steps - 1) : 0;
      return ["H", ...repeat("P", steps - 1 - refined), ...repeat("R", refined)];
    },
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
  heun: { steps: 28, grid: "shifted", takesBlocks: false, blocks: (steps) => repeat("H", steps) },
});

/** Name of a sampler: see the option `sampler`. */
export type SamplerName = keyof typeof rows;

/** The table of samplers by name. */
export const samplers: Record<string, SamplerRow> = rows;

export const defaultSampler = "flowturbo" satisfies SamplerName;

/** Samplers that blocks may be given for. */
export function samplersWithBlocks(): string[] {
  return Object.keys(samplers).filter((name) => samplers[name]!.takesBlocks);
}

/** Steps of the default ladder. */
const ladderSteps = [28, 20, 14, 10, 8, 6, 5, 4, 3, 2, 1];

/**
 * Schedules to choose from for a time limit, where nobody has ranked schedules for the model: those of the default
 * sampler, by number of predictor evaluations, then of refiner evaluations, falling.
 */
export function defaultLadder(hasRefiner: boolean): Block[][] {
  const cost = (blocks: readonly Block[]) => {
    const { predictor, refiner } = countEvaluations(blocks);
    return predictor * 1e6 + refiner;
  };
  const ladder = ladderSteps.map((steps) => samplers[defaultSampler]!.blocks(steps, hasRefiner));
  return ladder.sort((a, b) => cost(b) - cost(a));
}
