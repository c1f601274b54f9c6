/**
 * The options of the public functions, once: the schema below gives the types, the defaults, the checks and the flags
 * of the command line. What depends on a checkpoint (sizes, a refiner) is checked in the pipeline.
 */

import { z } from "zod";
import type { Logger } from "./common/logger.js";
import type { FloatTensor } from "./common/tensor.js";
import { OptionError } from "./errors.js";

/** What a field says about itself beyond its type. */
export interface OptionMeta {
  /** Flag of the command line, in commander's notation; none for what only code can pass. */
  readonly flag?: string;
  /** Help text. */
  readonly description: string;
  /** Completes "Expected … for <option>". */
  readonly expects: string;
}

const described = <T extends z.ZodType>(schema: T, meta: OptionMeta): T => schema.meta({ ...meta });

const text = z.string();
const texts = z.union([text, z.array(text).min(1)]);
const whole = (minimum: number, maximum: number) => z.int().min(minimum).max(maximum);
/** The largest size is for the model to say. */
const pixels = whole(1, Number.MAX_SAFE_INTEGER);
const callback = <T>() => z.custom<T>((value) => typeof value === "function");
const tensor = z.custom<FloatTensor>((value) => {
  const tensor = value as Partial<FloatTensor> | null;
  return typeof tensor === "object" && tensor?.data instanceof Float32Array && Array.isArray(tensor.shape);
});
const picture = z.custom<PictureSource>((value) => {
  if (typeof value === "string" || value instanceof Uint8Array) return true;
  const { width = 0, height = 0, data } = (value ?? {}) as Partial<RgbPicture>;
  const isSize = [width, height].every((side) => Number.isInteger(side) && side > 0);
  return isSize && data instanceof Uint8Array && data.length === 3 * width * height;
});
const stage = z.strictObject({
  width: pixels,
  height: pixels,
  blocks: text,
  sigma: z.number().optional(),
});
const abortSignal = z.custom<AbortSignal>((value) => value instanceof AbortSignal);

/** Sent while a model loads. */
export interface LoadProgress {
  readonly phase: "checkpoint" | "graphs" | "runtime";
  readonly done: number;
  readonly total: number;
}

/** 8-bit RGB values of a picture. */
export interface RgbPicture {
  readonly width: number;
  readonly height: number;
  /** Row-major RGB, 3 bytes a pixel. */
  readonly data: Uint8Array;
}

/** A picture that can be encoded and written. */
export interface Picture extends RgbPicture {
  toPNG(): Promise<Buffer>;
  toFile(file: string): Promise<void>;
}

/** Sent after each finished block of a schedule. */
export interface StepEvent {
  /** Index of the block, from 0, and the number of blocks, over all stages. */
  readonly step: number;
  readonly steps: number;
  /** Index of the stage, from 0, and the number of stages. */
  readonly stage: number;
  readonly stages: number;
  readonly block: "E" | "H" | "P" | "R";
  /** Noise level reached. */
  readonly sigma: number;
  /** Milliseconds that the block took in the runtime. */
  readonly milliseconds: number;
  /**
   * If the option `preview` asks for them: each picture as the run sees it now (the estimate x − σ·v); "fast" ones have
   * one pixel for each latent.
   */
  readonly previews: readonly Picture[];
}

/** One size of a run from coarse to fine. */
export interface Stage {
  readonly width: number;
  readonly height: number;
  /** Its schedule, such as "H1P4R2". */
  readonly blocks: string;
  /** How far the picture of the stage before is noised again, from 0 (not at all) to 1; default 0.6. Not for the first. */
  readonly sigma?: number | undefined;
}

/** A picture to read: the path of a file, an encoded file, or 8-bit RGB values. */
export type PictureSource = string | Uint8Array | RgbPicture;

const tensorrtFolder = described(text.min(1).optional(), {
  flag: "--tensorrt-dir <folder>",
  description: "where TensorRT's or TensorRT-RTX's libraries are (default: looked for)",
  expects: "the path of a folder",
});

const cacheFolder = described(text.min(1).optional(), {
  flag: "--cache <folder>",
  description: "folder of the caches of engines and of costs (default: flowturbo in the user's cache folder)",
  expects: "the path of a folder",
});

export const loadSchema = z.strictObject({
  runtime: described(z.enum(["auto", "onnxruntime", "tensorrt", "tensorrt-rtx"]).default("auto"), {
    flag: "--runtime <name>",
    description: "what runs the graphs: auto, onnxruntime (CPU), tensorrt or tensorrt-rtx",
    expects: '"auto", "onnxruntime", "tensorrt" or "tensorrt-rtx"',
  }),
  tensorrtFolder,
  cache: cacheFolder,
  capture: described(z.boolean().default(false), {
    flag: "--capture",
    description: "on a GPU: replay each picture as one CUDA graph; least latency, but launches are not shared",
    expects: "true or false",
  }),
  keepTextEncoders: described(z.boolean().default(true), {
    flag: "--no-keep-text-encoders",
    description: "free the text encoders' memory after each use; they are loaded again for new prompts",
    expects: "true or false",
  }),
  variant: described(text.min(1).optional(), {
    flag: "--variant <name>",
    description: "twin of the weight files to read, such as fp16",
    expects: "the name of a variant such as fp16",
  }),
  threads: described(whole(1, 1024).optional(), {
    flag: "--threads <n>",
    description: "threads of the CPU runtime (default: one for each core)",
    expects: "a whole number from 1 to 1024",
  }),
  weights: described(z.enum(["auto", "lazy", "folded"]).default("auto"), {
    flag: "--weights <mode>",
    description: "16-bit weights: lazy widens them at each use, folded once at load (faster, twice the memory)",
    expects: '"auto", "lazy" or "folded"',
  }),
  maxBatch: described(whole(1, 256).default(8), {
    flag: "--max-batch <n>",
    description: "at most so many pictures share a launch, of one request or of several",
    expects: "a whole number from 1 to 256",
  }),
  batches: described(z.array(whole(1, 256)).min(1).optional(), {
    description:
      "numbers of pictures that a launch may have, such as those that engines were compiled for; in place of maxBatch",
    expects: "a list of whole numbers from 1 to 256",
  }),
  maxWaitMs: described(z.number().min(0).max(60_000).default(20), {
    description: "how long a launch that leaves the device half empty may wait for company that is on its way",
    expects: "a number of milliseconds from 0 to 60000",
  }),
  pinBatch: described(whole(1, 256).optional(), {
    flag: "--pin-batch <n>",
    description: "pads every launch to so many pictures, so that no picture depends on its company in any bit",
    expects: "a whole number from 1 to 256",
  }),
  maxQueue: described(whole(0, 1_000_000).default(64), {
    description: "requests that may wait; more are refused",
    expects: "a whole number of at least 0",
  }),
  measureCosts: described(z.boolean().default(true), {
    description: "measures what launches cost while nobody asks for pictures, where it is not known yet",
    expects: "true or false",
  }),
  logger: described(z.custom<Logger>((value) => typeof value === "object" && value !== null).optional(), {
    description: "receives warnings and notes; the library never prints",
    expects: "an object such as console",
  }),
  signal: described(abortSignal.optional(), { description: "aborts loading", expects: "an AbortSignal" }),
  onProgress: described(callback<(progress: LoadProgress) => void>().optional(), {
    description: "called as loading proceeds",
    expects: "a function",
  }),
});

export const generateSchema = z.strictObject({
  prompt: described(texts, {
    description: "what to draw; several prompts form one batch",
    expects: "a string or a non-empty array of strings",
  }),
  negativePrompt: described(texts.optional(), {
    flag: "--negative <text>",
    description: "what to keep away from (default: nothing)",
    expects: "a string, or an array of as many strings as there are prompts",
  }),
  width: described(pixels.optional(), {
    flag: "--width <pixels>",
    description: "width of a picture (default: the model's native size)",
    expects: "a whole number of pixels",
  }),
  height: described(pixels.optional(), {
    flag: "--height <pixels>",
    description: "height of a picture (default: the model's native size)",
    expects: "a whole number of pixels",
  }),
  sampler: described(z.enum(["flowturbo", "euler", "heun"]).optional(), {
    flag: "--sampler <name>",
    description: "flowturbo, euler or heun (default: flowturbo)",
    expects: '"flowturbo", "euler" or "heun"',
  }),
  steps: described(whole(1, 1000).optional(), {
    flag: "--steps <n>",
    description: "number of steps (default: 10 for flowturbo, 28 for euler and heun)",
    expects: "a whole number from 1 to 1000",
  }),
  blocks: described(text.optional(), {
    flag: "--blocks <schedule>",
    description: "schedule of the flowturbo sampler, such as H1P5R3 or HPPPPPRRR, in place of --steps",
    expects: 'a schedule such as "H1P5R3"',
  }),
  grid: described(z.enum(["shifted", "diffusers"]).optional(), {
    flag: "--grid <name>",
    description: "noise levels: shifted, or diffusers (default: diffusers for euler, else shifted)",
    expects: '"shifted" or "diffusers"',
  }),
  guidanceScale: described(z.number().min(0).max(1000).default(4.5), {
    flag: "--guidance <scale>",
    description: "classifier-free guidance scale; 1 or less turns it off and halves the work",
    expects: "a number from 0 to 1000",
  }),
  seed: described(whole(0, Number.MAX_SAFE_INTEGER - 4096).optional(), {
    flag: "--seed <n>",
    description: "seed of the first picture; picture k uses seed + k (default: random)",
    expects: "a whole number of at least 0",
  }),
  count: described(whole(1, 1024).default(1), {
    flag: "--count <n>",
    description: "pictures for each prompt",
    expects: "a whole number from 1 to 1024",
  }),
  stages: described(z.array(stage).min(1).optional(), {
    description: "sizes to run through from coarse to fine, in place of width, height and blocks",
    expects: "an array of { width, height, blocks, sigma? }",
  }),
  image: described(picture.optional(), {
    flag: "--image <file>",
    description: "picture to start from",
    expects: "the path of a picture, an encoded picture, or { width, height, data }",
  }),
  mask: described(picture.optional(), {
    flag: "--mask <file>",
    description: "where to paint: white (or opaque) parts are drawn anew, the rest of --image is kept",
    expects: "the path of a picture, an encoded picture, or { width, height, data }",
  }),
  strength: described(z.number().gt(0).max(1).optional(), {
    flag: "--strength <part>",
    description: "part of the schedule that runs on --image: 1 forgets it (default: 0.6)",
    expects: "a number above 0 and up to 1",
  }),
  keepOriginal: described(z.boolean().default(true), {
    flag: "--no-keep-original",
    description: "with --mask: take the kept part through the autoencoder instead of pixel for pixel from the original",
    expects: "true or false",
  }),
  preview: described(z.enum(["fast", "decoded"]).optional(), {
    description: "what each step event shows: fast (a linear map of the latents), decoded (the full decoder)",
    expects: '"fast" or "decoded"',
  }),
  noise: described(z.union([tensor, z.array(tensor).min(1)]).optional(), {
    description: "starting noise [B, C, h, w] in place of a seed, one for each stage",
    expects: "a float32 tensor { dtype, shape, data }, or one for each stage",
  }),
  maxSequenceLength: described(whole(1, 512).optional(), {
    flag: "--max-sequence-length <tokens>",
    description: "tokens of the T5 encoder (default: 256, or what the tokenizer takes)",
    expects: "a whole number from 1 to 512",
  }),
  deadlineMs: described(
    z
      .number()
      .gt(0)
      .max(2 ** 31)
      .optional(),
    {
      flag: "--deadline <ms>",
      description: "milliseconds from the call to the pictures; takes the richest schedule that fits, or refuses",
      expects: "a positive number of milliseconds",
    },
  ),
  ladder: described(z.array(text).min(1).max(64).optional(), {
    description: "schedules to choose from with deadlineMs, the richest first (default: the model's)",
    expects: 'an array of schedules such as ["H1P7R2", "H1P3R1"]',
  }),
  priority: described(z.int().min(-100).max(100).default(0), {
    description: "who goes first: higher numbers, then earlier deadlines; waiting raises it",
    expects: "a whole number from -100 to 100",
  }),
  pinBatch: described(whole(1, 256).optional(), {
    description: "as the option of load(), for this call",
    expects: "a whole number from 1 to 256",
  }),
  signal: described(abortSignal.optional(), { description: "aborts between steps", expects: "an AbortSignal" }),
  onStep: described(callback<(event: StepEvent) => void>().optional(), {
    description: "called after each step, in order; of steps shorter than 200 ms several at a time",
    expects: "a function",
  }),
});

/** Sent while costs are measured: launches done, and how many there will be at most. */
export interface ProfileProgress {
  readonly done: number;
  readonly total: number;
}

const sizes = z
  .array(z.strictObject({ width: pixels, height: pixels }))
  .min(1)
  .optional();

export const profileSchema = z.strictObject({
  sizes: described(sizes, {
    flag: "--sizes <list>",
    description: "sizes of pictures as width x height, such as 1024x1024,832x1216 (default: the model's native size)",
    expects: "sizes such as 1024x1024",
  }),
  batches: described(
    z
      .array(whole(1, 256))
      .min(1)
      .default(() => [1, 2, 4, 8]),
    {
      flag: "--batches <list>",
      description: "pictures drawn at once, such as 1,2,4",
      expects: "whole numbers from 1 to 256",
    },
  ),
  guidance: described(z.enum(["on", "off", "both"]).default("on"), {
    flag: "--guidance <mode>",
    description: "steps with classifier-free guidance: on, off, both, or a scale as for generate",
    expects: '"on", "off" or "both"',
  }),
  rounds: described(whole(1, 1000).default(9), {
    flag: "--rounds <n>",
    description: "timed runs of each launch",
    expects: "a whole number from 1 to 1000",
  }),
  maxSequenceLength: generateSchema.shape.maxSequenceLength,
  signal: described(abortSignal.optional(), { description: "aborts measuring", expects: "an AbortSignal" }),
  onProgress: described(callback<(progress: ProfileProgress) => void>().optional(), {
    description: "called as measuring proceeds",
    expects: "a function",
  }),
});

/** Sent while engines are compiled. `done` never decreases, `total` is constant; both are for one engine. */
export interface EngineProgress {
  readonly graph: string;
  /** Index of the engine, and how many there are. */
  readonly engine: number;
  readonly engines: number;
  /** `waiting`: for another process that builds the same engine, or for an earlier job. */
  readonly phase: "weights" | "waiting" | "building" | "done";
  /** What the library says that it does. */
  readonly detail: string;
  readonly done: number;
  readonly total: number;
}

export const compileSchema = z.strictObject({
  runtime: described(z.enum(["auto", "tensorrt", "tensorrt-rtx"]).default("auto"), {
    flag: "--runtime <name>",
    description: "library to build with: auto, tensorrt or tensorrt-rtx",
    expects: '"auto", "tensorrt" or "tensorrt-rtx"',
  }),
  tensorrtFolder,
  variant: loadSchema.shape.variant,
  sizes: profileSchema.shape.sizes,
  batches: described(
    z
      .array(whole(1, 1024))
      .min(1)
      .default(() => [1]),
    {
      flag: "--batches <list>",
      description: "pictures drawn at once, such as 1,2,4",
      expects: "whole numbers from 1 to 1024",
    },
  ),
  targets: described(
    z
      .array(z.string().regex(/^\d{1,2}\.\d$/))
      .transform((targets) => targets.map((target) => Math.round(Number(target) * 10)))
      .optional(),
    {
      flag: "--targets <list>",
      description:
        "compute capabilities to build for with tensorrt-rtx, such as 8.6,8.9,12.0 (default: the present GPU)",
      expects: 'compute capabilities such as "8.9"',
    },
  ),
  guidance: described(z.enum(["on", "off", "both"]).default("on"), {
    flag: "--guidance <mode>",
    description: "steps with classifier-free guidance: on, off, both, or a scale as for generate",
    expects: '"on", "off" or "both"',
  }),
  features: described(
    z.array(z.enum(["stages", "editing", "previews"])).default(() => []),
    {
      flag: "--with <list>",
      description: "also what only some pictures need: stages, editing, previews",
      expects: '"stages", "editing" or "previews", or several',
    },
  ),
  maxSequenceLength: generateSchema.shape.maxSequenceLength,
  cache: cacheFolder,
  jobs: described(whole(1, 64).default(1), {
    flag: "--jobs <n>",
    description: "engines built at the same time",
    expects: "a whole number from 1 to 64",
  }),
  memory: described(z.number().positive().optional(), {
    description: "bytes of memory that builds may take (default: what is available)",
    expects: "a positive number of bytes",
  }),
  signal: described(abortSignal.optional(), { description: "aborts compiling", expects: "an AbortSignal" }),
  onProgress: described(callback<(progress: EngineProgress) => void>().optional(), {
    description: "called as compiling proceeds",
    expects: "a function",
  }),
});

export type CompileEnginesOptions = z.input<typeof compileSchema>;
export type ProfileOptions = z.input<typeof profileSchema>;
export type LoadOptions = z.input<typeof loadSchema>;
export type GenerateOptions = z.input<typeof generateSchema>;
export type ResolvedLoadOptions = z.output<typeof loadSchema>;
export type ResolvedGenerateOptions = z.output<typeof generateSchema>;

/**
 * Checks `input` against a schema and fills in defaults.
 * @throws OptionError that names the first wrong option, what was expected and what was received
 */
export function checkOptions<T extends z.ZodObject>(schema: T, input: unknown, subject: string): z.output<T> {
  const result = schema.safeParse(input);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  if (issue.code === "unrecognized_keys") {
    const key = issue.keys[0]!;
    throw new OptionError(key, `${subject} has no option "${key}"; it has ${Object.keys(schema.shape).join(", ")}.`);
  }
  const option = String(issue.path[0] ?? "options");
  const field = schema.shape[option] as z.ZodType | undefined;
  const expects = field ? optionMeta(field).expects : "an object of options";
  const received = (input as Record<string, unknown> | null | undefined)?.[option];
  throw new OptionError(option, `Expected ${expects} for ${option} but received ${show(field ? received : input)}.`);
}

/** What a field of a schema says about itself. */
export function optionMeta(field: z.ZodType): OptionMeta {
  return field.meta() as unknown as OptionMeta;
}

function show(value: unknown): string {
  if (typeof value === "function") return "a function";
  if (typeof value === "number" || value === undefined) return String(value);
  const json = JSON.stringify(value) ?? String(value);
  return json.length > 80 ? `${json.slice(0, 77)}...` : json;
}
