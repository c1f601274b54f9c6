/**
 * Calibrated schedules: noise levels and weights of each step that were fitted to a model at a size and a guidance scale, and which of
 * them serves a request. Pure; where they come from is generation/calibrate.ts, where they are kept checkpoint/schedules.ts.
 */

import type { Block } from "./blocks.js";
import type { StepWeights } from "./schedule.js";

/** A schedule as it was fitted. */
export interface CalibratedSchedule {
  /** Pixels of the pictures that it was fitted to. */
  readonly width: number;
  readonly height: number;
  /** Guidance scale that it was fitted to; 1 for none. */
  readonly guidanceScale: number;
  /** For each step whether it is guided. */
  readonly guided: readonly boolean[];
  /** For each step the guidance scale that it runs with, as a multiple of `guidanceScale`; absent where all are 1. */
  readonly scales?: readonly number[] | undefined;
  /** Noise levels, one more than steps, from 1 to 0. */
  readonly sigmas: readonly number[];
  /** For each step the weights of the velocity that it evaluates, of the one before, and of the one before that. */
  readonly weights: readonly (readonly [now: number, old: number, older: number])[];
  /** Mean PSNR to the reference, of it and of the usual schedule on the same pictures, dB. */
  readonly psnr?: { readonly held: number; readonly uncalibrated: number } | undefined;
  /** Whether the refiner corrects the last step (a block C): it was trained for that, and brings pictures nearer to the reference. */
  readonly refined?: boolean | undefined;
}

/** What a request runs of it. */
export interface FittedSchedule {
  readonly blocks: readonly Block[];
  readonly sigmas: readonly number[];
  readonly weights: readonly StepWeights[];
  /** For each step its guidance scale, null for none. */
  readonly guidance: readonly (number | null)[];
  /** Mean PSNR to the reference of pictures that it was not fitted to, dB; null where that is not known. */
  readonly psnr: number | null;
}

/** What a request asks for. */
export interface FittedRequest {
  readonly width: number;
  readonly height: number;
  /** 1 for none. */
  readonly guidanceScale: number;
  readonly steps: number;
  /** For each step whether it is guided; null to leave that to the schedule. */
  readonly guided: readonly boolean[] | null;
  /** Whether the model has a refiner. Default: no. */
  readonly hasRefiner?: boolean;
}

/** A schedule serves scales outside of those that were fitted up to this factor. */
const scaleReach = 1.15;
/** And sizes of up to this many times the area, or its inverse. */
const areaReach = 4.5;

/** Rows of the transformer that a schedule evaluates: two for a guided step. */
export const rowsOf = ({ guided }: Pick<CalibratedSchedule, "guided">) =>
  guided.reduce((sum, each) => sum + (each ? 2 : 1), 0);

/**
 * The schedule for a request: of its number of steps, fitted at its size, or else at the nearest within reach that has one; between two
 * guidance scales that were fitted every number is interpolated linearly, and a scale a little outside takes the nearest. Where the
 * request leaves open which steps are guided, the schedule that came nearest to the reference, and of equal ones the cheapest.
 * @returns null where nothing fits, or what does was found to be no better than the usual schedule
 */
export function fittedFor(all: readonly CalibratedSchedule[], request: FittedRequest): FittedSchedule | null {
  const { width, height, guidanceScale, steps, guided, hasRefiner = false } = request;
  const distance = (each: CalibratedSchedule) =>
    Math.abs(Math.log((each.width * each.height) / (width * height))) +
    (each.width === width && each.height === height ? 0 : 1e-6);
  const own = all
    .filter((each) => (guided ? each.guided.join() === guided.join() : each.guided.length === steps))
    .filter((each) => distance(each) <= Math.log(areaReach) && each.guidanceScale > 1 === guidanceScale > 1);
  for (const nearest of [...new Set(own.map(distance))].sort((a, b) => a - b)) {
    const near = own.filter((each) => distance(each) === nearest);
    const patterns = [...new Set(near.map((each) => each.guided.join()))];
    const found = patterns.flatMap(
      (pattern) =>
        atScale(
          near.filter((each) => each.guided.join() === pattern),
          guidanceScale,
        ) ?? [],
    );
    if (found.length === 0) continue;
    const [best] = found
      .filter(({ isBetter }) => isBetter)
      .sort((a, b) => heldOf(b.schedule) - heldOf(a.schedule) || rowsOf(a.schedule) - rowsOf(b.schedule));
    return best ? fitted(best.schedule, guidanceScale, hasRefiner) : null;
  }
  return null;
}

/** What there is at a guidance scale of schedules that differ in theirs only; null where it is out of reach. */
function atScale(schedules: readonly CalibratedSchedule[], guidanceScale: number) {
  const byScale = [...schedules].sort((a, b) => a.guidanceScale - b.guidanceScale);
  const above = byScale.find((each) => each.guidanceScale >= guidanceScale);
  const below = byScale.findLast((each) => each.guidanceScale <= guidanceScale);
  const [low, high] = [below ?? above!, above ?? below!];
  const reach = Math.max(low.guidanceScale, guidanceScale) / Math.min(high.guidanceScale, guidanceScale);
  if (!(above && below) && reach > scaleReach) return null;
  const whole = high.guidanceScale - low.guidanceScale;
  const part = whole === 0 ? 0 : (guidanceScale - low.guidanceScale) / whole;
  return { schedule: between(low, high, part), isBetter: isBetter(low) && isBetter(high) };
}

const heldOf = ({ psnr }: CalibratedSchedule) => psnr?.held ?? Number.NEGATIVE_INFINITY;

/** Whether it came nearer than the usual schedule to what decided; one that says nothing of it did. */
const isBetter = ({ psnr }: CalibratedSchedule) => !psnr || psnr.held > psnr.uncalibrated;

function between(a: CalibratedSchedule, b: CalibratedSchedule, part: number): CalibratedSchedule {
  const mix = (from: number, to: number) => from + (to - from) * part;
  return {
    ...a,
    refined: a.refined && b.refined,
    scales: a.guided.map((_, i) => mix(a.scales?.[i] ?? 1, b.scales?.[i] ?? 1)),
    psnr: a.psnr && b.psnr && { ...a.psnr, held: mix(a.psnr.held, b.psnr.held) },
    sigmas: a.sigmas.map((sigma, i) => mix(sigma, b.sigmas[i]!)),
    weights: a.weights.map(([now, old, older], i) => {
      const [otherNow, otherOld, otherOlder] = b.weights[i]!;
      return [mix(now, otherNow), mix(old, otherOld), mix(older, otherOlder)] as const;
    }),
  };
}

function fitted(
  { sigmas, weights, guided, scales, refined, psnr }: CalibratedSchedule,
  guidanceScale: number,
  hasRefiner: boolean,
): FittedSchedule {
  const last = refined && hasRefiner ? weights.length - 1 : null;
  return {
    blocks: weights.map((_, index): Block => (index === last ? "C" : index === 0 ? "E" : "A")),
    ...{ sigmas, psnr: psnr?.held ?? null },
    guidance: guided.map((each, index) => (each ? guidanceScale * (scales?.[index] ?? 1) : null)),
    weights: weights.map(([now, old, older]) => ({ in: 0, new: now, old, older })),
  };
}
