/**
 * Engines ahead of time: which graphs a checkpoint needs as engines, in which element types, and with which shapes for
 * the sizes and batches asked for. The runtime knows graphs and shapes only; what a picture is, is known here.
 */

import { setMaxListeners } from "node:events";
import { type Checkpoint, openCheckpoint } from "./checkpoint/index.js";
import { OptionError } from "./errors.js";
import { GraphLibrary, type GraphName } from "./graphs.js";
import type { EmitOptions } from "./networks/index.js";
import { mmditWidth } from "./networks/index.js";
import { type CompileEnginesOptions, checkOptions, compileSchema } from "./options.js";
import { pixelsAtOnce } from "./pipeline.js";
import { PromptEncoder } from "./prompts.js";
import { chooseForBuilding } from "./runtimes/tensorrt/choose.js";
import { type CompiledEngine, EngineCompiler, type ProfileShapes } from "./runtimes/tensorrt/compile.js";
import { rowsAtOnce } from "./schedule/index.js";
import type { StoredDType } from "./tensor.js";

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
  const graphs = new GraphLibrary(checkpoint, tensorRtEmitOptions(checkpoint, checked.targets));
  const files = [
    ...[checkpoint.transformer, checkpoint.refiner, checkpoint.vae],
    ...[checkpoint.textEncoder, checkpoint.textEncoder2, checkpoint.textEncoder3],
  ].flatMap((part) => part?.weights.files ?? []);

  // 2. The library and the cache.
  const kind = await chooseForBuilding(checked.runtime, { folder: checked.tensorrtFolder, targets: checked.targets });
  const compiler = await EngineCompiler.open({
    kind,
    folder: checked.tensorrtFolder,
    targets: checked.targets,
    cache: checked.cache,
    memory: checked.memory,
  });

  // 3. The engines in order, `jobs` at a time. One that fails stops the others.
  const failure = new AbortController();
  const stop = signal ? AbortSignal.any([signal, failure.signal]) : failure.signal;
  setMaxListeners(0, stop);
  const engines = new Array<Engine>(planned.length);
  const queue = planned.entries();
  const work = async () => {
    for (const [index, { name, stepType, profiles }] of queue) {
      const compiled = await compiler.compile(
        { graph: graphs.get(name), profiles: profiles.map(({ inputs }) => inputs) },
        {
          files,
          signal: stop,
          onProgress: (progress) => onProgress?.({ ...progress, engine: index, engines: planned.length }),
        },
      );
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
  return { runtime: kind, version: compiler.library.version.join("."), cache: compiler.cache.folder, engines };
}

export interface PlannedEngine {
  readonly name: GraphName;
  readonly stepType: "predict" | "refine" | null;
  readonly profiles: readonly EngineProfile[];
}

export interface EnginePlan {
  /** Default: the model's native size. */
  readonly sizes?: readonly { readonly width: number; readonly height: number }[] | undefined;
  readonly batches: readonly number[];
  /** Which of the steps' graphs: with guidance, without, or both. */
  readonly guidance: "on" | "off" | "both";
  /** Tokens of the T5 encoder; default: as for drawing. */
  readonly maxSequenceLength?: number | undefined;
}

/**
 * The engines for a plan, each with one profile for each (batch, size); equal ones are merged.
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
  const sizes = plan.sizes ?? [{ width: sampleSize * factor, height: sampleSize * factor }];
  const multiple = factor * patchSize;
  for (const { width, height } of sizes)
    if (width % multiple !== 0 || height % multiple !== 0 || Math.max(width, height) > multiple * posEmbedMaxSize)
      throw new OptionError(
        "sizes",
        `Expected widths and heights in multiples of ${multiple} up to ${multiple * posEmbedMaxSize} for sizes but received ${width}x${height}.`,
      );
  const batches = [...new Set(plan.batches)].sort((a, b) => a - b);

  // Any number of texts can be encoded in rows of 1 where no profile has that number.
  const texts = (inputs: (rows: number) => ProfileShapes): EngineProfile[] =>
    [...new Set([1, ...batches])].map((batch) => ({ batch, inputs: inputs(batch) }));
  const pictures = (inputs: (batch: number, latent: readonly [number, number]) => ProfileShapes): EngineProfile[] =>
    sizes.flatMap(({ width, height }) =>
      batches.map((batch) => ({ batch, width, height, inputs: inputs(batch, [height / factor, width / factor]) })),
    );
  const step = (stepType: "predict" | "refine", guided: boolean): PlannedEngine => {
    const { config } = stepType === "predict" ? transformer : refiner!;
    const profiles = pictures((batch, [h, w]) => {
      const rows = guided ? 2 * batch : batch;
      return {
        x: [batch, latentChannels, h, w],
        velocity: [rows, latentChannels, h, w],
        context: [rows, prompts.contextTokens(sequenceLength), jointAttentionDim],
        pooled: [rows, pooledProjectionDim],
        position_embedding: [1, (h / config.patchSize) * (w / config.patchSize), mmditWidth(config)],
        sigma: [batch],
        a_in: [batch],
        a_old: [batch],
        a_new: [batch],
        ...(guided && { guidance: [batch] }),
      };
    });
    return { name: guided ? stepType : `${stepType}_unguided`, stepType, profiles };
  };

  // The decoder takes a batch in pieces of at most so many pictures, and a last one with what is left.
  const decoder = sizes.flatMap(({ width, height }) => {
    const most = rowsAtOnce(pixelsAtOnce, width, height);
    const pieces = new Set(
      batches.flatMap((batch) => [Math.min(batch, most), batch % most]).filter((rows) => rows > 0),
    );
    return [...pieces]
      .sort((a, b) => a - b)
      .map(
        (batch): EngineProfile => ({
          ...{ batch, width, height },
          inputs: { latents: [batch, latentChannels, height / factor, width / factor] },
        }),
      );
  });

  const modes = { on: [true], off: [false], both: [true, false] }[plan.guidance];
  const engine = (name: GraphName, profiles: readonly EngineProfile[]) => ({ name, stepType: null, profiles });
  return [
    ...(textEncoder
      ? [
          engine(
            "clip_l",
            texts((rows) => ({ ids: [rows, tokenizer!.maxLength] })),
          ),
        ]
      : []),
    ...(textEncoder2
      ? [
          engine(
            "clip_g",
            texts((rows) => ({ ids: [rows, tokenizer2!.maxLength] })),
          ),
        ]
      : []),
    ...(textEncoder3
      ? [
          engine(
            "t5",
            texts((rows) => ({
              ids: [rows, sequenceLength],
              relative_buckets: [sequenceLength, sequenceLength],
            })),
          ),
        ]
      : []),
    ...modes.map((guided) => step("predict", guided)),
    ...(refiner ? modes.map((guided) => step("refine", guided)) : []),
    engine("vae_decoder", decoder),
  ];
}

/**
 * How graphs are emitted for TensorRT: each network in the element type of its own weights. T5 overflows in float16,
 * which it was not trained in, and computes in bfloat16 then, or in float32 where a target (SM 7.5) has none.
 */
export function tensorRtEmitOptions(
  checkpoint: Checkpoint,
  targets: readonly number[] = [],
): (name: GraphName) => EmitOptions {
  const { transformer, refiner, vae, textEncoder, textEncoder2, textEncoder3 } = checkpoint;
  // The graphs without weights are float32 throughout.
  const parts: Partial<Record<GraphName, Pick<typeof vae, "weights"> | null>> = {
    ...{ clip_l: textEncoder, clip_g: textEncoder2, t5: textEncoder3 },
    ...{ predict: transformer, predict_unguided: transformer, refine: refiner, refine_unguided: refiner },
    ...{ vae_decoder: vae, vae_encoder: vae, join: vae },
  };
  return (name) => {
    const part = parts[name];
    let compute = part ? computeTypes[prevailingDType(part.weights)] : "float32";
    if (name === "t5" && compute === "float16") compute = targets.some((sm) => sm < 80) ? "float32" : "bfloat16";
    return { compute, linear: "matmul", groupNorm: "operator", attention: "matmul" };
  };
}

const computeTypes = { F32: "float32", F16: "float16", BF16: "bfloat16" } as const;

/** The type that most of a part's values are stored in. */
function prevailingDType(weights: Checkpoint["vae"]["weights"]): StoredDType {
  const bytes = { F32: 0, F16: 0, BF16: 0 };
  for (const name of weights.names) {
    const tensor = weights.find(name);
    if (tensor) bytes[tensor.dtype] += tensor.length;
  }
  return (["BF16", "F16", "F32"] as const).reduce((most, dtype) => (bytes[dtype] > bytes[most] ? dtype : most));
}
