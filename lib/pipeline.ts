/**
 * Text to image: the recipe, top to bottom. A model is a checkpoint, the graphs emitted for it and a runtime that runs
 * them; a picture is a program (lib/schedule) over those graphs.
 */

import { randomInt } from "node:crypto";
import { fileURLToPath } from "node:url";
import { type Checkpoint, openCheckpoint } from "./checkpoint/index.js";
import { DisposedError, OptionError } from "./errors.js";
import { GraphLibrary, type GraphName } from "./graphs.js";
import { Image, toRgb } from "./image.js";
import { mmditWidth, positionTable } from "./networks/index.js";
import { NoiseGenerator } from "./noise.js";
import {
  checkOptions,
  type GenerateOptions,
  generateSchema,
  type LoadOptions,
  type Logger,
  loadSchema,
  type ResolvedGenerateOptions,
} from "./options.js";
import type { Program, StoredConstant } from "./program.js";
import { PromptEncoder } from "./prompts.js";
import { OnnxRuntime, resolveWeights } from "./runtimes/onnxruntime/onnxruntime.js";
import type { LaunchReport, Runtime, RuntimeName } from "./runtimes/runtime.js";
import { refuseTensorRt, whyNotTensorRt } from "./runtimes/tensorrt/choose.js";
import {
  type Block,
  countEvaluations,
  defaultBlocks,
  diffusersGrid,
  type Evaluations,
  formatBlocks,
  type GridName,
  parseBlocks,
  planSteps,
  type Sampler,
  samplingProgram,
  shiftedGrid,
} from "./schedule/index.js";
import { type FloatTensor, float32 } from "./tensor.js";

/** The model that comes with the package. */
export const embeddedModel = fileURLToPath(new URL("../models/shapes", import.meta.url));

/** Milliseconds. */
export interface Timings {
  /** Loading the model; the same in every result of one model. */
  readonly load: number;
  /** Tokenising and encoding the prompts; near 0 when all were cached. */
  readonly encode: number;
  /** Each block of the schedule. */
  readonly steps: readonly number[];
  readonly decode: number;
  /** The whole call, waiting for earlier calls included. */
  readonly total: number;
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
  /** The schedule that ran, such as "H1P7R2". */
  readonly blocks: string;
  /** Its noise levels, one more than blocks. */
  readonly sigmas: readonly number[];
  /** Evaluations of the two networks for one picture (guidance doubles their rows, not their number). */
  readonly evaluations: Evaluations;
  readonly timings: Timings;
  /** What the caller should know, such as a prompt that was cut. */
  readonly warnings: readonly string[];
}

/** The runtime of a model, and why those that would be preferred were passed over. */
export interface RuntimeChoice {
  readonly name: RuntimeName;
  readonly passedOver: readonly { readonly name: string; readonly reason: string }[];
}

const defaultSteps: Record<Sampler, number> = { flowturbo: 10, euler: 28, heun: 28 };

/** Pixels that go through the decoder at once: one picture of 1024 × 1024, or 256 of 64 × 64. */
const decodePixels = 2 ** 20;

/** Pictures of a size that go through the decoder at once. */
export function decodeRows(width: number, height: number): number {
  return Math.max(1, Math.floor(decodePixels / (width * height)));
}

/** Everything about a request that is known before any work. */
interface Plan {
  readonly options: ResolvedGenerateOptions;
  readonly prompts: readonly string[];
  readonly negatives: readonly string[];
  readonly width: number;
  readonly height: number;
  readonly latentShape: readonly [number, number, number, number];
  readonly sampler: Sampler;
  readonly grid: GridName;
  readonly blocks: readonly Block[];
  readonly sigmas: readonly number[];
  readonly guidanceScale: number | null;
  readonly sequenceLength: number;
  readonly seeds: readonly number[];
}

/** A loaded model. Calls made at the same time run one after another and are answered in order. */
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
  #queue: Promise<unknown> = Promise.resolve();
  #disposed: Promise<void> | null = null;

  private constructor(
    checkpoint: Checkpoint,
    graphs: GraphLibrary,
    runtime: Runtime,
    choice: RuntimeChoice,
    logger: Logger,
    loadMilliseconds: number,
  ) {
    this.#checkpoint = checkpoint;
    this.#graphs = graphs;
    this.#runtime = runtime;
    this.#prompts = new PromptEncoder(checkpoint);
    this.#logger = logger;
    this.#loadMilliseconds = loadMilliseconds;
    this.folder = checkpoint.folder;
    this.runtime = choice;
    this.hasRefiner = checkpoint.refiner !== null;
    const side = checkpoint.transformer.config.sampleSize * checkpoint.vae.config.factor;
    this.nativeSize = { width: side, height: side };
  }

  /**
   * Opens a checkpoint in the diffusers layout and starts a runtime for it. Weights are not read: the runtime maps them.
   * @param folder default: the embedded model
   * @throws CheckpointError if the folder is not a complete SD3 or SD3.5 checkpoint, OptionError for a wrong option
   */
  static async load(folder: string = embeddedModel, options: LoadOptions = {}): Promise<FlowTurbo> {
    const start = performance.now();
    if (typeof folder !== "string")
      throw new OptionError("folder", `Expected the path of a folder for folder but received ${typeof folder}.`);
    const checked = checkOptions(loadSchema, options, "load()");
    const { variant, threads, weights, logger = {}, signal, onProgress } = checked;
    signal?.throwIfAborted();
    if (checked.runtime === "tensorrt" || checked.runtime === "tensorrt-rtx")
      return refuseTensorRt(checked.runtime, { folder: checked.tensorrtFolder });

    // 1. The folder: configs, headers of the weights, tokenizers.
    onProgress?.({ phase: "checkpoint", done: 0, total: 3 });
    const checkpoint = await openCheckpoint(folder, { variant, signal });

    // 2. The graphs, which checks every weight's name, type and shape.
    onProgress?.({ phase: "graphs", done: 1, total: 3 });
    const graphs = new GraphLibrary(checkpoint);
    const bytes = graphs.bytesOf16BitWeights;

    // 3. The runtime.
    onProgress?.({ phase: "runtime", done: 2, total: 3 });
    const runtime = new OnnxRuntime({ weights: resolveWeights(weights, bytes), threads, logger });
    try {
      await runtime.start();
      signal?.throwIfAborted();
    } catch (error) {
      await runtime.dispose();
      throw error;
    }
    onProgress?.({ phase: "runtime", done: 3, total: 3 });
    const passedOver = checked.runtime === "auto" ? await whyNotTensorRt({ folder: checked.tensorrtFolder }) : [];
    const choice: RuntimeChoice = { name: runtime.name, passedOver };
    return new FlowTurbo(checkpoint, graphs, runtime, choice, logger, performance.now() - start);
  }

  /**
   * Draws `count` pictures for each prompt, all in one batch.
   * @throws OptionError before any work if an option is wrong or does not fit the model; NotFiniteError naming the step
   *   if the network's values overflow; RuntimeDiedError if the runtime's process ended; `signal.reason` after an abort
   */
  async generate(options: GenerateOptions): Promise<GenerateResult> {
    const start = performance.now();
    if (this.#disposed) throw new DisposedError("This model");
    const plan = this.#plan(checkOptions(generateSchema, options, "generate()"));
    const { signal } = plan.options;
    signal?.throwIfAborted();
    const turn = this.#queue.then(() => {
      signal?.throwIfAborted();
      return this.#draw(plan, start);
    });
    this.#queue = turn.catch(() => undefined);
    return untilAborted(turn, signal);
  }

  /** Waits for calls under way, then frees everything. Safe to call twice. */
  dispose(): Promise<void> {
    this.#disposed ??= this.#queue.then(() => this.#runtime.dispose());
    return this.#disposed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  /** Checks a request against the model and settles everything that can be known beforehand. */
  #plan(options: ResolvedGenerateOptions): Plan {
    const { transformer, vae, scheduler } = this.#checkpoint;
    const prompts = typeof options.prompt === "string" ? [options.prompt] : options.prompt;
    const negatives = perPrompt(options.negativePrompt ?? "", prompts.length);

    // Size.
    const width = options.width ?? this.nativeSize.width;
    const height = options.height ?? this.nativeSize.height;
    const { patchSize, posEmbedMaxSize } = transformer.config;
    const multiple = vae.config.factor * patchSize;
    for (const [name, size] of [
      ["width", width],
      ["height", height],
    ] as const) {
      if (size % multiple !== 0)
        throw new OptionError(
          name,
          `Expected a multiple of ${multiple} for ${name} but received ${size}. Nearest: ${nearest(size, multiple, posEmbedMaxSize)}.`,
        );
      if (size > multiple * posEmbedMaxSize)
        throw new OptionError(
          name,
          `Expected at most ${multiple * posEmbedMaxSize} for ${name} but received ${size}: the model's table of positions has ${posEmbedMaxSize} × ${posEmbedMaxSize} entries.`,
        );
    }
    const rows = prompts.length * options.count;
    const latentShape = [
      rows,
      transformer.config.outChannels,
      height / vae.config.factor,
      width / vae.config.factor,
    ] as const;

    // Schedule.
    const { sampler, blocks } = this.#schedule(options);
    const grid = options.grid ?? (sampler === "euler" ? "diffusers" : "shifted");
    const sigmas =
      grid === "shifted"
        ? shiftedGrid(blocks.length, scheduler.shift)
        : diffusersGrid(blocks.length, scheduler.shift, scheduler.numTrainTimesteps);

    // Noise.
    const { noise } = options;
    if (noise && noise.shape.join() !== latentShape.join())
      throw new OptionError(
        "noise",
        `Expected shape [${latentShape.join(", ")}] for noise (pictures, channels, height / ${vae.config.factor}, width / ${vae.config.factor}) but received [${noise.shape.join(", ")}].`,
      );
    if (noise && noise.data.length !== latentShape.reduce((a, b) => a * b, 1))
      throw new OptionError("noise", `The noise tensor has ${noise.data.length} values, which its shape does not.`);
    if (noise && !noise.data.every(Number.isFinite))
      throw new OptionError("noise", "Expected finite values for noise but it holds NaN or an infinity.");
    const seed = options.seed ?? randomInt(2 ** 32);
    const seeds = noise ? [] : Array.from({ length: rows }, (_, index) => seed + index);

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
      width,
      height,
      latentShape,
      sampler,
      grid,
      blocks,
      sigmas,
      guidanceScale: options.guidanceScale > 1 ? options.guidanceScale : null,
      sequenceLength,
      seeds,
    };
  }

  #schedule(options: ResolvedGenerateOptions): { sampler: Sampler; blocks: Block[] } {
    const { steps } = options;
    const sampler = options.sampler ?? "flowturbo";
    if (options.blocks === undefined)
      return { sampler, blocks: defaultBlocks(sampler, steps ?? defaultSteps[sampler], this.hasRefiner) };
    if (sampler !== "flowturbo")
      throw new OptionError(
        "blocks",
        `Blocks belong to the sampler flowturbo; leave out blocks or sampler "${sampler}".`,
      );
    const blocks = parseBlocks(options.blocks);
    if (steps !== undefined && steps !== blocks.length)
      throw new OptionError(
        "steps",
        `The blocks "${options.blocks}" are ${blocks.length} steps; leave out steps (${steps}).`,
      );
    if (blocks.includes("R") && !this.hasRefiner)
      throw new OptionError(
        "blocks",
        `The blocks "${options.blocks}" need a velocity refiner, but ${this.folder} has no refiner/ folder. Use P in place of R, or train a refiner.`,
      );
    return { sampler, blocks };
  }

  async #draw(plan: Plan, start: number): Promise<GenerateResult> {
    const { options, blocks, sigmas, latentShape, guidanceScale } = plan;
    const { transformer, refiner, vae } = this.#checkpoint;
    const { signal, onStep, count } = options;
    const rows = latentShape[0];

    // 1. Text: what the cache does not know is encoded.
    const encodeStart = performance.now();
    const guided = guidanceScale !== null;
    const texts = [...plan.prompts, ...(guided ? plan.negatives : [])];
    const encoded = await this.#prompts.encode(texts, plan.sequenceLength, (program) => this.#run(program, signal));
    const warnings = [...new Set(encoded.flatMap((prompt) => prompt.warnings))];
    for (const warning of warnings) this.#logger.warn?.(warning);
    const repeated = (part: typeof encoded) => part.flatMap((prompt) => new Array<typeof prompt>(count).fill(prompt));
    const conditional = repeated(encoded.slice(0, plan.prompts.length));
    const unconditional = repeated(encoded.slice(plan.prompts.length));
    const condition = this.#prompts.stack([...unconditional, ...conditional]);
    const encode = performance.now() - encodeStart;

    // 2. Noise: one generator a picture.
    const noise = options.noise ?? this.#noise(plan.seeds, latentShape);

    // 3. The program: steps, then the decoder.
    const graph = (type: "predict" | "refine"): GraphName => (guided ? type : `${type}_unguided`);
    const usesRefiner = blocks.includes("R");
    const sampling = samplingProgram({
      blocks,
      sigmas,
      noise,
      ...condition,
      guidanceScale,
      positions: {
        predict: positionCrop(transformer, latentShape),
        refine: usesRefiner && refiner ? positionCrop(refiner, latentShape) : null,
      },
      graphs: { predict: graph("predict"), refine: graph("refine"), decode: "vae_decoder" },
      vaeFactor: vae.config.factor,
      imageChannels: vae.config.outChannels,
      decodeRows: decodeRows(plan.width, plan.height),
    });
    const steps = new Array<number>(blocks.length).fill(0);
    let decode = 0;
    const results = await this.#run(sampling.program, signal, ({ launch: { label }, milliseconds }) => {
      if (label.kind !== "step") decode += milliseconds;
      else {
        const step = label.block!;
        steps[step]! += milliseconds;
        if (label.completesBlock)
          onStep?.({
            step,
            steps: blocks.length,
            block: blocks[step]!,
            sigma: sigmas[step + 1]!,
            milliseconds: steps[step]!,
          });
      }
    });

    // 4. Pictures.
    const pixels = results[sampling.image] as FloatTensor;
    const images = Array.from({ length: rows }, (_, row) => {
      const parameters = this.#parameters(plan, row);
      return new Image(plan.width, plan.height, toRgb(pixels, row), parameters);
    });
    return {
      images,
      latents: results[sampling.latents] as FloatTensor,
      pixels,
      seeds: plan.seeds,
      width: plan.width,
      height: plan.height,
      blocks: formatBlocks(blocks),
      sigmas,
      evaluations: countEvaluations(planSteps(blocks, sigmas)),
      timings: { load: this.#loadMilliseconds, encode, steps, decode, total: performance.now() - start },
      warnings,
    };
  }

  /** Makes sure that the runtime knows the graphs that a program launches, then runs it. */
  #run(program: Program, signal?: AbortSignal, onLaunch?: (report: LaunchReport) => void) {
    for (const instruction of program.instructions)
      if (instruction.op === "launch" && !this.#runtime.has(instruction.graph))
        this.#runtime.add(this.#graphs.get(instruction.graph as GraphName));
    return this.#runtime.run(program, { signal, onLaunch });
  }

  #noise(seeds: readonly number[], shape: readonly number[]): FloatTensor {
    const size = shape.slice(1).reduce((product, dimension) => product * dimension, 1);
    const data = new Float32Array(seeds.length * size);
    for (const [row, seed] of seeds.entries()) data.set(new NoiseGenerator(seed).draw(size), row * size);
    return float32(shape, data);
  }

  /** What a picture's file says about how it was made: enough to draw it again. */
  #parameters(plan: Plan, row: number): Record<string, unknown> {
    const index = Math.floor(row / plan.options.count);
    return {
      prompt: plan.prompts[index],
      ...(plan.guidanceScale !== null && { negativePrompt: plan.negatives[index] }),
      seed: plan.seeds[row] ?? null,
      width: plan.width,
      height: plan.height,
      sampler: plan.sampler,
      blocks: formatBlocks(plan.blocks),
      grid: plan.grid,
      guidanceScale: plan.guidanceScale ?? 1,
      maxSequenceLength: plan.sequenceLength,
      model: this.folder === embeddedModel ? "shapes (embedded)" : this.folder,
      software: "flowturbo",
    };
  }
}

/** The centre crop of a transformer's table of positions for a latent, read by the runtime from the checkpoint's file. */
function positionCrop(network: Checkpoint["transformer"], latentShape: readonly number[]): StoredConstant {
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
