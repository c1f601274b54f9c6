/** What a call asks for beyond the arguments that all providers share: `providerOptions.flowturbo`, checked. */

import { inspect } from "node:util";
import * as z from "zod";
import type { DrawRequest, NamedControl, sharedOptions, textOptions } from "../clients/drawer.js";
import { nearest } from "../common/near.js";
import { clipped } from "../common/text.js";
import type { ImageFormat, LoraUse, SkipLayers, Stage } from "../model.js";
import { generateSchema, mostControls, namedControlSchema, optionMeta } from "../options.js";
import type { QualityName, SamplerName } from "../schedule/index.js";
import { ArgumentError } from "./errors.js";

/** `providerOptions.flowturbo` of a call of `generateImage`. */
export interface FlowTurboImageOptions {
  /** Number of steps; see `GenerateOptions.steps`. */
  numInferenceSteps?: number | undefined;
  /** Number of steps by what counts, in place of `numInferenceSteps`: `"fast"`, `"balanced"` or `"best"`. */
  quality?: QualityName | undefined;
  /** Scale of classifier-free guidance, 0 to 1000. Default: the model's, 4.5, or 1 for one that was distilled. */
  guidanceScale?: number | undefined;
  /** Skip-layer guidance; see `GenerateOptions.skipLayers`. Default: none. */
  skipLayers?: SkipLayers | undefined;
  /** LoRAs by the names that the model was loaded with, as dynamic; each once. Default: none. */
  loras?: LoraUse[] | undefined;
  /** ControlNets by the names that the model was loaded with. Default: none. */
  controls?: FlowTurboControl[] | undefined;
  /** What the pictures should not show. Default: nothing. */
  negativePrompt?: string | undefined;
  /** What the second text encoder reads. Default: the prompt. */
  prompt2?: string | undefined;
  /** What the T5 encoder reads. Default: the prompt. */
  prompt3?: string | undefined;
  /** Negative prompt of the second text encoder. Default: `negativePrompt`. */
  negativePrompt2?: string | undefined;
  /** Negative prompt of the T5 encoder. Default: `negativePrompt`. */
  negativePrompt3?: string | undefined;
  /** Layers before the last but one that CLIP's hidden states of the prompt are taken from, 0 and more. Default: 0. */
  clipSkip?: number | undefined;
  /** Whether prompts have weights of their parts, such as `(word:1.3)`. Default: false. */
  promptWeighting?: boolean | undefined;
  /** Tokens of the T5 encoder, 1 to 512. Default: 256, or what its tokenizer takes if that is less. */
  maxSequenceLength?: number | undefined;
  /** In place of `seed`: one for each of `n` pictures, 0 to 2⁶⁴ − 1, above 2⁵³ − 1 as text of digits. */
  seeds?: (number | string)[] | undefined;
  /** The schedule, such as `"H1P5R3"`, in place of `numInferenceSteps`. */
  blocks?: string | undefined;
  /** How steps become a schedule. Default: `"flowturbo"`, or `"euler"` for a distilled model. */
  sampler?: SamplerName | undefined;
  /** With a picture to edit: part of the schedule that runs on it, above 0 and up to 1. Default: 0.6, or 1 with a mask. */
  strength?: number | undefined;
  /** With a mask: draws only its surroundings, with so many pixels around it, and puts them back; the picture keeps its size. Default: all of it is drawn. */
  paddingMaskCrop?: number | undefined;
  /** Milliseconds from the call to the pictures: the richest schedule that fits is drawn, or the call is refused. */
  deadlineMs?: number | undefined;
  /** Sizes to run through from coarse to fine, in place of the size and a schedule. */
  stages?: Stage[] | undefined;
  /** Format of the pictures. Default: `"png"`. */
  outputFormat?: ImageFormat | undefined;
  /** Quality of jpeg and webp files, 0 to 100. Default: 95. */
  outputCompression?: number | undefined;
}

/** A ControlNet of a call, with its control picture; see `Control`. */
export interface FlowTurboControl extends Omit<NamedControl, "image" | "mask"> {
  /** The control picture: base64 or a data: URL. Nothing is downloaded. */
  image: string;
  /** For ControlNets of inpainting: base64 or a data: URL. Transparent parts are painted, and of a mask without any the white ones. */
  mask?: string | undefined;
}

interface Field {
  readonly schema: z.ZodType;
  readonly expects: string;
  /** Its name in a request to draw. */
  readonly as: keyof DrawRequest;
}

type Shared = Exclude<(typeof sharedOptions)[number], "seed" | "width" | "height" | "guidanceScale">;

const ofLibrary = (as: Shared): Field => {
  const schema = generateSchema.shape[as];
  return { schema, expects: optionMeta(schema).expects, as };
};

/** Of the one prompt of a call. */
const text = (as: (typeof textOptions)[number]): Field => ({ schema: z.string(), expects: "a string", as });

/** A picture within JSON: base64 or a data: URL, as bytes. */
const picture = z.string().transform((text, context): Uint8Array => {
  const data = text.replace(/^data:image\/[\w.+-]+;base64,/, "");
  if (/^[A-Za-z0-9+/]+={0,2}$/.test(data.replace(/\s+/g, ""))) return new Uint8Array(Buffer.from(data, "base64"));
  context.addIssue({ code: "custom", message: "no base64" });
  return z.NEVER;
});

const fields: Record<keyof FlowTurboImageOptions, Field> = {
  numInferenceSteps: ofLibrary("steps"),
  quality: ofLibrary("quality"),
  guidanceScale: { schema: z.number().min(0).max(1000), expects: "a number from 0 to 1000", as: "guidanceScale" },
  skipLayers: ofLibrary("skipLayers"),
  loras: ofLibrary("loras"),
  controls: {
    schema: z.array(namedControlSchema(picture)).min(1).max(mostControls),
    expects: `an array of up to ${mostControls} of { name, image, mask?, scale?, start?, stop?, preprocess?, pixelRange? }, pictures as base64 or data: URLs,`,
    as: "controls",
  },
  negativePrompt: text("negativePrompt"),
  prompt2: text("prompt2"),
  prompt3: text("prompt3"),
  negativePrompt2: text("negativePrompt2"),
  negativePrompt3: text("negativePrompt3"),
  clipSkip: ofLibrary("clipSkip"),
  promptWeighting: ofLibrary("promptWeighting"),
  maxSequenceLength: ofLibrary("maxSequenceLength"),
  seeds: ofLibrary("seeds"),
  blocks: ofLibrary("blocks"),
  sampler: ofLibrary("sampler"),
  strength: ofLibrary("strength"),
  paddingMaskCrop: ofLibrary("paddingMaskCrop"),
  deadlineMs: ofLibrary("deadlineMs"),
  stages: ofLibrary("stages"),
  outputFormat: { schema: z.enum(["png", "jpeg", "webp"]), expects: '"png", "jpeg" or "webp"', as: "format" },
  outputCompression: {
    schema: z.int().min(0).max(100),
    expects: "a whole number from 0 to 100",
    as: "compression",
  },
};

/** Arguments of `generateImage` itself, which someone may look for among the options. */
const own: Record<string, string> = {
  prompt: "prompt",
  seed: "seed",
  size: "size",
  width: "size",
  height: "size",
  aspectratio: "aspectRatio",
  n: "n",
  count: "n",
  image: "prompt.images",
  images: "prompt.images",
  mask: "prompt.mask",
  signal: "abortSignal",
  abortsignal: "abortSignal",
};

/** Names of the same things in the library, in its HTTP interface and elsewhere that are not near in letters. */
const others: Record<string, keyof FlowTurboImageOptions> = {
  steps: "numInferenceSteps",
  guidance: "guidanceScale",
  cfg: "guidanceScale",
  cfgscale: "guidanceScale",
  lora: "loras",
  controlnet: "controls",
  controlnets: "controls",
  skipguidancelayers: "skipLayers",
  skiplayerguidance: "skipLayers",
  negative: "negativePrompt",
  schedule: "blocks",
  scheduler: "sampler",
  timeout: "deadlineMs",
  deadline: "deadlineMs",
  format: "outputFormat",
};

/** @throws ArgumentError for a name that there is not, with the one that is near, and for a value that is wrong or fits no other */
export function readOptions(given: Readonly<Record<string, unknown>> | undefined): Partial<DrawRequest> {
  const read: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(given ?? {})) {
    if (!Object.hasOwn(fields, name)) throw unknownName(name);
    if (value === undefined) continue;
    const { schema, expects, as } = fields[name as keyof FlowTurboImageOptions];
    const { success, data } = schema.safeParse(value);
    if (!success) {
      const shown = clipped(inspect(value, { depth: 0, breakLength: Infinity, maxStringLength: 80 }), 80);
      throw new ArgumentError(
        "providerOptions",
        `Expected ${expects} for providerOptions.flowturbo.${name} but received ${shown}.`,
      );
    }
    read[as] = data;
  }
  if (read.compression !== undefined && (read.format ?? "png") === "png")
    throw new ArgumentError(
      "providerOptions",
      'The format png has no quality. Leave providerOptions.flowturbo.outputCompression out, or set outputFormat to "jpeg" or "webp".',
    );
  return read;
}

function unknownName(name: string): ArgumentError {
  const plain = name.toLowerCase().replaceAll(/[^a-z\d]/g, "");
  const argument = Object.hasOwn(own, plain) ? own[plain] : undefined;
  const near = Object.hasOwn(others, plain) ? others[plain] : nearest(name, Object.keys(fields));
  const remedy = argument
    ? `It is an argument of generateImage itself: ${argument}.`
    : near
      ? `Did you mean ${near}?`
      : `There are ${Object.keys(fields).join(", ")}.`;
  const shown = JSON.stringify(clipped(name, 80));
  return new ArgumentError("providerOptions", `providerOptions.flowturbo has no option ${shown}. ${remedy}`);
}
