/**
 * The programs that a request launches, before its values are known: what the service predicts costs from, and what the
 * recipe binds values to. Requests of a kind share a template.
 */

import type { Checkpoint } from "../checkpoint/index.js";
import { LruCache } from "../common/lru-cache.js";
import { mmditWidth, positionTable } from "../networks/index.js";
import type { Program, StoredConstant } from "../program/program.js";
import type { Demand } from "../serving/prediction.js";
import type { Edit } from "./edit.js";
import {
  encoderProgram,
  type LatentShape,
  type SamplingStage,
  type SamplingTemplate,
  samplingTemplate,
} from "./programs.js";
import type { Candidate, Request, RequestStage } from "./request.js";
import type { PromptEncoder } from "./text.js";

export class Templates {
  readonly #checkpoint: Checkpoint;
  readonly #text: PromptEncoder;
  readonly #kept = new LruCache<SamplingTemplate>(32);

  constructor(checkpoint: Checkpoint, text: PromptEncoder) {
    this.#checkpoint = checkpoint;
    this.#text = text;
  }

  /** Rows of each program that a candidate runs: texts that the cache lacks, originals, pictures. */
  demands(request: Request, { stages }: Candidate, edit: Edit | null): Demand[] {
    const { sequenceLength, pinBatch, pictures } = request;
    const missing = this.#text.missing(promptsOf(request), sequenceLength, pinBatch);
    const encoding = { program: this.#text.program("", sequenceLength).program, rows: missing };
    const encoders = this.encoders(stages, edit).flatMap((program) => (program ? [{ program, rows: 1 }] : []));
    const sampling = { program: this.sampling(request, stages, edit).program, rows: pictures };
    return [...(missing > 0 ? [encoding] : []), ...encoders, sampling];
  }

  /** For each stage the program that encodes its original, or null where it needs none. */
  encoders(stages: readonly RequestStage[], edit: Edit | null): (Program | null)[] {
    const { factor } = this.#checkpoint.vae.config;
    return stages.map(({ latentShape }, index) => {
      const { original } = originalOf(edit, index) ?? {};
      return original ? encoderProgram(original.pixels, latentShape, factor) : null;
    });
  }

  /** The template of one picture. */
  sampling(
    request: Pick<Request, "guidanceScale" | "sequenceLength" | "preview">,
    stages: readonly RequestStage[],
    edit: Edit | null,
  ): SamplingTemplate {
    const { guidanceScale, sequenceLength, preview } = request;
    const sizes = stages.map(({ schedule: { blocks, sigmas }, latentShape: [, ...area] }, index) => {
      const { original, mask } = originalOf(edit, index) ?? {};
      return { blocks, sigmas, area, hasInit: original !== undefined, hasMask: Boolean(mask) };
    });
    const key = JSON.stringify([sizes, guidanceScale, sequenceLength, preview]);
    const known = this.#kept.get(key);
    if (known) return known;
    const { vae } = this.#checkpoint;
    const template = samplingTemplate({
      stages: stages.map(({ schedule, latentShape: [, ...area] }, index): SamplingStage => {
        const { hasInit, hasMask } = sizes[index]!;
        const latentShape = [1, ...area] as const;
        return { schedule, latentShape, positions: positionsOf(this.#checkpoint, latentShape), hasInit, hasMask };
      }),
      ...this.#text.shapes(sequenceLength, guidanceScale !== null),
      ...{ guidanceScale, preview, vaeFactor: vae.config.factor, imageChannels: vae.config.outChannels },
      textSize: sequenceLength === this.#text.defaultSequenceLength ? undefined : ` ${sequenceLength} tokens`,
    });
    return this.#kept.set(key, template);
  }
}

/** What a request encodes: its prompts, and with guidance the negative ones. */
export function promptsOf({ prompts, negativePrompts, guidanceScale }: Request): string[] {
  return [...prompts, ...(guidanceScale === null ? [] : negativePrompts)];
}

/** What a stage needs of an edit: later stages start from the stage before, and need the original only to keep a part of it. */
function originalOf(edit: Edit | null, index: number): Edit[number] | undefined {
  const stage = edit?.[index];
  return stage && (index === 0 || stage.mask) ? stage : undefined;
}

/** Positions for a latent, for each step type. */
export function positionsOf(
  { transformer, refiner }: Checkpoint,
  latentShape: LatentShape,
): SamplingStage["positions"] {
  return {
    predict: positionCrop(transformer, latentShape),
    ...(refiner && { refine: positionCrop(refiner, latentShape) }),
  };
}

/** The centre crop of a transformer's table of positions for a latent, read by the runtime from the checkpoint's file. */
export function positionCrop(
  { weights, config }: Checkpoint["transformer"],
  [, , height, width]: LatentShape,
): StoredConstant {
  const { patchSize, posEmbedMaxSize: side } = config;
  const elements = mmditWidth(config);
  const [rows, columns] = [height / patchSize, width / patchSize];
  const [top, left] = [Math.floor((side - rows) / 2), Math.floor((side - columns) / 2)];
  return {
    kind: "stored",
    source: positionTable(weights, config),
    shape: [1, rows * columns, elements],
    firstElement: (top * side + left) * elements,
    rowElements: columns * elements,
    strideElements: side * elements,
    rows,
  };
}
