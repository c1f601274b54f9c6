/**
 * The recipe: a request that has been let in → its pictures, in four steps. All arithmetic is in launches; what is here
 * says which programs run, with which values, and what becomes of their results.
 */

import type { Logger } from "../common/logger.js";
import type { FloatTensor } from "../common/tensor.js";
import type { GenerateResult } from "../model.js";
import { bind, type Program } from "../program/program.js";
import type { Runtime } from "../runtimes/runtime.js";
import { scheduleOf } from "../schedule/index.js";
import type { Admitted } from "../serving/service.js";
import type { Edit } from "./edit.js";
import { noiseOf, rowOf } from "./latents.js";
import type { LatentColours } from "./preview.js";
import { slotValues } from "./programs.js";
import { ProgressReporter } from "./progress.js";
import type { Candidate, ModelFacts, Request, RequestStage } from "./request.js";
import { resultOf } from "./result.js";
import { promptsOf, type Templates } from "./templates.js";
import type { Condition, PromptEncoder } from "./text.js";

/** What a loaded model draws with. */
export interface LoadedModel extends ModelFacts {
  readonly name: string;
  readonly runtime: Runtime;
  readonly text: PromptEncoder;
  readonly templates: Templates;
  readonly keepTextEncoders: boolean;
  readonly loadMilliseconds: number;
  readonly logger: Logger;
  /** The preview's map, fitted on first use. */
  readonly colours: (signal: AbortSignal | undefined) => Promise<LatentColours>;
}

/** @param start moment of the call */
export async function draw(
  model: LoadedModel,
  request: Request,
  edit: Edit | null,
  admitted: Admitted,
  start: number,
): Promise<GenerateResult> {
  const { count, pictures, pinBatch, sequenceLength, signal } = request;
  const candidate = request.candidates[admitted.candidate]!;
  const { stages, used, warnings } = withoutEmptyMask(candidate, edit, request);
  const progress = new ProgressReporter(stages, pictures, request);
  const run = (rows: readonly Program[]) => admitted.run({ rows, onLaunch: progress.observe.bind(progress) });

  // 1. Text: what the cache lacks is encoded. One condition for each prompt, unconditional first.
  const encodeStart = performance.now();
  const encoded = await model.text.encode(
    promptsOf(request),
    sequenceLength,
    (rows) => admitted.run({ rows }),
    pinBatch,
  );
  // Before the engines of the steps need the memory.
  if (!model.keepTextEncoders) await model.runtime.unload?.(model.text.graphs);
  const conditions = request.prompts.map((_, index): Condition => {
    const negative = encoded[request.prompts.length + index];
    return model.text.stack(negative ? [negative, encoded[index]!] : [encoded[index]!]);
  });
  const encode = performance.now() - encodeStart;
  warnings.unshift(...new Set(encoded.flatMap((prompt) => prompt.warnings)));
  for (const warning of warnings) model.logger.warn?.(warning);

  // 2. Init image: latents of the original for each stage that needs them, the same for all pictures.
  const init: (FloatTensor | undefined)[] = [];
  for (const program of model.templates.encoders(stages, used)) {
    const [result] = program ? await run([program]) : [];
    init.push(result?.latents as FloatTensor | undefined);
  }

  // 3. Denoise: a program for each picture, with its own noise.
  const shapes = candidate.stages.map(({ latentShape }) => latentShape);
  const noises = (request.noises ?? noiseOf(request.seeds, shapes)).slice(-stages.length);
  const colours = request.preview && (await model.colours(signal));
  const template = model.templates.sampling(request, stages, used);
  const programs = Array.from({ length: pictures }, (_, row) =>
    bind(
      template.program,
      slotValues({
        stages: noises.map((noise, index) => ({
          ...{ noise: rowOf(noise, row), init: init[index], mask: used?.[index]?.mask?.latents },
        })),
        ...conditions[Math.floor(row / count)]!,
        colours,
      }),
    ),
  );
  const results = await run(programs);

  // 4. Decode: the last launch of each program was the decoder; its pixels become pictures.
  const { milliseconds } = progress;
  return resultOf(model, request, { candidate, stages, edit, admitted, warnings }, template, results, {
    ...{ load: model.loadMilliseconds, queue: admitted.queuedMs, encode, steps: progress.steps },
    ...{ upscale: milliseconds.upscale, edit: milliseconds.edit, decode: milliseconds.decode },
    total: performance.now() - start,
  });
}

/** The stages that are run and what they use of an edit: where the mask is empty, the last stage without any block. */
function withoutEmptyMask({ stages }: Candidate, edit: Edit | null, request: Request) {
  const warnings: string[] = [];
  if (!edit?.every(({ mask }) => mask?.empty)) return { stages, used: edit, warnings };
  const through = request.edit!.keepOriginal ? "" : ", through the autoencoder";
  warnings.push(`The mask is black everywhere, so that nothing is to be painted: this is the original${through}.`);
  const last: RequestStage = { ...stages.at(-1)!, schedule: scheduleOf([], [0]) };
  return { stages: [last], used: edit.slice(-1).map((stage) => ({ ...stage, mask: null })), warnings };
}
