/**
 * A schedule: blocks on noise levels, and the launches that they amount to. It is made once for a request; everything
 * that asks what will run, what it costs or what it is called reads it from here.
 */

import { type Block, blockTable, type Evaluation, formatBlocks, type StepType } from "./blocks.js";

/** One launch of a fused step. */
export interface StepLaunch extends Evaluation {
  /** Index of the block that it belongs to, and whether it is the last one of it. */
  readonly block: number;
  readonly last: boolean;
}

/** Evaluations of the two networks for one picture. Guidance doubles their rows, not their number. */
export interface Evaluations {
  /** Of the transformer. */
  readonly predictor: number;
  /** Of the velocity refiner, a small network. */
  readonly refiner: number;
}

export interface Schedule {
  readonly blocks: readonly Block[];
  /** The short spelling of the blocks, such as "H1P7R2". */
  readonly text: string;
  /** Noise levels from 1 (noise) to 0 (image), falling; one more than blocks. */
  readonly sigmas: readonly number[];
  readonly launches: readonly StepLaunch[];
  readonly evaluations: Evaluations;
}

/**
 * The launches of blocks on noise levels. Heun blocks, pseudo corrector blocks and velocity refiner blocks are those of
 * FlowTurbo (arXiv 2409.18128): the pseudo corrector of section 3.3 takes the second slope of a Heun step at each step
 * and reuses it as the first slope of the next; the refiner of section 3.2 regresses what the velocity has changed by.
 * @param sigmas one more than blocks, falling
 * @throws RangeError for another number of noise levels, or a block that lacks the velocity which it needs
 */
export function planSteps(blocks: readonly Block[], sigmas: readonly number[]): StepLaunch[] {
  if (sigmas.length !== blocks.length + 1)
    throw new RangeError(`${blocks.length} blocks need ${blocks.length + 1} noise levels; got ${sigmas.length}.`);
  return blocks.flatMap((letter, block) => {
    const [from, to] = [sigmas[block]!, sigmas[block + 1]!];
    const before = block === 0 ? null : from - sigmas[block - 1]!;
    const row = blockTable[letter]!;
    if (row.needsVelocity && before === null)
      throw new RangeError(`A block ${letter} needs a velocity from a block before it.`);
    const evaluations = row.evaluations({ from, to, h: to - from, before });
    return evaluations.map((each, index) => ({ ...each, block, last: index === evaluations.length - 1 }));
  });
}

/** The launches of a block list, where the noise levels do not matter. */
function launchesOf(blocks: readonly Block[]): StepLaunch[] {
  const sigmas = Array.from({ length: blocks.length + 1 }, (_, index) => -index);
  return planSteps(blocks, sigmas);
}

/** Evaluations of a block list. They do not depend on the noise levels. */
export function countEvaluations(blocks: readonly Block[]): Evaluations {
  return evaluationsOf(launchesOf(blocks));
}

/** The networks that a block list evaluates. */
export function stepTypesOf(blocks: readonly Block[]): StepType[] {
  return [...new Set(launchesOf(blocks).map(({ type }) => type))];
}

function evaluationsOf(launches: readonly StepLaunch[]): Evaluations {
  const count = (type: StepType) => launches.filter((launch) => launch.type === type).length;
  return { predictor: count("predict"), refiner: count("refine") };
}

export function scheduleOf(blocks: readonly Block[], sigmas: readonly number[]): Schedule {
  const launches = planSteps(blocks, sigmas);
  return { blocks, text: formatBlocks(blocks), sigmas, launches, evaluations: evaluationsOf(launches) };
}
