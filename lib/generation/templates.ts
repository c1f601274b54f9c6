/**
 * The programs that a request launches, before its values are known: what the service predicts costs from, and what the
 * recipe binds values to. Requests of a kind share a template.
 */

import type { Checkpoint, TransformerConfig } from "../checkpoint/index.js";
import { LruCache } from "../common/lru-cache.js";
import type { FloatTensor, StoredTensor } from "../common/tensor.js";
import {
  controlPositionTable,
  launchedFor,
  mmditWidth,
  networksOf,
  positionTable,
  upscales,
} from "../networks/index.js";
import type { Program, StoredConstant } from "../program/program.js";
import { scheduleOf } from "../schedule/index.js";
import type { CandidateWork, Demand } from "../serving/prediction.js";
import { controlledStages } from "./additions.js";
import type { Candidate } from "./candidates.js";
import type { StageControl } from "./control.js";
import type { Crop } from "./crop.js";
import type { Edit } from "./edit.js";
import {
  encoderProgram,
  type LatentShape,
  type SamplingStage,
  type SamplingTemplate,
  samplingTemplate,
} from "./programs.js";
import type { Request } from "./request.js";
import type { RequestStage } from "./stages.js";
import type { EncoderProgram, PreparedPrompts, PromptEncoder } from "./text.js";

/** A candidate with the programs that draw it: costs are predicted from them, and the recipe binds values to them. */
export interface PreparedCandidate extends CandidateWork {
  readonly prompts: PreparedPrompts;
  /** Sizes that are run. */
  readonly stages: readonly RequestStage[];
  /** For each stage the program that encodes its original, or null where it needs none. */
  readonly encoders: readonly (Program | null)[];
  /** For each stage its mask in latents, [1, 1, h, w], where it has one. */
  readonly masks: readonly (FloatTensor | undefined)[];
  /** For each stage, for each control of the request the program that encodes its picture; null where no step of the stage needs it. */
  readonly controls: readonly (readonly (EncodedControl | null)[])[];
  /** What the pictures keep of the original, pixel for pixel. */
  readonly kept: Edit[number] | undefined;
  /** What they are put back into. */
  readonly crop: Crop | undefined;
  readonly template: SamplingTemplate;
  /** What the caller should know. */
  readonly warnings: readonly string[];
}

/** How a control becomes what the fused step reads: see `controlOf`. */
interface EncodedControl {
  readonly program: Program;
  readonly known: StageControl["known"];
}

export class Templates {
  readonly #checkpoint: Checkpoint;
  readonly #text: PromptEncoder;
  readonly #kept = new LruCache<SamplingTemplate>(32);

  constructor(checkpoint: Checkpoint, text: PromptEncoder) {
    this.#checkpoint = checkpoint;
    this.#text = text;
  }

  /** A candidate's programs. Where the mask is empty only the last stage is run, without any block. */
  prepare(
    request: Request,
    { text, stages: all }: Candidate,
    prompts: PreparedPrompts,
    edit: Edit | null,
    controls: readonly (readonly (StageControl | null)[])[] = [],
  ): PreparedCandidate {
    const { factor } = this.#checkpoint.vae.config;
    const kept = request.edit?.keepOriginal ? edit?.at(-1) : undefined;
    const warnings = request.controls.flatMap((control) => control.warnings);
    let [stages, used] = [all, edit];
    if (edit?.every(({ mask }) => mask?.empty)) {
      const through = kept && request.outputType === "image" ? "" : ", through the autoencoder";
      warnings.push(
        `The mask is black everywhere, or what it paints is darker than half or too small for a latent (${factor} x ${factor} pixels), so that nothing is to be painted: this is the original${through}.`,
      );
      stages = [{ ...all.at(-1)!, schedule: scheduleOf([], [0]) }];
      used = edit.slice(-1).map((stage) => ({ ...stage, mask: null }));
    }
    const encoders = stages.map(({ latentShape }, index) => {
      const { original } = originalOf(used, index) ?? {};
      return original ? encoderProgram(original.pixels, latentShape, factor) : null;
    });
    const template = this.sampling(request, stages, used);
    // Stages that are left out are the first ones.
    const left = all.length - stages.length;
    const needed = request.additions.controls.map((control) => controlledStages(control, stages));
    const encodedControls = stages.map(({ latentShape }, index) =>
      needed.map((isNeeded, which): EncodedControl | null => {
        const control = isNeeded[index] ? controls[which]![left + index]! : null;
        return control && { program: encoderProgram(control.pixels, latentShape, factor), known: control.known };
      }),
    );
    const demands = [
      ...textDemands(prompts.programs.values()),
      ...encodedControls.flat().flatMap((control) => (control ? [{ program: control.program, rows: 1 }] : [])),
      ...encoders.flatMap((program) => (program ? [{ program, rows: 1 }] : [])),
      { program: template.program, rows: request.pictures },
    ];
    const masks = stages.map((_, index) => used?.[index]?.mask?.latents);
    const crop = edit?.at(-1)?.crop;
    return {
      ...{ text, demands, prompts, stages, encoders, masks, controls: encodedControls },
      ...{ kept, crop, template, warnings },
    };
  }

  /** The template of one picture. */
  sampling(
    request: Pick<
      Request,
      | "guidance"
      | "sequenceLength"
      | "preview"
      | "previewCount"
      | "include"
      | "outputType"
      | "stepLatents"
      | "additions"
    >,
    stages: readonly RequestStage[],
    edit: Edit | null,
  ): SamplingTemplate {
    const { guidance, sequenceLength, preview, previewCount, additions } = request;
    const decodes = request.outputType === "image";
    const keepsLatents = !decodes || request.include.includes("latents");
    const reportsLatents = request.stepLatents;
    const sizes = stages.map(({ schedule: { key }, latentShape: [, ...area], upscale, place }, index) => {
      const { original, mask } = originalOf(edit, index) ?? {};
      return { key, area, upscale, place, hasInit: original !== undefined, hasMask: Boolean(mask) };
    });
    const results = [keepsLatents, decodes, reportsLatents];
    const key = JSON.stringify([sizes, guidance.mode, sequenceLength, preview, previewCount, results, additions]);
    const known = this.#kept.get(key);
    if (known) return known;
    const { vae, previewVae } = this.#checkpoint;
    const template = samplingTemplate({
      stages: stages.map(({ schedule, latentShape: [, ...area], upscale, place }, index): SamplingStage => {
        const { hasInit, hasMask } = sizes[index]!;
        const latentShape = [1, ...area] as const;
        const positions = positionsOf(this.#checkpoint, latentShape);
        const controlPositions = additions.controls.map(({ id }) =>
          controlPositionsOf(this.#checkpoint, id, latentShape),
        );
        return { schedule, latentShape, upscale, place, positions, controlPositions, hasInit, hasMask };
      }),
      additions,
      ...this.#text.shapes(sequenceLength),
      ...{ guidanceMode: guidance.mode, preview, previewCount, keepsLatents, decodes, reportsLatents },
      ...(previewVae && { previewDecoder: "preview_decoder" }),
      pixelsUpscale: launchedFor(this.#checkpoint, upscales.pixels),
      ...{ vaeFactor: vae.config.factor, imageChannels: vae.config.outChannels },
      textSize: sequenceLength === this.#text.defaultSequenceLength ? undefined : ` ${sequenceLength} tokens`,
    });
    return this.#kept.set(key, template);
  }
}

/** The programs that encode texts, as many of a kind as there are. */
export function textDemands(programs: Iterable<EncoderProgram>): Demand[] {
  const kinds = new Map<string, { program: Program; rows: number }>();
  for (const { graph, program, weights } of programs) {
    const kind = `${graph} ${weights?.masked.length ?? 0}`;
    const known = kinds.get(kind);
    if (known) known.rows++;
    else kinds.set(kind, { program, rows: 1 });
  }
  return [...kinds.values()];
}

/** What a stage needs of an edit: later stages start from the stage before, and need the original only to keep a part of it. */
function originalOf(edit: Edit | null, index: number): Edit[number] | undefined {
  const stage = edit?.[index];
  return stage && (index === 0 || stage.mask) ? stage : undefined;
}

/** Positions for a latent, for each step type that the checkpoint has a network for. */
export function positionsOf(checkpoint: Checkpoint, latentShape: LatentShape): SamplingStage["positions"] {
  const networks = networksOf(checkpoint).filter(({ row }) => row.role === "step");
  return Object.fromEntries(
    networks.map(({ name, row }) => [
      name,
      positionCrop(checkpoint[row.part!] as Checkpoint["transformer"], latentShape),
    ]),
  );
}

/** Positions of a ControlNet for a latent; null for one that has none of its own. */
export function controlPositionsOf(
  checkpoint: Checkpoint,
  id: string,
  latentShape: LatentShape,
): StoredConstant | null {
  const controlNet = checkpoint.controlNets.get(id)!;
  const source = controlPositionTable(controlNet);
  return (
    source && cropOf(source, { ...controlNet.config, posEmbedMaxSize: controlNet.config.posEmbedMaxSize! }, latentShape)
  );
}

/** The centre crop of a transformer's table of positions for a latent, read by the runtime from the checkpoint's file. */
export function positionCrop({ weights, config }: Checkpoint["transformer"], latentShape: LatentShape): StoredConstant {
  return cropOf(positionTable(weights, config), config, latentShape);
}

function cropOf(
  source: StoredTensor,
  config: Pick<TransformerConfig, "patchSize" | "posEmbedMaxSize" | "numAttentionHeads" | "attentionHeadDim">,
  [, , height, width]: LatentShape,
): StoredConstant {
  const { patchSize, posEmbedMaxSize: side } = config;
  const elements = mmditWidth(config);
  const [rows, columns] = [height / patchSize, width / patchSize];
  const [top, left] = [Math.floor((side - rows) / 2), Math.floor((side - columns) / 2)];
  return {
    kind: "stored",
    source,
    shape: [1, rows * columns, elements],
    firstElement: (top * side + left) * elements,
    rowElements: columns * elements,
    strideElements: side * elements,
    rows,
  };
}
