/**
 * The options of the public functions as schemas: one place for checks, defaults and flags of the command line. Their
 * types, with what each option means, are in model.ts; a test holds the two together. Values come from the tables of
 * samplers, runtimes and networks. What depends on a checkpoint (sizes, a refiner) is checked in generation/request.ts and generation/stages.ts.
 */

import { inspect } from "node:util";
import * as z from "zod";
import type { Logger } from "./common/logger.js";
import { largestSeed } from "./common/seed.js";
import type { FloatTensor } from "./common/tensor.js";
import { clipped } from "./common/text.js";
import { OptionError } from "./errors.js";
import type {
  AcceptEvent,
  CalibrateProgress,
  EngineProgress,
  HandlerOptions,
  LoadProgress,
  PictureSource,
  PixelRange,
  ProfileProgress,
  RgbPicture,
  StartEvent,
  StepEvent,
} from "./model.js";
import { type Feature, featureNames, type LoraRank, loraRanks, type UpscaleName, upscales } from "./networks/index.js";
import { type BuilderName, builderNames, type RuntimeName, runtimeNames, runtimes } from "./runtimes/index.js";
import {
  blocksGrid,
  defaultSampler,
  distilledDefaults,
  type GridName,
  longestSchedule,
  type QualityName,
  qualities,
  type SamplerName,
  type SamplerRow,
  samplers,
  samplersWithBlocks,
  sigmaGrids,
} from "./schedule/index.js";

/** Entries of the longest list that an option may be: as many as a call has pictures. */
const longestList = 1024;
/** Dimensions of a tensor. */
const longestShape = 16;
/** Fields of an object; loggers may have some. */
const mostFields = 1000;

/** What a field says about itself beyond its type. */
export interface OptionMeta {
  /** Flag of the command line, in commander's notation; none for what only code can pass. */
  readonly flag?: string;
  readonly description: string;
  /** Help text of the flag, where it says something else: of one that turns the option off. Default: the description. */
  readonly help?: string;
  /** Completes "Expected … for <option>". */
  readonly expects: string;
}

/** Words for the command line and for messages: apart from zod's own registry, since what is in that becomes keywords of JSON Schemas. */
const words = z.registry<Omit<Partial<OptionMeta>, "description">>();

/** A copy of a schema that says this about itself. */
export function worded<T extends z.ZodType>(schema: T, said: Omit<Partial<OptionMeta>, "description">): T {
  const copy = schema.clone();
  words.add(copy, said);
  return copy;
}

/** A kind of value, with the words for it. */
const kind = <T extends z.ZodType>(schema: T, expects: string): T => worded(schema, { expects });

const described = <T extends z.ZodType>(
  schema: T,
  inner: z.ZodType,
  description: string,
  flag?: string,
  help?: string,
): T => worded(schema.meta({ description }), { ...words.get(inner), ...(flag && { flag }), ...(help && { help }) });

const required = <T extends z.ZodType>(inner: T, description: string, flag?: string) =>
  described(inner, inner, description, flag);

const optional = <T extends z.ZodType>(inner: T, description: string, flag?: string) =>
  described(inner.optional(), inner, description, flag);

const defaulted = <T extends z.ZodType>(
  inner: T,
  value: z.output<T>,
  description: string,
  flag?: string,
  help?: string,
) =>
  described(
    inner.default(() => value as never),
    inner,
    description,
    flag,
    help,
  );

/** A list that nothing here changes. Not zod's readonly(), which freezes what it is given even where that is no list. */
const list = <T extends z.ZodType>(inner: T, least = 0, most = longestList) =>
  z.array(inner).min(least).max(most) as unknown as z.ZodType<readonly z.output<T>[], readonly z.input<T>[]>;

const integer = (minimum: number, maximum: number, expects = `a whole number from ${minimum} to ${maximum}`) =>
  kind(z.int().min(minimum).max(maximum), expects);
const integers = (maximum: number) =>
  kind(list(z.int().min(1).max(maximum), 1), `a list of whole numbers from 1 to ${maximum}`);
const either = (values: readonly string[]) =>
  values.map((value, index) => `${index === 0 ? "" : index === values.length - 1 ? " or " : ", "}"${value}"`).join("");
const oneOf = <const T extends string>(values: readonly T[]) => kind(z.enum(values), either(values));
/** The largest size is for the model to say. */
const pixels = integer(1, Number.MAX_SAFE_INTEGER, "a whole number of pixels");
const fraction = kind(z.number().min(0).max(1), "a number from 0 to 1");
const boolean = kind(z.boolean(), "true or false");
const path = kind(z.string().min(1), "the path of a folder");
const callback = <T>() =>
  kind(
    z.custom<T>((value) => typeof value === "function"),
    "a function",
  );
const handler = <Event>() => callback<(event: Event, options: HandlerOptions) => unknown>();
const abortSignal = kind(
  z.custom<AbortSignal>((value) => value instanceof AbortSignal),
  "an AbortSignal",
);
/** A float32 tensor in memory. */
export const tensor = z.custom<FloatTensor>((value) => {
  const { dtype, shape, data } = (value ?? {}) as Partial<FloatTensor>;
  return dtype === "float32" && data instanceof Float32Array && Array.isArray(shape);
});
const float32Tensor = "a float32 tensor { dtype, shape, data }";
const picture = kind(
  z.custom<PictureSource>((value) => {
    if (typeof value === "string" || value instanceof Uint8Array) return true;
    const { width = 0, height = 0, data } = (value ?? {}) as Partial<RgbPicture>;
    const isSize = [width, height].every((side) => Number.isInteger(side) && side > 0);
    return isSize && data instanceof Uint8Array && data.length === 3 * width * height;
  }),
  "the path of a picture, an encoded picture, or { width, height, data }",
);
const text = z.string();
const oneSeed = `a whole number from 0 to ${largestSeed}, above ${Number.MAX_SAFE_INTEGER} as a BigInt or as text of digits`;
const seedInJson = `Expected a whole number from 0 to ${largestSeed}, above ${Number.MAX_SAFE_INTEGER} as text of digits`;
/** A seed as JSON has it: a number that is exact, or text. */
export const seedJson = z.union(
  [
    z.int({ error: seedInJson }).min(0, { error: seedInJson }),
    z
      .string({ error: seedInJson })
      .regex(/^\d{1,20}$/, { error: seedInJson, abort: true })
      .refine((digits) => BigInt(digits) <= largestSeed, { error: seedInJson }),
  ],
  { error: seedInJson },
);
/** A seed as code gives it. */
const seedGiven = z.union([...seedJson.options, z.bigint().min(0n).max(largestSeed)]);
const texts = (expects: string) => kind(z.union([text, list(text, 1)]), expects);
const schedule = kind(text.max(longestSchedule), 'a schedule such as "H1P5R3"');
const size = z.strictObject({ width: pixels, height: pixels });
const upscale = z.enum(Object.keys(upscales) as UpscaleName[]).optional();
const sizes = kind(list(size, 1), "sizes such as 1024x1024");
const tokens = optional(
  integer(1, 512),
  "tokens of the T5 encoder (default: 256, or what the tokenizer takes)",
  "--max-sequence-length <tokens>",
);
const guidance = optional(
  kind(z.union([z.enum(["on", "off", "both"]), z.number().min(0)]), '"on", "off", "both" or a guidance scale'),
  "steps with classifier-free guidance: on, off, both, or a scale as for generate (default: on, or off for a distilled model)",
  "--guidance <mode>",
);
const tensorrtFolder = optional(
  path,
  "where TensorRT's or TensorRT-RTX's libraries are (default: looked for)",
  "--tensorrt-dir <folder>",
);
const cudaProviderFolder = optional(
  path,
  "where ONNX Runtime's CUDA provider is (default: looked for)",
  "--cuda-provider-dir <folder>",
);
const cache = optional(
  path,
  "folder of engines, costs, references of calibrate, and schedules whose model's folder cannot be written (default: flowturbo in the user's cache folder)",
  "--cache <folder>",
);
const variant = optional(
  kind(text.min(1), "the name of a variant such as fp16"),
  "variant of the weight files to read, such as fp16",
  "--variant <name>",
);

const textEncoder3 = defaulted(
  boolean,
  true,
  "whether T5, the third text encoder, is used where the model has it; otherwise its part of the text is zeros",
  "--no-t5",
  "leave T5 out, the third and largest text encoder: its part of the text is zeros",
);
const pathOrName = (of: string) => kind(z.string().min(1), `the path of ${of}, or owner/name of a model on the hub`);
const base = optional(
  pathOrName("a folder"),
  "for a model in one file: diffusers folder, or owner/name[@revision] on the hub, with what the file does not hold, such as text encoders or tokenizers",
  "--base <folder>",
);
const previewVae = optional(
  pathOrName("a folder or file"),
  "small autoencoder of the same latents, for decoded previews and upscaling between stages: folder of taesd3, its name on the hub (madebyollin/taesd3), or the file taesd3_decoder.safetensors",
  "--preview-vae <path>",
);

const withTargets = builderNames().filter((name) => runtimes[name]!.builder!.takesTargets);
const samplerNames = Object.keys(samplers) as SamplerName[];
const bySampler = (value: (row: SamplerRow) => string | number) =>
  samplerNames.map((name) => `${value(samplers[name]!)} for ${name}`).join(", ");

/** Adapters of one kind that a model or a request may have. */
const mostAdapters = 64;
/** ControlNets of one request: each is a network of its own in every step. */
export const mostControls = 8;
export const adapterScale = kind(z.number().min(-100).max(100), "a number from -100 to 100");
/** A ControlNet of a request, with pictures in memory, or with another schema of pictures in another form. */
export const controlSchema = <T extends z.ZodType>(picture: T) =>
  z.strictObject({
    folder: kind(z.string().min(1).max(4096), "the name or the folder of a ControlNet"),
    image: picture,
    mask: picture.optional(),
    scale: adapterScale.optional(),
    start: fraction.optional(),
    stop: fraction.optional(),
    preprocess: z.enum(["canny"]).optional(),
    pixelRange: z.enum<PixelRange[]>(["signed", "stability_canny"]).optional(),
  });
/** Characters of the name of an adapter that requests can say, at most. */
export const longestAdapterName = 128;
const adapterName = text.min(1).max(longestAdapterName);
/** A dynamic LoRA of a call. */
const loraUse = z.strictObject({ name: adapterName, scale: adapterScale.optional() });
const loraUses = kind(
  list(loraUse, 1, mostAdapters),
  `an array of 1 to ${mostAdapters} of { name, scale? }, scale from -100 to 100, names of 1 to ${longestAdapterName} characters`,
);
/** A ControlNet of a request that comes from elsewhere: by a name, which is no path, with pictures in another form. */
export const namedControlSchema = <T extends z.ZodType>(picture: T) =>
  z.strictObject({ name: adapterName, ...controlSchema(picture).omit({ folder: true }).shape });
/** The same with names as HTTP and tools have them. */
export const controlFields = <T extends z.ZodType>(picture: T) => {
  const { pixelRange, ...shape } = namedControlSchema(picture).shape;
  return z.strictObject({ ...shape, pixel_range: pixelRange });
};
const blockNumbers = kind(
  list(z.int().min(0).max(1000), 1, 1000),
  "a list of numbers of blocks of the transformer, from 0",
);

export const loadSchema = z.strictObject({
  runtime: defaulted(
    oneOf<"auto" | RuntimeName>(["auto", ...runtimeNames()]),
    "auto",
    `what runs the graphs: auto, ${Object.values(runtimes)
      .map(({ name, runsOn }) => `${name} (${runsOn})`)
      .join(", ")}`,
    "--runtime <name>",
  ),
  devices: optional(
    kind(
      z.union([
        z.literal("all"),
        list(z.int().min(0).max(1023), 1, 64).refine((numbers) => new Set(numbers).size === numbers.length),
      ]),
      '"all" or a list of different numbers of devices, from 0',
    ),
    "GPUs that draw together: all that can be used, or numbers in the order of CUDA, such as 0,1 (tensorrt, tensorrt-rtx, cuda; default: one)",
    "--devices <list>",
  ),
  tensorrtFolder,
  cudaProviderFolder,
  cache,
  capture: defaulted(
    boolean,
    false,
    "on a GPU: replay each picture as one CUDA graph; least latency, but launches are not shared",
    "--capture",
  ),
  keepTextEncoders: defaulted(
    boolean,
    true,
    "whether text encoders stay in memory; otherwise it is freed after each use, and new prompts load them again",
    "--no-keep-text-encoders",
    "free the text encoders' memory after each use; they are loaded again for new prompts",
  ),
  variant,
  textEncoder3,
  distilled: optional(
    boolean,
    "draw by default as models are drawn that were distilled to few steps without guidance; where nothing is said, the scheduler or a name such as turbo decides",
    "--distilled",
  ),
  base,
  previewVae,
  loras: optional(
    kind(
      list(
        z.strictObject({
          file: z.string().min(1),
          scale: adapterScale.optional(),
          name: adapterName.optional(),
          dynamic: z.boolean().optional(),
        }),
        1,
        mostAdapters,
      ),
      `an array of 1 to ${mostAdapters} of { file, scale?, name?, dynamic? }, scale from -100 to 100, names of 1 to ${longestAdapterName} characters`,
    ),
    "LoRAs: merged into the weights once, or where dynamic is true named by requests",
  ),
  controlNets: optional(
    kind(
      list(z.strictObject({ folder: z.string().min(1), name: adapterName.optional() }), 1, mostAdapters),
      `an array of 1 to ${mostAdapters} of { folder, name? }`,
    ),
    "ControlNets that are opened with the model, so that requests name them",
  ),
  threads: optional(
    integer(1, 1024),
    "threads of the CPU runtime (default: one for each physical core, within the quota of the control group)",
    "--threads <n>",
  ),
  weights: defaulted(
    oneOf(["auto", "lazy", "folded", "int8"]),
    "auto",
    "weights on the CPU: 16-bit ones widened at each use (lazy) or once at load (folded: faster, twice the memory); or int8, those of attention and MLP quantised once into the cache and multiplied as integers (faster than folded, and those in a quarter of its memory; pictures differ a little)",
    "--weights <mode>",
  ),
  t5Weights: optional(
    oneOf(["stored", "int8"]),
    "T5's weights on the CPU, whatever --weights says: as they are stored, or int8, quantised once into the cache and computed with in float32 (0.63 of the memory of 16 bits)",
    "--t5 <weights>",
  ),
  maxBatch: defaulted(
    integer(1, 256),
    8,
    "at most so many pictures share a launch, of one request or of several",
    "--max-batch <n>",
  ),
  batches: optional(
    integers(256),
    "numbers of pictures that a launch may have, such as those that engines were compiled for; in place of maxBatch",
  ),
  maxWaitMs: defaulted(
    kind(z.number().min(0).max(60_000), "a number of milliseconds from 0 to 60000"),
    20,
    "how long a launch that does not fill the device may be held back for others to share it",
  ),
  pinBatch: optional(
    integer(1, 256),
    "pads every launch to so many pictures, so that no bit of a picture depends on what else is drawn",
    "--pin-batch <n>",
  ),
  maxQueue: defaulted(
    integer(0, 1_000_000, "a whole number of at least 0"),
    64,
    "requests that may wait; more are refused",
  ),
  watchdogMs: defaulted(
    kind(z.number().min(1000).max(600_000), "a number of milliseconds from 1000 to 600000"),
    10_000,
    "how long the runtime's process may give no sign of life until it is replaced",
  ),
  allowPaths: defaulted(
    boolean,
    true,
    "whether requests may name pictures by the path of a file of this machine; false refuses them whatever a request says",
  ),
  measureCosts: defaulted(boolean, true, "measures unknown costs in the background, while no request is under way"),
  logger: optional(
    kind(
      z.custom<Logger>((value) => typeof value === "object" && value !== null),
      "an object such as console",
    ),
    "receives warnings and notes; the library never prints",
  ),
  signal: optional(abortSignal, "aborts loading"),
  onProgress: optional(callback<(progress: LoadProgress) => void>(), "called as loading proceeds"),
});

const prompt = texts("a string or a non-empty array of strings");
const promptText = "what to draw; several prompts form one batch";
const textForEach = texts("a string, or an array of as many strings as there are prompts");
/** Options that say how texts are encoded, of `generate` and of `encode`. */
const textOptions = {
  prompt2: optional(textForEach, "what the second text encoder reads (default: the prompt)", "--prompt2 <text>"),
  prompt3: optional(textForEach, "what the T5 encoder reads (default: the prompt)", "--prompt3 <text>"),
  negativePrompt: optional(textForEach, "what the pictures should not show (default: nothing)", "--negative <text>"),
  negativePrompt2: optional(
    textForEach,
    "negative prompt of the second text encoder (default: the negative prompt)",
    "--negative2 <text>",
  ),
  negativePrompt3: optional(
    textForEach,
    "negative prompt of the T5 encoder (default: the negative prompt)",
    "--negative3 <text>",
  ),
  clipSkip: defaulted(
    integer(0, 1000, "a whole number of at least 0"),
    0,
    "layers before the last but one that CLIP's hidden states of the prompt are taken from",
    "--clip-skip <layers>",
  ),
  promptWeighting: defaulted(
    boolean,
    false,
    "read weights of parts of the prompts, such as (word:1.3)",
    "--prompt-weighting",
  ),
  maxSequenceLength: tokens,
};

export const encodeSchema = z.strictObject({
  prompt: required(prompt, "what to encode; several prompts are rows"),
  ...textOptions,
  loras: optional(
    loraUses,
    "LoRAs that the texts are read with, by the names of those that load() was given as dynamic",
  ),
  signal: optional(abortSignal, "aborts encoding"),
});

/** Tensors in memory, or with another schema of tensors in another form. */
export const embedsSchema = <T extends z.ZodType>(tensor: T) =>
  z.strictObject({
    promptEmbeds: tensor,
    pooledPromptEmbeds: tensor,
    negativePromptEmbeds: tensor.optional(),
    negativePooledPromptEmbeds: tensor.optional(),
    loras: list(loraUse, 0, mostAdapters).optional(),
    tokens: z.int().nonnegative().optional(),
    warnings: list(z.string()).optional(),
  });

const generateFields = z.strictObject({
  prompt: optional(prompt, promptText),
  promptEmbeds: optional(
    kind(embedsSchema(tensor), `embeddings as encode() returns them, each ${float32Tensor}`),
    "embeddings of prompts, as encode() returns them, in place of prompt",
  ),
  ...textOptions,
  width: optional(pixels, "width of a picture (default: the model's native size)", "--width <pixels>"),
  height: optional(pixels, "height of a picture (default: the model's native size)", "--height <pixels>"),
  sampler: optional(
    oneOf(samplerNames),
    `${samplerNames.join(", ")} (default: ${defaultSampler}, or ${distilledDefaults(4).sampler} for a distilled model)`,
    "--sampler <name>",
  ),
  steps: optional(
    integer(1, 1000),
    `number of steps (default: ${bySampler(({ steps }) => steps)}; those that a distilled model was made for)`,
    "--steps <n>",
  ),
  quality: optional(
    oneOf(Object.keys(qualities) as QualityName[]),
    `number of steps by what counts: ${Object.entries(qualities)
      .map(([name, { steps }]) => `${name} (${steps})`)
      .join(
        ", ",
      )}, or for a distilled model half its steps, its steps and 8; or the last, middle and first schedule of the model's ladder, where it has one`,
    "--quality <name>",
  ),
  blocks: optional(
    schedule,
    `schedule of the sampler ${samplersWithBlocks().join(" or ")}, such as H1P5R3 or HPPPPPRRR, in place of steps`,
    "--blocks <schedule>",
  ),
  grid: optional(
    oneOf([...(Object.keys(sigmaGrids) as GridName[]), "calibrated"]),
    `noise levels: ${Object.keys(sigmaGrids).join(", ")}, calibrated (default: calibrated where such a schedule was found, otherwise ${bySampler(({ grid }) => grid)}; ${blocksGrid} for blocks)`,
    "--grid <name>",
  ),
  sigmas: optional(
    kind(list(z.number().min(0).max(1), 1, 1000), "a list of falling numbers from 1 to 0"),
    "noise levels in place of grid, one where each step starts, such as 1,0.9,0.5; shifted as the scheduler shifts (shift 1: as they are)",
    "--sigmas <list>",
  ),
  shift: optional(
    kind(z.number().min(0.01).max(100), "a number from 0.01 to 100"),
    "shift of the noise levels towards noise (default: the scheduler's)",
    "--shift <factor>",
  ),
  mu: optional(
    kind(z.number().min(-10).max(10), "a number from -10 to 10"),
    "with a scheduler that shifts by size: its shift parameter, in place of the one for the size",
    "--mu <number>",
  ),
  guidanceScale: optional(
    kind(
      z.union([z.number().min(0).max(1000), list(z.number().min(0).max(1000), 1, 1000)]),
      "a number from 0 to 1000, or a list of such numbers, one for each step",
    ),
    "classifier-free guidance scale, of which the default sampler takes less in steps that go far, or a list with one for each step; 1 or less turns it off and halves the work (default: 4.5, or 1 for a distilled model)",
    "--guidance <scale>",
  ),
  guidanceStart: defaulted(
    fraction,
    0,
    "part of the steps, from 0 to 1, after which guidance begins; steps before it cost half",
    "--guidance-start <part>",
  ),
  guidanceStop: defaulted(
    fraction,
    1,
    "part of the steps, from 0 to 1, after which guidance ends; steps after it cost half",
    "--guidance-stop <part>",
  ),
  guidanceMode: defaulted(
    oneOf(["cfg", "cfg_zero"]),
    "cfg",
    "cfg, or cfg_zero (CFG-Zero*: the unconditional velocity is scaled to the conditional one, and the first step is left out)",
    "--guidance-mode <name>",
  ),
  skipLayers: optional(
    kind(
      z.strictObject({
        layers: blockNumbers,
        scale: kind(z.number().min(0).max(100), "a number from 0 to 100").optional(),
        start: fraction.optional(),
        stop: fraction.optional(),
      }),
      "{ layers, scale?, start?, stop? }, layers a list of numbers of blocks from 0, start and stop parts of the steps from 0 to 1",
    ),
    "skip-layer guidance: away from what the transformer predicts without these blocks; with guidance only",
  ),
  loras: optional(loraUses, "LoRAs of this request, by the names of those that load() was given as dynamic"),
  controls: optional(
    kind(
      list(controlSchema(picture), 1, mostControls),
      `an array of 1 to ${mostControls} of { folder, image, mask?, scale?, start?, stop?, preprocess?, pixelRange? }`,
    ),
    "ControlNets that guide the picture, each with its control picture",
  ),
  seed: optional(
    kind(seedGiven, oneSeed),
    "seed of the first picture; picture k uses seed + k (default: random)",
    "--seed <n>",
  ),
  seeds: optional(
    kind(list(seedGiven, 1), `a list of seeds, each ${oneSeed}`),
    "seeds in place of seed, one for each picture, such as 7,1,12",
    "--seeds <list>",
  ),
  count: defaulted(integer(1, 1024), 1, "pictures for each prompt", "--count <n>"),
  stages: optional(
    kind(
      list(z.strictObject({ ...size.shape, blocks: schedule, sigma: z.number().optional(), upscale }), 1),
      "an array of { width, height, blocks, sigma?, upscale? }",
    ),
    "sizes to run through from coarse to fine, in place of width, height and blocks",
  ),
  image: optional(picture, "picture to start from", "--image <file>"),
  mask: optional(
    picture,
    "where to paint: white (or opaque) parts are drawn anew, the rest of image is kept",
    "--mask <file>",
  ),
  strength: optional(
    kind(z.number().gt(0).max(1), "a number above 0 and up to 1"),
    "part of the schedule that runs on image; 1 starts from noise alone (default: 0.6)",
    "--strength <part>",
  ),
  keepOriginal: defaulted(
    boolean,
    true,
    "with mask: whether the kept part is the original pixel for pixel; otherwise it goes through the autoencoder",
    "--no-keep-original",
    "with --mask: take the kept part through the autoencoder instead of pixel for pixel from the original",
  ),
  paddingMaskCrop: optional(
    integer(0, Number.MAX_SAFE_INTEGER, "a whole number of pixels from 0"),
    "with mask: draw only its surroundings, with so many pixels around it, and put them back into the picture, which keeps its size",
    "--padding-mask-crop <pixels>",
  ),
  preview: optional(
    oneOf(["fast", "decoded"]),
    "what each step event shows: fast (a linear map of the latents), decoded (the full decoder)",
  ),
  previewCount: optional(
    integer(1, 1000),
    "with preview: at most so many steps show previews, evenly over the schedule, the last never (default: every step)",
  ),
  stepLatents: defaulted(boolean, false, "whether step events hold the latents after the step"),
  outputType: defaulted(
    oneOf(["image", "latent"]),
    "image",
    "image, or latent: the decoder is left out, and the result holds latents and no pictures",
    "--output-type <type>",
  ),
  metadata: defaulted(
    kind(z.union([z.enum(["full", "parameters"]), z.literal(false)]), '"full", "parameters" or false'),
    "full",
    "what the pictures' files say about themselves: full, parameters (enough to draw them again) or false",
    "--metadata <mode>",
  ),
  noise: optional(
    kind(z.union([tensor, list(tensor, 1)]), `${float32Tensor}, or one for each stage`),
    "starting noise [B, C, h, w] in place of a seed, one for each stage",
  ),
  deadlineMs: optional(
    kind(
      z
        .number()
        .gt(0)
        .max(2 ** 31),
      "a positive number of milliseconds",
    ),
    "milliseconds from the call to the pictures; takes the richest schedule that fits, or refuses",
    "--deadline <ms>",
  ),
  timeoutMs: optional(
    kind(
      z
        .number()
        .gt(0)
        .max(2 ** 31 - 1),
      "a positive number of milliseconds",
    ),
    "milliseconds from the call after which it is stopped and fails, whatever it does then",
    "--timeout <ms>",
  ),
  ladder: optional(
    kind(list(schedule, 1, 64), 'an array of schedules such as ["H1P7R2", "H1P3R1"]'),
    "schedules to choose from with deadlineMs, the richest first (default: the model's ladder, or calibrated and usual ones)",
  ),
  prefer: defaulted(
    oneOf(["admission", "quality"]),
    "admission",
    "with deadlineMs: a schedule that leaves room for the requests expected at the present load, or the richest that fits",
  ),
  ticket: optional(
    kind(text.min(1).max(256), "a text of 1 to 256 characters"),
    "names the caller from one call to the next: one that was refused, and comes back when it was told to, has the room that it was told of",
  ),
  priority: defaulted(
    integer(-100, 100),
    0,
    "order of requests: higher numbers first, then earlier deadlines; waiting raises it",
  ),
  pinBatch: optional(
    integer(1, 256),
    "pads every launch of this request to so many pictures (default: the option of load())",
  ),
  include: optional(
    kind(list(z.enum(["latents", "pixels"])), 'an array of "latents" and "pixels"'),
    "values that the result holds besides the pictures: latents, pixels (default: latents)",
  ),
  allowPaths: defaulted(
    boolean,
    true,
    "whether image and mask may be the paths of files of this machine, where load() allows it",
  ),
  signal: optional(abortSignal, "aborts between steps"),
  onAccept: optional(handler<AcceptEvent>(), "called when the request has been accepted"),
  onStart: optional(handler<StartEvent>(), "called when the request's turn has come"),
  onStep: optional(handler<StepEvent>(), "called after each step, in order"),
  reports: optional(
    oneOf(["each", "bunched"]),
    "when step events come: each as soon as its step is done, or those of 200 ms bunched (default: each with preview or stepLatents, otherwise bunched)",
  ),
});

/** What a request draws has to be said. */
export const hasPrompt = ({ prompt, promptEmbeds }: { readonly prompt?: unknown; readonly promptEmbeds?: unknown }) =>
  prompt !== undefined || promptEmbeds !== undefined;

export const generateSchema = generateFields.refine(hasPrompt, { path: ["prompt"] });

export const profileSchema = z.strictObject({
  sizes: optional(
    sizes,
    "sizes of pictures as width x height, such as 1024x1024,832x1216 (default: the model's native size)",
    "--sizes <list>",
  ),
  batches: defaulted(integers(256), [1, 2, 4, 8], "pictures drawn at once, such as 1,2,4", "--batches <list>"),
  guidance,
  guidanceMode: generateSchema.shape.guidanceMode,
  loras: optional(
    kind(list(z.string().min(1), 1, 64), "a list of names"),
    "also steps with these dynamic LoRAs together, by their names, such as ink,pastel",
    "--loras <list>",
  ),
  controls: optional(
    kind(list(z.string().min(1), 1, mostControls), "a list of names of ControlNets"),
    "also steps with these ControlNets together, by their names, such as canny,depth",
    "--controls <list>",
  ),
  skipLayers: optional(
    blockNumbers,
    "also steps with skip-layer guidance that leaves out these blocks, such as 7,8,9",
    "--skip-layers <list>",
  ),
  rounds: defaulted(integer(1, 1000), 9, "timed runs of each launch", "--rounds <n>"),
  reset: defaulted(
    boolean,
    false,
    "forget the table before, also what was measured at other sizes and batches",
    "--reset",
  ),
  maxSequenceLength: tokens,
  signal: optional(abortSignal, "aborts measuring"),
  onProgress: optional(callback<(progress: ProfileProgress) => void>(), "called as measuring proceeds"),
});

export const calibrateSchema = z.strictObject({
  sizes: profileSchema.shape.sizes,
  guidanceScales: defaulted(
    kind(list(z.number().min(1).max(1000), 1, 64), "a list of numbers from 1 to 1000"),
    [4.5],
    "guidance scales to calibrate for, such as 2,4.5,7; those between are interpolated; 1 is without guidance",
    "--guidance <list>",
  ),
  steps: defaulted(
    kind(list(z.int().min(2).max(28), 1, 27), "a list of whole numbers from 2 to 28"),
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    "numbers of steps to find schedules for",
    "--steps <list>",
  ),
  intervals: defaulted(
    boolean,
    true,
    "whether schedules are found too whose first or last steps are not guided",
    "--no-intervals",
    "leave the schedules out whose first or last steps are not guided",
  ),
  prompts: optional(
    kind(list(text.min(1), 2, 1024), "a list of at least 2 prompts"),
    "what the pictures show that schedules are fitted to (default: prompts.txt of the model, or a list of the package's)",
  ),
  pictures: defaulted(
    integer(2, 256),
    16,
    "pictures that schedules are fitted to (one and a half times as many are drawn besides, to decide and to measure)",
    "--pictures <n>",
  ),
  seed: defaulted(kind(seedGiven, oneSeed), 0, "seed of the first picture", "--seed <n>"),
  batch: optional(
    integer(1, 256),
    "pictures in a launch (default: 8, or 1 where each batch needs an engine)",
    "--batch <n>",
  ),
  file: optional(
    kind(z.string().min(1), "the path of a file"),
    "file to write; models read it as schedules.json in their folder (default: that file, or one in the cache if it cannot be written)",
    "--out <file>",
  ),
  reset: defaulted(boolean, false, "fit again what the file holds already", "--reset"),
  maxSequenceLength: tokens,
  signal: optional(abortSignal, "aborts calibrating"),
  onProgress: optional(callback<(progress: CalibrateProgress) => void>(), "called as calibrating proceeds"),
});

export const compileSchema = z.strictObject({
  runtime: defaulted(
    oneOf<"auto" | BuilderName>(["auto", ...builderNames()]),
    "auto",
    `library to build with: ${["auto", ...builderNames()].join(", ")}`,
    "--runtime <name>",
  ),
  tensorrtFolder,
  variant,
  textEncoder3,
  base,
  previewVae,
  sizes: profileSchema.shape.sizes,
  batches: defaulted(integers(1024), [1], "pictures drawn at once, such as 1,2,4", "--batches <list>"),
  targets: described(
    list(z.string().regex(/^\d{1,2}\.\d$/))
      .transform((targets) => targets.map((target) => Math.round(Number(target) * 10)))
      .optional(),
    kind(z.unknown(), 'compute capabilities such as "8.9"'),
    `compute capabilities to build for with ${withTargets.join(" or ")}, such as 8.6,8.9,12.0 (default: the present GPU)`,
    "--targets <list>",
  ),
  guidance,
  guidanceMode: generateSchema.shape.guidanceMode,
  loras: loadSchema.shape.loras,
  lorasRank: optional(
    kind(z.literal<LoraRank[]>([...loraRanks]), `${loraRanks.slice(0, -1).join(", ")} or ${loraRanks.at(-1)}`),
    "also steps with dynamic LoRAs of up to this rank",
    "--loras-rank <rank>",
  ),
  controls: optional(
    kind(list(z.string().min(1), 1, mostControls), "a list of folders of ControlNets"),
    "also steps with these ControlNets together: folders, divided by commas",
    "--controls <list>",
  ),
  skipLayers: optional(
    blockNumbers,
    "also steps with skip-layer guidance that leaves out these blocks, such as 7,8,9",
    "--skip-layers <list>",
  ),
  features: defaulted(
    kind(list(z.enum<Feature[]>(featureNames())), `${either(featureNames())}, or several`),
    [],
    `also what only some pictures need: ${featureNames().join(", ")}`,
    "--with <list>",
  ),
  maxSequenceLength: tokens,
  cache,
  jobs: defaulted(integer(1, 64), 1, "engines built at the same time", "--jobs <n>"),
  memory: optional(
    kind(z.number().positive(), "a positive number of bytes"),
    "bytes of memory that builds may take (default: what is available)",
  ),
  signal: optional(abortSignal, "aborts compiling"),
  onProgress: optional(callback<(progress: EngineProgress) => void>(), "called as compiling proceeds"),
});

/** With the guidance scale, whose default is the model's. */
export type ResolvedGenerateOptions = Omit<z.output<typeof generateSchema>, "guidanceScale"> & {
  readonly guidanceScale: number | readonly number[];
};
export type ResolvedLoadOptions = z.output<typeof loadSchema>;
export type ResolvedEncodeOptions = z.output<typeof encodeSchema>;

/**
 * Whether steps run with guidance: which of the two, for the option `guidance` of measuring and compiling.
 * @param areMixed whether guided requests may leave guidance out of some steps, as some calibrated schedules do
 */
export function guidanceModes(mode: "on" | "off" | "both" | number, areMixed: boolean): readonly boolean[] {
  const isGuided = typeof mode === "number" ? mode > 1 : mode !== "off";
  return [...(isGuided ? [true] : []), ...(!isGuided || mode === "both" || areMixed ? [false] : [])];
}

/** @throws OptionError for an interval of guidance that is empty */
export function checkGuidanceInterval({
  guidanceStart: start,
  guidanceStop: stop,
}: Pick<ResolvedGenerateOptions, "guidanceStart" | "guidanceStop">): void {
  if (start >= stop)
    throw new OptionError(
      "guidanceStart",
      `Expected guidanceStart (${start}) below guidanceStop (${stop}). Use guidanceScale 1 to draw without guidance.`,
    );
}

/** @throws OptionError for a list of seeds beside something else that pictures start from, or of another length than there are pictures */
export function checkSeeds(
  { seed, seeds, noise }: Partial<Pick<ResolvedGenerateOptions, "seed" | "seeds" | "noise">>,
  pictures: number,
): void {
  for (const [name, value] of Object.entries({ seed, noise }))
    if (seeds && value !== undefined)
      throw new OptionError("seeds", `Both seeds and ${name} say what pictures start from; leave out one.`);
  if (seeds && seeds.length !== pictures)
    throw new OptionError(
      "seeds",
      `Expected as many seeds as pictures, ${pictures} (count for each prompt), but received ${seeds.length}. Give ${pictures}, or change count.`,
    );
}

/** @throws OptionError for noise levels that rise or repeat */
export function checkSigmas(sigmas: readonly number[] | undefined): void {
  if (sigmas?.[0] === 0)
    throw new OptionError("sigmas", "Expected sigmas that begin above 0; the 0 at the end may be left out.");
  for (const [index, sigma] of sigmas?.entries() ?? [])
    if (index > 0 && sigma >= sigmas![index - 1]!)
      throw new OptionError(
        "sigmas",
        `Expected falling sigmas but number ${index + 1}, ${sigma}, is not below number ${index}, ${sigmas![index - 1]}.`,
      );
}

/**
 * Checks `input` against a schema and fills in defaults.
 * @throws OptionError that names the first wrong option, what was expected and what was received
 */
export function checkOptions<T extends z.ZodObject>(schema: T, input: unknown, subject: string): z.output<T> {
  refuseOversized(input);
  const result = schema.safeParse(input);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  if (issue.code === "unrecognized_keys") {
    const key = issue.keys[0]!;
    if (issue.path.length > 0) {
      const path = issue.path as (string | number)[];
      const at = path.reduce<z.ZodType | undefined>((field, name) => field && fieldOf(field, name), schema);
      const inner = at && unwrapped(at);
      const has = inner instanceof z.ZodObject ? `; it has ${Object.keys(inner.shape).join(", ")}` : "";
      throw new OptionError(String(path[0]), `${pathText(path)} has no field ${show(key)}${has}.`);
    }
    throw new OptionError(
      key,
      `${subject} has no option ${show(key)}; it has ${Object.keys(schema.shape).join(", ")}.`,
    );
  }
  const option = String(issue.path[0] ?? "options");
  if (!(option in schema.shape))
    throw new OptionError(option, `Expected an object of options for ${option} but received ${show(input)}.`);
  const { expects, path, received } = deepestField(schema, input, issue.path as (string | number)[]);
  // A name that a field does not take.
  const wanted =
    issue.code === "invalid_value" && path.length === issue.path.length && issue.values.every(isText)
      ? either(issue.values)
      : expects;
  throw new OptionError(option, `Expected ${wanted} for ${pathText(path)} but received ${show(received)}.`);
}

const isText = (value: unknown): value is string => typeof value === "string";

/** Of what is wrong the innermost field that there are words for: an entry may be long, and right but for it. */
function deepestField(schema: z.ZodType, input: unknown, path: readonly (string | number)[]) {
  let field = schema;
  let received = input;
  let deepest = { expects: "", path: path.slice(0, 1), received: undefined as unknown };
  for (const [index, name] of path.entries()) {
    const next = fieldOf(field, name);
    if (!next) break;
    field = next;
    received = (received as Record<string, unknown> | null | undefined)?.[name];
    const expects = wordsFor(field);
    if (expects !== undefined) deepest = { expects, path: path.slice(0, index + 1), received };
  }
  return deepest;
}

/** The schema of a field of an object, or of an entry of a list; undefined for what is neither. */
function fieldOf(schema: z.ZodType, name: string | number): z.ZodType | undefined {
  const inner = unwrapped(schema);
  if (inner instanceof z.ZodObject) return Object.hasOwn(inner.shape, name) ? inner.shape[name] : undefined;
  return inner instanceof z.ZodArray ? (inner.element as z.ZodType) : undefined;
}

function unwrapped(schema: z.ZodType): z.ZodType {
  return schema instanceof z.ZodOptional || schema instanceof z.ZodDefault
    ? unwrapped(schema.unwrap() as z.ZodType)
    : schema;
}

function wordsFor(schema: z.ZodType): string | undefined {
  const { expects } = words.get(schema) ?? words.get(unwrapped(schema)) ?? {};
  if (expects !== undefined) return expects;
  const inner = unwrapped(schema);
  return inner instanceof z.ZodEnum ? either(inner.options.map(String)) : undefined;
}

/** controls[0].scale */
function pathText(path: readonly (string | number)[]): string {
  return path.map((name, index) => (typeof name === "number" ? `[${name}]` : index > 0 ? `.${name}` : name)).join("");
}

/**
 * Looks at nothing but lengths. Schemas have an issue for each wrong entry and field, whatever their own limit says: millions
 * of them would take seconds and gigabytes.
 * @throws OptionError for a list or an object that no option takes
 */
export function refuseOversized(input: unknown): void {
  if (typeof input !== "object" || input === null || Array.isArray(input)) return;
  const refuse = (option: string, length: number, most: number, what: string) => {
    if (length > most) throw new OptionError(option, `Expected at most ${most} ${what} but received ${length}.`);
  };
  const refuseShape = (option: string, shape: unknown) => {
    if (Array.isArray(shape)) refuse(option, shape.length, longestShape, `dimensions in a shape of ${option}`);
  };
  refuse("options", fieldsOf(input), mostFields, "options");
  for (const [option, value] of Object.entries(input)) {
    if (Array.isArray(value)) refuse(option, value.length, longestList, `entries for ${option}`);
    for (const each of Array.isArray(value) ? value : [value]) {
      refuse(option, fieldsOf(each), mostFields, `fields for ${option}`);
      // A tensor, or an object of tensors and lists.
      const fields: [string, unknown][] = fieldsOf(each) > 0 ? Object.entries(each) : [];
      for (const [name, value] of fields) {
        if (name === "shape") refuseShape(option, value);
        else if (Array.isArray(value)) refuse(option, value.length, longestList, `entries for ${option}.${name}`);
        else refuseShape(option, (value as { shape?: unknown } | null | undefined)?.shape);
      }
    }
  }
}

function fieldsOf(value: unknown): number {
  if (typeof value !== "object" || value === null || Array.isArray(value) || ArrayBuffer.isView(value)) return 0;
  return Object.keys(value).length;
}

/** @throws OptionError for a picture that is given by a URL, or by a path where `allowPaths` is false; no file is looked at */
export function refusePaths(
  options: Pick<ResolvedGenerateOptions, "image" | "mask" | "controls" | "allowPaths">,
): void {
  const { image, mask, controls = [] } = options;
  const sources: [string, PictureSource | undefined][] = [
    ["image", image],
    ["mask", mask],
    ...controls.flatMap((control, index): [string, PictureSource | undefined][] => [
      [`controls[${index}].image`, control.image],
      [`controls[${index}].mask`, control.mask],
    ]),
  ];
  for (const [name, source] of sources) {
    if (typeof source !== "string") continue;
    if (!options.allowPaths)
      throw new OptionError(
        optionOf(name),
        `Expected an encoded picture, or { width, height, data }, for ${name} but received a path, which is not allowed here (allowPaths is false). Give the picture's bytes.`,
      );
    refuseUrl(name, source);
  }
}

/** The option of a name such as "controls[0].image". */
const optionOf = (name: string) => name.replace(/\[.*/, "");

/** @throws OptionError for a URL where a file's path belongs. @param name of the option, or of a field of it */
export function refuseUrl(name: string, path: string): void {
  const remedy = remedies[path.match(/^[a-z]+(?=:)/i)?.[0].toLowerCase() ?? ""];
  if (remedy)
    throw new OptionError(
      optionOf(name),
      `Expected the path of a file for ${name} but received a URL, ${show(path)}. ${remedy}`,
      { publicMessage: `Expected a picture for ${name} but received a URL. ${remedy}` },
    );
}

const download =
  "Nothing is downloaded: save the picture to a file and give its path, or from code give its bytes, new Uint8Array(await (await fetch(url)).arrayBuffer()).";
/** What to do in place of giving a URL, by its scheme. A file whose name begins like one can be given as ./name. */
const remedies: Readonly<Record<string, string>> = {
  http: download,
  https: download,
  ftp: download,
  blob: download,
  data: 'Give the picture\'s bytes, Buffer.from(url.slice(url.indexOf(",") + 1), "base64"), or on the command line a file.',
  file: "Give the path, which fileURLToPath(url) of node:url makes of it.",
};

/** What a field of a schema says about itself. */
export function optionMeta(field: z.ZodType): OptionMeta {
  return { ...field.meta(), ...words.get(field) } as unknown as OptionMeta;
}

/** Characters of what was received that a message has. */
const longestShown = 80;

/** A value in a message, whatever it is. */
function show(value: unknown): string {
  if (typeof value === "function") return "a function";
  const text =
    typeof value === "string"
      ? JSON.stringify(value.slice(0, longestShown))
      : inspect(value, {
          // Fields of fields may be any number.
          depth: Array.isArray(value) ? 1 : 0,
          maxArrayLength: 20,
          maxStringLength: 80,
          breakLength: Infinity,
          customInspect: false,
        });
  return clipped(text, longestShown);
}
