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
  /** Pixels of the pictures that it was fitted to. A PSNR says nothing beside one of another size. */
  readonly width: number;
  readonly height: number;
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
  /** For each step whether it is guided; absent to leave that, and the number of steps, to the schedules. */
  readonly guided?: readonly boolean[] | undefined;
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
 * The schedules for a request, of each number of steps, as they were fitted at its size, or else at the nearest within reach where there
 * are some; between two guidance scales that were fitted every number is interpolated linearly, and only where nothing lies on both sides
 * a scale a little outside takes the nearest. Those of the nearest size come first. Left out is what is no better than the usual
 * schedule: than the one with the same steps guided, and where the request leaves that open, also than the one that guides all.
 */
export function fittedSchedules(all: readonly CalibratedSchedule[], request: FittedRequest): FittedSchedule[] {
  const { width, height, guidanceScale, guided, hasRefiner = false } = request;
  // By area; of equal ones by shape.
  const distance = (each: Pick<CalibratedSchedule, "width" | "height">) =>
    Math.abs(Math.log((each.width * each.height) / (width * height))) +
    1e-6 * Math.abs(Math.log((each.width * height) / (each.height * width)));
  const own = all
    .filter((each) => guided === undefined || each.guided.join() === guided.join())
    .filter((each) => distance(each) <= Math.log(areaReach) && each.guidanceScale > 1 === guidanceScale > 1);
  const ofEach = [...new Set(own.map(({ guided: { length } }) => length))].flatMap((steps) => {
    const ofSteps = own.filter((each) => each.guided.length === steps);
    const nearestFirst = [...ofSteps].sort((a, b) => distance(a) - distance(b));
    for (const size of new Set(nearestFirst.map(sizeOf))) {
      const near = ofSteps.filter((each) => sizeOf(each) === size);
      const found = atScale(near, guidanceScale);
      if (found.length === 0) continue;
      const whole = guided ? undefined : found.find(({ schedule }) => isWhole(schedule.guided))?.schedule;
      const usual = whole?.psnr?.uncalibrated ?? Number.NEGATIVE_INFINITY;
      return found
        .filter(({ schedule, isBetter }) => isBetter && (!schedule.psnr || schedule.psnr.held > usual))
        .map(({ schedule }) => fitted(schedule, guidanceScale, hasRefiner));
    }
    return [];
  });
  return ofEach.sort((a, b) => distance(a) - distance(b));
}

const sizeOf = ({ width, height }: CalibratedSchedule) => `${width}x${height}`;

/** Of schedules for a number of steps the one that comes nearest, of equal ones the cheapest; null of none. */
export function nearestOf(schedules: readonly FittedSchedule[]): FittedSchedule | null {
  const known = ({ psnr }: FittedSchedule) => psnr ?? Number.NEGATIVE_INFINITY;
  const rows = ({ guidance }: FittedSchedule) => rowsOf({ guided: guidance.map((each) => each !== null) });
  const order = [...schedules].sort((a, b) => {
    // Of those that nobody measured the one that guides most.
    if (a.psnr === null && b.psnr === null) return rows(b) - rows(a);
    return known(b) - known(a) || rows(a) - rows(b);
  });
  return order[0] ?? null;
}

/** Whether all steps are guided, or none. */
export const isWhole = (guided: readonly boolean[]) => guided.every((each) => each === guided[0]);

/** Whether there are schedules that guide some of their steps and not the others. */
export function areSomeMixed(all: readonly CalibratedSchedule[]): boolean {
  return all.some(({ guided }) => !isWhole(guided));
}

interface AtScale {
  readonly schedule: CalibratedSchedule;
  /** Whether it is better than the usual schedule that guides the same steps, or what it lies between is. */
  readonly isBetter: boolean;
}

/** Schedules of a size and a number of steps at a guidance scale, one for each pattern of guided steps. */
function atScale(near: readonly CalibratedSchedule[], scale: number): AtScale[] {
  const patterns = [...new Set(near.map(({ guided }) => guided.join()))].map((pattern) =>
    near.filter(({ guided }) => guided.join() === pattern).sort((a, b) => a.guidanceScale - b.guidanceScale),
  );
  const pairs = patterns.map((own) => ({
    above: own.find((each) => each.guidanceScale >= scale),
    below: own.findLast((each) => each.guidanceScale <= scale),
  }));
  const inside = pairs.flatMap(({ above, below }) => (above && below ? [between(below, above, scale)] : []));
  if (inside.length > 0) return inside;
  const factor = ({ guidanceScale }: CalibratedSchedule) =>
    Math.max(guidanceScale, scale) / Math.min(guidanceScale, scale);
  return pairs
    .map(({ above, below }) => above ?? below!)
    .filter((each) => factor(each) <= scaleReach)
    .map((schedule) => ({ schedule, isBetter: isBetter(schedule) }));
}

/** One that says nothing of it is. */
const isBetter = ({ psnr }: CalibratedSchedule) => !psnr || psnr.held > psnr.uncalibrated;

/** Between two that differ in their guidance scale only. */
function between(a: CalibratedSchedule, b: CalibratedSchedule, scale: number): AtScale {
  if (a === b) return { schedule: a, isBetter: isBetter(a) };
  const part = (scale - a.guidanceScale) / (b.guidanceScale - a.guidanceScale);
  const mix = (from: number, to: number) => from + (to - from) * part;
  const psnr = a.psnr &&
    b.psnr && {
      held: mix(a.psnr.held, b.psnr.held),
      uncalibrated: mix(a.psnr.uncalibrated, b.psnr.uncalibrated),
    };
  const schedule = {
    ...a,
    ...{ refined: a.refined && b.refined, psnr },
    scales: a.guided.map((_, i) => mix(a.scales?.[i] ?? 1, b.scales?.[i] ?? 1)),
    sigmas: a.sigmas.map((sigma, i) => mix(sigma, b.sigmas[i]!)),
    weights: a.weights.map(([now, old, older], i) => {
      const [otherNow, otherOld, otherOlder] = b.weights[i]!;
      return [mix(now, otherNow), mix(old, otherOld), mix(older, otherOlder)] as const;
    }),
  };
  return { schedule, isBetter: isBetter(a) && isBetter(b) };
}

function fitted(
  { width, height, sigmas, weights, guided, scales, refined, psnr }: CalibratedSchedule,
  guidanceScale: number,
  hasRefiner: boolean,
): FittedSchedule {
  const last = refined && hasRefiner ? weights.length - 1 : null;
  return {
    blocks: weights.map((_, index): Block => (index === last ? "C" : index === 0 ? "E" : "A")),
    ...{ width, height, sigmas, psnr: psnr?.held ?? null },
    guidance: guided.map((each, index) => (each ? guidanceScale * (scales?.[index] ?? 1) : null)),
    weights: weights.map(([now, old, older]) => ({ in: 0, new: now, old, older })),
  };
}
