/** Checked fields × a model → a call of `generate`, and how its pictures are answered. Every refusal that needs no model's work is here. */

import { clipped } from "../common/text.js";
import { sizeLike } from "../generation/sizes.js";
import type { GenerateOptions, ImageFormat, ImageModel } from "../model.js";
import { parseBlocks, qualities } from "../schedule/index.js";
import type { Body } from "./bodies.js";
import { invalid } from "./failure.js";
import { type Fields, type Kind, sizePattern } from "./fields.js";
import type { Limits } from "./options.js";
import { controlsOf, type Edited, editedOf } from "./pictures.js";

export type ApiQuality = "low" | "medium" | "high";

/** How pictures are answered. */
export interface Rendering {
  readonly format: ImageFormat;
  /** Of jpeg and webp, 1 to 100; undefined for the format's own. */
  readonly quality: number | undefined;
  /** The quality that was asked for; null where something else says how many steps there are. */
  readonly asked: ApiQuality | null;
}

export interface Settled {
  readonly options: GenerateOptions;
  readonly rendering: Rendering;
  readonly isEdit: boolean;
  /** Pixels of the picture that is edited; 0 for none. */
  readonly inputPixels: number;
}

/** A quality of the API and the library's name for it. */
const presets: Record<string, { readonly name: ApiQuality; readonly quality: "fast" | "balanced" | "best" }> = {
  low: { name: "low", quality: "fast" },
  medium: { name: "medium", quality: "balanced" },
  high: { name: "high", quality: "best" },
  standard: { name: "medium", quality: "balanced" },
  hd: { name: "high", quality: "best" },
};

/** @throws Failure that names the field and the remedy */
export async function settle(body: Body, model: ImageModel, limits: Limits, kind: Kind): Promise<Settled> {
  const { fields } = body;
  refuseUnsupported(fields, kind);
  const preset = fields.quality === undefined ? undefined : presets[fields.quality];
  checkSchedule(fields, preset !== undefined, limits);
  checkNames(fields, model);
  const edited = await editedOf(body, limits);
  if (!edited && kind === "edit")
    throw invalid("image", "Expected a picture for image, which is required.", "missing_required_parameter");
  if (!edited && fields.strength !== undefined)
    throw invalid("strength", "The field strength is for edits; it needs an image.");
  for (const name of ["padding_mask_crop", "keep_original"] as const)
    if (!edited?.mask && fields[name] !== undefined)
      throw invalid(name, `The field ${name} is for edits with a mask; give image and mask, or leave ${name} out.`);
  checkSeeds(fields);
  const size = sizeOf(fields, model, edited);
  const param = fields.stages ? "stages" : "size";
  for (const { width, height } of fields.stages ?? [size])
    if (width * height > limits.maxPixels)
      throw invalid(
        param,
        `Expected at most ${limits.maxPixels} pixels for a picture but ${width}x${height} has more.`,
      );
  const { deadline_ms: deadlineMs = limits.deadlineMs ?? undefined, partial_images: previewCount = 0 } = fields;
  const controls = await controlsOf(body, limits);
  const isStaged = fields.stages !== undefined;
  const named = {
    ...{ negativePrompt: fields.negative_prompt, sampler: fields.sampler, steps: fields.num_inference_steps },
    ...{
      blocks: fields.blocks,
      guidanceScale: fields.guidance_scale,
      seed: fields.seed,
      seeds: fields.seeds,
      stages: fields.stages,
      deadlineMs,
    },
    ...{ grid: fields.grid, sigmas: fields.sigmas, shift: fields.shift, mu: fields.mu },
    ...{ guidanceStart: fields.guidance_start, guidanceStop: fields.guidance_stop, guidanceMode: fields.guidance_mode },
    ...{ prompt2: fields.prompt_2, prompt3: fields.prompt_3, clipSkip: fields.clip_skip },
    ...{ negativePrompt2: fields.negative_prompt_2, negativePrompt3: fields.negative_prompt_3 },
    ...{ promptWeighting: fields.prompt_weighting, maxSequenceLength: fields.max_sequence_length },
    ...{ quality: preset?.quality, count: fields.n, strength: fields.strength ?? (edited?.mask ? 1 : undefined) },
    ...{ skipLayers: fields.skip_layers, loras: fields.loras, controls: controls ?? undefined },
    ...{ keepOriginal: fields.keep_original, paddingMaskCrop: fields.padding_mask_crop },
  };
  return {
    options: {
      prompt: fields.prompt,
      ...(!isStaged && size),
      ...Object.fromEntries(Object.entries(named).filter(([, value]) => value !== undefined)),
      ...(edited && { image: edited.image, ...(edited.mask && { mask: edited.mask }) }),
      ...(previewCount > 0 && { preview: fields.preview ?? "decoded", previewCount }),
      ...{ metadata: "parameters", allowPaths: false },
    },
    rendering: {
      format: fields.output_format ?? "png",
      quality: fields.output_compression === undefined ? undefined : Math.max(1, fields.output_compression),
      asked: preset?.name ?? null,
    },
    isEdit: edited !== null,
    inputPixels: edited ? size.width * size.height : 0,
  };
}

/** What cannot be had is said, not left out. */
function refuseUnsupported(fields: Fields, kind: Kind): void {
  const refuse = (param: string, message: string) => {
    throw invalid(param, message, "unsupported_value");
  };
  if (fields.background === "transparent")
    refuse("background", 'The models draw no transparent background. Use "opaque" or "auto".');
  if (fields.response_format === "url")
    refuse("response_format", 'This server keeps no pictures at URLs. Use "b64_json".');
  if ((fields.output_format ?? "png") === "png" && fields.output_compression !== undefined)
    refuse(
      "output_compression",
      'The format png has no quality. Leave output_compression out, or use "jpeg" or "webp".',
    );
  if (kind !== "job" && fields.partial_images && !fields.stream)
    refuse("partial_images", "Partial images need a stream. Set stream to true, or leave partial_images out.");
  if (fields.preview !== undefined && !fields.partial_images)
    refuse("preview", "The field preview says what partial images are; give partial_images, or leave preview out.");
}

/** Adapters are those that the model has, where it tells them. */
function checkNames({ loras = [], controls = [] }: Fields, { adapters }: ImageModel): void {
  if (!adapters) return;
  const check = (field: string, kind: string, used: readonly { name: string }[], names: readonly string[]) => {
    const index = used.findIndex(({ name }) => !names.includes(name));
    if (index < 0) return;
    const has = names.length > 0 ? `it has ${names.join(", ")}` : "it was loaded without any";
    const name = JSON.stringify(clipped(used[index]!.name, 64));
    throw invalid(`${field}.${index}.name`, `There is no ${kind} ${name} in this model; ${has}.`);
  };
  check("loras", "LoRA", loras, adapters.loras);
  check("controls", "ControlNet", controls, adapters.controlNets);
}

/** A seed is said once for each picture. */
function checkSeeds({ seed, seeds, n = 1 }: Fields): void {
  if (!seeds) return;
  if (seed !== undefined) throw invalid("seeds", "Both seed and seeds say what pictures start from; leave out one.");
  if (seeds.length !== n)
    throw invalid(
      "seeds",
      `Expected as many seeds as pictures, n (${n}), but received ${seeds.length}. Give ${n}, or change n.`,
    );
}

/** How many steps there are is said once, and not above the limit. */
function checkSchedule(fields: Fields, isPreset: boolean, { maxSteps }: Limits): void {
  const { num_inference_steps: steps, blocks, stages } = fields;
  const said = Object.entries({ quality: isPreset || undefined, num_inference_steps: steps, blocks, stages }).filter(
    ([, value]) => value !== undefined,
  );
  if (said.length > 1) {
    const [[first], [second]] = said as [[string, unknown], [string, unknown]];
    throw invalid(second, `Both ${first} and ${second} say what is run; leave out one.`);
  }
  for (const name of ["size", "sampler"] as const)
    if (stages && fields[name] !== undefined && fields[name] !== "auto")
      throw invalid(name, `The field stages says which sizes and steps are run; leave out ${name}, or stages.`);
  const texts = stages?.map((stage) => stage.blocks) ?? (blocks === undefined ? [] : [blocks]);
  const count = texts.reduce((sum, text) => sum + parseBlocks(text).length, 0);
  const param = stages ? "stages" : "blocks";
  if (count > maxSteps) throw invalid(param, `Expected at most ${maxSteps} steps for ${param} but received ${count}.`);
  const preset = fields.quality === undefined ? undefined : presets[fields.quality];
  const most = preset ? qualities[preset.quality]!.steps : 0;
  if (most > maxSteps)
    throw invalid(
      "quality",
      `The quality "${fields.quality}" has ${most} steps, and this server draws at most ${maxSteps}.`,
    );
}

function sizeOf(
  { size, stages, padding_mask_crop: crop }: Fields,
  { nativeSize }: ImageModel,
  edited: Edited | null,
): { width: number; height: number } {
  const last = stages?.at(-1);
  if (last) return { width: last.width, height: last.height };
  const match = size?.match(sizePattern);
  if (match) return { width: Number(match[1]), height: Number(match[2]) };
  // What surrounds a mask does not have the picture's proportions.
  return edited && crop === undefined ? sizeLike(edited, nativeSize) : { ...nativeSize };
}
