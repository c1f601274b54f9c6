/**
 * Calibration: for a model, a size and a guidance scale the schedules of few steps that come nearest to a run of many. The noise levels
 * are found by dynamic programming over the reference run (schedule/grid-search.ts), then levels and weights of all steps are fitted
 * together on decoded pictures (fit.ts). Pictures that are fitted to are kept apart from those that decide between fits. Every schedule
 * is written as soon as it is found, so that a run that was stopped goes on.
 */

import { createHash } from "node:crypto";
import { readFile, rm, stat, writeFile } from "node:fs/promises";
import path from "node:path";
import { z } from "zod";
import {
  type Checkpoint,
  calibratedSchema,
  fingerprintOf,
  modelFingerprint,
  schedulesVersion,
} from "../checkpoint/index.js";
import { makeFolders, writeFileAtomic } from "../common/files.js";
import { packageVersion } from "../common/package.js";
import { elementCount, type Tensor } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import { OptionError, OutputError } from "../errors.js";
import type { CalibratedEntry, CalibrateProgress, Size } from "../model.js";
import type { Program } from "../program/program.js";
import {
  bestGrids,
  type Gram,
  gramOf,
  planSteps,
  rowsOf,
  samplers,
  shiftedSigmas,
  sigmaGrids,
  sigmaSettings,
} from "../schedule/index.js";
import { VelocityField } from "./field.js";
import { type FitPicture, type FitProblem, fitted, launchedPsnr, psnrOf, type StepNumbers, sketch } from "./fit.js";
import { noiseOf } from "./latents.js";
import { latentShapeOf } from "./sizes.js";
import { positionCrop } from "./templates.js";
import type { PromptEncoder } from "./text.js";

/** Steps of the reference, of two evaluations each. */
const referenceSteps = 50;
/** Memory of the states of the reference run of one group of pictures. */
const groupBytes = 512 * 2 ** 20;

export interface CalibrationSettings {
  readonly sizes: readonly Size[];
  readonly guidanceScales: readonly number[];
  readonly steps: readonly number[];
  readonly prompts: readonly string[];
  /** Pictures that are fitted to; half as many, of other prompts and noise, decide between fits. */
  readonly pictures: number;
  readonly seed: number;
  /** Pictures of a launch. */
  readonly batch: number;
  readonly sequenceLength: number;
  /** Whether what the file holds is fitted again. */
  readonly reset: boolean;
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((progress: CalibrateProgress) => void) | undefined;
}

export interface CalibrationPlace {
  readonly checkpoint: Checkpoint;
  readonly text: PromptEncoder;
  readonly run: (program: Program) => Promise<Record<string, Tensor>>;
  /** Called when texts have been encoded: their encoders' memory is not needed any more. */
  readonly encoded: () => Promise<void>;
  /** Where schedules are written, beside those that are there. */
  readonly file: string;
  /** Folder where references are kept for a run that goes on. */
  readonly cache: string;
}

/** The file as it is written; what it holds besides is kept. */
interface SchedulesJson {
  readonly version: number;
  readonly model: string;
  readonly calibrated: readonly CalibratedEntry[];
}

/** @returns the schedules for all that was asked for, those that were in the file already among them */
export async function calibrate(place: CalibrationPlace, settings: CalibrationSettings): Promise<CalibratedEntry[]> {
  const { checkpoint, file } = place;
  const { sizes, guidanceScales, steps: counts, onProgress } = settings;
  const isAskedFor = ({ width, height, guidanceScale, weights }: CalibratedEntry) =>
    sizes.some((size) => size.width === width && size.height === height) &&
    guidanceScales.includes(guidanceScale) &&
    counts.includes(weights.length);
  await tryToWrite(file);
  const [model, { variant }] = [await fingerprintOf(checkpoint), checkpoint.transformer.weights];
  const before = await readJson(file, model, variant);
  let json = settings.reset ? { ...before, calibrated: before.calibrated.filter((each) => !isAskedFor(each)) } : before;
  const found: CalibratedEntry[] = [];
  const total = sizes.length * guidanceScales.length * counts.length;
  for (const size of sizes) {
    // Strong guidance first: what was fitted to it is a good start for milder guidance, and not the reverse.
    let neighbours = new Map<number, CalibratedEntry>();
    for (const guidanceScale of [...guidanceScales].sort((a, b) => b - a)) {
      const own = new Map(
        json.calibrated
          .filter((each) => each.width === size.width && each.height === size.height)
          .filter((each) => each.guidanceScale === guidanceScale)
          .map((each) => [each.weights.length, each]),
      );
      const report = (phase: CalibrateProgress["phase"], part = 0) =>
        onProgress?.({ phase, ...size, guidanceScale, done: found.length + part, total });
      let subject: Subject | null = null;
      for (const steps of counts) {
        if (!own.has(steps)) {
          subject ??= await openSubject(place, settings, size, guidanceScale, (part) => report("reference", part));
          report("fitting");
          const stronger = neighbours.get(steps);
          const elsewhere = json.calibrated.find(
            (each) => each.guidanceScale === guidanceScale && each.weights.length === steps,
          );
          const entry = await entryOf(
            subject,
            steps,
            [stronger, elsewhere].flatMap((each) => each ?? []),
          );
          own.set(steps, entry);
          // Beside what others have found meanwhile.
          const others = (await readJson(file, model, variant)).calibrated.filter(
            (each) => keyOf(each) !== keyOf(entry),
          );
          json = { ...json, calibrated: sorted([...others, entry]) };
          await writeFileAtomic(file, `${formatted(json)}\n`);
        }
        found.push(own.get(steps)!);
        report("fitting");
      }
      neighbours = own;
    }
  }
  return found;
}

const keyOf = ({ width, height, guidanceScale, weights }: CalibratedEntry) =>
  [width, height, guidanceScale, weights.length].join();

const sorted = (entries: CalibratedEntry[]) =>
  entries.sort(
    (a, b) =>
      a.width * a.height - b.width * b.height ||
      a.guidanceScale - b.guidanceScale ||
      a.weights.length - b.weights.length,
  );

/** JSON with a line for each schedule. */
function formatted({ calibrated, ...others }: SchedulesJson): string {
  const lines = calibrated.map((each) => `    ${JSON.stringify(each)}`).join(",\n");
  return `${JSON.stringify(others, null, 2).slice(0, -2)},\n  "calibrated": [\n${lines}\n  ]\n}`;
}

/** @throws OutputError where the file cannot be written */
async function tryToWrite(file: string): Promise<void> {
  const refuse = (reason: string, cause?: unknown): never => {
    throw new OutputError(file, `The schedules cannot be written to ${file}: ${reason}`, { cause });
  };
  const existing = await stat(file).catch(() => null);
  if (existing?.isDirectory()) refuse("it is a folder.");
  const trial = `${file}.${process.pid}.tmp`;
  try {
    await makeFolders(path.dirname(file));
    await writeFile(trial, "");
    await rm(trial);
  } catch (cause) {
    refuse((cause as Error).message, cause);
  }
}

/**
 * What the file holds, if it is there. A ladder alone belongs to whatever model it lies with.
 * @throws OptionError for one that cannot be read, or is another model's
 */
async function readJson(file: string, model: string, variant: string | null): Promise<SchedulesJson> {
  const refuse = (reason: string): never => {
    throw new OptionError("file", `${file} ${reason}. Remove it, or name another file.`);
  };
  const text = await readFile(file, "utf8").catch((error: NodeJS.ErrnoException) =>
    error.code === "ENOENT" ? "{}" : refuse(`cannot be read (${error.message})`),
  );
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    refuse(`is not JSON (${(cause as Error).message})`);
  }
  const { success, data } = fileSchema.safeParse(json);
  if (!success) return refuse("is no file of schedules");
  const { version = schedulesVersion, calibrated = [] } = data;
  const isOther = data.model !== undefined && data.model !== model && (data.variant ?? null) === variant;
  if (version !== schedulesVersion || isOther) refuse("holds schedules of another model or version");
  const named = data.variant ?? variant;
  return {
    ...data,
    ...{ version, model: data.model ?? model, ...(named && { variant: named }), made: `flowturbo ${packageVersion()}` },
    calibrated: calibrated as unknown as CalibratedEntry[],
  };
}

const fileSchema = z.looseObject({
  version: z.number().optional(),
  model: z.string().optional(),
  variant: z.string().nullish(),
  calibrated: z.array(calibratedSchema).optional(),
});

/** A size and a guidance scale, with what the reference run says of them. */
interface Subject {
  readonly settings: CalibrationSettings;
  readonly size: Size;
  readonly scale: number;
  readonly field: VelocityField;
  readonly pictures: { readonly fitted: readonly FitPicture[]; readonly held: readonly FitPicture[] };
  /** Noise levels by number of steps. */
  readonly grids: ReadonlyMap<number, readonly number[]>;
  /** Noise levels of the usual schedule. */
  readonly usual: (steps: number) => readonly number[];
  /** Mean PSNR of the usual schedule on the pictures that decide, by number of steps. */
  readonly uncalibrated: (steps: number) => Promise<number>;
}

/** Runs the reference, or reads it where it was run before. */
async function openSubject(
  { checkpoint, text, run, encoded, cache }: CalibrationPlace,
  settings: CalibrationSettings,
  size: Size,
  scale: number,
  report: (part: number) => void,
): Promise<Subject> {
  const { pictures: fitted, seed, batch, sequenceLength } = settings;
  const count = fitted + Math.max(1, fitted >> 1);
  const prompts = settings.prompts.slice(0, count);
  const latentShape = latentShapeOf(checkpoint, 1, size);
  const [, ...area] = latentShape;
  const { factor, outChannels } = checkpoint.vae.config;
  const { patchSize } = checkpoint.transformer.config;
  const field = await VelocityField.open({
    ...{ run, text, sequenceLength, prompts, latentShape, factor, imageChannels: outChannels, batch },
    positions: positionCrop(checkpoint.transformer, latentShape),
  });
  await encoded();
  const [noise] = await noiseOf(
    Array.from({ length: count }, (_, index) => seed + index),
    [[count, ...area]],
  );
  const elements = elementCount(area);
  const starts = Array.from({ length: count }, (_, index) =>
    noise!.data.slice(index * elements, (index + 1) * elements),
  );
  // Of the prompts the first part is fitted to, and the rest decides.
  const border = Math.min(prompts.length - 1, Math.max(1, Math.ceil((prompts.length * fitted) / count)));
  const promptOf = (index: number) =>
    index < fitted ? index % border : border + ((index - fitted) % (prompts.length - border));
  const schedulerSettings = sigmaSettings(checkpoint.scheduler, (area[1] / patchSize) * (area[2] / patchSize));
  const levels = shiftedSigmas(referenceSteps, schedulerSettings);
  const parts = [checkpoint.textEncoder, checkpoint.textEncoder2, checkpoint.textEncoder3].map((part) =>
    part ? modelFingerprint(part.config, part.weights.files) : null,
  );
  const digests = await Promise.all([fingerprintOf(checkpoint), ...parts]);
  const subject = [digests, prompts, size, scale, seed, fitted, sequenceLength, levels];
  const key = createHash("sha256").update(JSON.stringify(subject)).digest("hex").slice(0, 32);
  const kept = new ReferenceFile(path.join(cache, `calibration-${key}.bin`), elements);
  const guidance = scale > 1 ? scale : null;
  const reference = await kept.read();
  const group = Math.max(1, Math.floor(groupBytes / (elements * 4 * (2 * referenceSteps + 1))));
  while (reference.length < count) {
    const first = reference.length;
    const some = Array.from({ length: Math.min(group, count - first) }, (_, index) => first + index);
    const ask = (xs: readonly Float32Array[], sigma: number) => {
      settings.signal?.throwIfAborted();
      return field.velocities(xs.map((x, row) => ({ x, sigma, prompt: promptOf(some[row]!), scale: guidance })));
    };
    const runs = some.map((index) => ({ states: [starts[index]!], velocities: [] as Float32Array[] }));
    for (let step = 0; step < referenceSteps; step++) {
      const [from, to] = [levels[step]!, levels[step + 1]!];
      const h = to - from;
      const now = runs.map(({ states }) => states.at(-1)!);
      const slopes = await ask(now, from);
      const guesses = now.map((x, row) => x.map((value, i) => value + h * slopes[row]![i]!));
      const others = await ask(guesses, to);
      for (const [row, { states, velocities }] of runs.entries()) {
        const [a, b] = [slopes[row]!, others[row]!];
        states.push(now[row]!.map((value, i) => value + (h / 2) * (a[i]! + b[i]!)));
        velocities.push(a);
      }
      report((first + (some.length * (step + 1)) / referenceSteps) / count);
    }
    for (const { states, velocities } of runs) {
      const [x0] = states as [Float32Array];
      // Relative to the noise: what all states have in common would only cost digits.
      const gram = await gramOf([...states.map((x) => x.map((value, i) => value - x0[i]!)), ...velocities]);
      reference.push({ end: states.at(-1)!, gram });
      if (isDue()) await rest();
    }
    await kept.write(reference);
  }
  const targets = await field.decoded(
    reference.map(({ end }) => end),
    sketch,
  );
  const pictures = starts.map(
    (noise, index): FitPicture => ({
      ...{ noise, prompt: promptOf(index), target: targets[index]! },
    }),
  );
  const grams = reference.slice(0, fitted).map(({ gram }) => gram);
  const grids = bestGrids(grams, settings.steps, "squares");
  const held = pictures.slice(fitted);
  const usual = (steps: number) =>
    sigmaGrids[samplers.flowturbo!.grid]!(steps, { ...schedulerSettings, guidance: scale });
  return {
    ...{ settings, size, scale, field, pictures: { fitted: pictures.slice(0, fitted), held } },
    grids: new Map([...grids].map(([steps, indices]) => [steps, indices.map((index) => levels[index]!)])),
    usual,
    uncalibrated: (steps) => {
      const launches = planSteps(samplers.flowturbo!.blocks(steps, scale), usual(steps), { guidance });
      return launchedPsnr({ field, scales: [], pictures: held }, launches);
    },
  };
}

/** What a reference run leaves: where it ends, and the inner products of what it went through. */
interface Reference {
  readonly end: Float32Array;
  readonly gram: Gram;
}

/** References of some pictures in a file, as float64. It is worth time only: one that cannot be read is made again. */
class ReferenceFile {
  readonly #file: string;
  readonly #elements: number;

  constructor(file: string, elements: number) {
    this.#file = file;
    this.#elements = elements;
  }

  async read(): Promise<Reference[]> {
    const bytes = await readFile(this.#file).catch(() => Buffer.alloc(0));
    const products = (2 * referenceSteps + 1) ** 2;
    const each = this.#elements + products;
    const values = new Float64Array(new Uint8Array(bytes).buffer, 0, Math.floor(bytes.length / 8));
    return Array.from({ length: Math.floor(values.length / each) }, (_, index) => {
      const own = values.subarray(index * each, (index + 1) * each);
      return { end: Float32Array.from(own.subarray(0, this.#elements)), gram: own.slice(this.#elements) };
    });
  }

  async write(references: readonly Reference[]): Promise<void> {
    await makeFolders(path.dirname(this.#file));
    const parts = references.flatMap(({ end, gram }) => [Float64Array.from(end), gram]);
    await writeFileAtomic(
      this.#file,
      parts.map((part) => new Uint8Array(part.buffer, part.byteOffset, part.byteLength)),
    );
  }
}

/** Euler's weights on a grid (`part` 0), those of Adams and Bashforth (1), or between. */
function extrapolated(sigmas: readonly number[], part: number): StepNumbers {
  const weights = sigmas.slice(0, -1).map((from, step) => {
    const h = sigmas[step + 1]! - from;
    const more = step === 0 ? 0 : (part * h * h) / (2 * (from - sigmas[step - 1]!));
    return [h + more, -more, 0] as const;
  });
  return { sigmas, weights };
}

/** The damped multistep method (the block M) as far as three velocities express it: what it remembers further back is left out. */
function damped(sigmas: readonly number[], guidance: number): StepNumbers {
  const steps = sigmas.length - 1;
  const launches = planSteps(new Array(steps).fill("M"), sigmas, { guidance });
  const k = launches.map(({ combination }) => combination?.x[1] ?? 0);
  const weights = launches.map(({ aNew, sigma }, step) => {
    const before = step > 0 ? k[step]! * k[step - 1]! * sigmas[step - 1]! : 0;
    return [aNew, step > 0 ? k[step]! * sigma - before : 0, before] as const;
  });
  return { sigmas, weights };
}

/** Significant digits of numbers that are written. */
const round = (value: number) => Number(value.toPrecision(7));

/**
 * Where fits begin. One that is ahead before it is fitted may end behind another, so that each is fitted once, but for those that are
 * behind the first by this much, dB.
 */
const farBehind = 5;
/** A neighbour, which is fitted already, is taken alone where it is ahead of all others by this much, dB. */
const clearlyAhead = 1;

async function startsOf(
  judge: FitProblem,
  plain: readonly StepNumbers[],
  neighbours: readonly StepNumbers[],
): Promise<readonly StepNumbers[]> {
  const scores = new Map<StepNumbers, number>();
  for (const start of [...plain, ...neighbours]) scores.set(start, await psnrOf(judge, start));
  const [first] = [...scores].sort(([, a], [, b]) => b - a)[0]!;
  const best = scores.get(first)!;
  const isNear = (start: StepNumbers) => scores.get(start)! > best - farBehind;
  const own = plain.filter(isNear);
  if (!neighbours.includes(first)) return [...own, ...neighbours.filter(isNear)];
  return own.every((start) => scores.get(start)! < best - clearlyAhead) ? [first] : [...own, first];
}

/** @param neighbours what was fitted for this number of steps at the next stronger guidance, and at another size */
async function entryOf(subject: Subject, steps: number, neighbours: readonly StepNumbers[]): Promise<CalibratedEntry> {
  const { settings, size, scale, field, pictures, grids, usual, uncalibrated } = subject;
  const scales = new Array<number | null>(steps).fill(scale > 1 ? scale : null);
  const problem: FitProblem = { field, scales, pictures: pictures.fitted, signal: settings.signal };
  const judge = { ...problem, pictures: pictures.held };
  const grid = grids.get(steps)!;
  let best: { readonly numbers: StepNumbers; readonly held: number } | null = null;
  for (const start of await startsOf(
    judge,
    [extrapolated(grid, 0), extrapolated(grid, 1), damped(usual(steps), scale)],
    neighbours,
  )) {
    const { numbers } = await fitted(problem, start, { sets: 1, stepsPerSet: 3 });
    const held = await psnrOf(judge, numbers);
    if (!best || held > best.held) best = { numbers, held };
  }
  const again = await fitted(problem, best!.numbers, { sets: 1, stepsPerSet: 3 });
  const heldAgain = await psnrOf(judge, again.numbers);
  // A closer fit may be no better on what it has not seen.
  if (heldAgain > best!.held) best = { numbers: again.numbers, held: heldAgain };
  const { numbers, held } = best!;
  const guided = scales.map((each) => each !== null);
  return {
    ...{ width: size.width, height: size.height, guidanceScale: scale, guided, rows: rowsOf({ guided }) },
    sigmas: numbers.sigmas.map(round),
    weights: numbers.weights.map(([now, old, older]) => [round(now), round(old), round(older)] as const),
    psnr: {
      fitted: round(await psnrOf(problem, numbers)),
      held: round(held),
      uncalibrated: round(await uncalibrated(steps)),
    },
    ...{ pictures: settings.pictures, seed: settings.seed },
  };
}
