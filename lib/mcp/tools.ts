/** The tools as their callers see them: what they take and give. The descriptions are read by language models. */

import * as z from "zod";
import type { AdapterNames } from "../model.js";
import { controlFields, generateSchema, mostControls, seedJson } from "../options.js";

const field = <T extends z.ZodType>(schema: T, description: string) => schema.optional().describe(description);

const text = z.string().max(32_000);

const drawn = {
  prompt: z.string().min(1).max(32_000).describe("What the picture shows, in English."),
  negative_prompt: field(text, "What the picture should not show."),
  prompt_2: field(text, "What the second text encoder reads. Default: prompt."),
  prompt_3: field(text, "What the T5 encoder reads. Default: prompt."),
  negative_prompt_2: field(text, "Negative prompt of the second text encoder. Default: negative_prompt."),
  negative_prompt_3: field(text, "Negative prompt of the T5 encoder. Default: negative_prompt."),
  clip_skip: field(
    z.int().min(0).max(1000),
    "Layers before the last but one that CLIP's hidden states of the prompt are taken from. Default: 0.",
  ),
  prompt_weighting: field(
    z.boolean(),
    "Whether prompts have weights of their parts, such as (word:1.3). Default: false.",
  ),
  max_sequence_length: field(
    z.int().min(1).max(512),
    "Tokens of the T5 encoder. Default: 256, or what its tokenizer takes if that is less.",
  ),
  size: field(
    z.string().regex(/^[1-9]\d{0,4}x[1-9]\d{0,4}$/, 'Expected a size such as "1024x768"'),
    'Width x height in pixels, both multiples of 16, such as "1024x768". Default: the size that the model was trained for; of an edit, as many pixels in the proportions of its picture.',
  ),
  count: field(z.int().min(1).max(10), "Number of pictures, 1 to 10. Default: 1."),
  seed: field(
    seedJson,
    "Seed of the first picture, 0 to 2^64 - 1, above 2^53 - 1 as text of digits; picture k uses seed + k. The same seed and options draw the same picture. Default: random.",
  ),
  seeds: field(
    z.array(seedJson).min(1).max(10),
    "In place of seed: one for each picture, as many as count, such as those of pictures that were drawn before.",
  ),
  quality: field(
    z.enum(["fast", "balanced", "best"]),
    "Number of steps by what counts. Not together with steps or blocks. Default: balanced.",
  ),
  steps: field(z.int().min(1).max(1000), "Number of steps, 1 to 1000, in place of quality."),
  guidance_scale: field(
    z.number().min(0).max(1000),
    "How closely the picture follows the prompt; 1 or less turns guidance off and halves the work. Default: the model's, 4.5 or 1.",
  ),
  skip_layers: field(
    generateSchema.shape.skipLayers.unwrap(),
    "Skip-layer guidance, for SD3.5-medium only: numbers of the transformer's blocks that are left out, such as 7, 8, 9; scale, default 2.8; start and stop, parts of the steps between which it is on, default 0.01 and 0.2. Default: none.",
  ),
  sampler: field(
    generateSchema.shape.sampler.unwrap(),
    "How steps become a schedule. Default: flowturbo, or euler for a distilled model.",
  ),
  blocks: field(
    z.string().min(1).max(8192),
    'The schedule itself, one letter a step, such as "H1P5R3", in place of steps and quality.',
  ),
  deadline_ms: field(
    z
      .number()
      .gt(0)
      .max(2 ** 31),
    "Milliseconds to the picture: the richest schedule that fits is drawn, or the call is refused at once.",
  ),
  output_format: field(
    z.enum(["png", "jpeg", "webp"]),
    "Format of the picture; jpeg and webp are smaller. Default: as the server was started, mostly png.",
  ),
};

const loras = field(
  generateSchema.shape.loras.unwrap(),
  "LoRAs by name, each once, with how much of each is added: scale, 1 is as it was trained. Default: none.",
);

const controls = field(
  z
    .array(controlFields(z.string().min(1)))
    .min(1)
    .max(mostControls),
  "ControlNets by name, each with the picture that guides: image, the absolute path of a file of this machine, a data: URL, or base64. preprocess canny makes the guiding picture of the edges of image. mask is for ControlNets of inpainting, and painted as that of an edit. scale, default 1, is how strongly it guides; start and stop, parts of the steps, default 0 and 1. pixel_range is stability_canny for Stability's Canny ControlNet of SD3.5-large only. Default: none.",
);

const adapters = { loras, controls };

const edited = {
  image: z
    .string()
    .min(1)
    .describe("The picture to edit: the absolute path of a file of this machine, a data: URL, or base64."),
  mask: field(
    z.string().min(1),
    "Where to paint, as image: a picture whose transparent parts are painted, or, where nothing is transparent, the white ones; the rest is kept. Default: everything is drawn anew from the picture.",
  ),
  strength: field(
    z.number().gt(0).max(1),
    "How much of the picture is drawn anew, above 0 and up to 1. Default: 0.6, or 1 with a mask.",
  ),
  padding_mask_crop: field(
    z.int().min(0).max(99_999),
    "With mask: draws only its surroundings, with so many pixels around it, and puts them back, so that a small thing in a large picture has all of the model's pixels; the picture keeps its size. Default: all of the picture is drawn.",
  ),
};

const saved = {
  save_to: field(
    z.string().min(1).max(1000),
    'File or folder to write the pictures to, inside the folder that the server was started with, such as "cat.png" or "pets/". Files that exist are not replaced. Default: nothing is written.',
  ),
};

export interface ToolSchema {
  readonly title: string;
  readonly description: string;
  readonly input: z.ZodType<ToolInput>;
}

/** What a tool is called with. */
export type ToolInput = z.output<z.ZodObject<typeof drawn & typeof adapters & typeof saved>> &
  Partial<z.output<z.ZodObject<typeof edited>>>;

/**
 * @param model name of it, for the description
 * @param canSave whether there is a folder that pictures may be written to
 * @param names of its adapters, so that callers know them; null where they are not known
 */
export function toolSchemas(
  model: string,
  canSave: boolean,
  names: AdapterNames | null = null,
): Record<"generate" | "edit", ToolSchema> {
  // What is left out is never given.
  const further = { ...adaptersOf(names), ...(canSave && saved) } as typeof adapters & typeof saved;
  return {
    generate: {
      title: "Draw pictures",
      description: `Draws pictures of a text with the model ${model}, and returns them.`,
      input: z.strictObject({ ...drawn, ...further }),
    },
    edit: {
      title: "Edit a picture",
      description: `Draws a picture anew after a text with the model ${model}, all of it or where a mask says, and returns it.`,
      input: z.strictObject({ ...drawn, ...edited, ...further }),
    },
  };
}

/** Fields of adapters: none for those that the model has none of. */
function adaptersOf(names: AdapterNames | null): Partial<typeof adapters> {
  if (!names) return adapters;
  const told = <T extends z.ZodType>(schema: T, known: readonly string[]) =>
    schema.describe(`${schema.description} Names: ${known.map((name) => JSON.stringify(name)).join(", ")}.`);
  return {
    ...(names.loras.length > 0 && { loras: told(loras, names.loras) }),
    ...(names.controlNets.length > 0 && { controls: told(controls, names.controlNets) }),
  };
}

/** What a tool says of its pictures. */
export const toolOutput = z.object({
  seeds: z.array(z.union([z.number(), z.string()])).describe("Seed of each picture; text of digits above 2^53 - 1."),
  width: z.number().describe("Pixels."),
  height: z.number().describe("Pixels."),
  model: z.string().describe("The model's name."),
  blocks: z.string().describe("The schedule that ran."),
  steps: z.number().describe("Steps that ran."),
  milliseconds: z
    .object({ total: z.number(), queue: z.number(), encode: z.number(), steps: z.number(), decode: z.number() })
    .describe("Where the time went."),
  warnings: z.array(z.string()).describe("What the caller should know, such as a prompt that was cut."),
  files: z.array(z.string()).describe("Files that were written, if save_to was given."),
});

export type ToolOutput = z.output<typeof toolOutput>;
