/** What a call of `generate` results in, put together from the results of its pictures' programs. */

import type { Checkpoint } from "../checkpoint/index.js";
import { packageVersion } from "../common/package.js";
import { seedToJson } from "../common/seed.js";
import type { FloatTensor, Tensor } from "../common/tensor.js";
import type { GenerateResult, Timings } from "../model.js";
import type { Admitted } from "../serving/service.js";
import { pasted } from "./crop.js";
import { keepOriginal } from "./edit.js";
import { Image, toRgbInSlices } from "./image.js";
import { stacked } from "./latents.js";
import type { Request } from "./request.js";
import { patchesOf, type RequestStage } from "./stages.js";
import type { PreparedCandidate } from "./templates.js";

/** @param text tokens of the prompts, and what the caller should know */
export async function resultOf(
  model: { readonly name: string; readonly runtime: { readonly name: string }; readonly checkpoint: Checkpoint },
  request: Request,
  { text: drawn, stages, kept, crop, template }: PreparedCandidate,
  admitted: Admitted,
  text: { readonly tokens: number; readonly warnings: readonly string[] },
  results: readonly Record<string, Tensor>[],
  timings: Timings,
): Promise<GenerateResult> {
  const size = stages.at(-1)!;
  const { width, height } = crop?.picture ?? size;
  const blocks = blocksOf(stages);
  const origin = originOf(model, request.texts !== null);
  const images: Image[] = [];
  const { image } = template;
  for (const [row, result] of image === null ? [] : results.entries()) {
    let rgb = await toRgbInSlices(result[image!] as FloatTensor, 0);
    if (crop)
      rgb = await pasted(
        crop,
        { ...{ width: size.width, height: size.height }, channels: 3, data: rgb },
        kept !== undefined,
      );
    else if (kept?.mask) await keepOriginal(rgb, kept.original.rgb, kept.mask.pixels);
    const parameters = {
      ...(request.metadata && parametersOf(request, stages, row)),
      ...(request.metadata === "full" && origin),
    };
    images.push(new Image(width, height, rgb, parameters));
  }
  const { deadlineMs, include, outputType } = request;
  const valuesOf = (name: string) => stacked(results.map((result) => result[name]!));
  return {
    ...{ images, width, height, blocks, timings, warnings: text.warnings, seeds: request.seeds },
    tokens: { text: text.tokens, image: patchesOf(model.checkpoint, stages.at(-1)!.latentShape) },
    latents: outputType === "latent" || include.includes("latents") ? await valuesOf(template.latents) : null,
    pixels: include.includes("pixels") && image !== null ? await valuesOf(image) : null,
    sigmas: stages.flatMap(({ schedule }) => schedule.sigmas),
    stages: stages.map(({ width, height, schedule: { text, sigmas } }) => ({ width, height, blocks: text, sigmas })),
    evaluations: {
      predictor: stages.reduce((sum, { schedule }) => sum + schedule.evaluations.predictor, 0),
      refiner: stages.reduce((sum, { schedule }) => sum + schedule.evaluations.refiner, 0),
      rows: stages.reduce((sum, { schedule }) => sum + schedule.evaluations.rows, template.thirdRows),
    },
    deadline:
      deadlineMs === undefined
        ? null
        : {
            ...{ deadlineMs, blocks: drawn, reason: admitted.reason! },
            ...{ predictedMs: admitted.predictedMs!, actualMs: timings.total },
          },
  };
}

/** The schedules of all stages, as results and events name them. */
export function blocksOf(stages: PreparedCandidate["stages"]): string {
  return stages.map(({ schedule }) => schedule.text).join(" ");
}

/** What it takes to draw a picture again on the same model, by the names of the options (parameters.ts reads them). No path: originals and masks are not named. */
export function parametersOf(
  request: Request,
  drawn: PreparedCandidate["stages"],
  row: number,
): Record<string, unknown> {
  const { guidance, additions, loras, seeds, sampler, sigmas, shift, mu, stages, edit } = request;
  const index = Math.floor(row / request.count);
  const { width, height, whole } = drawn.at(-1)!;
  // Noise levels depend on guidance, even where the steps that had it are left out.
  const isGuided = [whole.guidanceScale].flat().some((scale) => scale > 1);
  return {
    ...textParameters(request, index),
    seed: seeds.length > 0 ? seedToJson(seeds[row]!) : null,
    ...(stages ? { stages } : { width, height, sampler, ...scheduleParameters(whole, sigmas) }),
    ...(shift !== undefined && { shift }),
    ...(mu !== undefined && { mu }),
    ...(loras.length > 0 && { loras }),
    ...(edit && { strength: edit.strength, inpainted: edit.mask !== null }),
    ...(edit?.mask && { keepOriginal: edit.keepOriginal }),
    ...(edit && edit.paddingMaskCrop !== null && { paddingMaskCrop: edit.paddingMaskCrop }),
    guidanceScale: isGuided ? whole.guidanceScale : 1,
    ...(isGuided &&
      (guidance.start > 0 || guidance.stop < 1) && { guidanceStart: guidance.start, guidanceStop: guidance.stop }),
    ...(isGuided && guidance.mode !== "cfg" && { guidanceMode: guidance.mode }),
    ...(isGuided && additions.skipLayers && { skipLayers: additions.skipLayers }),
    ...(request.controls.length > 0 && { controls: request.controls.map(controlParameters) }),
    ...(request.texts && { maxSequenceLength: request.sequenceLength }),
  };
}

/** A control without its pictures. */
function controlParameters({ name, mask, scale, start, stop, preprocess, pixelRange }: Request["controls"][number]) {
  return {
    ...{ folder: name, scale },
    ...((start > 0 || stop < 1) && { start, stop }),
    ...(mask !== null && { inpaints: true }),
    ...(preprocess !== null && { preprocess }),
    ...(pixelRange !== "signed" && { pixelRange }),
  };
}

/** The texts of a row as they were given, and how they were encoded; of embeddings only that there were some. */
function textParameters({ texts, clipSkip, promptWeighting }: Request, index: number): Record<string, unknown> {
  if (!texts) return { promptEmbeds: true };
  const isGuided = texts.negativePrompts.length > 0;
  const given = Object.entries({ prompt: [], ...(isGuided && { negativePrompt: [] }), ...texts.given })
    .filter(([option]) => isGuided || !option.startsWith("negative"))
    .map(([option, rows]) => [option, rows[index] ?? ""]);
  return {
    ...Object.fromEntries(given),
    ...(clipSkip > 0 && { clipSkip }),
    ...(promptWeighting && { promptWeighting }),
  };
}

/** What an original's strength or the guidance leaves out is left out again. A schedule's own blocks are no given ones: guidance differs. */
function scheduleParameters({ blocks, steps, grid }: RequestStage["whole"], sigmas: Request["sigmas"]) {
  return { ...(blocks === null ? { steps } : { blocks }), ...(sigmas ? { sigmas } : { grid }) };
}

/** What drew it: names, and no path. @param readsTexts whether its text encoders were used: without T5 it is another picture */
function originOf(
  { name, runtime, checkpoint }: Pick<Parameters<typeof resultOf>[0], "name" | "runtime" | "checkpoint">,
  readsTexts: boolean,
) {
  return {
    ...{ model: name, software: `flowturbo ${packageVersion()}`, runtime: runtime.name },
    ...(readsTexts && checkpoint.textEncoder3 === null && { textEncoder3: false }),
    ...(checkpoint.loras.length > 0 && { mergedLoras: checkpoint.loras.map(({ name, scale }) => ({ name, scale })) }),
  };
}
