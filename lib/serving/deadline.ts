/**
 * Schedules for a time limit: a ladder of them, the richest first, and the choice of the first that fits.
 */

import {
  type Block,
  countEvaluations,
  defaultBlocks,
  formatBlocks,
  planSteps,
  shiftedSigmas,
} from "../schedule/index.js";

/**
 * What a prediction has to leave free. Predictions are medians: without room, every second picture that is predicted to
 * fit just so would come late.
 */
export const deadlineMargin = 1.1;

/** A rung with what it is predicted to take. */
export interface PredictedRung {
  readonly blocks: string;
  /** From now to the pictures, waiting included. */
  readonly milliseconds: number;
}

export interface Choice {
  readonly index: number;
  /** Why this one, in a sentence. */
  readonly reason: string;
}

/** Steps of the default ladder. */
const defaultSteps = [28, 20, 14, 10, 8, 6, 5, 4, 3, 2, 1];

/**
 * The ladder of a model that nobody has ranked schedules for: the usual schedules of the flowturbo sampler, by number
 * of predictor evaluations, then of refiner evaluations.
 */
export function defaultLadder(hasRefiner: boolean): string[] {
  const rungs = defaultSteps.map((steps) => defaultBlocks("flowturbo", steps, hasRefiner));
  const cost = (blocks: readonly Block[]) => {
    // Which grid does not matter: evaluations are counted.
    const { predictor, refiner } = countEvaluations(planSteps(blocks, shiftedSigmas(blocks.length, 1)));
    return predictor * 1e6 + refiner;
  };
  return rungs.sort((a, b) => cost(b) - cost(a)).map(formatBlocks);
}

/** The smallest limit that a prediction fits. */
export function limitFor(milliseconds: number, margin = deadlineMargin): number {
  // A product such as 100 · 1.1 is a little more than 110.
  return Math.ceil(milliseconds * margin - 1e-6);
}

/**
 * The margin that a machine needs for 95 % of its promises: at least the usual one, more after each that was broken, and a
 * little less after each that was kept, so that it stays where about one in forty is broken.
 */
export class Margin {
  #value = deadlineMargin;

  get value(): number {
    return this.#value;
  }

  observe(isLate: boolean): void {
    const next = this.#value + (isLate ? marginStep : -marginStep / 39);
    this.#value = Math.min(largestMargin, Math.max(deadlineMargin, next));
  }
}

const marginStep = 0.15;
const largestMargin = 2.5;

/**
 * The first rung that fits.
 * @param rungs the richest first
 * @param limit milliseconds
 * @param margin what a prediction has to leave free, as a factor
 * @returns null if none fits
 */
export function chooseRung(rungs: readonly PredictedRung[], limit: number, margin = deadlineMargin): Choice | null {
  const index = rungs.findIndex((rung) => limitFor(rung.milliseconds, margin) <= limit);
  if (index < 0) return null;
  const { blocks, milliseconds } = rungs[index]!;
  const fits = `${blocks} is predicted to take ${Math.round(milliseconds)} ms of ${Math.round(limit)} ms`;
  if (rungs.length === 1) return { index, reason: `${fits}.` };
  if (index === 0) return { index, reason: `${fits}, and is the richest of ${rungs.length} schedules.` };
  const next = rungs[index - 1]!;
  return {
    index,
    reason: `${fits}, and is the richest of ${rungs.length} schedules that fits; ${next.blocks} would need ${limitFor(next.milliseconds, margin)} ms.`,
  };
}
