/**
 * The stages of a request: for each size the schedule that it is drawn with, as its options and the model say. Every refusal of a
 * schedule is here.
 */

import type { Checkpoint } from "../checkpoint/index.js";
import { OptionError, publicMessage } from "../errors.js";
import type { GenerateOptions, Size, Stage } from "../model.js";
import { networks, sigmaBeforeUpscale, type UpscaleName, upscaleJump } from "../networks/index.js";
import type { ResolvedGenerateOptions } from "../options.js";
import {
  type Block,
  blocksGrid,
  type CalibratedSchedule,
  defaultSampler,
  type FittedSchedule,
  fittedSchedules,
  formatBlocks,
  givenSigmas,
  nearestOf,
  ownScales,
  parseBlocks,
  type SamplerRow,
  type Schedule,
  type Solver,
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
import type { StepPlace } from "./additions.js";
import type { LatentShape } from "./programs.js";
import { checkSize, fitsPositions, latentShapeOf, nativeSize } from "./sizes.js";

/** What the stages of a request have to know of a model. */
export interface StageFacts {
  readonly checkpoint: Checkpoint;
  /** Schedules that were calibrated for the model. */
  readonly calibrated: readonly CalibratedSchedule[];
}

/** One size of a request. */
export interface RequestStage extends Size {
  /** Of all pictures, [B, C, h, w]. */
  readonly latentShape: LatentShape;
  readonly schedule: Schedule;
  /** How it starts from the stage before; absent of the first. */
  readonly upscale?: UpscaleName | undefined;
  /** Where its blocks are among the steps of the whole request, those that are left out included: intervals are parts of these. */
  readonly place: StepPlace;
  /** For the picture's parameters: the blocks before any are left out, and the name of their noise levels. */
  readonly whole: {
    /** As they were given; null for a number of steps. */
    readonly blocks: string | null;
    readonly steps: number;
    readonly grid: string;
    /** One scale, or one for each step: a time limit may choose a schedule that leaves guidance out of some. */
    readonly guidanceScale: number | readonly number[];
  };
}

/** Part of the schedule that runs on an original, as in diffusers' pipelines for SD3. */
export const defaultStrength = 0.6;

/** Noise level that a finished stage is brought to for the next. */
const defaultUpscaleSigma = 0.6;

export type StageOptions = Omit<ResolvedGenerateOptions, "width" | "height" | "blocks"> &
  Pick<GenerateOptions, "width" | "height" | "blocks">;

/** The guidance scale of a step, null for none. As diffusers' guiders, the steps ⌊n·start⌋ to ⌊n·stop⌋ − 1 are guided. */
function scaleAt(options: Omit<StageOptions, "blocks">, step: number, steps: number): number | null {
  const { guidanceScale, guidanceStart, guidanceStop } = options;
  const scale = typeof guidanceScale === "number" ? guidanceScale : guidanceScale[step]!;
  const isWithin = Math.trunc(guidanceStart * steps) <= step && step < Math.trunc(guidanceStop * steps);
  return isWithin && scale > 1 ? scale : null;
}

/**
 * @param steps of all stages
 * @throws OptionError for a list of scales of another length, or an interval in which no step is guided
 */
function checkGuidance(options: ResolvedGenerateOptions, steps: number): void {
  const { guidanceScale, guidanceStart, guidanceStop } = options;
  if (typeof guidanceScale !== "number" && guidanceScale.length !== steps)
    throw new OptionError(
      "guidanceScale",
      `Expected one guidance scale, or ${steps} (one for each step), for guidanceScale but received ${guidanceScale.length}.`,
    );
  if (guidesNone(options, steps))
    throw new OptionError(
      "guidanceStart",
      `With guidanceStart ${guidanceStart} and guidanceStop ${guidanceStop} no step would be guided: of ${steps} step${steps === 1 ? "" : "s"} those from ⌊${steps} · guidanceStart⌋ to ⌊${steps} · guidanceStop⌋ − 1 are. Give an interval with at least one guided step, or guidanceScale 1 to draw without guidance.`,
    );
}

/** Whether guidance is asked for, and its interval leaves it out of every step. */
function guidesNone(options: Omit<StageOptions, "blocks">, steps: number): boolean {
  const isAskedFor = [options.guidanceScale].flat().some((scale) => scale > 1);
  return isAskedFor && Array.from({ length: steps }, (_, step) => scaleAt(options, step, steps)).every((each) => !each);
}

/** Whether a request says no more of its guidance than its scale. */
export function leavesGuidanceOpen(options: Omit<StageOptions, "blocks">): boolean {
  return typeof options.guidanceScale === "number" && options.guidanceStart === 0 && options.guidanceStop === 1;
}

/**
 * The calibrated schedule for a request that leaves everything but the number of steps and guidance at one scale open. Which steps are
 * guided is the schedule's choice where the request says no more than the scale. Null as well where guidance is asked for and no step of
 * so many would have it, which is refused.
 */
export function fittedSchedule(
  options: Omit<StageOptions, "blocks">,
  model: StageFacts,
  steps: number,
): FittedSchedule | null {
  if (guidesNone(options, steps)) return null;
  const scales = Array.from({ length: steps }, (_, step) => scaleAt(options, step, steps));
  const guided = leavesGuidanceOpen(options) ? undefined : scales.map((each) => each !== null);
  const [guidanceScale = 1, ...others] = new Set(scales.filter((each) => each !== null));
  if (others.length > 0) return null;
  const found = fittedSchedulesOf({ ...options, guidanceScale }, model, guided);
  return nearestOf(found.filter(({ guidance }) => guidance.length === steps));
}

/** Calibrated schedules of all numbers of steps. @param options with one guidance scale @param guided the steps that are, if that is not left open */
export function fittedSchedulesOf(
  options: Omit<StageOptions, "blocks">,
  { checkpoint, calibrated }: StageFacts,
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

/** @throws OptionError for blocks that are none, or that need a refiner which is not there */
export function blocksOf(text: string, checkpoint: Checkpoint): Block[] {
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

/**
 * The usual request: one size, on which an original's `strength` keeps the last part of the schedule.
 * @param later steps of later stages
 * @param end the noise level that it ends at, above 0 if another stage takes noise over
 */
export function firstStage(
  options: StageOptions,
  model: StageFacts,
  pictures: number,
  blocks: readonly Block[] | null,
  later = 0,
  end = 0,
): RequestStage {
  const { checkpoint } = model;
  const native = nativeSize(checkpoint);
  const size = { width: options.width ?? native.width, height: options.height ?? native.height };
  checkSize(checkpoint, size, []);
  const { sampler = defaultSampler, guidanceScale } = options;
  const row = samplers[sampler]!;
  if (blocks && !row.takesBlocks)
    throw new OptionError(
      "blocks",
      `Blocks belong to the sampler ${samplersWithBlocks().join(" or ")}; leave out blocks or sampler "${sampler}".`,
    );
  const count = stepCount(options, blocks, row.steps);
  checkGuidance(options, count + later);
  const latentShape = latentShapeOf(checkpoint, pictures, size);
  // Those of a model's own ladder were not asked for.
  const asked = options.blocks === undefined ? options.ladder && "ladder" : "blocks";
  if (blocks && asked && options.grid === "calibrated")
    throw new OptionError(
      "grid",
      `The option ${asked} and grid "calibrated" exclude each other: a calibrated schedule has steps of its own. Leave out ${asked}, or grid.`,
    );
  const fitted = blocks || options.stages ? null : fittedSchedule(options, model, count);
  if (fitted) {
    const { blocks: steps, sigmas, weights, guidance } = fitted;
    const schedule = scheduleOf(steps, sigmas, { weights, guidance: (block) => guidance[block]! });
    const whole = { blocks: null, steps: count, grid: "calibrated", guidanceScale };
    return { ...size, latentShape, schedule, place: { first: 0, steps: count }, whole };
  }
  if (options.grid === "calibrated")
    throw new OptionError(
      "grid",
      `No schedule of ${count} steps was calibrated for this request: its size, its guidance and what else it says of its schedule. Leave out grid, or run \`flowturbo calibrate\`.`,
    );
  const named = Array.from({ length: count }, (_, step) => scaleAt(options, step, count + later));
  const strongest = Math.max(1, ...named.map((scale) => scale ?? 1));
  const solver = solverOf(checkpoint, sampler);
  const settings = {
    ...sigmaSettings(checkpoint.scheduler, patchesOf(checkpoint, latentShape), options),
    ...{ guidance: strongest, solver },
  };
  if (!(settings.shift > 0 && Number.isFinite(settings.shift)))
    throw new OptionError(
      "mu",
      `The noise levels' shift would be ${settings.shift}: it has to be above 0. Give shift, or another mu.`,
    );
  const grid = options.grid ?? (blocks ? blocksGrid : row.grid);
  const spacing = (grid === "diffusers" && row.diffusersSigmas) || sigmaGrids[grid]!;
  const spaced = () => (end > 0 ? upscaleSigmas(count, settings, 1, end) : spacing(count, settings));
  const sigmas = options.sigmas ? checkedLevels(givenSigmas(options.sigmas, settings)) : spaced();
  const { run, skipped, start } = blocksLeft(options, row, { blocks, count, strongest, grid, sigmas });
  checkSize(checkpoint, size, stepTypesOf(run));
  const scales = blocks || typeof guidanceScale !== "number" ? named : ownScales(row, sigmas, named);
  const schedule = scheduleOf(run, sigmas.slice(skipped), {
    start,
    guidance: (block) => scales[skipped + block]!,
    wholeTimestepsOf: row.wholeTimesteps ? settings.numTrainTimesteps : undefined,
    solver: solver ? { ...solver, skipped, steps: count } : undefined,
  });
  const whole = { blocks: blocks && formatBlocks(blocks), steps: count, grid, guidanceScale };
  return { ...size, latentShape, schedule, place: { first: skipped, steps: count + later }, whole };
}

/**
 * How the model's scheduler steps, if the sampler is the one of its name.
 * @throws OptionError for a config that the sampler does not compute
 */
function solverOf({ scheduler: { solver, className } }: Checkpoint, sampler: string): Solver | null {
  if (solver?.sampler !== sampler) return null;
  const [first] = solver.unsupported;
  if (first)
    throw new OptionError(
      "sampler",
      `The model's scheduler, ${className}, has ${first.key} ${JSON.stringify(first.value)}, which the sampler "${sampler}" does not compute. Set ${first.key} to ${first.instead} in scheduler/scheduler_config.json, or take another sampler.`,
    );
  return solver;
}

/** What is run of a schedule's blocks. */
interface BlocksLeft {
  readonly run: readonly Block[];
  /** Blocks before them that are not. */
  readonly skipped: number;
  /** Noise level of what they start from, where it is not the one after the skipped blocks. */
  readonly start?: number;
}

/**
 * What is run of a schedule's blocks: those that `strength` keeps, less the first one of all where CFG-Zero* leaves it out. It does where
 * the schedule starts from noise: without an original, or at a strength that keeps the whole schedule, of which the first level is 1. The
 * velocity there counts as zero, so that what comes after starts from the same noise.
 * @param strongest the largest guidance scale of its steps, 1 without guidance
 * @param sigmas of the whole schedule
 */
function blocksLeft(
  { image, strength = defaultStrength, guidanceMode, blocks: text }: StageOptions,
  row: SamplerRow,
  whole: {
    readonly blocks: readonly Block[] | null;
    readonly count: number;
    readonly strongest: number;
    readonly grid: string;
    readonly sigmas: readonly number[];
  },
): BlocksLeft {
  const { blocks, count, strongest, grid, sigmas } = whole;
  const cut = image === undefined ? 0 : skippedBlocks(count, strength);
  // Shifting rounds, and UniPC has a level a little below 1 for it.
  const isNoise = image === undefined || (cut === 0 && sigmas[0]! > 1 - leastGap);
  const zeroInit = guidanceMode === "cfg_zero" && strongest > 1 && isNoise;
  if (zeroInit && count === 1)
    throw new OptionError(
      "guidanceMode",
      `With "cfg_zero" the first step is left out, so that ${count} step is too few; give at least 2.`,
    );
  const skipped = zeroInit ? 1 : cut;
  // Given blocks are cut; a default schedule is made anew for what is left, so that it begins as its sampler does.
  const run = blocks?.slice(skipped) ?? row.blocks(count - skipped, strongest, grid);
  if (!blocks || !unmetNeed(run)) return { run, skipped, ...(zeroInit && { start: 1 }) };
  const named = text ?? formatBlocks(blocks);
  throw zeroInit
    ? new OptionError(
        "blocks",
        `With guidanceMode "cfg_zero" the first block of "${named}" is left out, and those after it need its velocity. Put a block before it.`,
      )
    : new OptionError(
        "strength",
        `Strength ${strength} leaves only the last blocks of "${named}", which need the velocity of a block before them. Give a larger strength.`,
      );
}

/** Tokens of one picture in the transformer. */
export function patchesOf({ transformer }: Checkpoint, [, , height, width]: LatentShape): number {
  const { patchSize } = transformer.config;
  return (height / patchSize) * (width / patchSize);
}

/** A request from coarse to fine. */
export function risingStages(
  options: ResolvedGenerateOptions,
  stages: NonNullable<ResolvedGenerateOptions["stages"]>,
  model: StageFacts,
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
    const whole = {
      ...{ blocks: schedule.text, steps: all.length, grid: blocksGrid, guidanceScale: options.guidanceScale },
    };
    return { width, height, latentShape, upscale, schedule, place: { first: start, steps: total }, whole };
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
