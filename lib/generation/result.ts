/** What a call of `generate` results in, put together from the results of its pictures' programs. */

import type { Tensor } from "../common/tensor.js";
import type { GenerateResult, Timings } from "../model.js";
import type { Admitted } from "../serving/service.js";
import type { Edit } from "./edit.js";
import { keepOriginal } from "./edit.js";
import { Image, toRgb } from "./image.js";
import { stacked } from "./latents.js";
import type { SamplingTemplate } from "./programs.js";
import type { Candidate, Request, RequestStage } from "./request.js";

/** How a request was drawn. */
interface Drawn {
  readonly candidate: Candidate;
  /** Those that were run: not the candidate's where a mask left nothing to paint. */
  readonly stages: readonly RequestStage[];
  readonly edit: Edit | null;
  readonly admitted: Admitted;
  readonly warnings: readonly string[];
}

export function resultOf(
  model: { readonly name: string },
  request: Request,
  { candidate, stages, edit, admitted, warnings }: Drawn,
  template: SamplingTemplate,
  results: readonly Record<string, Tensor>[],
  timings: Timings,
): GenerateResult {
  const { width, height } = stages.at(-1)!;
  const pixels = stacked(results.map((result) => result[template.image]!));
  const kept = request.edit?.keepOriginal ? edit?.at(-1) : undefined;
  const blocks = stages.map(({ schedule }) => schedule.text).join(" ");
  const images = results.map((_, row) => {
    const rgb = toRgb(pixels, row);
    if (kept?.mask) keepOriginal(rgb, kept.original.rgb, kept.mask.pixels);
    return new Image(width, height, rgb, {
      ...parametersOf(request, row, blocks),
      ...{ width, height, model: model.name },
    });
  });
  const { deadlineMs } = request;
  return {
    ...{ images, pixels, width, height, blocks, timings, warnings, seeds: request.seeds },
    latents: stacked(results.map((result) => result[template.latents]!)),
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
            ...{ deadlineMs, blocks: candidate.text, reason: admitted.reason! },
            ...{ predictedMs: admitted.predictedMs!, actualMs: timings.total },
          },
  };
}

/** What a picture's file says about how it was made: enough to draw it again. */
function parametersOf(request: Request, row: number, blocks: string): Record<string, unknown> {
  const { prompts, negativePrompts, guidanceScale, seeds, sampler, grid, stages, edit, sequenceLength } = request;
  const index = Math.floor(row / request.count);
  return {
    prompt: prompts[index],
    ...(guidanceScale !== null && { negativePrompt: negativePrompts[index] }),
    seed: seeds[row] ?? null,
    ...{ sampler, blocks, grid },
    ...(stages && { stages }),
    ...(edit && { strength: edit.strength, inpainted: edit.mask !== null }),
    guidanceScale: guidanceScale ?? 1,
    maxSequenceLength: sequenceLength,
    software: "flowturbo",
  };
}
