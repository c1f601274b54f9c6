/**
 * Options of `generate` × a model → a settled request: everything about it that is known before any work. Every refusal
 * of generate() that needs the model, and no file, is here. Pure, but for a seed that is drawn where none is given.
 */

import { randomInt } from "node:crypto";
import type { Checkpoint } from "../checkpoint/index.js";
import { LruCache } from "../common/lru-cache.js";
import { elementCount, type FloatTensor } from "../common/tensor.js";
import { OptionError, publicMessage } from "../errors.js";
import type { GenerateOptions, PictureSource, Size, Stage } from "../model.js";
import { networks, sigmaBeforeUpscale, type UpscaleName, upscaleJump } from "../networks/index.js";
import {
  checkGuidanceInterval,
  checkOptions,
  checkSigmas,
  generateSchema,
  type ResolvedGenerateOptions,
  refusePaths,
} from "../options.js";
import { allFinite } from "../program/validate.js";
import {
  type Block,
  blocksGrid,
  type CalibratedSchedule,
  defaultSampler,
  type FittedSchedule,
  fittedSchedules,
  formatBlocks,
  givenSigmas,
  ladderSteps,
  nearestOf,
  parseBlocks,
  qualities,
  rowsOf,
  type Schedule,
  samplers,
  samplersWithBlocks,
  scheduleOf,
  sigmaGrids,
  sigmaSettings,
  skippedBlocks,
  stepTypesOf,
  unmetNeed,
  upscaleSigmas,
} from "../schedule/index.js";
import { guidanceOf, type LatentShape } from "./programs.js";
import { checkSize, fitsPositions, latentShapeOf, nativeSize } from "./sizes.js";
import type { PromptEncoder } from "./text.js";

/** What a request has to know of a model. */
export interface ModelFacts {
  readonly checkpoint: Checkpoint;
  /** Schedules for time limits, the richest first: blocks, or numbers of steps. */
  readonly ladder: readonly (readonly Block[] | number)[];
  /** Schedules that were calibrated for the model. */
  readonly calibrated: readonly CalibratedSchedule[];
  readonly text: Pick<PromptEncoder, "defaultSequenceLength" | "maxSequenceLength">;
  /** Whether each picture is one captured program, which shares nothing. */
  readonly captured: boolean;
  readonly pinBatch: number | null;
  /** Whether requests may name pictures by the path of a file. */
  readonly allowPaths: boolean;
}

/** One size of a request. */
export interface RequestStage extends Size {
  /** Of all pictures, [B, C, h, w]. */
  readonly latentShape: LatentShape;
  readonly schedule: Schedule;
  /** How it starts from the stage before; absent of the first. */
  readonly upscale?: UpscaleName | undefined;
  /** Whether the schedule was calibrated for the model. */
  readonly isCalibrated: boolean;
  /** For the picture's parameters: the blocks before any are left out, and the name of their noise levels. */
  readonly whole: {
    readonly blocks: string;
    readonly grid: string;
    /** One scale, or one for each step: a time limit may choose a schedule that leaves guidance out of some. */
    readonly guidanceScale: number | readonly number[];
  };
}

/** A way to draw a request. Those of a time limit differ in their schedules only. */
export interface Candidate {
  /** Schedules of its stages, such as "H1P7R2 H1P1". */
  readonly text: string;
  readonly stages: readonly RequestStage[];
  /** Whether some step of it is guided. */
  readonly isGuided: boolean;
}

/** What a request edits. */
export interface EditRequest {
  readonly image: PictureSource;
  readonly mask: PictureSource | null;
  readonly strength: number;
  readonly keepOriginal: boolean;
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
  | "metadata"
  | "deadlineMs"
  | "prefer"
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
  readonly prompts: readonly string[];
  /** One for each prompt; none without guidance. */
  readonly negativePrompts: readonly string[];
  /** B: `count` for each prompt. */
  readonly pictures: number;
  /** Ways to draw it, the richest first; one without a time limit. */
  readonly candidates: readonly [Candidate, ...Candidate[]];
  readonly guidance: GuidanceSettings;
  readonly sequenceLength: number;
  /** Seed of each picture; empty if the noise was given. */
  readonly seeds: readonly number[];
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

/** Part of the schedule that runs on an original, as in diffusers' pipelines for SD3. */
const defaultStrength = 0.6;

/** Noise level that a finished stage is brought to for the next. */
const defaultUpscaleSigma = 0.6;

/** @throws OptionError that names the option and the remedy */
export function settleRequest(given: GenerateOptions, model: ModelFacts): Request {
  const options = withQuality(checkOptions(generateSchema, given, "generate()"));
  const {
    image,
    mask,
    strength,
    keepOriginal,
    maxSequenceLength: sequenceLength = model.text.defaultSequenceLength,
  } = options;
  const { count, preview, metadata, deadlineMs, prefer, timeoutMs, priority, stages, sigmas, shift, mu } = options;
  const { include = [], signal, onAccept, onStart, onStep, reports = preview ? "each" : "bunched" } = options;
  refusePaths({ ...options, allowPaths: options.allowPaths && model.allowPaths });
  if (model.captured && (options.pinBatch ?? 1) > 1) throw pinnedWithCapture();
  const prompts = typeof options.prompt === "string" ? [options.prompt] : options.prompt;
  const negativePrompts = perPrompt(options.negativePrompt ?? "", prompts.length);
  const pictures = prompts.length * count;
  if (pictures > maxPictures)
    throw new OptionError(
      prompts.length > maxPictures ? "prompt" : "count",
      `Expected at most ${maxPictures} pictures of one call but received ${prompts.length} prompts with ${count} each. Make several calls; they share launches.`,
    );
  checkGuidanceInterval(options);
  checkSigmas(sigmas);
  checkShift(options, model.checkpoint);
  const candidates = candidatesOf(options, model, pictures);
  const isOn = candidates.some(({ isGuided }) => isGuided);

  // What an edit needs.
  for (const [name, value] of Object.entries({ mask, strength }))
    if (value !== undefined && image === undefined)
      throw new OptionError(name, `The option ${name} needs an image to work on; give one, or leave ${name} out.`);

  // Noise.
  const noises = options.noise === undefined ? null : ([options.noise].flat() as FloatTensor[]);
  if (noises) checkNoise(noises, candidates[0].stages, model.checkpoint.vae.config.factor);
  const seed = options.seed ?? randomInt(2 ** 32);
  const seeds = noises ? [] : Array.from({ length: pictures }, (_, index) => seed + index);

  // Text.
  checkSequenceLength(sequenceLength, model.text.maxSequenceLength);
  const sampler = options.sampler ?? defaultSampler;
  return {
    ...{ count, preview, metadata, deadlineMs, prefer, timeoutMs, priority },
    ...{ prompts, pictures, candidates, sequenceLength },
    ...{ seeds, noises, sampler, stages, include, sigmas, shift, mu },
    ...{ signal, onAccept, onStart, onStep, reports: onStep ? reports : "bunched" },
    negativePrompts: isOn ? negativePrompts : [],
    guidance: {
      ...{ start: options.guidanceStart, stop: options.guidanceStop, mode: options.guidanceMode, isOn },
    },
    edit:
      image === undefined ? null : { image, mask: mask ?? null, strength: strength ?? defaultStrength, keepOriginal },
    pinBatch: options.pinBatch ?? model.pinBatch,
  };
}

/** @throws OptionError for more tokens than the T5 tokenizer takes */
export function checkSequenceLength(length: number, most: number): void {
  if (length > most)
    throw new OptionError(
      "maxSequenceLength",
      `Expected at most ${most} for maxSequenceLength but received ${length}: the model's T5 tokenizer takes no more.`,
    );
}

export function pinnedWithCapture(): OptionError {
  return new OptionError(
    "pinBatch",
    "With capture each picture runs by itself, whatever else is drawn; leave out pinBatch, or capture.",
  );
}

const knownCandidates = new WeakMap<ModelFacts, LruCache<[Candidate, ...Candidate[]]>>();

/** One way to draw a request, or with a time limit those of the ladder, each schedule once. Requests of a kind share them. */
function candidatesOf(
  options: ResolvedGenerateOptions,
  model: ModelFacts,
  pictures: number,
): [Candidate, ...Candidate[]] {
  const { deadlineMs, ladder, sampler, blocks, steps, stages, width, height, grid, image, strength } = options;
  const { sigmas, shift, mu, guidanceScale, guidanceStart, guidanceStop, guidanceMode } = options;
  const shape = {
    ...{ ladder, sampler, blocks, steps, stages, width, height, grid, strength, pictures, sigmas, shift, mu },
    ...{ guidanceScale, guidanceStart, guidanceStop, guidanceMode },
  };
  const key = JSON.stringify({ ...shape, isEdit: image !== undefined, isLimited: deadlineMs !== undefined });
  const kept = knownCandidates.get(model) ?? new LruCache(64);
  knownCandidates.set(model, kept);
  return kept.get(key) ?? kept.set(key, newCandidates(options, model, pictures));
}

function newCandidates(
  options: ResolvedGenerateOptions,
  model: ModelFacts,
  pictures: number,
): [Candidate, ...Candidate[]] {
  const { deadlineMs, ladder, sampler, blocks, steps, stages, sigmas, guidanceScale } = options;
  if (ladder !== undefined && deadlineMs === undefined)
    throw new OptionError("ladder", "A ladder is for a time limit; give deadlineMs, or leave ladder out.");
  const fixed = { sampler, blocks, steps, stages, sigmas };
  for (const [name, value] of Object.entries(fixed))
    if (ladder !== undefined && value !== undefined)
      throw new OptionError("ladder", `The ladder says what may be run; leave out ${name} or ladder.`);
  const given = blocks === undefined || stages ? null : blocksOf(blocks, model.checkpoint);
  const isFixed = Object.values(fixed).some((value) => value !== undefined);
  if (deadlineMs === undefined || isFixed) return [candidateOf(options, model, pictures, given)];
  if (typeof guidanceScale !== "number")
    throw new OptionError(
      "guidanceScale",
      "A list of guidance scales is for a number of steps, which a time limit leaves open; give steps, or one scale.",
    );
  const candidates = new Map<string, Candidate>();
  let refused: unknown;
  const calibrated = ladder ? null : calibratedRungs(options, model);
  const rungs = ladder?.map((text) => blocksOf(text, model.checkpoint)) ?? calibrated ?? model.ladder;
  for (const each of rungs)
    try {
      const rung = typeof each === "number" ? { steps: each } : each;
      const candidate =
        "steps" in rung
          ? candidateOf({ ...options, ...rung }, model, pictures, null)
          : candidateOf(options, model, pictures, rung);
      const key = candidate.stages.map(({ schedule }) => schedule.key).join();
      if (!candidates.has(key)) candidates.set(key, candidate);
    } catch (error) {
      // At some strengths what is left of a short schedule is not valid; others may be.
      if (ladder !== undefined || !(error instanceof OptionError)) throw error;
      refused = error;
    }
  const found = [...candidates.values()];
  // A file's ladder, or the caller's, is in its own order.
  if (calibrated) found.sort((a, b) => rowsOfCandidate(b) - rowsOfCandidate(a));
  const [first, ...others] = found;
  if (!first) throw refused;
  return [first, ...others];
}

const rowsOfCandidate = ({ stages }: Candidate) =>
  stages.reduce((sum, { schedule }) => sum + schedule.evaluations.rows, 0);

/** A number of steps, and the guidance scale of each. */
type Rung = Pick<ResolvedGenerateOptions, "guidanceScale"> & { readonly steps: number };

/**
 * Schedules for a time limit where some were calibrated: those that come nearer to the reference than any of no more rows, and the usual
 * ones of other numbers of steps. Null without calibration.
 * @param options with one guidance scale
 */
function calibratedRungs(options: ResolvedGenerateOptions, model: ModelFacts): Rung[] | null {
  const scale = options.guidanceScale as number;
  const counts = [...new Set(model.calibrated.map(({ guided }) => guided.length))];
  const found = leavesGuidanceOpen(options)
    ? fittedSchedulesOf(options, model)
    : counts.flatMap((steps) => fittedSchedule(options, model, steps) ?? []);
  if (found.length === 0) return null;
  const all = found.map(({ guidance, psnr }) => ({
    ...{ steps: guidance.length, psnr, guided: guidance.map((each) => each !== null) },
    rows: rowsOf({ guided: guidance.map((each) => each !== null) }),
  }));
  const best = all.filter(({ rows, psnr }) =>
    all.every((other) => other.rows > rows || psnr === null || other.psnr === null || other.psnr <= psnr),
  );
  const known = new Set(all.map(({ steps }) => steps));
  return [
    ...best.map(({ steps, guided }) => ({
      steps,
      guidanceScale: leavesGuidanceOpen(options) ? guided.map((each) => (each ? scale : 1)) : scale,
    })),
    ...ladderSteps.filter((steps) => !known.has(steps)).map((steps) => ({ steps, guidanceScale: scale })),
  ];
}

/** Whether a request says no more of its guidance than its scale. */
function leavesGuidanceOpen(options: Omit<StageOptions, "blocks">): boolean {
  return typeof options.guidanceScale === "number" && options.guidanceStart === 0 && options.guidanceStop === 1;
}

/**
 * The calibrated schedule for a request that leaves everything but the number of steps and guidance at one scale open. Which steps are
 * guided is the schedule's choice where the request says no more than the scale.
 */
function fittedSchedule(
  options: Omit<StageOptions, "blocks">,
  model: Pick<ModelFacts, "checkpoint" | "calibrated">,
  steps: number,
): FittedSchedule | null {
  const scales = Array.from({ length: steps }, (_, step) => scaleAt(options, step, steps));
  const guided = leavesGuidanceOpen(options) ? undefined : scales.map((each) => each !== null);
  const [guidanceScale = 1, ...others] = new Set(scales.filter((each) => each !== null));
  if (others.length > 0) return null;
  const found = fittedSchedulesOf({ ...options, guidanceScale }, model, guided);
  return nearestOf(found.filter(({ guidance }) => guidance.length === steps));
}

/** Calibrated schedules of all numbers of steps. @param options with one guidance scale @param guided the steps that are, if that is not left open */
function fittedSchedulesOf(
  options: Omit<StageOptions, "blocks">,
  { checkpoint, calibrated }: Pick<ModelFacts, "checkpoint" | "calibrated">,
  guided?: readonly boolean[],
): FittedSchedule[] {
  const { sampler = defaultSampler, grid, sigmas, shift, mu, image, guidanceMode } = options;
  const own = [grid === "calibrated" ? undefined : grid, sigmas, shift, mu, image];
  const isUsual = own.every((value) => value === undefined) && sampler === defaultSampler && guidanceMode === "cfg";
  if (!isUsual) return [];
  const native = nativeSize(checkpoint);
  const { width = native.width, height = native.height } = options;
  return fittedSchedules(calibrated, {
    ...{ width, height, guided, guidanceScale: Math.max(1, options.guidanceScale as number) },
    hasRefiner: checkpoint.refiner !== null && fitsPositions(checkpoint, "refine", { width, height }),
  });
}

function candidateOf(
  options: ResolvedGenerateOptions,
  model: ModelFacts,
  pictures: number,
  blocks: readonly Block[] | null,
): Candidate {
  const stages = options.stages
    ? risingStages(options, options.stages, model, pictures)
    : [firstStage(options, model, pictures, blocks)];
  const text = stages.map(({ schedule }) => schedule.text).join(" ");
  return { text, stages, isGuided: guidanceOf(stages).guided };
}

/** @throws OptionError for blocks that are none, or that need a refiner which is not there */
function blocksOf(text: string, checkpoint: Checkpoint): Block[] {
  const blocks = parseBlocks(text);
  if (!canRun(checkpoint, blocks)) {
    const needs = `The blocks "${formatBlocks(blocks)}" need a velocity refiner, but`;
    throw new OptionError(
      "blocks",
      `${needs} ${checkpoint.folder} has no refiner/ folder. Use other blocks, such as P, or train a refiner.`,
      { publicMessage: `${needs} this model has none. Use other blocks, such as P.` },
    );
  }
  return blocks;
}

/** Whether a checkpoint has all networks that blocks evaluate. */
export function canRun(checkpoint: Checkpoint, blocks: readonly Block[]): boolean {
  return stepTypesOf(blocks).every((type) => checkpoint[networks[type]!.part!] !== null);
}

/** Levels that are nearer than this to each other are one to float32, and weights that divide by their distance are no numbers. */
const leastGap = 1e-5;

function checkedLevels(sigmas: readonly number[]): readonly number[] {
  for (const [index, sigma] of sigmas.entries())
    if (index > 0 && sigmas[index - 1]! - sigma < leastGap)
      throw new OptionError(
        "sigmas",
        `Expected sigmas at least ${leastGap} apart after shifting but number ${index + 1} is ${sigma} after ${sigmas[index - 1]}.`,
      );
  return sigmas;
}

/** A quality as the number of steps that it stands for. @throws OptionError beside other words for the schedule */
function withQuality(options: ResolvedGenerateOptions): ResolvedGenerateOptions {
  const { quality, steps, blocks, sigmas, stages, sampler, ladder } = options;
  if (quality === undefined) return options;
  for (const [name, value] of Object.entries({ steps, blocks, sigmas, stages, ladder }))
    if (value !== undefined)
      throw new OptionError("quality", `Both quality and ${name} say what is run; leave out one.`);
  if (sampler !== undefined && sampler !== defaultSampler)
    throw new OptionError("quality", `A quality is of the sampler ${defaultSampler}; give steps for "${sampler}".`);
  return { ...options, steps: qualities[quality]! };
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

/** The guidance scale of a step, null for none. As diffusers' guiders, the steps ⌊n·start⌋ to ⌊n·stop⌋ − 1 are guided. */
function scaleAt(options: ResolvedGenerateOptions, step: number, steps: number): number | null {
  const { guidanceScale, guidanceStart, guidanceStop } = options;
  const scale = typeof guidanceScale === "number" ? guidanceScale : guidanceScale[step]!;
  const isWithin = Math.trunc(guidanceStart * steps) <= step && step < Math.trunc(guidanceStop * steps);
  return isWithin && scale > 1 ? scale : null;
}

/** @throws OptionError for a list of scales of another length */
function checkScales({ guidanceScale }: ResolvedGenerateOptions, steps: number): void {
  if (typeof guidanceScale !== "number" && guidanceScale.length !== steps)
    throw new OptionError(
      "guidanceScale",
      `Expected one guidance scale, or ${steps} (one for each step), for guidanceScale but received ${guidanceScale.length}.`,
    );
}

/** @throws OptionError where options name different numbers of steps */
function stepCount(
  { blocks: text, steps, sigmas, grid }: Pick<StageOptions, "blocks" | "steps" | "sigmas" | "grid">,
  blocks: readonly Block[] | null,
  usual: number,
): number {
  const levels = sigmas?.filter((sigma) => sigma > 0).length;
  if (blocks && steps !== undefined && steps !== blocks.length)
    throw new OptionError("steps", `The blocks "${text}" are ${blocks.length} steps; leave out steps (${steps}).`);
  if (sigmas && grid !== undefined)
    throw new OptionError("sigmas", "Both sigmas and grid say which noise levels there are; leave out one.");
  const count = blocks?.length ?? steps;
  if (levels !== undefined && count !== undefined && levels !== count)
    throw new OptionError(
      "sigmas",
      `Expected ${count} sigmas, one where each step starts (0 at the end may be left out), but received ${levels}.`,
    );
  return count ?? levels ?? usual;
}

type StageOptions = Omit<ResolvedGenerateOptions, "width" | "height" | "blocks"> &
  Pick<GenerateOptions, "width" | "height" | "blocks">;

/**
 * The usual request: one size, on which an original's `strength` keeps the last part of the schedule.
 * @param later steps of later stages
 * @param end the noise level that it ends at, above 0 if another stage takes noise over
 */
function firstStage(
  options: StageOptions,
  model: ModelFacts,
  pictures: number,
  blocks: readonly Block[] | null,
  later = 0,
  end = 0,
): RequestStage {
  const { checkpoint } = model;
  const native = nativeSize(checkpoint);
  const size = { width: options.width ?? native.width, height: options.height ?? native.height };
  checkSize(checkpoint, size, []);
  const { sampler = defaultSampler, strength = defaultStrength, guidanceScale, guidanceMode } = options;
  const row = samplers[sampler]!;
  const text = options.blocks ?? formatBlocks(blocks ?? []);
  if (blocks && !row.takesBlocks)
    throw new OptionError(
      "blocks",
      `Blocks belong to the sampler ${samplersWithBlocks().join(" or ")}; leave out blocks or sampler "${sampler}".`,
    );
  const count = stepCount(options, blocks, row.steps);
  checkScales(options, count + later);
  const fitted = blocks || options.stages ? null : fittedSchedule(options, model, count);
  if (fitted) {
    const { blocks: steps, sigmas, weights, guidance } = fitted;
    const schedule = scheduleOf(steps, sigmas, { weights, guidance: (block) => guidance[block]! });
    const whole = { blocks: schedule.text, grid: "calibrated", guidanceScale };
    return { ...size, latentShape: latentShapeOf(checkpoint, pictures, size), schedule, isCalibrated: true, whole };
  }
  const scale = (step: number) => scaleAt(options, step, count + later);
  const guidance = Math.max(1, ...Array.from({ length: count }, (_, step) => scale(step) ?? 1));
  if (options.grid === "calibrated")
    throw new OptionError(
      "grid",
      `No schedule of ${count} steps was calibrated for this request: its size, its guidance and what else it says of its schedule. Leave out grid, or run \`flowturbo calibrate\`.`,
    );
  // CFG-Zero* leaves the first step out where it starts from noise: the velocity there counts as zero.
  const zeroInit = guidanceMode === "cfg_zero" && guidance > 1 && options.image === undefined ? 1 : 0;
  if (zeroInit === count)
    throw new OptionError(
      "guidanceMode",
      `With "cfg_zero" the first step is left out, so that ${count} step is too few; give at least 2.`,
    );
  const skipped = options.image === undefined ? zeroInit : skippedBlocks(count, strength);
  // Given blocks are cut; a default schedule is made anew for what is left, so that it begins as its sampler does.
  const run = blocks?.slice(skipped) ?? row.blocks(count - skipped, guidance);
  if (blocks && unmetNeed(run))
    throw zeroInit
      ? new OptionError(
          "blocks",
          `With guidanceMode "cfg_zero" the first block of "${text}" is left out, and those after it need its velocity. Put a block before it.`,
        )
      : new OptionError(
          "strength",
          `Strength ${strength} leaves only the last blocks of "${text}", which need the velocity of a block before them. Give a larger strength.`,
        );
  checkSize(checkpoint, size, stepTypesOf(run));
  const latentShape = latentShapeOf(checkpoint, pictures, size);
  const settings = { ...sigmaSettings(checkpoint.scheduler, patchesOf(checkpoint, latentShape), options), guidance };
  const grid = options.grid ?? (blocks ? blocksGrid : row.grid);
  const spacing = (grid === "diffusers" && row.diffusersSigmas) || sigmaGrids[grid]!;
  const spaced = () => (end > 0 ? upscaleSigmas(count, settings, 1, end) : spacing(count, settings));
  if (!(settings.shift > 0 && Number.isFinite(settings.shift)))
    throw new OptionError(
      "mu",
      `The noise levels' shift would be ${settings.shift}: it has to be above 0. Give shift, or another mu.`,
    );
  const sigmas = options.sigmas ? checkedLevels(givenSigmas(options.sigmas, settings)) : spaced();
  const schedule = scheduleOf(run, sigmas.slice(skipped), {
    guidance: (block) => scale(skipped + block),
    wholeTimestepsOf: row.wholeTimesteps ? settings.numTrainTimesteps : undefined,
  });
  const whole = { blocks: formatBlocks(blocks ?? row.blocks(count, guidance)), grid, guidanceScale };
  return { ...size, latentShape, schedule, isCalibrated: false, whole };
}

function patchesOf({ transformer }: Checkpoint, [, , height, width]: LatentShape): number {
  const { patchSize } = transformer.config;
  return (height / patchSize) * (width / patchSize);
}

/** A request from coarse to fine. */
function risingStages(
  options: ResolvedGenerateOptions,
  stages: NonNullable<ResolvedGenerateOptions["stages"]>,
  model: ModelFacts,
  pictures: number,
): RequestStage[] {
  const { checkpoint } = model;
  const { width, height, blocks, steps, sampler, grid, sigmas } = options;
  for (const [name, value] of Object.entries({ width, height, blocks, steps, sampler, grid, sigmas }))
    if (value !== undefined)
      throw new OptionError(name, `Stages say sizes and blocks themselves; leave out ${name} or stages.`);
  const refuse = (message: string): never => {
    throw new OptionError("stages", message);
  };
  const nameOf = (index: number) => ({ option: "stages", prefix: `stages[${index}].` });
  for (const [index, stage] of stages.entries()) {
    const before = stages[index - 1];
    const named = nameOf(index);
    checkSize(checkpoint, stage, [], named);
    if (before && (stage.width < before.width || stage.height < before.height))
      refuse(
        `Expected rising sizes for stages but stage ${index + 1} is ${stage.width} × ${stage.height} after ${before.width} × ${before.height}.`,
      );
    if (before && stage.width === before.width && stage.height === before.height)
      refuse(
        `Expected rising sizes for stages but stages ${index} and ${index + 1} are both ${stage.width} × ${stage.height}.`,
      );
    if (!before && stage.sigma !== undefined)
      refuse("The first stage has no picture to noise again; leave out its sigma, or give an image and a strength.");
    if (!before && stage.upscale !== undefined)
      refuse("The first stage has no stage before it to upscale; leave out its upscale.");
    if (stage.sigma !== undefined && !(stage.sigma > 0 && stage.sigma < 1))
      refuse(`Expected a number between 0 and 1 for stages[${index}].sigma but received ${stage.sigma}.`);
  }
  const parsed = stages.map((stage, index) => stageBlocks(stage.blocks, `${nameOf(index).prefix}blocks`, checkpoint));
  const counts = parsed.map(({ length }) => length);
  const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0);
  return stages.map((stage, index) => {
    const all = parsed[index]!;
    checkSize(checkpoint, stage, stepTypesOf(all), nameOf(index));
    const end = endOf(stage, stages[index + 1], checkpoint);
    if (index === 0) return firstStage({ ...options, ...stage }, model, pictures, all, sum(counts.slice(1)), end);
    const { width, height, sigma = defaultUpscaleSigma, upscale = "pixels" } = stage;
    if (end >= sigma)
      refuse(
        `Stage ${index + 1} starts at sigma ${sigma}, but the next one takes its latents over at ${end.toFixed(4)}. Give a larger stages[${index}].sigma, or a smaller stages[${index + 1}].sigma.`,
      );
    const latentShape = latentShapeOf(checkpoint, pictures, stage);
    const settings = sigmaSettings(checkpoint.scheduler, patchesOf(checkpoint, latentShape), options);
    const [start, total] = [sum(counts.slice(0, index)), sum(counts)];
    const schedule = scheduleOf(all, upscaleSigmas(all.length, settings, sigma, end), {
      guidance: (block) => scaleAt(options, start + block, total),
    });
    const whole = { blocks: schedule.text, grid: blocksGrid, guidanceScale: options.guidanceScale };
    return { width, height, latentShape, upscale, schedule, isCalibrated: false, whole };
  });
}

/** The noise level that a stage ends at: above 0 where the next one takes its latents. */
function endOf(stage: Size, next: Stage | undefined, checkpoint: Checkpoint): number {
  if (next?.upscale !== "latents") return 0;
  const [before, after] = [stage, next].map((size) => {
    const [, , height, width] = latentShapeOf(checkpoint, 1, size);
    return [height, width] as const;
  });
  return sigmaBeforeUpscale(next.sigma ?? defaultUpscaleSigma, upscaleJump(before!, after!));
}

function stageBlocks(text: string, name: string, checkpoint: Checkpoint): Block[] {
  try {
    return blocksOf(text, checkpoint);
  } catch (error) {
    throw new OptionError("stages", `${name}: ${(error as Error).message}`, {
      publicMessage: `${name}: ${publicMessage(error)}`,
    });
  }
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

function perPrompt(value: string | readonly string[], prompts: number): readonly string[] {
  if (typeof value === "string") return new Array<string>(prompts).fill(value);
  if (value.length !== prompts)
    throw new OptionError(
      "negativePrompt",
      `Expected one negative prompt, or ${prompts} (one for each prompt), for negativePrompt but received ${value.length}.`,
    );
  return value;
}
