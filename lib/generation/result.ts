/** What a call of `generate` results in, put together from the results of its pictures' programs. */

import type { Tensor } from "../common/tensor.js";
import type { GenerateResult, Size, Timings } from "../model.js";
import type { Admitted } from "../serving/service.js";
import { keepOriginal } from "./edit.js";
import { Image, toRgbInSlices } from "./image.js";
import { stacked } from "./latents.js";
import type { Request } from "./request.js";
import type { PreparedCandidate } from "./templates.js";

export async function resultOf(
  model: { readonly name: string },
  request: Request,
  { text, stages, kept, template }: PreparedCandidate,
  admitted: Admitted,
  warnings: readonly string[],
  results: readonly Record<string, Tensor>[],
  timings: Timings,
): Promise<GenerateResult> {
  const { width, height } = stages.at(-1)!;
  const pixels = await stacked(results.map((result) => result[template.image]!));
  const blocks = stages.map(({ schedule }) => schedule.text).join(" ");
  const images: Image[] = [];
  for (let row = 0; row < results.length; row++) {
    const rgb = await toRgbInSlices(pixels, row);
    if (kept?.mask) await keepOriginal(rgb, kept.original.rgb, kept.mask.pixels);
    images.push(new Image(width, height, rgb, parametersOf(model.name, request, { width, height }, row, blocks)));
  }
  const { deadlineMs } = request;
  return {
    ...{ images, pixels, width, height, blocks, timings, warnings, seeds: request.seeds },
    latents: await stacked(results.map((result) => result[template.latents]!)),
    sigmas: stages.flatMap(({ schedule }) => schedule.sigmas),
    stages: stages.map(({ width, height, schedule: { text, sigmas } }) => ({ width, height, blocks: text, sigmas })),
    evaluations: {
      predictor: stages.reduce((sum, { schedule }) => sum + schedule.evaluations.predictor, 0),
      refiner: stages.reduce((sum, { schedule }) => sum + schedule.evaluations.refiner, 0),
    },
    deadline:
      deadlineMs === undefined
        ? null
        : {
            ...{ deadlineMs, blocks: text, reason: admitted.reason! },
            ...{ predictedMs: admitted.predictedMs!, actualMs: timings.total },
          },
  };
}

/** What a picture's file says about how it was made: enough to draw it again. */
function parametersOf(
  model: string,
  request: Request,
  size: Size,
  row: number,
  blocks: string,
): Record<string, unknown> {
  const { prompts, negativePrompts, guidanceScale, seeds, sampler, grid, stages, edit, sequenceLength } = request;
  const index = Math.floor(row / request.count);
  return {
    prompt: prompts[index],
    ...(guidanceScale !== null && { negativePrompt: negativePrompts[index] }),
    seed: seeds[row] ?? null,
    ...size,
    ...{ sampler, blocks, grid },
    ...(stages && { stages }),
    ...(edit && { strength: edit.strength, inpainted: edit.mask !== null }),
    guidanceScale: guidanceScale ?? 1,
    maxSequenceLength: sequenceLength,
    model,
    software: "flowturbo",
  };
}
