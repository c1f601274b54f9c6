/**
 * Engines ahead of time: which graphs a checkpoint needs as engines, and with which shapes for the sizes and batches asked
 * for. Both follow from the table of networks: a profile is a graph's own dimensions, with numbers for their names.
 */

import {
  type ControlNet,
  calibratedSchedulesOf,
  checkControlNetFits,
  checkControlNetValues,
  openCheckpoint,
  openControlNet,
} from "../checkpoint/index.js";
import { defaultCacheFolder } from "../common/files.js";
import { checkInstallation } from "../common/package.js";
import { OptionError } from "../errors.js";
import type { CompileEnginesOptions, Size } from "../model.js";
import {
  type Feature,
  graphName,
  guidedKeysOf,
  type LoraRank,
  listed,
  type Network,
  networksOf,
  textEncodersOf,
  tokensOf,
  type VariantValues,
} from "../networks/index.js";
import { GraphLibrary } from "../networks/library.js";
import { type OnnxGraph, shapeWith } from "../onnx/index.js";
import { checkOptions, compileSchema, guidanceModes } from "../options.js";
import type { CompiledEngine, ProfileShapes } from "../runtimes/builder.js";
import { openBuilder } from "../runtimes/index.js";
import { areSomeMixed, type CalibratedSchedule } from "../schedule/index.js";
import { launchBatches } from "../serving/split.js";
import { defaultsOf } from "./defaults.js";
import { locateAll } from "./locate.js";
import { namedLoras, withMergedLoras } from "./loras.js";
import { checkSequenceLength } from "./prompts.js";
import { noSuchLayer } from "./request.js";
import { checkControlSizes, checkSizes, fitsPositions, latentShapeOf, nativeSize } from "./sizes.js";
import { PromptEncoder } from "./text.js";

/** One set of input shapes that an engine runs on. */
export interface EngineProfile {
  /** Pictures, or for a text encoder texts. */
  readonly batch: number;
  /** Pixels; absent for a text encoder. */
  readonly width?: number;
  /** Pixels; absent for a text encoder. */
  readonly height?: number;
  /** Dimensions of every input. */
  readonly inputs: ProfileShapes;
}

/** An engine that was built, or found in the cache. */
export interface Engine extends Omit<CompiledEngine, "profiles"> {
  /** Which network of the fused step it is: the transformer ("predict"), the velocity refiner ("refine"), or none. */
  readonly stepType: string | null;
  /** What it runs on. */
  readonly profiles: readonly EngineProfile[];
}

/** What `compileEngines` results in. */
export interface CompileReport {
  /** Library that the engines are for. */
  readonly runtime: string;
  /** Four-part version of the library. */
  readonly version: string;
  /** Folder of the engines. */
  readonly cache: string;
  /** The engines, one for each graph. */
  readonly engines: readonly Engine[];
  /** What is missing or there twice in the checkpoint's folder, and how it was read because of it; that the hub could not be asked. */
  readonly warnings: readonly string[];
}

/** @throws OptionError for a LoRA whose matrices are no part of an engine */
function refuseDynamic(loras: CompileEnginesOptions["loras"] = []): void {
  const lora = loras.find(({ dynamic }) => dynamic);
  if (lora)
    throw new OptionError(
      "loras",
      `The LoRA ${lora.name ?? lora.file} of loras is dynamic, and engines for dynamic ones are built for a rank, whichever they are; leave it out, and give lorasRank (--loras-rank).`,
    );
}

/**
 * Builds every engine that a checkpoint needs for the sizes and batches given, or finds it in the cache.
 * @param folder a checkpoint: a folder in the diffusers layout, one .safetensors file, or a model of the hub as `FlowTurbo.load` takes it
 * @throws OptionError, InstallationError, HubError, CheckpointError, RuntimeUnavailableError, CompileError, MemoryError, CacheError, `signal.reason`
 */
export async function compileEngines(folder: string, options: CompileEnginesOptions = {}): Promise<CompileReport> {
  const checked = checkOptions(compileSchema, options, "compileEngines()");
  const { signal, onProgress } = checked;
  signal?.throwIfAborted();
  checkInstallation();

  refuseDynamic(checked.loras);
  // 1. The checkpoint, its graphs and their shapes: wrong requests end here.
  const { variant, textEncoder3 } = checked;
  const nets = checked.controls?.map((net) => ({ folder: net }));
  const located = await locateAll(folder, { ...checked, controlNets: nets });
  const { base, previewVae } = located;
  const opened = await openCheckpoint(located.path, { variant, base, previewVae, textEncoder3, signal });
  const controlNets = new Map<string, ControlNet>();
  const controlIds: string[] = [];
  for (const path of located.controlNets) {
    const controlNet = await openControlNet(path, { variant, signal });
    checkControlNetFits(controlNet, opened);
    await checkControlNetValues(controlNet, signal);
    controlNets.set(controlNet.id, controlNet);
    controlIds.push(controlNet.id);
  }
  const cache = checked.cache ?? defaultCacheFolder();
  const merged = await withMergedLoras(opened, await namedLoras(checked.loras), cache, { signal });
  const checkpoint = { ...merged, controlNets };
  const calibrated = await calibratedSchedulesOf(checkpoint, cache);
  const { guidance = (await defaultsOf(checkpoint, undefined)).distilled ? "off" : "on" } = checked;
  const required = requiredEngines(new GraphLibrary(checkpoint), { ...checked, controlIds, guidance, calibrated });

  // 2. The library and the cache.
  const { compiler, emitOptions, name } = await openBuilder(checked.runtime, {
    folder: checked.tensorrtFolder,
    ...{ targets: checked.targets, cache: checked.cache, memory: checked.memory },
  });
  const graphs = new GraphLibrary(checkpoint, emitOptions);
  const { files } = graphs;

  // 3. Memory: what cannot be built here is refused before the rest is built.
  const requests = required.map(({ graph, profiles }) => {
    return { graph: graphs.get(graph), profiles: profiles.map(({ inputs }) => inputs) };
  });
  await compiler.checkMemory(requests, { files, signal });

  // 4. The engines in order, `jobs` at a time. One that fails stops the others.
  const failure = new AbortController();
  const stop = signal ? AbortSignal.any([signal, failure.signal]) : failure.signal;
  const engines = new Array<Engine>(required.length);
  const queue = required.entries();
  const work = async () => {
    for (const [index, { stepType, profiles }] of queue) {
      const compiled = await compiler.compile(requests[index]!, {
        files,
        signal: stop,
        onProgress: (progress) => onProgress?.({ ...progress, engine: index, engines: required.length }),
      });
      engines[index] = { ...compiled, stepType, profiles };
    }
  };
  const workers = Array.from({ length: checked.jobs }, () =>
    work().catch((error) => {
      failure.abort(error);
      throw error;
    }),
  );
  await Promise.all(workers);
  const warnings = [...located.warnings, ...checkpoint.warnings];
  return { runtime: name, version: compiler.version, cache: compiler.folder, engines, warnings };
}

export interface RequiredEngine {
  readonly graph: string;
  readonly stepType: string | null;
  readonly profiles: readonly EngineProfile[];
}

export interface EngineNeeds {
  /** Default: the model's native size. */
  readonly sizes?: readonly Size[] | undefined;
  readonly batches: readonly number[];
  readonly guidance: Parameters<typeof guidanceModes>[0];
  /** Default: `cfg`. */
  readonly guidanceMode?: "cfg" | "cfg_zero" | undefined;
  /** Also steps with dynamic LoRAs of up to this rank. */
  readonly lorasRank?: LoraRank | undefined;
  /** Also steps with these ControlNets together, which the checkpoint has opened: their ids. */
  readonly controlIds?: readonly string[] | undefined;
  /** Also steps that leave out these blocks. */
  readonly skipLayers?: readonly number[] | undefined;
  readonly features?: readonly Feature[] | undefined;
  /** What was calibrated for the model; default: what lies with it. */
  readonly calibrated?: readonly CalibratedSchedule[] | undefined;
  /** Tokens of the T5 encoder; default: as for drawing. */
  readonly maxSequenceLength?: number | undefined;
}

/**
 * The engines that pictures of these sizes and batches need, each with one profile for each (batch, size) that is launched;
 * those that are named twice are one.
 * @throws OptionError for a size or length that the model does not take
 */
export function requiredEngines(graphs: GraphLibrary, needs: EngineNeeds): RequiredEngine[] {
  const { checkpoint } = graphs;
  const text = new PromptEncoder(graphs);
  const sequenceLength = needs.maxSequenceLength ?? text.defaultSequenceLength;
  checkSequenceLength(sequenceLength, text.maxSequenceLength);
  const sizes = distinct(needs.sizes ?? [nativeSize(checkpoint)]);
  checkSizes(checkpoint, sizes);
  const batches = [...new Set(needs.batches)].sort((a, b) => a - b);
  const features = new Set<string>(needs.features);
  const modes = guidanceModes(needs.guidance, areSomeMixed(needs.calibrated ?? checkpoint.schedules.calibrated));
  const { numLayers } = checkpoint.transformer.config;
  const { lorasRank, controlIds = [], skipLayers = [] } = needs;
  const layers = [...new Set(skipLayers)].sort((a, b) => a - b);
  const beyond = layers.find((layer) => layer >= numLayers);
  if (beyond !== undefined) throw noSuchLayer(beyond, numLayers, "skipLayers");
  // Steps outside of an interval have none of it, so that every combination occurs.
  const added: VariantValues = {
    ...(lorasRank && { lora: [undefined, lorasRank] }),
    ...(controlIds.length > 0 && { controls: [undefined, listed(controlIds)] }),
    ...(layers.length > 0 && { skipped: [undefined, listed(layers)] }),
  };
  for (const id of controlIds) checkControlSizes(checkpoint.controlNets.get(id)!, checkpoint, sizes);
  const encodesControls = ({ forControls }: Network) => forControls === true && controlIds.length > 0;
  /** Next to no adapter changes T5, the largest network: its engine is built by the first request that needs it. */
  const addedTo = ({ text }: Network): VariantValues =>
    text?.joins === "tokens" ? { ...added, lora: [undefined] } : added;
  const { factor } = checkpoint.vae.config;
  const encoders = new Map(textEncodersOf(checkpoint).map((encoder) => [encoder.name, encoder]));
  const [contextTokens] = text.shapes(sequenceLength).contextShape;

  /** Sizes of pictures that a network is launched for, and those that it starts from where it goes from one to another. */
  const sizesFor = (name: string, row: Network, graph: OnnxGraph): { size: Size; before: Size }[] => {
    const { features: by, role } = row;
    const named = by
      ? Object.entries(by).flatMap(([feature, { side }]) => {
          if (!features.has(feature)) return [];
          return side === undefined ? sizes : [{ width: side * factor, height: side * factor }];
        })
      : sizes;
    const fitting = distinct(encodesControls(row) ? [...named, ...sizes] : named).filter(
      (size) => role !== "step" || fitsPositions(checkpoint, name, size),
    );
    const risesIn = [...graph.inputs.values()].flat().includes("next_height");
    if (!risesIn) return fitting.map((size) => ({ size, before: size }));
    const pairs = fitting.flatMap((size) =>
      fitting.filter((small) => isBelow(small, size)).map((before) => ({ size, before })),
    );
    if (pairs.length === 0)
      throw new OptionError("sizes", "Stages run from a smaller size to a larger one; name both in sizes.");
    return pairs;
  };

  const profilesOf = (name: string, row: Network, graph: OnnxGraph): EngineProfile[] => {
    const encoder = encoders.get(name);
    const inputs = (rows: number, size: Size, before: Size): ProfileShapes => {
      const [, , height, width] = latentShapeOf(checkpoint, rows, before);
      const [, , nextHeight, nextWidth] = latentShapeOf(checkpoint, rows, size);
      const { patchSize } = checkpoint.transformer.config;
      const numbers = {
        ...{ rows, network_rows: 2 * rows, height, width, next_height: nextHeight, next_width: nextWidth },
        ...{ image_height: size.height, image_width: size.width, patches: (height / patchSize) * (width / patchSize) },
        tokens: encoder ? tokensOf(encoder, sequenceLength) : contextTokens,
      };
      return Object.fromEntries([...graph.inputs].map(([name, shape]) => [name, shapeWith(shape, numbers)]));
    };
    // Any number of texts can be encoded in rows of 1 where no profile has that number.
    if (encoder)
      return [...new Set([1, ...batches])].map((batch) => ({ batch, inputs: inputs(batch, sizes[0]!, sizes[0]!) }));
    return sizesFor(name, row, graph).flatMap(({ size, before }) => {
      const { width, height } = size;
      const rows = launchBatches(batches, row.maxRows?.(width, height) ?? Number.POSITIVE_INFINITY, null);
      return rows.map((batch) => ({ batch, width, height, inputs: inputs(batch, size, before) }));
    });
  };

  return networksOf(checkpoint)
    .filter(
      ({ row }) =>
        !row.features || encodesControls(row) || Object.keys(row.features).some((name) => features.has(name)),
    )
    .flatMap(({ name, row }) =>
      guidedKeysOf(name, modes, needs.guidanceMode, addedTo(row)).map((key): RequiredEngine => {
        const graph = graphs.get(graphName(key));
        return {
          graph: graph.name,
          stepType: row.role === "step" ? name : null,
          profiles: profilesOf(name, row, graph),
        };
      }),
    )
    .filter(({ profiles }) => profiles.length > 0);
}

/** Whether a stage of one size may come before a stage of another. */
function isBelow(small: Size, large: Size): boolean {
  return small !== large && small.width <= large.width && small.height <= large.height;
}

/** In their order, each once. */
function distinct(sizes: readonly Size[]): Size[] {
  return [...new Map(sizes.map((size) => [`${size.width}x${size.height}`, size])).values()];
}
