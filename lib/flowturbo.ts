/**
 * Text to image: the recipe, top to bottom. A model is a checkpoint, the graphs emitted for it and a runtime that runs
 * them; a picture is a program (lib/schedule) over those graphs.
 */

import { randomInt } from "node:crypto";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type Checkpoint, openCheckpoint } from "./checkpoint/index.js";
import type { Logger } from "./common/logger.js";
import { LruCache } from "./common/lru-cache.js";
import { elementCount, type FloatTensor, float32 } from "./common/tensor.js";
import { CheckpointError, DisposedError, FlowTurboError, OptionError } from "./errors.js";
import { costSubject } from "./generation/costs.js";
import {
  Image,
  keepOriginal,
  type Mask,
  maskAt,
  type Original,
  originalAt,
  readMask,
  readOriginal,
  toRgb,
} from "./generation/image.js";
import { checkDeviceMemory } from "./generation/memory.js";
import { NoiseGenerator } from "./generation/noise.js";
import { fitLatentColours, type LatentColours } from "./generation/preview.js";
import { encodeProgram, placeholder, rowOf, StepReporter, stacked } from "./generation/progress.js";
import { PromptEncoder } from "./generation/text.js";
import { mmditWidth, positionTable } from "./networks/index.js";
import { GraphLibrary, type GraphName, tensorRtEmitOptions } from "./networks/library.js";
import type { OnnxGraph } from "./onnx/index.js";
import {
  checkOptions,
  type GenerateOptions,
  generateSchema,
  type LoadOptions,
  loadSchema,
  type ProfileOptions,
  profileSchema,
  type ResolvedGenerateOptions,
  type ResolvedLoadOptions,
} from "./options.js";
import type { Program, StoredConstant } from "./program/program.js";
import { runtimes } from "./runtimes/index.js";
import { OnnxRuntime } from "./runtimes/onnxruntime/onnxruntime.js";
import { resolveWeights } from "./runtimes/onnxruntime/weights.js";
import type { Runtime } from "./runtimes/runtime.js";
import { smOf } from "./runtimes/tensorrt/addon.js";
import { tensorRtKinds } from "./runtimes/tensorrt/flavours.js";
import { openTensorRt } from "./runtimes/tensorrt/open.js";
import {
  type Block,
  countEvaluations,
  defaultBlocks,
  diffusersSigmas,
  type Evaluations,
  formatBlocks,
  type GridName,
  parseBlocks,
  planSteps,
  type Sampler,
  type SamplingProgram,
  type SamplingStage,
  samplingProgram,
  shiftedSigmas,
  skippedBlocks,
  upscaleSigmas,
  withValues,
} from "./schedule/index.js";
import type { CostEntry } from "./serving/costs.js";
import { defaultLadder } from "./serving/deadline.js";
import { samplesOf } from "./serving/measure.js";
import { type Admitted, batchesUpTo, type Demand, type Rung, Service, type ServiceOptions } from "./serving/service.js";
import type { Stats } from "./serving/stats.js";
import { CostStore, costKey } from "./serving/store.js";

/** The model that comes with the package. */
export const embeddedModel = fileURLToPath(new URL("../models/shapes", import.meta.url));

/** Milliseconds. */
export interface Timings {
  /** Loading the model; the same in every result of one model. */
  readonly load: number;
  /** Tokenising and encoding the prompts; near 0 when all were cached. */
  readonly encode: number;
  /** Each block of the schedule, over all stages. */
  readonly steps: readonly number[];
  /** Lifting pictures from one stage to the next. */
  readonly join: number;
  /** Encoding an original and keeping its known region. */
  readonly edit: number;
  readonly decode: number;
  /** Waiting to be let in. */
  readonly queue: number;
  /** The whole call, waiting included. Launches that were shared count whole in the times above. */
  readonly total: number;
}

/** How a time limit was kept. Milliseconds count from the call. */
export interface DeadlineResult {
  readonly deadlineMs: number;
  /** The schedule that was chosen, and why. */
  readonly blocks: string;
  readonly reason: string;
  readonly predictedMs: number;
  readonly actualMs: number;
}

/** What launches cost, as it is known now. */
export interface Costs {
  /** One for each (graph, size, batch); graph "host" is what is not in launches. */
  readonly entries: readonly CostEntry[];
  /** Where the table is kept. */
  readonly file: string;
  /** How much slower launches are now than the table says. */
  readonly drift: number;
  /** Milliseconds of a launch now, by the nearest batches that are known; null if nothing is known about it. */
  estimate(graph: string, size: string, batch: number): number | null;
}

/** One size of a run, as it was run. */
export interface StageResult {
  readonly width: number;
  readonly height: number;
  /** Such as "H1P7R2". */
  readonly blocks: string;
  /** Noise levels, one more than blocks. */
  readonly sigmas: readonly number[];
}

export interface GenerateResult {
  /** Prompt by prompt, `count` pictures for each. */
  readonly images: readonly Image[];
  /** Final latents, [B, C, H/f, W/f], as the transformer sees them. */
  readonly latents: FloatTensor;
  /** Decoded values, [B, 3, H, W], nominally in [-1, 1], not clamped. */
  readonly pixels: FloatTensor;
  /** Seed of each picture; empty if the noise was given. */
  readonly seeds: readonly number[];
  readonly width: number;
  readonly height: number;
  /** The schedule that ran, such as "H1P7R2"; those of several stages follow each other after a space. */
  readonly blocks: string;
  /** Its noise levels, one more than blocks; stage after stage. */
  readonly sigmas: readonly number[];
  readonly stages: readonly StageResult[];
  /** Evaluations of the two networks for one picture (guidance doubles their rows, not their number). */
  readonly evaluations: Evaluations;
  readonly timings: Timings;
  /** Null without a time limit. */
  readonly deadline: DeadlineResult | null;
  /** What the caller should know, such as a prompt that was cut. */
  readonly warnings: readonly string[];
}

/** The runtime of a model, and why those that would be preferred were passed over. */
export interface RuntimeChoice {
  readonly name: string;
  readonly passedOver: readonly { readonly name: string; readonly reason: string }[];
}

const defaultSteps: Record<Sampler, number> = { flowturbo: 10, euler: 28, heun: 28 };

/** Part of the schedule that runs on an original, as in diffusers' pipelines for SD3. */
const defaultStrength = 0.6;

/** How far a finished stage is noised again for the next. */
const defaultJoinSigma = 0.6;

/** Pixels that go through the autoencoder at once: one picture of 1024 × 1024, or 256 of 64 × 64. */
export const pixelsAtOnce = 2 ** 20;

/** One size of a request. */
interface PlannedStage {
  readonly width: number;
  readonly height: number;
  readonly latentShape: readonly [number, number, number, number];
  readonly blocks: readonly Block[];
  readonly sigmas: readonly number[];
}

/** Everything about a request that is known before any work. */
interface Plan {
  readonly options: ResolvedGenerateOptions;
  readonly prompts: readonly string[];
  readonly negatives: readonly string[];
  readonly sampler: Sampler;
  readonly grid: GridName;
  readonly stages: readonly PlannedStage[];
  /** Given noise, one tensor for each stage; null to draw it from the seeds. */
  readonly noises: readonly FloatTensor[] | null;
  readonly guidanceScale: number | null;
  readonly sequenceLength: number;
  readonly seeds: readonly number[];
}

/** What a model is made of. */
interface Loaded {
  readonly checkpoint: Checkpoint;
  /** Schedules for time limits, the richest first. */
  readonly ladder: readonly string[];
  readonly graphs: GraphLibrary;
  readonly runtime: Runtime;
  readonly choice: RuntimeChoice;
}

/** What a model's service starts with. */
interface Serving {
  readonly store: CostStore;
  readonly known: readonly CostEntry[];
  readonly about: Readonly<Record<string, unknown>>;
  readonly options: Pick<ServiceOptions, "batches" | "maxWaitMs" | "pinBatch" | "maxQueue" | "background" | "whole">;
}

/** The original and the mask of an edit, for each stage. */
type Edits = readonly { readonly original: Original; readonly mask: Mask | null }[];

/**
 * A loaded model. Calls made at the same time are served side by side: their launches are shared where that pays, and each
 * is answered when it is done.
 */
export class FlowTurbo implements AsyncDisposable {
  /** Folder of the checkpoint. */
  readonly folder: string;
  readonly runtime: RuntimeChoice;
  /** Size of a picture that the model was trained for, in pixels. */
  readonly nativeSize: { readonly width: number; readonly height: number };
  readonly hasRefiner: boolean;

  readonly #checkpoint: Checkpoint;
  readonly #graphs: GraphLibrary;
  readonly #runtime: Runtime;
  readonly #prompts: PromptEncoder;
  readonly #logger: Logger;
  readonly #loadMilliseconds: number;
  readonly #keepTextEncoders: boolean;
  /** Whether each picture is a program of its own. */
  readonly #whole: boolean;
  readonly #service: Service;
  readonly #store: CostStore;
  readonly #ladder: readonly string[];
  readonly #pinBatch: number | null;
  readonly #calls = new Set<Promise<unknown>>();
  readonly #sketches = new LruCache<SamplingProgram>(32);
  #colours: Promise<LatentColours> | null = null;
  #disposed: Promise<void> | null = null;

  private constructor(loaded: Loaded, serving: Serving, checked: ResolvedLoadOptions, start: number) {
    const { checkpoint, graphs, runtime, choice } = loaded;
    const logger = checked.logger ?? {};
    this.#checkpoint = checkpoint;
    this.#graphs = graphs;
    this.#runtime = runtime;
    this.#prompts = new PromptEncoder(checkpoint);
    this.#logger = logger;
    this.#keepTextEncoders = checked.keepTextEncoders;
    this.#whole = serving.options.whole ?? false;
    this.#loadMilliseconds = performance.now() - start;
    this.folder = checkpoint.folder;
    this.runtime = choice;
    this.hasRefiner = checkpoint.refiner !== null;
    const side = checkpoint.transformer.config.sampleSize * checkpoint.vae.config.factor;
    this.nativeSize = { width: side, height: side };
    this.#store = serving.store;
    this.#ladder = loaded.ladder;
    this.#pinBatch = serving.options.pinBatch;
    this.#service = new Service(runtime, serving.known, {
      ...serving.options,
      store: serving.store,
      about: serving.about,
      graph: (name) => this.#graph(name),
      onError: (error) => logger.debug?.(`The table of costs could not be kept up: ${(error as Error).message}`),
    });
  }

  /**
   * Opens a checkpoint in the diffusers layout and starts a runtime for it. Weights are not read: the runtime maps them.
   * @param folder default: the embedded model
   * @throws CheckpointError if the folder is not a complete SD3 or SD3.5 checkpoint, OptionError for a wrong option,
   *   RuntimeUnavailableError if the runtime asked for cannot be used here, MemoryError if the model does not fit
   */
  static async load(folder: string = embeddedModel, options: LoadOptions = {}): Promise<FlowTurbo> {
    const start = performance.now();
    if (typeof folder !== "string")
      throw new OptionError("folder", `Expected the path of a folder for folder but received ${typeof folder}.`);
    const checked = checkOptions(loadSchema, options, "load()");
    const { variant, signal, onProgress } = checked;
    if (checked.capture && (checked.pinBatch ?? 1) > 1) throw pinnedAlone();
    signal?.throwIfAborted();

    // 1. The folder: configs, headers of the weights, tokenizers.
    onProgress?.({ phase: "checkpoint", done: 0, total: 3 });
    const checkpoint = await openCheckpoint(folder, { variant, signal });
    const ladder = ladderOf(checkpoint);

    // 2. The graphs, which checks every weight's name, type and shape; 3. the runtime.
    const { settings, ...opened } = await openRuntime(checkpoint, checked);
    const loaded: Loaded = { checkpoint, ladder, ...opened };
    const { graphs, runtime } = loaded;
    try {
      signal?.throwIfAborted();
    } catch (error) {
      await runtime.dispose();
      throw error;
    }
    onProgress?.({ phase: "runtime", done: 3, total: 3 });

    // 4. What launches cost, if it has been measured before.
    const subject = costSubject(graphs, { name: runtime.name, ...settings });
    const store = new CostStore(costKey(subject), checked.cache);
    const serving: Serving = {
      store,
      known: await store.read(),
      about: { folder: checkpoint.folder, runtime: subject.runtime, machine: subject.machine },
      options: {
        batches: checked.batches ?? batchesUpTo(checked.maxBatch),
        maxWaitMs: checked.maxWaitMs,
        pinBatch: checked.pinBatch ?? null,
        maxQueue: checked.maxQueue,
        // On a GPU a batch that no engine has yet is built first: not for the mere sake of measuring. Those named have one.
        background: checked.measureCosts && (runtime.name === "onnxruntime" || checked.batches !== undefined),
        whole: checked.capture && runtime.name !== "onnxruntime",
      },
    };
    return new FlowTurbo(loaded, serving, checked, start);
  }

  /**
   * Draws `count` pictures for each prompt, split over launches as costs least.
   * @throws OptionError before any work if an option is wrong or does not fit the model; DeadlineError before any work if
   *   no schedule is done within `deadlineMs`; QueueFullError if too many requests wait; NotFiniteError naming the step
   *   if the network's values overflow; RuntimeDiedError if the runtime's process ended; `signal.reason` after an abort
   */
  async generate(options: GenerateOptions): Promise<GenerateResult> {
    const start = performance.now();
    if (this.#disposed) throw new DisposedError("This model");
    const plans = this.#plans(checkOptions(generateSchema, options, "generate()"));
    const { signal } = plans[0]!.options;
    signal?.throwIfAborted();
    return untilAborted(this.#keptTrackOf(this.#serve(plans, start)), signal);
  }

  /** Counters and histograms of all calls. */
  stats(): Stats {
    return this.#service.stats();
  }

  /** What launches cost on this machine, measured by `profile()`, in the background, or while drawing. */
  get costs(): Costs {
    const { costs } = this.#service;
    return {
      entries: costs.entries,
      file: this.#store.file,
      drift: costs.drift,
      estimate: (graph, size, batch) => costs.estimate(graph, size, batch),
    };
  }

  /**
   * Measures what every launch of a picture costs, at each size and batch, and keeps the table for later loads.
   * @throws OptionError for a size that the model does not draw; `signal.reason` after an abort
   */
  async profile(options: ProfileOptions = {}): Promise<Costs> {
    if (this.#disposed) throw new DisposedError("This model");
    const checked = checkOptions(profileSchema, options, "profile()");
    const { signal, onProgress, rounds, batches, maxSequenceLength } = checked;
    const sizes = checked.sizes ?? [this.nativeSize];
    const scales = { on: [2], off: [1], both: [2, 1] }[checked.guidance];
    for (const { width, height } of sizes)
      try {
        this.#checkSize(width, height);
      } catch (error) {
        throw new OptionError("sizes", `The size ${width}x${height} cannot be drawn. ${(error as Error).message}`);
      }
    const work = async () => {
      const requests = sizes.flatMap((size) =>
        scales.map((guidanceScale) => ({
          ...{ prompt: "", seed: 0, guidanceScale, maxSequenceLength, signal },
          ...{ width: size.width, height: size.height, blocks: this.hasRefiner ? "H1R1" : "H1" },
        })),
      );
      const plans = requests.map((request) => this.#plan(checkOptions(generateSchema, request, "profile()")));
      const text = this.#prompts.program("", plans[0]!.sequenceLength).program;
      const encoders = plans.map(({ stages }) => {
        const { width, height, latentShape } = stages[0]!;
        const image = placeholder(1, this.#checkpoint.vae.config.inChannels, height, width);
        return encodeProgram(image, latentShape, "vae_encoder" satisfies GraphName);
      });
      const samples = samplesOf([text, ...plans.map((plan) => this.#sketch(plan).program), ...encoders]);
      const report = (done: number, total: number) => onProgress?.({ done, total });
      await this.#service.profile(samples, [...new Set(batches)], { rounds, signal, onProgress: report });
      // What is not in launches is known by drawing: first warm, then at the least and the greatest batch.
      for (const request of requests.filter(({ guidanceScale }) => guidanceScale === scales[0]))
        for (const count of new Set([1, Math.min(...batches), Math.max(...batches)]))
          for (let round = 0; round < 5; round++) await this.generate({ ...request, count });
      await this.#service.store();
      return this.costs;
    };
    return this.#keptTrackOf(work());
  }

  /** A call that `dispose` waits for. */
  #keptTrackOf<T>(call: Promise<T>): Promise<T> {
    const settled = call.then(
      () => undefined,
      () => undefined,
    );
    this.#calls.add(settled);
    void settled.then(() => this.#calls.delete(settled));
    return call;
  }

  /** Waits for calls under way, then frees everything. Safe to call twice. */
  dispose(): Promise<void> {
    this.#disposed ??= (async () => {
      await Promise.all(this.#calls);
      await this.#service.close();
      await this.#runtime.dispose();
    })();
    return this.#disposed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  /** The ways to draw a request, the richest first: one, or with a time limit those of the ladder. */
  #plans(options: ResolvedGenerateOptions): Plan[] {
    const { deadlineMs, ladder, sampler, blocks, steps, stages } = options;
    if (ladder !== undefined && deadlineMs === undefined)
      throw new OptionError("ladder", "A ladder is for a time limit; give deadlineMs, or leave ladder out.");
    const fixed = { sampler, blocks, steps, stages };
    for (const [name, value] of Object.entries(fixed))
      if (ladder !== undefined && value !== undefined)
        throw new OptionError("ladder", `The ladder says what may be run; leave out ${name} or ladder.`);
    const isFixed = Object.values(fixed).some((value) => value !== undefined);
    if (deadlineMs === undefined || isFixed) return [this.#plan(options)];
    const seed = options.seed ?? randomInt(2 ** 32);
    const plans = new Map<string, Plan>();
    let refused: unknown;
    for (const blocks of ladder ?? this.#ladder)
      try {
        const plan = this.#plan({ ...options, seed, blocks });
        const key = formatBlocks(plan.stages[0]!.blocks);
        if (!plans.has(key)) plans.set(key, plan);
      } catch (error) {
        // What a short schedule leaves of itself at some strength may be no schedule; others will do.
        if (ladder !== undefined || !(error instanceof OptionError)) throw error;
        refused = error;
      }
    if (plans.size === 0) throw refused;
    return [...plans.values()];
  }

  /** Checks a request against the model and settles everything that can be known beforehand. */
  #plan(options: ResolvedGenerateOptions): Plan {
    if (this.#whole && (options.pinBatch ?? 1) > 1) throw pinnedAlone();
    const prompts = typeof options.prompt === "string" ? [options.prompt] : options.prompt;
    const negatives = perPrompt(options.negativePrompt ?? "", prompts.length);

    const rows = prompts.length * options.count;
    const { sampler, grid, stages } = options.stages
      ? this.#plannedStages(options, rows)
      : this.#plannedStage(options, rows);

    // Originals.
    const needs = { mask: options.mask, strength: options.strength };
    for (const [name, value] of Object.entries(needs))
      if (value !== undefined && options.image === undefined)
        throw new OptionError(name, `The option ${name} needs an image to work on; give one, or leave ${name} out.`);

    // Noise.
    const noises = options.noise === undefined ? null : [options.noise].flat();
    if (noises) this.#checkNoise(noises, stages);
    const seed = options.seed ?? randomInt(2 ** 32);
    const seeds = noises ? [] : Array.from({ length: rows }, (_, index) => seed + index);

    // Text.
    const sequenceLength = options.maxSequenceLength ?? this.#prompts.defaultSequenceLength;
    if (sequenceLength > this.#prompts.maxSequenceLength)
      throw new OptionError(
        "maxSequenceLength",
        `Expected at most ${this.#prompts.maxSequenceLength} for maxSequenceLength but received ${sequenceLength}: the model's T5 tokenizer takes no more.`,
      );
    return {
      options,
      prompts,
      negatives,
      sampler,
      grid,
      stages,
      noises,
      guidanceScale: options.guidanceScale > 1 ? options.guidanceScale : null,
      sequenceLength,
      seeds,
    };
  }

  /**
   * @param prefix names the stage that the size belongs to
   * @param blocks that are to run on it: the refiner has a table of positions of its own
   * @throws OptionError if the model cannot draw that size
   */
  #checkSize(width: number, height: number, prefix = "", blocks: readonly Block[] = []): void {
    const { transformer, refiner, vae } = this.#checkpoint;
    const { patchSize } = transformer.config;
    const positions = [{ whose: "model", side: transformer.config.posEmbedMaxSize }];
    if (refiner && blocks.includes("R")) positions.push({ whose: "refiner", side: refiner.config.posEmbedMaxSize });
    const { whose, side: posEmbedMaxSize } = positions.reduce((a, b) => (b.side < a.side ? b : a));
    const multiple = vae.config.factor * patchSize;
    for (const [side, size] of [
      ["width", width],
      ["height", height],
    ] as const) {
      const option = prefix ? "stages" : side;
      const name = `${prefix}${side}`;
      if (size % multiple !== 0)
        throw new OptionError(
          option,
          `Expected a multiple of ${multiple} for ${name} but received ${size}. Nearest: ${nearest(size, multiple, posEmbedMaxSize)}.`,
        );
      if (size > multiple * posEmbedMaxSize)
        throw new OptionError(
          option,
          `Expected at most ${multiple * posEmbedMaxSize} for ${name} but received ${size}: the ${whose}'s table of positions has ${posEmbedMaxSize} × ${posEmbedMaxSize} entries.`,
        );
    }
  }

  #latentShape(rows: number, width: number, height: number): readonly [number, number, number, number] {
    const { transformer, vae } = this.#checkpoint;
    return [rows, transformer.config.outChannels, height / vae.config.factor, width / vae.config.factor];
  }

  /**
   * @param stage names the blocks of a stage
   * @throws OptionError for blocks that are none, or that need a refiner which is not there
   */
  #blocks(text: string, stage?: string): Block[] {
    if (stage)
      try {
        return this.#blocks(text);
      } catch (error) {
        throw new OptionError("stages", `${stage}: ${(error as Error).message}`);
      }
    const blocks = parseBlocks(text);
    if (blocks.includes("R") && !this.hasRefiner)
      throw new OptionError(
        "blocks",
        `The blocks "${text}" need a velocity refiner, but ${this.folder} has no refiner/ folder. Use P in place of R, or train a refiner.`,
      );
    return blocks;
  }

  /** The usual request: one size, on which an original's `strength` keeps the last part of the schedule. */
  #plannedStage(options: ResolvedGenerateOptions, rows: number): Pick<Plan, "sampler" | "grid" | "stages"> {
    const width = options.width ?? this.nativeSize.width;
    const height = options.height ?? this.nativeSize.height;
    this.#checkSize(width, height);
    const { steps } = options;
    const sampler = options.sampler ?? "flowturbo";
    if (options.blocks !== undefined && sampler !== "flowturbo")
      throw new OptionError(
        "blocks",
        `Blocks belong to the sampler flowturbo; leave out blocks or sampler "${sampler}".`,
      );
    const given = options.blocks === undefined ? null : this.#blocks(options.blocks);
    if (given && steps !== undefined && steps !== given.length)
      throw new OptionError(
        "steps",
        `The blocks "${options.blocks}" are ${given.length} steps; leave out steps (${steps}).`,
      );
    const count = given?.length ?? steps ?? defaultSteps[sampler];
    const skipped = options.image === undefined ? 0 : skippedBlocks(count, options.strength ?? defaultStrength);
    const blocks = given?.slice(skipped) ?? defaultBlocks(sampler, count - skipped, this.hasRefiner);
    if (blocks[0] === "R")
      throw new OptionError(
        "strength",
        `Strength ${options.strength ?? defaultStrength} leaves only the refiner blocks of "${options.blocks}", and they need a velocity to refine. Give a larger strength.`,
      );
    this.#checkSize(width, height, "", blocks);
    const grid = options.grid ?? (sampler === "euler" ? "diffusers" : "shifted");
    const { shift, numTrainTimesteps } = this.#checkpoint.scheduler;
    const full = grid === "shifted" ? shiftedSigmas(count, shift) : diffusersSigmas(count, shift, numTrainTimesteps);
    const latentShape = this.#latentShape(rows, width, height);
    return { sampler, grid, stages: [{ width, height, latentShape, blocks, sigmas: full.slice(skipped) }] };
  }

  /** A request from coarse to fine. */
  #plannedStages(options: ResolvedGenerateOptions, rows: number): Pick<Plan, "sampler" | "grid" | "stages"> {
    const { width, height, blocks, steps, sampler, grid } = options;
    for (const [name, value] of Object.entries({ width, height, blocks, steps, sampler, grid }))
      if (value !== undefined)
        throw new OptionError(name, `Stages say sizes and blocks themselves; leave out ${name} or stages.`);
    const { shift } = this.#checkpoint.scheduler;
    const stages = options.stages!.map((stage, index): PlannedStage => {
      const before = options.stages![index - 1];
      this.#checkSize(stage.width, stage.height, `stages[${index}].`);
      if (before && (stage.width < before.width || stage.height < before.height))
        throw new OptionError(
          "stages",
          `Expected rising sizes for stages but stage ${index + 1} is ${stage.width} × ${stage.height} after ${before.width} × ${before.height}.`,
        );
      if (before && stage.width === before.width && stage.height === before.height)
        throw new OptionError(
          "stages",
          `Expected rising sizes for stages but stages ${index} and ${index + 1} are both ${stage.width} × ${stage.height}.`,
        );
      if (!before && stage.sigma !== undefined)
        throw new OptionError(
          "stages",
          "The first stage has no picture to noise again; leave out its sigma, or give an image and a strength.",
        );
      if (stage.sigma !== undefined && !(stage.sigma > 0 && stage.sigma < 1))
        throw new OptionError(
          "stages",
          `Expected a number between 0 and 1 for stages[${index}].sigma but received ${stage.sigma}.`,
        );
      const latentShape = this.#latentShape(rows, stage.width, stage.height);
      const all = this.#blocks(stage.blocks, `stages[${index}].blocks`);
      this.#checkSize(stage.width, stage.height, `stages[${index}].`, all);
      const size = { width: stage.width, height: stage.height, latentShape };
      if (before)
        return { ...size, blocks: all, sigmas: upscaleSigmas(all.length, shift, stage.sigma ?? defaultJoinSigma) };
      const first = this.#plannedStage({ ...options, ...stage, sampler: undefined, stages: undefined }, rows)
        .stages[0]!;
      return { ...size, blocks: first.blocks, sigmas: first.sigmas };
    });
    return { sampler: "flowturbo", grid: "shifted", stages };
  }

  #checkNoise(noises: readonly FloatTensor[], stages: readonly PlannedStage[]): void {
    if (noises.length !== stages.length)
      throw new OptionError(
        "noise",
        `Expected ${stages.length} noise tensors, one a stage, but received ${noises.length}.`,
      );
    const { factor } = this.#checkpoint.vae.config;
    for (const [index, noise] of noises.entries()) {
      const { latentShape } = stages[index]!;
      const which = stages.length > 1 ? `noise of stage ${index + 1}` : "noise";
      if (noise.shape.join() !== latentShape.join())
        throw new OptionError(
          "noise",
          `Expected shape [${latentShape.join(", ")}] for ${which} (pictures, channels, height / ${factor}, width / ${factor}) but received [${noise.shape.join(", ")}].`,
        );
      if (noise.data.length !== latentShape.reduce((a, b) => a * b, 1))
        throw new OptionError("noise", `The ${which} has ${noise.data.length} values, which its shape does not.`);
      if (!noise.data.every(Number.isFinite))
        throw new OptionError("noise", `Expected finite values for ${which} but it holds NaN or an infinity.`);
    }
  }

  /** Reads the original and the mask, and brings them to the size of each stage. */
  async #readEdits(plan: Plan): Promise<Edits | null> {
    const { image, mask } = plan.options;
    if (image === undefined) return null;
    const { factor } = this.#checkpoint.vae.config;
    const picture = await readOriginal(image);
    const painted = mask === undefined ? null : await readMask(mask);
    const edits: Edits[number][] = [];
    for (const { width, height } of plan.stages)
      edits.push({
        original: await originalAt(picture, width, height),
        mask: painted && (await maskAt(painted, picture, width, height, factor)),
      });
    return edits;
  }

  async #serve(plans: readonly Plan[], start: number): Promise<GenerateResult> {
    const [first] = plans as [Plan];
    const { options } = first;
    const edits = await this.#readEdits(first);
    options.signal?.throwIfAborted();
    const last = first.stages.at(-1)!;
    const order = {
      priority: options.priority,
      arrival: start,
      deadlineMs: options.deadlineMs ?? null,
      pictures: last.latentShape[0],
      size: `${last.width}x${last.height}`,
      pin: options.pinBatch ?? null,
      signal: options.signal,
    };
    const rungs = plans.map(
      (plan): Rung => ({ blocks: formatStages(plan.stages), demands: this.#demands(plan, edits) }),
    );
    return this.#service.serve(order, rungs, (admitted) => this.#draw(plans[admitted.rung]!, edits, start, admitted));
  }

  /** The batch that all of a plan's launches are padded to. */
  #pinOf({ options }: Plan): number | null {
    return options.pinBatch ?? this.#pinBatch;
  }

  /** What a plan will launch. */
  #demands(plan: Plan, edits: Edits | null): Demand[] {
    const texts = [...plan.prompts, ...(plan.guidanceScale === null ? [] : plan.negatives)];
    const missing = this.#prompts.missing(texts, plan.sequenceLength, this.#pinOf(plan));
    const demands: Demand[] = [];
    if (missing > 0) demands.push({ program: this.#prompts.program("", plan.sequenceLength).program, rows: missing });
    for (const program of this.#originals(plan, edits)) if (program) demands.push({ program, rows: 1 });
    return [...demands, { program: this.#sketch(plan, edits).program, rows: plan.stages[0]!.latentShape[0] }];
  }

  /** For each stage the program that encodes its original, or null where it needs none. */
  #originals(plan: Plan, edits: Edits | null): (Program | null)[] {
    return plan.stages.map(({ latentShape }, index) => {
      const edit = edits?.[index];
      // Later stages start from the stage before; they need the original only to keep a part of it.
      if (!edit || (index > 0 && !edit.mask)) return null;
      return encodeProgram(edit.original.pixels, latentShape, "vae_encoder" satisfies GraphName);
    });
  }

  /** The program of one picture without its values: what it will launch. Requests of a kind share it. */
  #sketch(plan: Plan, edits: Edits | null = null): SamplingProgram {
    const { guidanceScale, sequenceLength, options } = plan;
    const stages = plan.stages.map(({ blocks, sigmas, latentShape: [, ...row] }) => ({ blocks, sigmas, row }));
    const edited = edits?.map(({ mask }) => mask !== null);
    const key = JSON.stringify([stages, edited, guidanceScale, sequenceLength, options.preview]);
    return this.#sketches.get(key) ?? this.#sketches.set(key, this.#newSketch(plan, edits));
  }

  #newSketch(plan: Plan, edits: Edits | null): SamplingProgram {
    const { transformer, vae } = this.#checkpoint;
    const { jointAttentionDim, pooledProjectionDim, outChannels } = transformer.config;
    const { guidanceScale, sequenceLength, options } = plan;
    const group = guidanceScale === null ? 1 : 2;
    const one = ([, ...rest]: readonly number[]) => placeholder(1, ...rest);
    const variant = (name: "predict" | "refine" | "merge" | "preview"): GraphName =>
      guidanceScale === null ? `${name}_unguided` : name;
    return samplingProgram({
      stages: plan.stages.map(({ blocks, sigmas, latentShape }, index): SamplingStage => {
        const isOriginal = edits !== null && (index === 0 || edits[index]!.mask !== null);
        return {
          ...{ blocks, sigmas, noise: one(latentShape), positions: this.#positions(latentShape) },
          originalLatents: isOriginal ? one(latentShape) : undefined,
          mask: edits?.[index]?.mask ? placeholder(1, 1, latentShape[2], latentShape[3]) : undefined,
        };
      }),
      context: placeholder(group, this.#prompts.contextTokens(sequenceLength), jointAttentionDim),
      pooled: placeholder(group, pooledProjectionDim),
      colours: options.preview && { map: placeholder(3, outChannels), bias: placeholder(3, 1) },
      guidanceScale,
      graphs: {
        predict: variant("predict"),
        refine: variant("refine"),
        merge: variant("merge"),
        preview: variant("preview"),
        decode: "vae_decoder",
        encode: "vae_encoder",
        join: "join",
        noised: "noised",
      } satisfies Record<string, GraphName>,
      vaeFactor: vae.config.factor,
      imageChannels: vae.config.outChannels,
      pixelsAtOnce,
      textSize: sequenceLength === this.#prompts.defaultSequenceLength ? undefined : ` ${sequenceLength} tokens`,
      preview: options.preview,
    });
  }

  async #draw(plan: Plan, edits: Edits | null, start: number, admitted: Admitted): Promise<GenerateResult> {
    const { options, guidanceScale } = plan;
    const { signal, count } = options;
    const warnings: string[] = [];
    const rows = plan.stages[0]!.latentShape[0];

    // 1. Text: what the cache does not know is encoded.
    const encodeStart = performance.now();
    const texts = [...plan.prompts, ...(guidanceScale === null ? [] : plan.negatives)];
    const run = (rows: readonly Program[]) => admitted.run({ rows });
    const encoded = await this.#prompts.encode(texts, plan.sequenceLength, run, this.#pinOf(plan));
    // Before the network's engines ask for the room.
    if (!this.#keepTextEncoders) await this.#runtime.unload?.(textEncoders);
    warnings.push(...new Set(encoded.flatMap((prompt) => prompt.warnings)));
    // One condition for each prompt: its pictures share it, unconditional first.
    const conditions = plan.prompts.map((_, index) =>
      this.#prompts.stack([encoded[plan.prompts.length + index], encoded[index]].filter((part) => part !== undefined)),
    );
    const encode = performance.now() - encodeStart;

    // 2. Originals, for all pictures at once.
    let stages: readonly PlannedStage[] = plan.stages;
    if (edits?.every(({ mask }) => mask?.empty)) {
      const through = options.keepOriginal ? "" : ", through the autoencoder";
      warnings.push(`The mask is black everywhere, so that nothing is to be painted: this is the original${through}.`);
      stages = [{ ...stages.at(-1)!, blocks: [], sigmas: [0] }];
    }
    for (const warning of warnings) this.#logger.warn?.(warning);
    const isOriginal = stages !== plan.stages;
    const used = isOriginal ? edits!.slice(-1).map((edit) => ({ ...edit, mask: null })) : edits;
    const reporter = new StepReporter(stages, rows, options);
    const onLaunch = reporter.heard.bind(reporter);
    const originals: (FloatTensor | undefined)[] = [];
    for (const program of this.#originals({ ...plan, stages }, used)) {
      const [result] = program ? await admitted.run({ rows: [program], onLaunch }) : [];
      originals.push(result?.latents as FloatTensor | undefined);
    }

    // 3. A program for each picture, with its noise: one generator a picture, which draws for one stage after another.
    const noises = plan.noises ?? this.#noise(plan.seeds, plan.stages);
    const colours = options.preview && (await this.#latentColours(signal));
    const sketch = this.#sketch({ ...plan, stages }, used);
    const programs = Array.from({ length: rows }, (_, row) =>
      withValues(sketch, {
        stages: stages.map((_, index) => ({
          noise: rowOf(noises.at(index - stages.length)!, row),
          originalLatents: originals[index],
          mask: used?.[index]?.mask?.latents,
        })),
        ...conditions[Math.floor(row / count)]!,
        colours,
      }),
    );
    const results = await admitted.run({ rows: programs.map(({ program }) => program), onLaunch });

    // 4. Pictures.
    const { width, height } = stages.at(-1)!;
    const pixels = stacked(results.map((result, row) => result[programs[row]!.image]!));
    const edit = options.keepOriginal ? edits?.at(-1) : undefined;
    const images = Array.from({ length: rows }, (_, row) => {
      const rgb = toRgb(pixels, row);
      if (edit?.mask) keepOriginal(rgb, edit.original.rgb, edit.mask.pixels);
      return new Image(width, height, rgb, this.#parameters(plan, stages, row));
    });
    const evaluations = stages.map(({ blocks, sigmas }) => countEvaluations(planSteps(blocks, sigmas)));
    const { spent, steps } = reporter;
    const total = performance.now() - start;
    return {
      images,
      latents: stacked(results.map((result, row) => result[programs[row]!.latents]!)),
      pixels,
      seeds: plan.seeds,
      width,
      height,
      blocks: formatStages(stages),
      sigmas: stages.flatMap(({ sigmas }) => sigmas),
      stages: stages.map(({ width, height, blocks, sigmas }) => ({
        ...{ width, height, sigmas },
        blocks: formatBlocks(blocks),
      })),
      evaluations: {
        predictor: evaluations.reduce((sum, { predictor }) => sum + predictor, 0),
        refiner: evaluations.reduce((sum, { refiner }) => sum + refiner, 0),
      },
      timings: {
        load: this.#loadMilliseconds,
        ...{
          queue: admitted.queuedMs,
          encode,
          steps,
          join: spent.upscale,
          edit: spent.edit,
          decode: spent.decode,
          total,
        },
      },
      deadline:
        options.deadlineMs === undefined
          ? null
          : {
              deadlineMs: options.deadlineMs,
              blocks: formatStages(plan.stages),
              reason: admitted.reason!,
              predictedMs: admitted.predictedMs!,
              actualMs: total,
            },
      warnings,
    };
  }

  #positions(latentShape: readonly number[]): SamplingStage["positions"] {
    const { transformer, refiner } = this.#checkpoint;
    return {
      predict: positionCrop(transformer, latentShape),
      refine: refiner ? positionCrop(refiner, latentShape) : null,
    };
  }

  /** The preview's map, fitted on first use. */
  #latentColours(signal: AbortSignal | undefined): Promise<LatentColours> {
    this.#colours ??= fitLatentColours("vae_encoder", this.#checkpoint.vae.config, (program) =>
      this.#run(program, signal),
    ).catch((error) => {
      this.#colours = null;
      throw error;
    });
    return this.#colours;
  }

  /** A graph, which the runtime is told of when it is first needed. */
  #graph(name: string): OnnxGraph {
    const graph = this.#graphs.get(name as GraphName);
    if (!this.#runtime.has(name)) this.#runtime.add(graph);
    return graph;
  }

  /** Runs a program of its own, beside the requests. */
  #run(program: Program, signal?: AbortSignal) {
    for (const instruction of program.instructions) if (instruction.op === "launch") this.#graph(instruction.graph);
    return this.#runtime.run(program, { signal });
  }

  #noise(seeds: readonly number[], stages: readonly PlannedStage[]): FloatTensor[] {
    const tensors = stages.map(({ latentShape }) => float32(latentShape, new Float32Array(elementCount(latentShape))));
    for (const [row, seed] of seeds.entries()) {
      const generator = new NoiseGenerator(seed);
      for (const { data } of tensors) {
        const size = data.length / seeds.length;
        data.set(generator.draw(size), row * size);
      }
    }
    return tensors;
  }

  /** What a picture's file says about how it was made: enough to draw it again. */
  #parameters(plan: Plan, stages: readonly PlannedStage[], row: number): Record<string, unknown> {
    const { options } = plan;
    const index = Math.floor(row / options.count);
    const { width, height } = plan.stages.at(-1)!;
    return {
      prompt: plan.prompts[index],
      ...(plan.guidanceScale !== null && { negativePrompt: plan.negatives[index] }),
      seed: plan.seeds[row] ?? null,
      width,
      height,
      sampler: plan.sampler,
      blocks: formatStages(stages),
      grid: plan.grid,
      ...(options.stages && { stages: options.stages }),
      ...(options.image !== undefined && {
        strength: options.strength ?? defaultStrength,
        inpainted: options.mask !== undefined,
      }),
      guidanceScale: plan.guidanceScale ?? 1,
      maxSequenceLength: plan.sequenceLength,
      model: this.folder === embeddedModel ? "shapes (embedded)" : this.folder,
      software: "flowturbo",
    };
  }
}

/**
 * The checkpoint's own ladder, as far as it can be run; without one the usual.
 * @throws CheckpointError for an entry that is no schedule
 */
function ladderOf({ folder, ladder, refiner }: Checkpoint): readonly string[] {
  const hasRefiner = refiner !== null;
  const own = (ladder ?? []).map((text) => {
    try {
      return parseBlocks(text);
    } catch (cause) {
      const file = join(folder, "schedules.json");
      throw new CheckpointError(
        file,
        `${file}: ${(cause as Error).message} Correct it, or remove the file: the usual schedules are then taken.`,
        { cause },
      );
    }
  });
  const usable = own.filter((blocks) => hasRefiner || !blocks.includes("R")).map(formatBlocks);
  return usable.length > 0 ? usable : defaultLadder(hasRefiner);
}

/** Schedules of all stages. */
function formatStages(stages: readonly PlannedStage[]): string {
  return stages.map(({ blocks }) => formatBlocks(blocks)).join(" ");
}

/** The runtime that was asked for, started, with the checkpoint's graphs as it wants them. */
async function openRuntime(
  checkpoint: Checkpoint,
  checked: ResolvedLoadOptions,
): Promise<Omit<Loaded, "checkpoint" | "ladder"> & { readonly settings: Readonly<Record<string, unknown>> }> {
  const { runtime: wanted, tensorrtFolder, cache, capture, weights, threads, logger, onProgress } = checked;
  const passedOver: { name: string; reason: string }[] = [];
  let kind = wanted === "auto" || wanted === "onnxruntime" ? null : wanted;
  if (wanted === "auto")
    for (const name of tensorRtKinds) {
      const reason = await runtimes[name]!.find({ weights, capture, tensorrtFolder });
      if (reason === null) {
        kind = name;
        break;
      }
      passedOver.push({ name, reason });
    }
  if (kind) {
    onProgress?.({ phase: "graphs", done: 1, total: 3 });
    let emit = tensorRtEmitOptions(checkpoint);
    const graphs = new GraphLibrary(checkpoint, (name) => emit(name));
    onProgress?.({ phase: "runtime", done: 2, total: 3 });
    let opened: Awaited<ReturnType<typeof openTensorRt>> | null = null;
    try {
      opened = await openTensorRt({ kind, folder: tensorrtFolder, cache, files: graphs.files, capture, logger });
      const { runtime, device, version } = opened;
      emit = tensorRtEmitOptions(checkpoint, [smOf(device)]);
      checkDeviceMemory(graphs, device.name, device.memoryBytes);
      return { graphs, runtime, choice: { name: kind, passedOver }, settings: { version, gpu: device.name } };
    } catch (error) {
      await opened?.runtime.dispose();
      if (wanted !== "auto" || !(error instanceof FlowTurboError)) throw error;
      passedOver.push({ name: kind, reason: error.message });
    }
  }
  onProgress?.({ phase: "graphs", done: 1, total: 3 });
  const graphs = new GraphLibrary(checkpoint);
  const widening = resolveWeights(weights, graphs.bytesOf16BitWeights);
  onProgress?.({ phase: "runtime", done: 2, total: 3 });
  const runtime = new OnnxRuntime({ weights: widening, threads, logger });
  try {
    const { version } = await runtime.start();
    const settings = { version, threads: threads ?? null, weights: widening };
    return { graphs, runtime, choice: { name: runtime.name, passedOver }, settings };
  } catch (error) {
    await runtime.dispose();
    throw error;
  }
}

const textEncoders: readonly GraphName[] = ["clip_l", "clip_g", "t5"];

/** The centre crop of a transformer's table of positions for a latent, read by the runtime from the checkpoint's file. */
export function positionCrop(network: Checkpoint["transformer"], latentShape: readonly number[]): StoredConstant {
  const { patchSize, posEmbedMaxSize: side } = network.config;
  const width = mmditWidth(network.config);
  const rows = latentShape[2]! / patchSize;
  const columns = latentShape[3]! / patchSize;
  const top = Math.floor((side - rows) / 2);
  const left = Math.floor((side - columns) / 2);
  return {
    kind: "stored",
    source: positionTable(network.weights, network.config),
    shape: [1, rows * columns, width],
    firstElement: (top * side + left) * width,
    rowElements: columns * width,
    strideElements: side * width,
    rows,
  };
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

function pinnedAlone(): OptionError {
  return new OptionError(
    "pinBatch",
    "With capture each picture runs by itself, and depends on no company; leave out pinBatch, or capture.",
  );
}

function nearest(size: number, multiple: number, maximum: number): number {
  return multiple * Math.min(maximum, Math.max(1, Math.round(size / multiple)));
}

/** Settles as `work` does, or rejects with the signal's reason as soon as it aborts while `work` waits its turn. */
function untilAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return work;
  return new Promise<T>((resolve, reject) => {
    const abort = () => reject(signal.reason);
    signal.addEventListener("abort", abort, { once: true });
    work.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}
