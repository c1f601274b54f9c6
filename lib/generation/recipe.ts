/**
 * The recipe: a request that has been let in → its pictures, in four steps. Networks and the arithmetic between them are in launches; what is
 * here says which programs run, with which values, and what becomes of their results.
 */

import type { Logger } from "../common/logger.js";
import type { FloatTensor } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import { NotFiniteError } from "../errors.js";
import type { GenerateResult } from "../model.js";
import { bind, type Program } from "../program/program.js";
import type { Runtime } from "../runtimes/runtime.js";
import type { Admitted } from "../serving/service.js";
import { controlOf } from "./control.js";
import type { ControlNets } from "./control-nets.js";
import type { RequestEvents } from "./events.js";
import { noiseOf, rowOf } from "./latents.js";
import type { LoraInputs } from "./lora-inputs.js";
import type { LatentColours } from "./preview.js";
import { guidanceOf, slotValues } from "./programs.js";
import { ProgressReporter } from "./progress.js";
import type { ModelFacts, Request } from "./request.js";
import { resultOf } from "./result.js";
import type { PreparedCandidate, Templates } from "./templates.js";
import { type Condition, type PromptEncoder, tokensOfPrompts, warningsOf } from "./text.js";

/** What a loaded model draws with. */
export interface LoadedModel extends ModelFacts {
  readonly controlNets?: ControlNets | undefined;
  readonly name: string;
  readonly runtime: Runtime;
  readonly text: PromptEncoder;
  readonly templates: Templates;
  readonly loras: LoraInputs;
  readonly keepTextEncoders: boolean;
  /** Frees the memory that graphs take, until their next launch. */
  readonly unload: (graphs: readonly string[]) => Promise<void>;
  readonly loadMilliseconds: number;
  readonly logger: Logger;
  /** The preview's map, fitted on first use. */
  readonly colours: (signal: AbortSignal | undefined) => Promise<LatentColours>;
}

/** An error of `draw`; one of values that are not finite says with which dynamic LoRAs it was. */
export function withLoras(error: unknown, loras: Request["loras"]): unknown {
  if (!(error instanceof NotFiniteError) || loras.length === 0) return error;
  const named = loras.map(({ name, scale }) => `"${name}" at ${scale}`).join(", ");
  return new NotFiniteError(
    error.where,
    `${error.message} It was drawn with dynamic LoRAs (${named}): give them smaller scales.`,
  );
}

/**
 * @param events where step events go; null for none
 * @param start moment of the call
 */
export async function draw(
  model: LoadedModel,
  request: Request,
  candidate: PreparedCandidate,
  admitted: Admitted,
  events: RequestEvents | null,
  start: number,
): Promise<GenerateResult> {
  const { count, pictures, reports, signal, embeds } = request;
  const { stages, template } = candidate;
  const progress = new ProgressReporter(stages, pictures, (event) => events?.send("onStep", event));
  const run = (rows: readonly Program[]) => admitted.run({ rows, reports, onLaunch: progress.observe.bind(progress) });

  // 1. Text: what the cache lacks is encoded. One condition for each prompt, unconditional first.
  const encodeStart = performance.now();
  const encoded = await model.text.encode(candidate.prompts, (programs) =>
    admitted.run({ rows: programs.map(({ program }) => program) }),
  );
  // Before the engines of the steps need the memory.
  if (!model.keepTextEncoders) await model.unload(model.text.graphs);
  const needs = guidanceOf(stages);
  const conditions: { guided?: Condition | undefined; alone?: Condition | undefined }[] = [];
  const prompts = pictures / count;
  const all = embeds ? [...embeds.prompts, ...embeds.negativePrompts] : encoded;
  for (let index = 0; index < prompts; index++) {
    const [prompt, negative] = [all[index]!, all[prompts + index]];
    conditions.push({
      ...(needs.guided && { guided: model.text.stack([negative!, prompt]) }),
      ...(needs.alone && { alone: model.text.stack([prompt]) }),
    });
    if (isDue()) await rest();
  }
  const encode = performance.now() - encodeStart;
  const tokens = embeds?.tokens ?? tokensOfPrompts(encoded.slice(0, prompts));
  const settled = request.texts ?? request.embeds;
  const warnings = [...warningsOf(encoded), ...(settled?.warnings ?? []), ...candidate.warnings];
  for (const warning of warnings) model.logger.warn?.(warning);

  // 2. Init image and control pictures: latents of the original and of each control for each stage that needs them, the same for all pictures.
  const latentsOf = async (program: Program) => (await run([program]))[0]!.latents as FloatTensor;
  const init: (FloatTensor | undefined)[] = [];
  for (const program of candidate.encoders) init.push(program ? await latentsOf(program) : undefined);
  const controls: (FloatTensor | undefined)[][] = [];
  for (const stage of candidate.controls) {
    const read: (FloatTensor | undefined)[] = [];
    for (const control of stage)
      read.push(control ? controlOf(await latentsOf(control.program), control.known) : undefined);
    controls.push(read);
  }

  // 3. Denoise: a program for each picture, with its own noise.
  const shapes = stages.map(({ latentShape }) => latentShape);
  const noises = (request.noises ?? (await noiseOf(request.seeds, shapes))).slice(-stages.length);
  const lora = await model.loras.values("predict", request.loras);
  const colours = template.previewed.size > 0 ? await model.colours(signal) : undefined;
  const programs: Program[] = [];
  for (let row = 0; row < pictures; row++) {
    const values = noises.map((noise, index) => {
      return { noise: rowOf(noise, row), init: init[index], mask: candidate.masks[index], controls: controls[index] };
    });
    const condition = conditions[Math.floor(row / count)]!;
    programs.push(bind(template.program, slotValues({ stages: values, ...condition, lora, colours })));
    if (isDue()) await rest();
  }
  const results = await run(programs);

  // 4. Decode: the last launch of each program was the decoder, unless latents are what is wanted; its pixels become pictures.
  const { steps, milliseconds } = progress;
  return resultOf(model, request, candidate, admitted, { tokens, warnings }, results, {
    ...{ load: model.loadMilliseconds, queue: admitted.queuedMs, encode, steps, upscale: milliseconds.upscale },
    ...{ edit: milliseconds.edit, decode: milliseconds.decode, total: performance.now() - start },
  });
}
