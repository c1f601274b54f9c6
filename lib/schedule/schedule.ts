/**
 * A schedule: blocks on noise levels, and the launches that they amount to. It is made once for a request; everything
 * that asks what will run, what it costs or what it is called reads it from here.
 */

import {
  type Block,
  type BlockPlace,
  blockTable,
  type Evaluation,
  formatBlocks,
  moveBy,
  type StepType,
  unmetNeed,
} from "./blocks.js";
import type { Solver, SolverPlace } from "./solvers.js";

/** One launch of a fused step, and what is combined after it. */
export interface StepLaunch extends Evaluation {
  /** Index of the block that it belongs to, and whether it is the last one of it. */
  readonly block: number;
  readonly last: boolean;
  /** Scale of classifier-free guidance, above 0; null for an evaluation of the conditional row alone. */
  readonly guidance: number | null;
}

/** Evaluations of the two networks for one picture. */
export interface Evaluations {
  /** Of the transformer. Guidance doubles their rows, not their number. */
  readonly predictor: number;
  /** Of the velocity refiner, a small network. */
  readonly refiner: number;
  /** Rows of the transformer: two for a guided evaluation, one for another. What a schedule costs goes by them. */
  readonly rows: number;
}

export interface Schedule {
  readonly blocks: readonly Block[];
  /** The short spelling of the blocks, such as "H1P7R2". */
  readonly text: string;
  /** Noise levels, falling from 1 (noise) to 0 (image); one more than blocks. */
  readonly sigmas: readonly number[];
  /** Noise level of what it starts from: the first of `sigmas`, but 1 where a step from noise was left out. */
  readonly start: number;
  readonly launches: readonly StepLaunch[];
  readonly evaluations: Evaluations;
  /** Equal for schedules with equal starts and launches. */
  readonly key: string;
}

/**
 * Weights of one step of a calibrated schedule, in place of those that its letter gives: see `Evaluation`. The last,
 * `older`, is that of the velocity before the one that is reused.
 */
export interface StepWeights {
  readonly in: number;
  readonly old: number;
  readonly new: number;
  readonly older: number;
}

export interface ScheduleOptions {
  /** Noise level of what it starts from. Default: the first one. */
  readonly start?: number | undefined;
  /** Guidance scale of a block, null for none. Default: none. */
  readonly guidance?: number | null | ((block: number) => number | null);
  /** How D and U step, as the model's scheduler says, and where the blocks are in the whole. Default: as diffusers does without a config. */
  readonly solver?: (Solver & SolverPlace) | undefined;
  /** Training steps of the model, if the networks get the noise level in whole ones, as in diffusers' multistep schedulers. */
  readonly wholeTimestepsOf?: number | undefined;
  /** For each block the weights to use, where they were fitted. All blocks are then one evaluation of the transformer, which C refines. */
  readonly weights?: readonly StepWeights[];
}

/**
 * The evaluations of blocks on noise levels. Heun blocks, pseudo corrector blocks and velocity refiner blocks are those of
 * FlowTurbo (arXiv 2409.18128): the pseudo corrector of section 3.3 takes the second slope of a Heun step at each step
 * and reuses it as the first slope of the next; the refiner of section 3.2 regresses what the velocity has changed by.
 * @param sigmas one more than blocks, falling
 * @throws RangeError for another number of noise levels, or a block that lacks the velocity which it needs
 */
export function planSteps(
  blocks: readonly Block[],
  sigmas: readonly number[],
  { guidance = null, wholeTimestepsOf: steps, weights, solver }: ScheduleOptions = {},
): StepLaunch[] {
  if (sigmas.length !== blocks.length + 1)
    throw new RangeError(`${blocks.length} blocks need ${blocks.length + 1} noise levels; got ${sigmas.length}.`);
  if (weights && weights.length !== blocks.length)
    throw new RangeError(`${blocks.length} blocks need weights for each; got ${weights.length}.`);
  const unmet = unmetNeed(blocks);
  if (unmet) throw new RangeError(`A block ${unmet.letter} needs a velocity from a block before it.`);
  const scales = blocks.map((_, block) => (typeof guidance === "function" ? guidance(block) : guidance));
  const largest = Math.max(1, ...scales.map((each) => each ?? 1));
  const launches: StepLaunch[] = [];
  let velocities: readonly number[] = [];
  /** Whether the velocities so far are pairs, the latest first. */
  let pairs: readonly boolean[] = [];
  let run = 0;
  let scale: number | null = null;
  for (const [index, letter] of blocks.entries()) {
    if (letter !== blocks[run]) run = index;
    const [from, to] = [sigmas[index]!, sigmas[index + 1]!];
    const next = blocks[index + 1] ?? null;
    const place = { from, to, h: to - from, sigmas, index, run, next, velocities, guidance: largest, solver };
    const row = blockTable[letter]!;
    const evaluations = weights
      ? [weighted(place, weights[index]!), ...(row.afterFitted?.(place) ?? [])]
      : row.evaluations(place);
    // The refiner corrects the velocity of the block before it, which is a pair where that one was guided.
    if (evaluations.some(({ type }) => type === "predict")) scale = scales[index]!;
    for (const [order, { extrapolation, ...each }] of evaluations.entries()) {
      const sigma = steps ? Math.floor(steps * each.sigma) / steps : each.sigma;
      launches.push({
        ...{ ...each, sigma, block: index, last: order === evaluations.length - 1, guidance: scale },
        // A pair and a single velocity have no difference.
        ...(extrapolation !== undefined && pairs[0] === pairs[1] && { extrapolation }),
      });
      if (!each.keepsVelocity) continue;
      velocities = [each.sigma, ...velocities].slice(0, 2);
      pairs = [scale !== null, ...pairs].slice(0, 2);
    }
  }
  return withVelocitiesKept(launches);
}

/** A step of a calibrated schedule: as an Adams-Bashforth block, with the weights that were fitted. */
function weighted({ from, velocities }: BlockPlace, weights: StepWeights): Evaluation {
  const older = velocities.length > 1 ? weights.older : 0;
  const reuses = velocities.length > 0;
  return {
    ...{ type: "predict", sigma: from, keepsVelocity: true },
    ...{ aIn: reuses ? weights.in : 0, aOld: reuses ? weights.old : 0, aNew: weights.new },
    ...(older !== 0 && { combination: { ...moveBy(0), x: [0, 0, older] as const }, readsVelocities: true }),
  };
}

/** Where a launch reads the two velocities before it, those that evaluate them put them into memory. */
function withVelocitiesKept(launches: readonly StepLaunch[]): StepLaunch[] {
  const kept = new Set<number>();
  const evaluated = launches.flatMap(({ keepsVelocity }, index) => (keepsVelocity ? [index] : []));
  for (const [index, { readsVelocities }] of launches.entries())
    if (readsVelocities) for (const each of evaluated.filter((other) => other < index).slice(-2)) kept.add(each);
  return launches.map((launch, index) =>
    kept.has(index)
      ? { ...launch, combination: { ...(launch.combination ?? moveBy(0)), first: [1, 0, 0], second: [0, 1, 0] } }
      : launch,
  );
}

/** The launches of a block list, where the noise levels do not matter. */
function launchesOf(blocks: readonly Block[]): StepLaunch[] {
  const sigmas = Array.from({ length: blocks.length + 1 }, (_, index) => 1 - index / blocks.length);
  return planSteps(blocks, sigmas);
}

/** Evaluations of a block list without guidance. They do not depend on the noise levels. */
export function countEvaluations(blocks: readonly Block[]): Evaluations {
  return evaluationsOf(launchesOf(blocks));
}

/** The networks that a block list evaluates. */
export function stepTypesOf(blocks: readonly Block[]): StepType[] {
  return [...new Set(launchesOf(blocks).flatMap(({ type }) => (type === "combine" ? [] : [type])))];
}

function evaluationsOf(launches: readonly StepLaunch[]): Evaluations {
  const count = (type: StepType) => launches.filter((launch) => launch.type === type).length;
  const rows = launches.reduce(
    (sum, { type, guidance }) => sum + (type !== "predict" ? 0 : guidance === null ? 1 : 2),
    0,
  );
  return { predictor: count("predict"), refiner: count("refine"), rows };
}

export function scheduleOf(
  blocks: readonly Block[],
  sigmas: readonly number[],
  options: ScheduleOptions = {},
): Schedule {
  const launches = planSteps(blocks, sigmas, options);
  const { start = sigmas[0]! } = options;
  const key = JSON.stringify([start, sigmas, launches]);
  return { blocks, text: formatBlocks(blocks), sigmas, start, launches, evaluations: evaluationsOf(launches), key };
}
