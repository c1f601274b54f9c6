/**
 * The search for one schedule: noise levels by dynamic programming over a reference run (schedule/grid-search.ts), then levels, weights
 * and guidance scales of all steps fitted together on decoded pictures (fit.ts), from several starts; and how far guidance may stop short
 * of the first or the last steps. Pictures that are fitted to are kept apart from those that decide, and both from those that say how near
 * the schedule comes that was chosen.
 */

import type { CalibratedEntry, Size } from "../model.js";
import { bestGrids, defaultSampler, ownScales, planSteps, rowsOf, samplers, sigmaGrids } from "../schedule/index.js";
import type { Reference } from "./calibration-reference.js";
import { type FitPicture, fitted, launchedPsnr, psnrOf, type StepNumbers } from "./fit.js";

/** A size and a guidance scale. */
export interface SearchSubject {
  readonly reference: Reference;
  readonly size: Size;
  /** 1 for none. */
  readonly scale: number;
  readonly seed: number | string;
  /** Digest of the prompts, which the entry names. */
  readonly prompts: string;
  readonly signal?: AbortSignal | undefined;
}

/** Sets of differences, and steps for each, of one fit. */
const effort = { sets: 1, stepsPerSet: 3 };
/** Where fits begin: one that is ahead before it is fitted may end behind another, so that a few are fitted. */
const mostStarts = 2;
/** Those that are behind the first by this much are not, dB. */
const farBehind = 3;
/** What was fitted elsewhere is taken alone where it is ahead of all others by this much, dB. */
const clearlyAhead = 2;
/** A fit that gained so much goes on with new differences, dB, up to so many times. */
const [stillMoving, mostFits] = [0.3, 3];

interface Found {
  readonly numbers: StepNumbers;
  /** Mean PSNR on the pictures that decide, dB. */
  readonly decided: number;
}

/** What a fit ended with, and what it gained. */
interface Fitted extends Found {
  readonly gain: number;
}

/** Problems with the pictures that are fitted to, with those that decide, and with those that are shown neither. */
function problemsOf({ reference: { field, fitted, deciding, held }, signal }: SearchSubject) {
  const of = (pictures: readonly FitPicture[]) => ({ field, pictures, signal });
  return { problem: of(fitted), judge: of(deciding), unseen: of(held) };
}

/** Finds schedules at a size and a guidance scale. */
export class ScheduleSearch {
  readonly #subject: SearchSubject;
  /** Noise levels by number of steps. */
  readonly #grids: ReadonlyMap<number, readonly number[]>;

  constructor(subject: SearchSubject, counts: readonly number[]) {
    const { levels, grams } = subject.reference;
    this.#subject = subject;
    const found = bestGrids(grams, counts, "squares");
    this.#grids = new Map([...found].map(([steps, indices]) => [steps, indices.map((index) => levels[index]!)]));
  }

  /** All steps guided, or none. @param neighbours what was fitted for this number of steps already, for whatever size and scale */
  whole(steps: number, neighbours: readonly CalibratedEntry[]): Promise<CalibratedEntry> {
    return this.#best([new Array<boolean>(steps).fill(this.#subject.scale > 1)], neighbours);
  }

  /**
   * A schedule with one guided step less than one that was found, at the end where that costs less.
   * @param found at least two guided steps
   */
  shorter(found: CalibratedEntry, neighbours: readonly CalibratedEntry[]): Promise<CalibratedEntry> {
    const { guided } = found;
    const without = (step: number) => guided.map((each, index) => each && index !== step);
    return this.#best([without(guided.indexOf(true)), without(guided.lastIndexOf(true))], [found, ...neighbours]);
  }

  /** The best of some patterns of guided steps, all of one number of steps. */
  async #best(
    patterns: readonly (readonly boolean[])[],
    neighbours: readonly CalibratedEntry[],
  ): Promise<CalibratedEntry> {
    let best: Fitted | null = null;
    for (const start of await this.#starts(patterns, neighbours)) best = better(best, await this.#fitted(start));
    for (let fits = 1; fits < mostFits && best!.gain > stillMoving; fits++) best = await this.#fitted(best!);
    return this.#entryOf(best!);
  }

  /** A closer fit may be no better on what it has not seen: what is better there is taken. */
  async #fitted(start: Found): Promise<Fitted> {
    const { problem, judge } = problemsOf(this.#subject);
    const { numbers } = await fitted(problem, start.numbers, effort);
    const decided = await psnrOf(judge, numbers);
    return { ...better(start, { numbers, decided }), gain: decided - start.decided };
  }

  async #starts(
    patterns: readonly (readonly boolean[])[],
    neighbours: readonly CalibratedEntry[],
  ): Promise<readonly Found[]> {
    const { scale, reference } = this.#subject;
    const { judge } = problemsOf(this.#subject);
    const steps = patterns[0]!.length;
    const grid = this.#grids.get(steps)!;
    const plain = [extrapolated(grid, 0), extrapolated(grid, 1), damped(usualSigmas(reference, steps, scale), scale)];
    const starts: (Found & { readonly isFitted: boolean })[] = [];
    for (const guided of patterns) {
      const scalesOf = (factors: readonly number[] | undefined) =>
        guided.map((each, step) => (each ? scale * (factors?.[step] ?? 1) : null));
      const all = [
        ...plain.map((each) => ({
          numbers: { ...each, scales: usualScales(each.sigmas, guided, scale) },
          isFitted: false,
        })),
        ...neighbours.map(({ sigmas, weights, scales }) => ({
          numbers: { sigmas, weights, scales: scalesOf(scales) },
          isFitted: true,
        })),
      ];
      for (const each of all) starts.push({ ...each, decided: await psnrOf(judge, each.numbers) });
    }
    starts.sort((a, b) => b.decided - a.decided);
    const [first] = starts as [(typeof starts)[number]];
    const second = starts.find(({ isFitted }) => !isFitted)!;
    if (first.isFitted && first.decided > second.decided + clearlyAhead) return [first];
    return starts.filter(({ decided }) => decided > first.decided - farBehind).slice(0, mostStarts);
  }

  async #entryOf({ numbers }: Found): Promise<CalibratedEntry> {
    const { size, scale, seed, prompts, reference } = this.#subject;
    const { problem, unseen } = problemsOf(this.#subject);
    const guided = numbers.scales.map((each) => each !== null);
    const steps = guided.length;
    const usual = usualSigmas(reference, steps, scale);
    const scales = usualScales(usual, guided, scale);
    const launches = planSteps(usualSampler.blocks(steps, scale), usual, { guidance: (block) => scales[block]! });
    const factors = numbers.scales.map((each) => (each === null ? 1 : round(each / scale)));
    return {
      ...{ width: size.width, height: size.height, guidanceScale: scale, guided, rows: rowsOf({ guided }) },
      ...(factors.some((factor) => factor !== 1) && { scales: factors }),
      sigmas: numbers.sigmas.map(round),
      weights: numbers.weights.map(([now, old, older]) => [round(now), round(old), round(older)] as const),
      psnr: {
        fitted: round(await psnrOf(problem, numbers)),
        held: round(await psnrOf(unseen, numbers)),
        uncalibrated: round(await launchedPsnr(unseen, launches)),
      },
      ...{ pictures: reference.fitted.length, seed, prompts },
    };
  }
}

/** Whether a schedule comes nearer than all of no more rows. */
export function isWorthwhile(entry: CalibratedEntry, others: readonly CalibratedEntry[]): boolean {
  // A file that somebody has edited may say nothing of how near a schedule comes.
  return others.every((other) => rowsOf(other) > rowsOf(entry) || !other.psnr || other.psnr.held <= entry.psnr.held);
}

const better = <T extends Found>(a: T | null, b: T): T => (a && a.decided >= b.decided ? a : b);

const usualSampler = samplers[defaultSampler]!;

/** Guidance scales of the usual schedule, on any levels. */
const usualScales = (sigmas: readonly number[], guided: readonly boolean[], scale: number) =>
  ownScales(
    usualSampler,
    sigmas,
    guided.map((each) => (each ? scale : null)),
  );

/** Noise levels of the usual schedule. */
const usualSigmas = ({ sigmas }: Reference, steps: number, guidance: number) =>
  sigmaGrids[usualSampler.grid]!(steps, { ...sigmas, guidance });

/** Significant digits of numbers that are written. */
const round = (value: number) => Number(value.toPrecision(7));

/** Where a fit may begin, all steps guided alike. */
type Start = Omit<StepNumbers, "scales">;

/** Euler's weights on a grid (`part` 0), those of Adams and Bashforth (1), or between. */
function extrapolated(sigmas: readonly number[], part: number): Start {
  const weights = sigmas.slice(0, -1).map((from, step) => {
    const h = sigmas[step + 1]! - from;
    const more = step === 0 ? 0 : (part * h * h) / (2 * (from - sigmas[step - 1]!));
    return [h + more, -more, 0] as const;
  });
  return { sigmas, weights };
}

/** The damped multistep method (the block M) as far as three velocities express it: what it remembers further back is left out. */
function damped(sigmas: readonly number[], guidance: number): Start {
  const steps = sigmas.length - 1;
  const launches = planSteps(new Array(steps).fill("M"), sigmas, { guidance });
  const k = launches.map(({ combination }) => combination?.x[1] ?? 0);
  const weights = launches.map(({ aNew, sigma }, step) => {
    const before = step > 0 ? k[step]! * k[step - 1]! * sigmas[step - 1]! : 0;
    return [aNew, step > 0 ? k[step]! * sigma - before : 0, before] as const;
  });
  return { sigmas, weights };
}
