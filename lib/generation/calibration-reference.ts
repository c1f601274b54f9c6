/**
 * What calibration compares with: runs of many steps from the same noise. They are run once for a size and a guidance scale, and kept
 * in files, since they are a good part of the work.
 */

import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import path from "node:path";
import { type Checkpoint, fingerprintOf, modelFingerprint } from "../checkpoint/index.js";
import { makeFolders, writeFileAtomic } from "../common/files.js";
import { seedsFrom } from "../common/seed.js";
import { elementCount, type Tensor } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import type { Size } from "../model.js";
import type { Program } from "../program/program.js";
import { type Gram, gramOf, type SigmaSettings, shiftedSigmas, sigmaSettings } from "../schedule/index.js";
import { VelocityField } from "./field.js";
import { type FitPicture, sketch } from "./fit.js";
import { noiseOf } from "./latents.js";
import { latentShapeOf } from "./sizes.js";
import { positionCrop } from "./templates.js";
import type { PromptEncoder } from "./text.js";

/** Steps of the reference, of two evaluations each. */
const referenceSteps = 50;
/** Memory of the states of the reference run of one group of pictures, and how many that are: each group is kept on disk when it is done. */
const [groupBytes, groupPictures] = [512 * 2 ** 20, 8];

export interface ReferencePlace {
  readonly checkpoint: Checkpoint;
  readonly text: PromptEncoder;
  readonly run: (program: Program) => Promise<Record<string, Tensor>>;
  /** Called when texts have been encoded: their encoders' memory is not needed any more. */
  readonly encoded: () => Promise<void>;
  /** Folder where references are kept for a run that goes on. */
  readonly cache: string;
}

export interface ReferenceSettings {
  readonly prompts: readonly string[];
  /**
   * Pictures that are fitted to. Half as many, of other prompts and noise, decide between fits, and as many, of others again, say how near
   * the schedule that was chosen comes: what decided would flatter it.
   */
  readonly pictures: number;
  readonly seed: number | string;
  /** Pictures of a launch. */
  readonly batch: number;
  readonly sequenceLength: number;
  readonly signal?: AbortSignal | undefined;
}

/** A size and a guidance scale, with what the reference run says of them. */
export interface Reference {
  readonly field: VelocityField;
  readonly fitted: readonly FitPicture[];
  readonly deciding: readonly FitPicture[];
  readonly held: readonly FitPicture[];
  /** Noise levels of the run, and of each fitted picture the inner products of what it went through. */
  readonly levels: readonly number[];
  readonly grams: readonly Gram[];
  /** What noise levels of the usual schedule depend on. */
  readonly sigmas: SigmaSettings;
}

/** Runs the reference, or reads it where it was run before. @param report is told which part of it is done */
export async function referenceOf(
  place: ReferencePlace,
  settings: ReferenceSettings,
  size: Size,
  scale: number,
  report: (part: number) => void,
): Promise<Reference> {
  const { checkpoint, encoded, cache } = place;
  const { pictures: fitted, seed, sequenceLength } = settings;
  const parts = [fitted, Math.max(1, fitted >> 1), fitted];
  const count = parts.reduce((sum, part) => sum + part);
  const prompts = settings.prompts.slice(0, count);
  const latentShape = latentShapeOf(checkpoint, 1, size);
  const [, ...area] = latentShape;
  const field = await openField(place, settings, prompts, size);
  await encoded();
  const starts = await noises(count, seed, area);
  const promptOf = dealtPrompts(prompts.length, parts);
  const { patchSize } = checkpoint.transformer.config;
  const sigmas = sigmaSettings(checkpoint.scheduler, (area[1] / patchSize) * (area[2] / patchSize));
  const levels = shiftedSigmas(referenceSteps, sigmas);
  const subject = [await digestsOf(checkpoint), prompts, size, scale, seed, fitted, sequenceLength, levels];
  const key = createHash("sha256").update(JSON.stringify(subject)).digest("hex").slice(0, 32);
  const elements = elementCount(area);
  const kept = new TraceFile(path.join(cache, `calibration-${key}.bin`), elements);
  const traces = await kept.read();
  const group = Math.min(
    groupPictures,
    Math.max(1, Math.floor(groupBytes / (elements * 4 * (2 * referenceSteps + 1)))),
  );
  while (traces.length < count) {
    const first = traces.length;
    const some = starts.slice(first, first + group).map((x, row) => ({ x, prompt: promptOf(first + row) }));
    const guidance = scale > 1 ? scale : null;
    const run = tracesOf({ field, levels, guidance, signal: settings.signal }, some, (part) =>
      report((first + some.length * part) / count),
    );
    traces.push(...(await run));
    await kept.write(traces);
  }
  const targets = await field.decoded(
    traces.map(({ end }) => end),
    sketch,
  );
  const all = starts.map((noise, index): FitPicture => ({ noise, prompt: promptOf(index), target: targets[index]! }));
  const grams = traces.slice(0, fitted).map(({ gram }) => gram);
  const [deciding, held] = [all.slice(fitted, fitted + parts[1]!), all.slice(fitted + parts[1]!)];
  return { field, fitted: all.slice(0, fitted), deciding, held, levels, grams, sigmas };
}

function openField(
  { checkpoint, text, run }: ReferencePlace,
  { batch, sequenceLength }: ReferenceSettings,
  prompts: readonly string[],
  size: Size,
): Promise<VelocityField> {
  const latentShape = latentShapeOf(checkpoint, 1, size);
  const { factor, outChannels } = checkpoint.vae.config;
  return VelocityField.open({
    ...{ run, text, sequenceLength, prompts, latentShape, factor, imageChannels: outChannels, batch },
    positions: positionCrop(checkpoint.transformer, latentShape),
  });
}

async function noises(count: number, seed: number | string, area: readonly number[]): Promise<Float32Array[]> {
  const [noise] = await noiseOf(seedsFrom(seed, count), [[count, ...area]]);
  const elements = elementCount(area);
  return Array.from({ length: count }, (_, index) => noise!.data.slice(index * elements, (index + 1) * elements));
}

/** The prompt of each picture: every part has prompts of its own, but for the last two where there are only two prompts. */
function dealtPrompts(prompts: number, parts: readonly number[]): (index: number) => number {
  const [fitted, deciding] = parts as [number, number];
  const count = parts.reduce((sum, part) => sum + part);
  const between = (low: number, value: number, high: number) => Math.min(high, Math.max(low, Math.round(value)));
  const first = between(1, (prompts * fitted) / count, Math.max(1, prompts - 2));
  const second = prompts < 3 ? first : between(first + 1, (prompts * (fitted + deciding)) / count, prompts - 1);
  return (index) => {
    if (index < fitted) return index % first;
    if (prompts < 3) return first;
    if (index < fitted + deciding) return first + ((index - fitted) % (second - first));
    return second + ((index - fitted - deciding) % (prompts - second));
  };
}

/** What tells models apart that end elsewhere from the same noise. */
async function digestsOf(checkpoint: Checkpoint): Promise<readonly (string | null)[]> {
  const parts = [checkpoint.textEncoder, checkpoint.textEncoder2, checkpoint.textEncoder3];
  const digests = parts.map((part) => (part ? modelFingerprint(part.config, part.weights.files) : null));
  // Products of 8-bit integers end elsewhere than those of the same weights in float.
  const derived = [checkpoint.transformer, ...parts].flatMap(
    (part) => part?.weights.derived?.map(({ file }) => file) ?? [],
  );
  return Promise.all([fingerprintOf(checkpoint), ...digests, ...derived.map((file) => path.basename(file))]);
}

/** What a run leaves: where it ends, and the inner products of what it went through. */
interface Trace {
  readonly end: Float32Array;
  readonly gram: Gram;
}

interface TraceSettings {
  readonly field: VelocityField;
  readonly levels: readonly number[];
  readonly guidance: number | null;
  readonly signal?: AbortSignal | undefined;
}

/** Heun's method on all levels. */
async function tracesOf(
  { field, levels, guidance, signal }: TraceSettings,
  starts: readonly { readonly x: Float32Array; readonly prompt: number }[],
  report: (part: number) => void,
): Promise<Trace[]> {
  const ask = async (xs: readonly Float32Array[], sigma: number) => {
    signal?.throwIfAborted();
    const points = xs.map((x, row) => ({ x, sigma, prompt: starts[row]!.prompt, scale: guidance }));
    return (await field.velocities(points)).map(({ value }) => value);
  };
  const runs = starts.map(({ x }) => ({ states: [x], velocities: [] as Float32Array[] }));
  const steps = levels.length - 1;
  for (let step = 0; step < steps; step++) {
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
    report((step + 1) / steps);
  }
  const traces: Trace[] = [];
  for (const { states, velocities } of runs) {
    const [x0] = states as [Float32Array];
    // Relative to the noise: what all states have in common would only cost digits.
    const gram = await gramOf([...states.map((x) => x.map((value, i) => value - x0[i]!)), ...velocities]);
    traces.push({ end: states.at(-1)!, gram });
    if (isDue()) await rest();
  }
  return traces;
}

/** Traces of some pictures in a file, as float64. It is worth time only: one that cannot be read is made again. */
class TraceFile {
  readonly #file: string;
  readonly #elements: number;

  constructor(file: string, elements: number) {
    this.#file = file;
    this.#elements = elements;
  }

  async read(): Promise<Trace[]> {
    const bytes = await readFile(this.#file).catch(() => Buffer.alloc(0));
    const products = (2 * referenceSteps + 1) ** 2;
    const each = this.#elements + products;
    const values = new Float64Array(new Uint8Array(bytes).buffer, 0, Math.floor(bytes.length / 8));
    return Array.from({ length: Math.floor(values.length / each) }, (_, index) => {
      const own = values.subarray(index * each, (index + 1) * each);
      return { end: Float32Array.from(own.subarray(0, this.#elements)), gram: own.slice(this.#elements) };
    });
  }

  async write(traces: readonly Trace[]): Promise<void> {
    await makeFolders(path.dirname(this.#file));
    const parts = traces.flatMap(({ end, gram }) => [Float64Array.from(end), gram]);
    await writeFileAtomic(
      this.#file,
      parts.map((part) => new Uint8Array(part.buffer, part.byteOffset, part.byteLength)),
    );
  }
}
