/**
 * What requests may say, as zod schemas: the checks of every body and the OpenAPI document are made of them. Names are OpenAI's; what
 * OpenAI does not have is named as diffusers names it, and the rest as the option of `generate`.
 */

import * as z from "zod";
import { controlFields, generateSchema, seedJson } from "../options.js";
import { type SamplerName, samplers } from "../schedule/index.js";
import type { Limits } from "./options.js";

/** Characters of a prompt: OpenAI's limit. */
export const longestPrompt = 32_000;
/** A size as requests name it. */
export const sizePattern = /^([1-9]\d{0,4})x([1-9]\d{0,4})$/;

const base64Picture = z
  .string()
  .min(1)
  .max(2 ** 28);
const described = <T extends z.ZodType>(schema: T, description: string) => schema.optional().describe(description);
const part = z.number().min(0).max(1);
const ofLibrary = generateSchema.shape;

function common({ maxImages, maxSteps, maxControls }: Limits) {
  const steps = `1 to ${maxSteps}`;
  return {
    prompt: z.string().min(1).max(longestPrompt).describe("What to draw."),
    model: described(z.string().max(256), "Id of a model of this server. Default: the first one."),
    n: described(z.int().min(1).max(maxImages), "Pictures. Default: 1."),
    size: described(
      z.string().regex(sizePattern, 'Expected "auto" or a size such as "1024x1024"').or(z.literal("auto")),
      'Width x height in pixels, or "auto": the size that the model was trained for; of an edit, as many pixels in the proportions of its picture. Default: "auto".',
    ),
    quality: described(
      z.enum(["auto", "low", "medium", "high", "standard", "hd"]),
      'Number of steps by what counts: low, medium or high ("standard" is medium, "hd" is high). Cannot be combined with num_inference_steps, blocks or stages. Default: "auto", which is medium unless something else says how many steps there are.',
    ),
    output_format: described(z.enum(["png", "jpeg", "webp"]), 'Format of the pictures. Default: "png".'),
    output_compression: described(
      z.int().min(0).max(100),
      "Quality of jpeg and webp, 0 to 100; png is always lossless. Default: 95.",
    ),
    response_format: described(
      z.enum(["b64_json", "url"]),
      'Only "b64_json": this server keeps no pictures at addresses.',
    ),
    background: described(
      z.enum(["auto", "opaque", "transparent"]),
      'Only "auto" and "opaque": the models draw no transparency.',
    ),
    user: described(z.string().max(256), "Your name for the one who asked; it is written to the server's log."),
    preview: described(
      z.enum(["decoded", "fast"]),
      'What partial images are: "decoded", by the model\'s decoder, or "fast", by a linear map, nearly free and blurred. Default: "decoded".',
    ),
    seed: described(
      seedJson,
      "Seed of the first picture, 0 to 2^64 - 1, above 2^53 - 1 as text of digits; picture k has seed + k. Default: random.",
    ),
    seeds: described(
      z.array(seedJson).min(1).max(maxImages),
      "In place of seed: one for each picture, as many as n. In multipart/form-data a JSON array, or a field `seeds[]` for each.",
    ),
    num_inference_steps: described(z.int().min(1).max(maxSteps), `Number of steps, ${steps}. Default: by quality.`),
    guidance_scale: described(
      z.union([z.number().min(0).max(1000), z.array(z.number().min(0).max(1000)).min(1).max(maxSteps)]),
      "Scale of classifier-free guidance, or a list with one for each step; 1 or less turns it off and halves the work. Default: the model's, 4.5 or 1.",
    ),
    guidance_start: described(
      part,
      "Part of the steps after which guidance begins, 0 to 1; steps before it cost half. Default: 0.",
    ),
    guidance_stop: described(
      part,
      "Part of the steps after which guidance ends, 0 to 1; steps after it cost half. Default: 1.",
    ),
    guidance_mode: described(
      ofLibrary.guidanceMode.unwrap(),
      'How guidance is computed: "cfg", or "cfg_zero" (CFG-Zero*). Default: "cfg".',
    ),
    skip_layers: described(
      ofLibrary.skipLayers.unwrap(),
      "Skip-layer guidance, beside guidance: numbers of the transformer's blocks that are left out, from 0; scale, 0 to 100, default 2.8; start and stop, parts of the steps between which it is on, default 0.01 and 0.2. Default: none.",
    ),
    loras: described(
      ofLibrary.loras.unwrap(),
      "LoRAs by the names that the model has for them, each once; scale is -100 to 100, default that of the server. Default: none.",
    ),
    controls: described(
      z.array(controlFields(base64Picture)).min(1).max(maxControls),
      "ControlNets by the names that the model has for them, each with its control picture, base64 or a data: URL; in multipart/form-data files `controls[0][image]`. mask is for inpainting ControlNets: transparent parts are painted, or where nothing is transparent the white ones. scale, -100 to 100, default 1; start and stop, parts of the steps, default 0 and 1. preprocess canny makes the control picture of the edges of image. pixel_range, of the values that the pixels become, is stability_canny for Stability's Canny ControlNet of SD3.5-large, default signed. Default: none.",
    ),
    negative_prompt: described(z.string().max(longestPrompt), "What the pictures should not show. Default: nothing."),
    prompt_2: described(z.string().max(longestPrompt), "What the second text encoder reads. Default: prompt."),
    prompt_3: described(z.string().max(longestPrompt), "What the T5 encoder reads. Default: prompt."),
    negative_prompt_2: described(
      z.string().max(longestPrompt),
      "Negative prompt of the second text encoder. Default: negative_prompt.",
    ),
    negative_prompt_3: described(
      z.string().max(longestPrompt),
      "Negative prompt of the T5 encoder. Default: negative_prompt.",
    ),
    clip_skip: described(
      z.int().min(0).max(1000),
      "Layers before the last but one that CLIP's hidden states of the prompt are taken from. Default: 0.",
    ),
    prompt_weighting: described(
      z.boolean(),
      "Whether prompts have weights of their parts, such as (word:1.3). Default: false.",
    ),
    max_sequence_length: described(
      z.int().min(1).max(512),
      "Tokens of the T5 encoder. Default: 256, or what its tokenizer takes if that is less.",
    ),
    sampler: described(
      z.enum(Object.keys(samplers) as [SamplerName, ...SamplerName[]]),
      "How steps become a schedule. Default: flowturbo, or euler for a distilled model.",
    ),
    grid: described(
      ofLibrary.grid.unwrap(),
      "Noise levels by name. Default: calibrated where such a schedule was found, otherwise the sampler's.",
    ),
    sigmas: described(
      z.array(z.number().min(0).max(1)).min(1).max(maxSteps),
      `Noise levels in place of grid: falling numbers, one where each step starts, of ${steps} steps.`,
    ),
    shift: described(
      z.number().min(0.01).max(100),
      "Shift of the noise levels towards noise, 0.01 to 100. Default: the scheduler's.",
    ),
    mu: described(
      z.number().min(-10).max(10),
      "With a scheduler that shifts by size: its shift parameter, -10 to 10, in place of the one for the size.",
    ),
    blocks: described(
      z.string().min(1).max(8192),
      `The schedule itself, one letter a step, such as "H1P5R3", of ${steps} steps. Default: what the sampler makes.`,
    ),
    stages: described(
      z
        .array(
          z.strictObject({
            width: z.int().min(1).max(99_999),
            height: z.int().min(1).max(99_999),
            blocks: z.string().min(1).max(8192),
            sigma: z.number().gt(0).lt(1).optional(),
            upscale: z.enum(["pixels", "latents"]).optional(),
          }),
        )
        .min(1)
        .max(16),
      "Sizes to run through from coarse to fine, in place of size, quality, sampler and blocks.",
    ),
    deadline_ms: described(
      z
        .number()
        .gt(0)
        .max(2 ** 31),
      "Milliseconds to the pictures: takes the richest schedule that fits, or refuses at once. Default: the server's, or none.",
    ),
  };
}

const edited = {
  image: z
    .union([base64Picture, z.array(base64Picture).length(1)])
    .optional()
    .describe("The picture to edit: base64 or a data: URL; in multipart/form-data a file `image` or `image[]`."),
  images: z
    .array(z.strictObject({ image_url: base64Picture }))
    .length(1)
    .optional()
    .describe("In place of image: a list of one { image_url }, a data: URL. Nothing is fetched from other URLs."),
  mask: z
    .union([base64Picture, z.strictObject({ image_url: base64Picture })])
    .optional()
    .describe(
      "Where to paint: a picture of image's size with an alpha channel. Transparent parts are painted, opaque ones are kept, as with OpenAI.",
    ),
  strength: described(
    z.number().gt(0).max(1),
    "Part of the schedule that runs on image; 1 starts from noise alone. Default: 0.6, or 1 with a mask.",
  ),
  keep_original: described(
    z.boolean(),
    "With mask: whether the kept part is the original pixel for pixel; otherwise it goes through the autoencoder. Default: true.",
  ),
  padding_mask_crop: described(
    z.int().min(0).max(99_999),
    "With mask: draws only its surroundings, with so many pixels around it, at size, and puts them back; the picture keeps the size of image. Default: all of the picture is drawn.",
  ),
};

const streamed = {
  stream: described(z.boolean(), "Whether the answer is a stream of server-sent events. Default: false."),
  partial_images: described(
    z.int().min(0).max(3),
    "With stream: partial images, 0 to 3, evenly over the schedule. Default: 0.",
  ),
};

const queued = {
  partial_images: described(
    z.int().min(0).max(100),
    "Partial images among the events, 0 to 100, evenly over the schedule. Default: 0.",
  ),
  webhook: described(
    z.url({ protocol: /^https?$/ }).max(2048),
    "Address that is told when the job has ended, signed as Standard Webhooks say. The server must have been told to allow its host.",
  ),
};

/** The bodies that the server takes. */
export function bodySchemas(limits: Limits) {
  const fields = common(limits);
  return {
    generation: z.strictObject({ ...fields, ...streamed }),
    edit: z.strictObject({ ...fields, ...edited, ...streamed }),
    job: z.strictObject({ ...fields, ...edited, ...queued }),
  };
}

export type BodySchemas = ReturnType<typeof bodySchemas>;
export type Kind = keyof BodySchemas;
/** A checked body of any kind. */
export type Fields = z.output<BodySchemas["edit"]> & Pick<z.output<BodySchemas["job"]>, "webhook">;

/** The names of `generate`'s options in requests, where they differ. */
const names: Record<string, string> = {
  ...{ count: "n", steps: "num_inference_steps", guidanceScale: "guidance_scale", negativePrompt: "negative_prompt" },
  ...{ prompt2: "prompt_2", prompt3: "prompt_3", clipSkip: "clip_skip", promptWeighting: "prompt_weighting" },
  ...{ negativePrompt2: "negative_prompt_2", negativePrompt3: "negative_prompt_3" },
  maxSequenceLength: "max_sequence_length",
  ...{ guidanceStart: "guidance_start", guidanceStop: "guidance_stop", guidanceMode: "guidance_mode" },
  ...{ keepOriginal: "keep_original", paddingMaskCrop: "padding_mask_crop", pixelRange: "pixel_range" },
  ...{
    skipLayers: "skip_layers",
    width: "size",
    height: "size",
    deadlineMs: "deadline_ms",
    previewCount: "partial_images",
  },
};

/** The field of a request that became an option of `generate`. */
export function fieldOf(option: string): string {
  return Object.hasOwn(names, option) ? names[option]! : option;
}

/** A message about options with the fields' names. Options that are plain words, such as steps, stay: they may be no names where they stand. */
export function withFieldNames(message: string): string {
  return message
    .replace(/\b(controls\[\d+\])\.folder\b/g, "$1.name")
    .replace(/\b[a-z]+(?:[A-Z][a-z]*|\d)+\b/g, fieldOf);
}

/** Fields of OpenAI's that this server has no use for, and why they are refused. */
export const refusedFields: Record<string, string> = {
  style: "The models have no styles; say it in the prompt.",
  moderation: "Nothing is moderated here.",
  input_fidelity: "Use strength, which says how much of the picture is drawn anew.",
};
