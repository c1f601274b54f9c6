/**
 * Fits the numbers of a schedule (noise levels, weights and guidance scale of each step) so that it ends where a run of many steps
 * ends. Only forward evaluations are used, so that any runtime will do: Levenberg–Marquardt on the decoded pictures, with derivatives by
 * differences. A change of a weight or a scale acts on the steps after its own, and a change of a noise level on its own step and those
 * after it, so that only these are run again. Between two sets of differences Broyden's update keeps the derivatives.
 */

import { solved } from "../common/linear.js";
import { isDue, rest } from "../common/turns.js";
import { NotFiniteError } from "../errors.js";
import type { StepLaunch, Weights } from "../schedule/index.js";
import type { GuidedVelocity, VelocityField } from "./field.js";

/** The numbers of a schedule of n steps. */
export interface StepNumbers {
  /** Where each step evaluates, and 0 at the end; n + 1. */
  readonly sigmas: readonly number[];
  /** Weights of the velocity of the step itself, of the one before and of the one before that; n of each. */
  readonly weights: readonly (readonly [now: number, old: number, older: number])[];
  /** Guidance scale of each step, null for none; n. */
  readonly scales: readonly (number | null)[];
}

/** A picture to come near to. */
export interface FitPicture {
  readonly noise: Float32Array;
  readonly prompt: number;
  /** Pixels of the reference, as `sketch` gives them. */
  readonly target: Float32Array;
}

export interface FitProblem {
  readonly field: VelocityField;
  readonly pictures: readonly FitPicture[];
  readonly signal?: AbortSignal | undefined;
}

/** Numbers of a picture that are compared; more are sketched to so many. */
const sketched = 2 ** 14;

/**
 * Pixels, at most so many numbers: of larger pictures sums with random signs (count sketch, Charikar et al. 2002), whose inner
 * products are those of the pixels on average, here to about a hundredth.
 */
export function sketch(pixels: Float32Array): Float32Array {
  if (pixels.length <= sketched) return pixels;
  const sums = new Float32Array(sketched);
  for (let i = 0; i < pixels.length; i++) {
    // A bucket by the upper bits of a hash of the place, a sign by the lowest.
    const hash = mixed(i);
    sums[hash >>> 18]! += hash & 1 ? pixels[i]! : -pixels[i]!;
  }
  // So that the mean of squares is that of the pixels.
  const scale = Math.sqrt(sketched / pixels.length);
  return sums.map((value) => value * scale);
}

/** Neighbouring places to bits that have nothing to do with each other: the end of MurmurHash3. */
function mixed(place: number): number {
  let hash = Math.imul(place ^ (place >>> 16), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) >>> 0;
}

/** A run under way: its state before step `step`, and the velocities before it, the latest first. */
interface Run {
  readonly picture: number;
  x: Float32Array;
  history: readonly GuidedVelocity[];
  step: number;
  readonly numbers: StepNumbers;
}

type Snapshot = Pick<Run, "x" | "history">;

const plus = (x: Float32Array, ...terms: readonly (readonly [number, Float32Array | undefined])[]): Float32Array => {
  const sum = Float32Array.from(x);
  for (const [weight, vector] of terms)
    if (vector && weight !== 0) for (let i = 0; i < sum.length; i++) sum[i]! += weight * vector[i]!;
  return sum;
};

/**
 * A velocity as a step of scale `scale` reuses it in its update, as the fused step does (networks/step.ts): guided anew where both are
 * guided, else as it was guided where it was evaluated.
 */
const reused = (velocity: GuidedVelocity, scale: number | null): Float32Array =>
  scale === null || velocity.scale === null || scale === velocity.scale
    ? velocity.value
    : plus(velocity.value, [scale - velocity.scale, velocity.difference!]);

/** Takes all runs to the end; those at the same step share launches. @param seen is told the state before each step of each run */
async function finish(
  { field, pictures, signal }: FitProblem,
  runs: readonly Run[],
  seen?: (run: number, step: number, state: Snapshot) => void,
): Promise<void> {
  const steps = runs[0]!.numbers.weights.length;
  for (let step = Math.min(...runs.map((run) => run.step)); step < steps; step++) {
    signal?.throwIfAborted();
    const active = runs.filter((run) => run.step === step);
    for (const [index, run] of runs.entries()) if (run.step === step) seen?.(index, step, run);
    const velocities = await field.velocities(
      active.map(({ x, picture, numbers }) => ({
        ...{ x, sigma: numbers.sigmas[step]!, prompt: pictures[picture]!.prompt, scale: numbers.scales[step]! },
      })),
    );
    for (const [index, run] of active.entries()) {
      const [now, old, older] = run.numbers.weights[step]!;
      const v = velocities[index]!;
      const [last, before] = run.history;
      run.x = plus(run.x, [now, v.value], [old, last && reused(last, v.scale)], [older, before?.value]);
      run.history = [v, ...run.history].slice(0, 2);
      run.step++;
      if (isDue()) await rest();
    }
  }
}

/** What is left of each picture after a run. */
async function residuals({ field, pictures }: FitProblem, runs: readonly Run[]): Promise<Float32Array[]> {
  return field.decoded(
    runs.map(({ x }) => x),
    (pixels, index) => {
      const { target } = pictures[runs[index]!.picture]!;
      return sketch(pixels).map((value, i) => value - target[i]!);
    },
  );
}

/** Mean square of a residual in units of the whole range, as for a PSNR; what no 8-bit picture shows does not count. */
const errorOf = (residual: Float32Array) => {
  let sum = 0;
  for (const value of residual) sum += value * value;
  return Math.max(sum / residual.length / 4, 1e-7);
};

const decibels = (errors: readonly number[]) =>
  errors.reduce((sum, error) => sum - 10 * Math.log10(error), 0) / errors.length;

const begin = (problem: FitProblem, numbers: StepNumbers): Run[] =>
  problem.pictures.map(({ noise }, picture) => ({ picture, x: noise, history: [], step: 0, numbers }));

/** Mean PSNR against the references, dB. */
export async function psnrOf(problem: FitProblem, numbers: StepNumbers): Promise<number> {
  const runs = begin(problem, numbers);
  await finish(problem, runs);
  return decibels((await residuals(problem, runs)).map(errorOf));
}

/** The same of launches as programs run them, for schedules of other letters. */
export async function launchedPsnr(problem: FitProblem, launches: readonly StepLaunch[]): Promise<number> {
  const { field, pictures, signal } = problem;
  const runs = begin(problem, { sigmas: [], weights: [], scales: [] });
  const states = runs.map(({ x }): Record<"x" | "velocity" | "first" | "second", Float32Array> => {
    const none = new Float32Array(x.length);
    return { x, velocity: none, first: none, second: none };
  });
  for (const { type, sigma, aIn, aOld, aNew, keepsVelocity, combination, guidance } of launches) {
    signal?.throwIfAborted();
    if (type === "refine") throw new RangeError("The field has no refiner.");
    if (type === "predict") {
      const points = states.map(({ x, velocity }, run) => ({
        ...{ x: plus(x, [aIn, velocity]), sigma, prompt: pictures[run]!.prompt, scale: guidance },
      }));
      for (const [run, { value }] of (await field.velocities(points)).entries()) {
        const state = states[run]!;
        state.x = plus(state.x, [aOld, state.velocity], [aNew, value]);
        if (keepsVelocity) state.velocity = value;
      }
    }
    if (!combination) continue;
    for (const state of states) {
      const { x, velocity, first, second } = state;
      const none = new Float32Array(x.length);
      const sum = (to: Float32Array, [w, m1, m2]: Weights) => plus(to, [w, velocity], [m1, first], [m2, second]);
      state.x = sum(x, combination.x);
      state.first = sum(none, combination.first);
      state.second = sum(none, combination.second);
    }
  }
  const ended = runs.map((run, index) => ({ ...run, x: states[index]!.x }));
  return decibels((await residuals(problem, ended)).map(errorOf));
}

/** One number of a schedule, with the size of its changes. */
interface Parameter {
  readonly step: number;
  /** Which weight, or the noise level, or the guidance scale. */
  readonly which: 0 | 1 | 2 | "sigma" | "scale";
  readonly unit: number;
}

/** What is fitted: all but the first noise level and the last. */
export function parametersOf({ sigmas, weights, scales }: StepNumbers): Parameter[] {
  return weights.flatMap((_, step): Parameter[] => {
    const h = sigmas[step]! - sigmas[step + 1]!;
    const of = (which: 0 | 1 | 2): Parameter => ({ step, which, unit: h });
    const scale = scales[step]!;
    const ofScale: Parameter[] = scale === null ? [] : [{ step, which: "scale", unit: scale }];
    if (step === 0) return [of(0), ...ofScale];
    const gap = Math.min(h, sigmas[step - 1]! - sigmas[step]!);
    return [{ step, which: "sigma", unit: gap }, of(0), of(1), ...(step > 1 ? [of(2)] : []), ...ofScale];
  });
}

/** @param by of each parameter, in its unit */
export function changed(
  { sigmas, weights, scales }: StepNumbers,
  parameters: readonly Parameter[],
  by: ArrayLike<number>,
): StepNumbers {
  const levels = [...sigmas];
  const guidance = [...scales];
  const rows = weights.map((row) => [...row] as [number, number, number]);
  for (const [index, { step, which, unit }] of parameters.entries()) {
    const change = by[index]! * unit;
    if (which === "sigma") levels[step]! += change;
    else if (which === "scale") guidance[step]! += change;
    else rows[step]![which] += change;
  }
  return { sigmas: levels, weights: rows, scales: guidance };
}

/** Whether levels fall and scales are above 0. */
const isSchedule = ({ sigmas, scales }: StepNumbers) =>
  sigmas.every((sigma, i) => i === 0 || sigma < sigmas[i - 1]! - 1e-4) &&
  scales.every((scale) => scale === null || scale > 0.05);

/** Change of a parameter for a difference, in its unit. */
export const difference = 0.02;
/** Damping of Levenberg and Marquardt, as parts of the normal matrix's diagonal. */
const dampings = [1e-3, 1e-2, 1e-1, 1];
/** Memory of the states of one group of runs of differences. */
const groupBytes = 256 * 2 ** 20;

/** Derivatives of the residuals: for each parameter and picture. */
export async function derivatives(
  problem: FitProblem,
  numbers: StepNumbers,
  parameters: readonly Parameter[],
  states: readonly (readonly Snapshot[])[],
  left: readonly Float32Array[],
): Promise<Float32Array[][]> {
  const columns: Float32Array[][] = parameters.map(() => new Array(problem.pictures.length));
  const each = problem.pictures[0]!.noise.byteLength * 5 * parameters.length;
  const size = Math.max(1, Math.floor(groupBytes / each));
  for (let start = 0; start < problem.pictures.length; start += size) {
    const runs: Run[] = [];
    const places: [number, number][] = [];
    for (let picture = start; picture < Math.min(start + size, problem.pictures.length); picture++)
      for (const index of parameters.keys()) {
        runs.push(perturbed(numbers, parameters, index, states[picture]!, picture));
        places.push([index, picture]);
      }
    await finish(problem, runs);
    const ends = await residuals(problem, runs);
    for (const [run, [index, picture]] of places.entries()) {
      const before = left[picture]!;
      columns[index]![picture] = ends[run]!.map((value, i) => (value - before[i]!) / difference);
      if (isDue()) await rest();
    }
  }
  return columns;
}

/** A run that differs in one parameter, from where it differs on. */
function perturbed(
  numbers: StepNumbers,
  parameters: readonly Parameter[],
  index: number,
  states: readonly Snapshot[],
  picture: number,
): Run {
  const { step, which, unit } = parameters[index]!;
  if (which === "sigma") {
    const by = parameters.map((_, other) => (other === index ? difference : 0));
    return { picture, ...states[step]!, step, numbers: changed(numbers, parameters, by) };
  }
  // x is linear in a weight and in a scale: the step itself needs no evaluation.
  const after = states[step + 1]!;
  const by = difference * unit;
  const [now, old] = after.history as [GuidedVelocity, GuidedVelocity | undefined];
  const older = states[step]!.history[1];
  if (which === "scale") {
    const [nowBy, oldBy] = numbers.weights[step]!;
    const x = plus(
      after.x,
      [by * nowBy, now.difference ?? undefined],
      [by * oldBy, (old?.scale !== null && old?.difference) || undefined],
    );
    const other = { ...now, value: plus(now.value, [by, now.difference ?? undefined]), scale: now.scale! + by };
    return { picture, x, history: [other, ...after.history.slice(1)], step: step + 1, numbers };
  }
  const vector = [now.value, old && reused(old, now.scale), older?.value][which];
  return { picture, x: plus(after.x, [by, vector]), history: after.history, step: step + 1, numbers };
}

export interface FitSettings {
  /** Sets of differences, and steps for each. */
  readonly sets: number;
  readonly stepsPerSet: number;
}

export interface Fit {
  readonly numbers: StepNumbers;
  /** Mean PSNR on the pictures of the fit before and after, dB. */
  readonly before: number;
  readonly after: number;
}

/** Runs a schedule: the states before its steps and at its end, and what is left of each picture. */
export async function evaluate(problem: FitProblem, numbers: StepNumbers) {
  const runs = begin(problem, numbers);
  const states: Snapshot[][] = runs.map(() => []);
  await finish(problem, runs, (run, step, { x, history }) => {
    states[run]![step] = { x, history };
  });
  for (const [index, { x, history }] of runs.entries()) states[index]!.push({ x, history });
  const left = await residuals(problem, runs);
  const errors = left.map(errorOf);
  return { states, left, errors, psnr: decibels(errors) };
}

/** Fits from a start. It ends no worse than it starts, on the pictures that it is fitted to. */
export async function fitted(
  problem: FitProblem,
  start: StepNumbers,
  { sets, stepsPerSet }: FitSettings,
): Promise<Fit> {
  let numbers = start;
  let at = await evaluate(problem, numbers);
  const before = at.psnr;
  for (let set = 0; set < sets; set++) {
    const parameters = parametersOf(numbers);
    const columns = await derivatives(problem, numbers, parameters, at.states, at.left);
    const start = at.psnr;
    for (let step = 0; step < stepsPerSet; step++) {
      // From here with more and more damping, until that makes it worse; the best is taken.
      let best: { candidate: StepNumbers; next: typeof at; change: Float64Array } | null = null;
      const equations = await normalEquations(columns, at.left, at.errors);
      for (const damping of dampings) {
        const change = dampedStep(equations, damping);
        const candidate = changed(numbers, parameters, change);
        if (!isSchedule(candidate)) continue;
        // A step too far may leave what the network can compute: it is none.
        const next = await evaluate(problem, candidate).catch((error: unknown) => {
          if (error instanceof NotFiniteError) return null;
          throw error;
        });
        if (!next) continue;
        if (best && next.psnr < best.next.psnr) break;
        best = { candidate, next, change };
      }
      if (!best) break;
      await update(columns, at.left, best.next.left, best.change);
      const gain = best.next.psnr - at.psnr;
      if (gain <= 0) break;
      [numbers, at] = [best.candidate, best.next];
      if (gain < 0.02) break;
    }
    if (at.psnr - start < 0.03) break;
  }
  return { numbers, before, after: at.psnr };
}

interface NormalEquations {
  readonly normal: readonly Float64Array[];
  readonly right: Float64Array;
}

/** For a step in all parameters; pictures weigh by the inverse of their error, since what counts is the mean of their decibels. */
async function normalEquations(
  columns: readonly (readonly Float32Array[])[],
  left: readonly Float32Array[],
  errors: readonly number[],
): Promise<NormalEquations> {
  const mean = Math.exp(errors.reduce((sum, error) => sum + Math.log(error), 0) / errors.length);
  const weights = errors.map((error) => Math.min(8, Math.max(1 / 8, mean / error)));
  const n = columns.length;
  const normal = Array.from({ length: n }, () => new Float64Array(n));
  const right = new Float64Array(n);
  for (const [picture, residual] of left.entries()) {
    const weight = weights[picture]!;
    for (let a = 0; a < n; a++) {
      const first = columns[a]![picture]!;
      right[a]! -= weight * inner(first, residual);
      for (let b = a; b < n; b++) normal[a]![b]! += weight * inner(first, columns[b]![picture]!);
      if (isDue()) await rest();
    }
  }
  for (let a = 0; a < n; a++) for (let b = 0; b < a; b++) normal[a]![b] = normal[b]![a]!;
  return { normal, right };
}

function dampedStep({ normal, right }: NormalEquations, damping: number): Float64Array {
  const trace = normal.reduce((sum, row, a) => sum + row[a]!, 0) / normal.length;
  const rows = normal.map((row, a) => {
    const copy = Float64Array.from(row);
    copy[a]! += (damping + 1e-6) * (row[a]! + 1e-3 * trace);
    return copy;
  });
  return solved(rows, Float64Array.from(right));
}

function inner(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}

/** Broyden's update: of all matrices that explain the last step the one nearest to the present one. */
async function update(
  columns: readonly Float32Array[][],
  before: readonly Float32Array[],
  after: readonly Float32Array[],
  change: Float64Array,
): Promise<void> {
  const length = change.reduce((sum, value) => sum + value * value, 0);
  if (length === 0) return;
  for (const [picture, residual] of after.entries()) {
    const unexplained = residual.map((value, i) => value - before[picture]![i]!);
    for (const [index, column] of columns.entries()) {
      const vector = column[picture]!;
      for (let i = 0; i < unexplained.length; i++) unexplained[i]! -= change[index]! * vector[i]!;
    }
    for (const [index, column] of columns.entries()) {
      const part = change[index]! / length;
      const vector = column[picture]!;
      for (let i = 0; i < vector.length; i++) vector[i]! += part * unexplained[i]!;
    }
    if (isDue()) await rest();
  }
}
