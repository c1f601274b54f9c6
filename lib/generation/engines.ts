/**
 * Engines ahead of time: which graphs a checkpoint needs as engines, in which element types, and with which shapes for
 * the sizes and batches asked for. The runtime knows graphs and shapes only; what a picture is, is known here.
 */

import { setMaxListeners } from "node:events";
import { type Checkpoint, openCheckpoint, type Tokenizer } from "../checkpoint/index.js";
import { OptionError } from "../errors.js";
import { pixelsAtOnce } from "../flowturbo.js";
import { mmditWidth } from "../networks/index.js";
import { GraphLibrary, type GraphName, tensorRtEmitOptions } from "../networks/library.js";
import { type CompileEnginesOptions, checkOptions, compileSchema } from "../options.js";
import type { CompiledEngine, ProfileShapes } from "../runtimes/builder.js";
import { openBuilder } from "../runtimes/index.js";
import type { EngineCompiler } from "../runtimes/tensorrt/compile.js";
import { rowsAtOnce } from "../schedule/index.js";
import { fitSide } from "./preview.js";
import { PromptEncoder } from "./text.js";

export interface EngineProfile {
  /** Pictures, or for a text encoder texts. */
  readonly batch: number;
  /** Pixels; absent for a text encoder. */
  readonly width?: number;
  readonly height?: number;
  /** Dimensions of every input. */
  readonly inputs: ProfileShapes;
}

export interface Engine extends Omit<CompiledEngine, "profiles"> {
  readonly graph: GraphName;
  readonly stepType: "predict" | "refine" | null;
  readonly profiles: readonly EngineProfile[];
}

export interface CompileReport {
  readonly runtime: "tensorrt" | "tensorrt-rtx";
  /** Four-part version of the library. */
  readonly version: string;
  /** Folder of the engines. */
  readonly cache: string;
  readonly engines: readonly Engine[];
}

/**
 * Builds every engine that a checkpoint needs for the sizes and batches given, or finds it in the cache.
 * @param folder a checkpoint in the diffusers layout
 * @throws OptionError, CheckpointError, RuntimeUnavailableError, CompileError, MemoryError, CacheError, `signal.reason`
 */
export async function compileEngines(folder: string, options: CompileEnginesOptions = {}): Promise<CompileReport> {
  const checked = checkOptions(compileSchema, options, "compileEngines()");
  const { signal, onProgress } = checked;
  signal?.throwIfAborted();

  // 1. The checkpoint, its graphs and their shapes: wrong requests end here.
  const checkpoint = await openCheckpoint(folder, { variant: checked.variant, signal });
  const planned = plannedEngines(checkpoint, checked);

  // 2. The library and the cache.
  const { tensorrtFolder, targets, cache, memory } = checked;
  const { name, compiler } = await openBuilder(checked.runtime, { folder: tensorrtFolder, targets, cache, memory });
  const emit = tensorRtEmitOptions(checkpoint, (compiler as EngineCompiler).targets);
  const graphs = new GraphLibrary(checkpoint, emit);
  const { files } = graphs;

  // 3. Memory: what cannot be built here is refused before hours go into the rest.
  const requests = planned.map(({ name, profiles }) => {
    return { graph: graphs.get(name), profiles: profiles.map(({ inputs }) => inputs) };
  });
  await compiler.checkMemory(requests, { files, signal });

  // 4. The engines in order, `jobs` at a time. One that fails stops the others.
  const failure = new AbortController();
  const stop = signal ? AbortSignal.any([signal, failure.signal]) : failure.signal;
  setMaxListeners(0, stop);
  const engines = new Array<Engine>(planned.length);
  const queue = planned.entries();
  const work = async () => {
    for (const [index, { name, stepType, profiles }] of queue) {
      const compiled = await compiler.compile(requests[index]!, {
        files,
        signal: stop,
        onProgress: (progress) => onProgress?.({ ...progress, engine: index, engines: planned.length }),
      });
      engines[index] = { ...compiled, graph: name, stepType, profiles };
    }
  };
  const workers = Array.from({ length: checked.jobs }, () =>
    work().catch((error) => {
      failure.abort(error);
      throw error;
    }),
  );
  await Promise.all(workers);
  return { runtime: name as CompileReport["runtime"], version: compiler.version, cache: compiler.folder, engines };
}

export interface PlannedEngine {
  readonly name: GraphName;
  readonly stepType: "predict" | "refine" | null;
  readonly profiles: readonly EngineProfile[];
}

export interface EnginePlan {
  /** Default: the model's native size. */
  readonly sizes?: readonly Size[] | undefined;
  readonly batches: readonly number[];
  /** Which of the steps' graphs: with guidance, without, or both. */
  readonly guidance: "on" | "off" | "both";
  /** Graphs that only some pictures need: joins between sizes, originals and masks, previews. */
  readonly features?: readonly ("stages" | "editing" | "previews")[] | undefined;
  /** Tokens of the T5 encoder; default: as for drawing. */
  readonly maxSequenceLength?: number | undefined;
}

/**
 * The engines for a plan, each with one profile for each (batch, size); those that are named twice are one.
 * @throws OptionError for a size or length that the model does not take
 */
export function plannedEngines(checkpoint: Checkpoint, plan: EnginePlan): PlannedEngine[] {
  const { transformer, refiner, vae, textEncoder, textEncoder2, textEncoder3, tokenizer, tokenizer2 } = checkpoint;
  const { factor, latentChannels } = vae.config;
  const { patchSize, posEmbedMaxSize, sampleSize, jointAttentionDim, pooledProjectionDim } = transformer.config;
  const prompts = new PromptEncoder(checkpoint);
  const sequenceLength = plan.maxSequenceLength ?? prompts.defaultSequenceLength;
  if (sequenceLength > prompts.maxSequenceLength)
    throw new OptionError(
      "maxSequenceLength",
      `Expected at most ${prompts.maxSequenceLength} for maxSequenceLength but received ${sequenceLength}: the model's T5 tokenizer takes no more.`,
    );
  const sizes = distinct(plan.sizes ?? [{ width: sampleSize * factor, height: sampleSize * factor }]);
  const multiple = factor * patchSize;
  for (const { width, height } of sizes)
    if (width % multiple !== 0 || height % multiple !== 0 || Math.max(width, height) > multiple * posEmbedMaxSize)
      throw new OptionError(
        "sizes",
        `Expected widths and heights in multiples of ${multiple} up to ${multiple * posEmbedMaxSize} for sizes but received ${width}x${height}.`,
      );
  const batches = [...new Set(plan.batches)].sort((a, b) => a - b);
  const modes = { on: [true], off: [false], both: [true, false] }[plan.guidance];

  const engines: PlannedEngine[] = [];
  const add = (name: GraphName, profiles: readonly EngineProfile[], stepType: PlannedEngine["stepType"] = null) =>
    engines.push({ name, stepType, profiles });
  type Latent = readonly [channels: number, height: number, width: number];
  /** One profile for each size and each number of rows that it is launched with. */
  const perSize = (rows: (size: Size) => readonly number[], inputs: (batch: number, latent: Latent) => ProfileShapes) =>
    sizes.flatMap((size) =>
      rows(size).map((batch): EngineProfile => {
        const { width, height } = size;
        return { batch, width, height, inputs: inputs(batch, [latentChannels, height / factor, width / factor]) };
      }),
    );
  const whole = () => batches;
  /** The autoencoder takes a batch in pieces of at most so many pictures, and a last one with what is left. */
  const pieces = ({ width, height }: Size) => {
    const most = rowsAtOnce(pixelsAtOnce, width, height);
    const rows = batches.flatMap((batch) => [Math.min(batch, most), batch % most]).filter((rows) => rows > 0);
    return [...new Set(rows)].sort((a, b) => a - b);
  };

  // 1. Texts: any number of them can be encoded in rows of 1 where no profile has that number.
  const texts = (inputs: (rows: number) => ProfileShapes): EngineProfile[] =>
    [...new Set([1, ...batches])].map((batch) => ({ batch, inputs: inputs(batch) }));
  const clip = (tokenizer: Tokenizer) => texts((rows) => ({ ids: [rows, tokenizer.maxLength] }));
  if (textEncoder) add("clip_l", clip(tokenizer!));
  if (textEncoder2) add("clip_g", clip(tokenizer2!));
  if (textEncoder3)
    add(
      "t5",
      texts((rows) => ({ ids: [rows, sequenceLength], relative_buckets: [sequenceLength, sequenceLength] })),
    );

  // 2. Steps.
  for (const [stepType, network] of [
    ["predict", transformer],
    ["refine", refiner],
  ] as const)
    for (const guided of network ? modes : []) {
      const { config } = network!;
      const profiles = perSize(whole, (batch, latent) => {
        const rows = guided ? 2 * batch : batch;
        const [, height, width] = latent;
        return {
          x: [batch, ...latent],
          velocity: [rows, ...latent],
          context: [rows, prompts.contextTokens(sequenceLength), jointAttentionDim],
          pooled: [rows, pooledProjectionDim],
          position_embedding: [1, (height / config.patchSize) * (width / config.patchSize), mmditWidth(config)],
          ...{ sigma: [batch], a_in: [batch], a_old: [batch], a_new: [batch] },
          ...(guided && { guidance: [batch] }),
        };
      });
      add(guided ? stepType : `${stepType}_unguided`, profiles, stepType);
    }

  // 3. Pictures.
  add(
    "vae_decoder",
    perSize(pieces, (batch, latent) => ({ latents: [batch, ...latent] })),
  );

  // 4. What only some pictures need.
  const features = new Set(plan.features);
  const encoded = [
    ...(features.has("editing") ? sizes : []),
    ...(features.has("previews") ? [{ width: fitSide * factor, height: fitSide * factor }] : []),
  ];
  if (encoded.length > 0)
    add(
      "vae_encoder",
      distinct(encoded).map(({ width, height }) => {
        return { batch: 1, width, height, inputs: { image: [1, vae.config.inChannels, height, width] } };
      }),
    );
  if (features.has("stages")) {
    const fits = (small: Size, large: Size) =>
      small !== large && small.width <= large.width && small.height <= large.height;
    const profiles = sizes.flatMap((large) =>
      sizes
        .filter((small) => fits(small, large))
        .flatMap((small) =>
          pieces(large).map((batch): EngineProfile => {
            const [latents, noise] = [small, large].map(({ width, height }) => {
              return [batch, latentChannels, height / factor, width / factor];
            }) as [number[], number[]];
            return { batch, ...large, inputs: { latents, noise, sigma: [batch] } };
          }),
        ),
    );
    if (profiles.length === 0)
      throw new OptionError("sizes", "Stages run from a smaller size to a larger one; name both in sizes.");
    add("join", profiles);
  }
  if (features.has("editing")) {
    const original = ([channels, ...area]: Latent) => ({ latents: [1, channels, ...area], mask: [1, 1, ...area] });
    add(
      "noised",
      perSize(whole, (batch, latent) => {
        const { latents } = original(latent);
        return { latents, noise: [batch, ...latent], sigma: [batch] };
      }),
    );
    for (const guided of modes)
      add(
        guided ? "merge" : "merge_unguided",
        perSize(whole, (batch, latent) => ({
          ...{ x: [batch, ...latent], velocity: [guided ? 2 * batch : batch, ...latent] },
          ...{ noise: [batch, ...latent], sigma: [batch], ...original(latent) },
        })),
      );
  }
  if (features.has("previews"))
    for (const guided of modes)
      add(
        guided ? "preview" : "preview_unguided",
        perSize(whole, (batch, latent) => ({
          ...{ x: [batch, ...latent], velocity: [guided ? 2 * batch : batch, ...latent], sigma: [batch] },
          ...{ map: [3, latentChannels], bias: [3, 1], ...(guided && { guidance: [batch] }) },
        })),
      );
  return engines;
}

interface Size {
  readonly width: number;
  readonly height: number;
}

/** In their order, each once. */
function distinct(sizes: readonly Size[]): Size[] {
  return [...new Map(sizes.map((size) => [`${size.width}x${size.height}`, size])).values()];
}
