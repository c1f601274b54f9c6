/**
 * Blocks on a grid → launches of the two fused steps. A launch computes, from the state x and a velocity v,
 *
 *   v' = network(x + a_in·v, σ)      x' = x + a_old·v + a_new·v'
 *
 * which serves every block (h = σ_{i+1} − σ_i, negative):
 *
 *   E  predict (0, 0, h) at σ_i
 *   H  predict (0, 0, 0) at σ_i, then predict (h, h/2, h/2) at σ_{i+1}
 *   P  predict (h, h/2, h/2) at σ_{i+1} with the velocity of the block before; without one, as H
 *   R  refine (0, 0, 0) at σ_i, then refine (h, h/2, h/2) at σ_{i+1} with the velocity just refined
 *
 * The velocity that goes on to the next block is the last one computed; after R it is the first of its two, as in the
 * reference code of FlowTurbo.
 */

import type { Block } from "./blocks.js";

export interface StepLaunch {
  readonly type: "predict" | "refine";
  /** Where the network is evaluated. */
  readonly sigma: number;
  readonly aIn: number;
  readonly aOld: number;
  readonly aNew: number;
  /** Index of the block this launch belongs to, and whether it is the last one of it. */
  readonly block: number;
  readonly last: boolean;
  /** Whether the velocity that this launch computes goes on, rather than the one it was given. */
  readonly keepsVelocity: boolean;
}

export interface Evaluations {
  readonly predictor: number;
  readonly refiner: number;
}

/** @param grid the noise levels, one more than blocks, falling */
export function planSteps(blocks: readonly Block[], grid: readonly number[]): StepLaunch[] {
  if (grid.length !== blocks.length + 1)
    throw new RangeError(`${blocks.length} blocks need ${blocks.length + 1} noise levels; got ${grid.length}.`);
  const launches: StepLaunch[] = [];
  let hasVelocity = false;
  for (const [block, kind] of blocks.entries()) {
    const from = grid[block]!;
    const to = grid[block + 1]!;
    const h = to - from;
    const evaluate = (type: "predict" | "refine"): StepLaunch => ({
      type,
      sigma: from,
      aIn: 0,
      aOld: 0,
      aNew: 0,
      block,
      last: false,
      keepsVelocity: true,
    });
    const correct = (type: "predict" | "refine"): StepLaunch => ({
      type,
      sigma: to,
      aIn: h,
      aOld: h / 2,
      aNew: h / 2,
      block,
      last: true,
      keepsVelocity: type === "predict",
    });
    switch (kind) {
      case "E":
        launches.push({ ...evaluate("predict"), aNew: h, last: true });
        break;
      case "P":
        if (!hasVelocity) launches.push(evaluate("predict"));
        launches.push(correct("predict"));
        break;
      case "H":
        launches.push(evaluate("predict"), correct("predict"));
        break;
      case "R":
        if (!hasVelocity) throw new RangeError("A refiner block needs a velocity from a block before it.");
        launches.push(evaluate("refine"), correct("refine"));
        break;
    }
    hasVelocity = true;
  }
  return launches;
}

export function countEvaluations(launches: readonly StepLaunch[]): Evaluations {
  const predictor = launches.filter((launch) => launch.type === "predict").length;
  return { predictor, refiner: launches.length - predictor };
}
