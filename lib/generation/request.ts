/**
 * Options of `generate` × a model → a settled request: everything about it that is known before any work. Every refusal
 * of generate() that needs the model, and no file, is here, or in stages.ts and candidates.ts. Pure, but for a seed that is drawn where none is given.
 */

import { randomInt } from "node:crypto";
import type { Checkpoint } from "../checkpoint/index.js";
import { type Seed, seedOf, seedsFrom } from "../common/seed.js";
import { elementCount, type FloatTensor } from "../common/tensor.js";
import { OptionError } from "../errors.js";
import type { GenerateOptions, PictureSource } from "../model.js";
import type { LowRankLayout } from "../networks/index.js";
import {
  checkGuidanceInterval,
  checkOptions,
  checkSeeds,
  checkSigmas,
  generateSchema,
  type ResolvedGenerateOptions,
  refusePaths,
} from "../options.js";
import { allFinite } from "../program/validate.js";
import { defaultsBeside, formatBlocks, type QualityName, qualities, usualDefaults } from "../schedule/index.js";
import { type Additions, hasSkippedStep, type SkippedLayers } from "./additions.js";
import { type Candidate, type CandidateFacts, candidatesOf } from "./candidates.js";
import type { KnownControlNets } from "./control-nets.js";
import { type ControlRequest, controlKind, settleControls } from "./control-request.js";
import { type AppliedLora, type LoraFacts, noLoras } from "./lora-inputs.js";
import { type Embeds, type PromptFacts, settleEmbeds, settleTexts, type Texts, unguided } from "./prompts.js";
import { defaultStrength, type RequestStage } from "./stages.js";

/** What a request has to know of a model. */
export interface ModelFacts extends CandidateFacts {
  readonly text: PromptFacts;
  /** Whether each picture is one captured program, which shares nothing. */
  readonly captured: boolean;
  readonly pinBatch: number | null;
  /** The dynamic LoRAs that requests may name. Default: none. */
  readonly loras?: LoraFacts;
  /** Whether requests may name pictures by the path of a file. */
  readonly allowPaths: boolean;
  /** ControlNets that requests may name. Default: none. */
  readonly controlNets?: KnownControlNets | undefined;
}

/** What a request edits. */
export interface EditRequest {
  readonly image: PictureSource;
  readonly mask: PictureSource | null;
  readonly strength: number;
  readonly keepOriginal: boolean;
  /** Pixels around the mask's rectangle that are drawn with it; null to draw the whole picture. */
  readonly paddingMaskCrop: number | null;
}

/** Classifier-free guidance of a request: see the options of these names. */
export interface GuidanceSettings {
  readonly start: number;
  readonly stop: number;
  readonly mode: "cfg" | "cfg_zero";
  /** Whether some step is guided. */
  readonly isOn: boolean;
}

type Kept =
  | "count"
  | "preview"
  | "previewCount"
  | "metadata"
  | "outputType"
  | "stepLatents"
  | "deadlineMs"
  | "prefer"
  | "ticket"
  | "timeoutMs"
  | "priority"
  | "signal"
  | "onAccept"
  | "onStart"
  | "onStep";

export interface Request extends Pick<ResolvedGenerateOptions, Kept> {
  /** What the result holds besides the pictures. */
  readonly include: NonNullable<GenerateOptions["include"]>;
  readonly reports: NonNullable<GenerateOptions["reports"]>;
  /** What is drawn, in texts; null where `embeds` say it. Negative prompts are none without guidance. */
  readonly texts: Texts | null;
  readonly embeds: Embeds | null;
  readonly clipSkip: number;
  readonly promptWeighting: boolean;
  /** B: `count` for each prompt. */
  readonly pictures: number;
  /** Ways to draw it, the richest first; one without a time limit. */
  readonly candidates: readonly [Candidate, ...Candidate[]];
  readonly guidance: GuidanceSettings;
  /** What the transformer is run with besides. */
  readonly additions: Additions;
  /** The controls of `additions`, with their pictures. */
  readonly controls: readonly ControlRequest[];
  readonly sequenceLength: number;
  /** Dynamic LoRAs, in the order of loading; none of scale 0. */
  readonly loras: readonly AppliedLora[];
  /** Seed of each picture; empty if the noise was given. */
  readonly seeds: readonly Seed[];
  /** Given noise, one tensor for each stage; null to draw it from the seeds. */
  readonly noises: readonly FloatTensor[] | null;
  readonly edit: EditRequest | null;
  readonly pinBatch: number | null;
  /** For the picture's parameters. */
  readonly sampler: string;
  readonly sigmas: readonly number[] | undefined;
  readonly shift: number | undefined;
  readonly mu: number | undefined;
  readonly stages: GenerateOptions["stages"];
}

/** Of one call: what is done for each picture, on the event loop and in memory, has to end somewhere. */
const maxPictures = 1024;

/**
 * @param model the same object for each request: schedules are kept by it
 * @param controlNets that the request may name. Default: those of the model
 * @throws OptionError that names the option and the remedy
 */
export function settleRequest(
  given: GenerateOptions,
  model: ModelFacts,
  controlNets: KnownControlNets | undefined = model.controlNets,
): Request {
  const checked = checkOptions(generateSchema, given, "generate()");
  const { guidanceScale = defaultsBeside(checked.sampler, model.defaults).guidanceScale } = checked;
  const options = withQuality({ ...checked, guidanceScale }, model);
  const { image, mask, strength, keepOriginal, paddingMaskCrop } = options;
  const { count, preview, previewCount, outputType, metadata, deadlineMs, prefer, ticket, timeoutMs, priority } =
    options;
  const { stages, sigmas, shift, mu } = options;
  const {
    include = ["latents"],
    signal,
    onAccept,
    onStart,
    onStep,
    reports = preview || options.stepLatents ? "each" : "bunched",
  } = options;
  refusePaths({ ...options, allowPaths: options.allowPaths && model.allowPaths });
  if (model.captured && (options.pinBatch ?? 1) > 1) throw pinnedWithCapture();
  const { prompt = "" } = options;
  const facts = model.loras ?? noLoras;
  const loras = facts.settle(options.loras);
  const embeds = settleEmbeds(options, model.text, facts.reading(loras));
  const settled = embeds ? null : settleTexts({ ...options, prompt }, model.text, loras);
  const rows = embeds?.rows ?? settled!.prompts.length;
  const pictures = rows * count;
  if (pictures > maxPictures)
    throw new OptionError(
      rows <= maxPictures ? "count" : embeds ? "promptEmbeds" : "prompt",
      `Expected at most ${maxPictures} pictures of one call but received ${rows} prompts with ${count} each. Make several calls; they share launches.`,
    );
  if (previewCount !== undefined && preview === undefined)
    throw new OptionError(
      "previewCount",
      "The option previewCount says how many steps have previews; give preview too, or leave previewCount out.",
    );
  if (outputType === "latent" && include.includes("pixels"))
    throw new OptionError(
      "include",
      'With outputType "latent" nothing is decoded, so that there are no pixels; leave "pixels" out of include, or leave out outputType.',
    );
  checkGuidanceInterval(options);
  checkSigmas(sigmas);
  checkShift(options, model.checkpoint);
  const known = { checkpoint: model.checkpoint, allowPaths: model.allowPaths, controlNets };
  const controlled = settleControls(options, known, candidatesOf(options, model, pictures));
  const { controls } = controlled;
  const { skipLayers, candidates } = settleSkipLayers(options, controlled.candidates, model.checkpoint);
  const isOn = candidates.some(({ isGuided }) => isGuided);
  if (embeds && isOn && embeds.negativePrompts.length === 0)
    throw new OptionError(
      "promptEmbeds",
      "Guidance needs promptEmbeds.negativePromptEmbeds and promptEmbeds.negativePooledPromptEmbeds; give them, or guidanceScale 1.",
    );

  // What an edit needs.
  for (const [name, value] of Object.entries({ mask, strength }))
    if (value !== undefined && image === undefined)
      throw new OptionError(name, `The option ${name} needs an image to work on; give one, or leave ${name} out.`);

  if (paddingMaskCrop !== undefined && (image === undefined || mask === undefined))
    throw new OptionError(
      "paddingMaskCrop",
      "The option paddingMaskCrop says what is cut out around a mask; give image and mask, or leave it out.",
    );
  if (paddingMaskCrop !== undefined && outputType === "latent")
    throw new OptionError(
      "paddingMaskCrop",
      'With paddingMaskCrop what was drawn is put back into the picture as pixels, and outputType "latent" makes none; leave out one.',
    );

  // Noise.
  checkSeeds(options, pictures);
  const noises = options.noise === undefined ? null : ([options.noise].flat() as FloatTensor[]);
  if (noises) checkNoise(noises, candidates[0].stages, model.checkpoint.vae.config.factor);
  const seeds = noises ? [] : (options.seeds?.map(seedOf) ?? seedsFrom(options.seed ?? randomInt(2 ** 32), pictures));

  const { sampler } = candidates[0];
  return {
    ...{ count, preview, previewCount, outputType, metadata, deadlineMs, prefer, ticket, timeoutMs, priority },
    ...{ embeds, pictures, candidates, sequenceLength: (embeds ?? settled!).sequenceLength },
    texts: settled && (isOn ? settled : unguided(settled)),
    ...{ clipSkip: options.clipSkip, promptWeighting: options.promptWeighting },
    // Without a handler nobody sees them.
    stepLatents: options.stepLatents && onStep !== undefined,
    ...{ loras, seeds, noises, sampler, stages, include, sigmas, shift, mu },
    ...{ signal, onAccept, onStart, onStep, reports: onStep ? reports : "bunched" },
    guidance: {
      ...{ start: options.guidanceStart, stop: options.guidanceStop, mode: options.guidanceMode, isOn },
    },
    additions: { lora: sizeOf(facts.layout("predict", loras)), controls: controls.map(controlKind), skipLayers },
    controls,
    edit:
      image === undefined
        ? null
        : {
            ...{ image, mask: mask ?? null, strength: strength ?? defaultStrength, keepOriginal },
            paddingMaskCrop: paddingMaskCrop ?? null,
          },
    pinBatch: options.pinBatch ?? model.pinBatch,
  };
}

/** Of a low-rank branch what programs have to know. */
function sizeOf(layout: LowRankLayout | null): Additions["lora"] {
  return layout && { rank: layout.rank, down: layout.down, up: layout.up };
}

export function pinnedWithCapture(): OptionError {
  return new OptionError(
    "pinBatch",
    "With capture each picture runs by itself, whatever else is drawn; leave out pinBatch, or capture.",
  );
}

/**
 * A quality as what it stands for: a schedule of the model's own ladder, or else a number of steps.
 * @throws OptionError beside other words for the schedule
 */
function withQuality(
  options: ResolvedGenerateOptions,
  { ladder: own, defaults = usualDefaults }: ModelFacts,
): ResolvedGenerateOptions {
  const { quality, steps, blocks, sigmas, stages, sampler, ladder } = options;
  if (quality === undefined) return options;
  for (const [name, value] of Object.entries({ steps, blocks, sigmas, stages, ladder }))
    if (value !== undefined)
      throw new OptionError("quality", `Both quality and ${name} say what is run; leave out one.`);
  if (sampler !== undefined && sampler !== defaults.sampler)
    throw new OptionError("quality", `A quality is of the sampler ${defaults.sampler}; give steps for "${sampler}".`);
  // A ladder was written on purpose. A calibrated grid that is named has no blocks.
  if (own === null || options.grid === "calibrated")
    return { ...options, steps: defaults.quality[quality as QualityName] };
  return { ...options, blocks: formatBlocks(own[qualities[quality]!.rung(own.length)]!) };
}

/**
 * Skip-layer guidance, with those of the candidates in which some step has it. Null where nothing is said, and for a scale of 0, which changes
 * nothing.
 * @throws OptionError for blocks that the transformer does not have, without guidance, and where no step of any candidate would have it
 */
function settleSkipLayers(
  { skipLayers }: ResolvedGenerateOptions,
  candidates: readonly [Candidate, ...Candidate[]],
  { transformer }: Checkpoint,
): { readonly skipLayers: SkippedLayers | null; readonly candidates: readonly [Candidate, ...Candidate[]] } {
  if (!skipLayers) return { skipLayers: null, candidates };
  const { scale = 2.8, start = 0.01, stop = 0.2 } = skipLayers;
  const { numLayers } = transformer.config;
  const layers = [...new Set(skipLayers.layers)].sort((a, b) => a - b);
  const refuse = (message: string): never => {
    throw new OptionError("skipLayers", message);
  };
  const beyond = layers.find((layer) => layer >= numLayers);
  if (beyond !== undefined) throw noSuchLayer(beyond, numLayers, "skipLayers.layers");
  if (start >= stop) refuse(`Expected skipLayers.start (${start}) below skipLayers.stop (${stop}).`);
  if (!candidates.some(({ stages }) => stages.some(({ place }) => place.first < place.steps)))
    refuse(
      "Skip-layer guidance is of steps, and this strength leaves none; give a larger strength, or leave out skipLayers.",
    );
  if (!candidates.some(({ isGuided }) => isGuided))
    refuse("Skip-layer guidance is added to guidance; give a guidanceScale above 1, or leave out skipLayers.");
  if (scale === 0) return { skipLayers: null, candidates };
  const settled = { layers, scale, start, stop };
  const [first, ...others] = candidates.filter(({ stages }) => hasSkippedStep(settled, stages));
  if (!first) {
    const { steps } = candidates[0].stages[0]!.place;
    return refuse(
      `With skipLayers.start ${start} and skipLayers.stop ${stop} no guided step would have skip-layer guidance: of ${steps} step${steps === 1 ? "" : "s"}, numbered from 0, those between ${rounded(steps * start)} and ${rounded(steps * stop)} have it. Give a wider interval, or more steps.`,
    );
  }
  return { skipLayers: settled, candidates: [first, ...others] };
}

/** Without the last digits, which are those of binary fractions. */
const rounded = (value: number) => Number(value.toPrecision(12));

/** @param option that names the block */
export function noSuchLayer(layer: number, numLayers: number, option: string): OptionError {
  return new OptionError(
    "skipLayers",
    `Expected numbers of blocks from 0 to ${numLayers - 1} for ${option}, since the transformer has ${numLayers}, but received ${layer}.`,
  );
}

/** @throws OptionError for two shifts, or a parameter that the model's scheduler does not have */
function checkShift({ shift, mu }: ResolvedGenerateOptions, { scheduler }: Checkpoint): void {
  if (mu === undefined) return;
  if (shift !== undefined)
    throw new OptionError("mu", "Both shift and mu say how noise levels are shifted; leave out one.");
  if (!scheduler.dynamic)
    throw new OptionError(
      "mu",
      "The model's scheduler does not shift by size (use_dynamic_shifting is off), so that mu would have no effect; give shift.",
    );
}

function checkNoise(noises: readonly FloatTensor[], stages: readonly RequestStage[], factor: number): void {
  const refuse = (message: string): never => {
    throw new OptionError("noise", message);
  };
  if (noises.length !== stages.length)
    refuse(`Expected ${stages.length} noise tensors, one a stage, but received ${noises.length}.`);
  for (const [index, noise] of noises.entries()) {
    const { latentShape } = stages[index]!;
    const which = stages.length > 1 ? `noise of stage ${index + 1}` : "noise";
    if (noise.shape.join() !== latentShape.join())
      refuse(
        `Expected shape [${latentShape.join(", ")}] for ${which} (pictures, channels, height / ${factor}, width / ${factor}) but received [${noise.shape.join(", ")}].`,
      );
    if (noise.data.length !== elementCount(latentShape))
      refuse(`The ${which} has ${noise.data.length} values, which its shape does not.`);
    if (!allFinite(noise.data)) refuse(`Expected finite values for ${which} but it holds NaN or an infinity.`);
  }
}
