/** A loaded model: a checkpoint, the graphs emitted for it, a runtime that runs them, and a service that many callers share. */

import { createHash } from "node:crypto";
import type { EventEmitter } from "node:events";
import os from "node:os";
import path from "node:path";
import type * as z from "zod";
import {
  type Checkpoint,
  calibratedSchedulesOf,
  calibrationFile,
  calibrationPromptsOf,
  checkpointName,
  leftAsStored,
  openCheckpoint,
  quantisedT5,
} from "./checkpoint/index.js";
import { SharedTask } from "./common/abort.js";
import { Calls } from "./common/calls.js";
import { defaultCacheFolder, type FileVersion } from "./common/files.js";
import { Gate } from "./common/gate.js";
import { checkInstallation, packageFile, packagePath } from "./common/package.js";
import { seedToJson } from "./common/seed.js";
import { CheckpointError, DisposedError, DrainingError, OptionError, TimeoutError } from "./errors.js";
import { controlledStages } from "./generation/additions.js";
import { graphsAhead } from "./generation/ahead.js";
import { calibrate } from "./generation/calibrate.js";
import { calibrationPrompts } from "./generation/calibration-prompts.js";
import { readControl, type StageControl } from "./generation/control.js";
import { ControlNets, type KnownControlNets } from "./generation/control-nets.js";
import { defaultsOf } from "./generation/defaults.js";
import {
  additionsMemoryNeeded,
  checkDeviceMemory,
  checkPictureMemory,
  deviceMemoryNeeded,
} from "./generation/device-memory.js";
import { type Edit, readEdit } from "./generation/edit.js";
import { RequestEvents } from "./generation/events.js";
import { withInt8Weights } from "./generation/int8.js";
import { locateAll } from "./generation/locate.js";
import { dynamicLoras, LoraInputs } from "./generation/lora-inputs.js";
import { namedLoras, withMergedLoras } from "./generation/loras.js";
import { fitLatentColours, type LatentColours } from "./generation/preview.js";
import { encoderProgram } from "./generation/programs.js";
import { checkSequenceLength, settleTexts } from "./generation/prompts.js";
import { draw, type LoadedModel, withLoras } from "./generation/recipe.js";
import { type EditRequest, pinnedWithCapture, type Request, settleRequest } from "./generation/request.js";
import { blocksOf } from "./generation/result.js";
import { sharp } from "./generation/sharp.js";
import { checkSizes, fitsPositions, latentShapeOf, nativeSize } from "./generation/sizes.js";
import { canRun } from "./generation/stages.js";
import { generateStream } from "./generation/stream.js";
import { Templates, textDemands } from "./generation/templates.js";
import { PromptEncoder, promptOf, tokensOfPrompts, warningsOf } from "./generation/text.js";
import { type CallTrace, traced } from "./generation/traces.js";
import type {
  AdapterNames,
  CalibrateOptions,
  Calibration,
  Control,
  Costs,
  EncodeOptions,
  GenerateOptions,
  GenerateResult,
  GenerateStream,
  ImageModel,
  LoadOptions,
  LoadProgress,
  ModelDefaults,
  ProfileOptions,
  PromptEmbeds,
  Size,
} from "./model.js";
import { graphKey, graphName, networks } from "./networks/index.js";
import { GraphLibrary } from "./networks/library.js";
import type { OnnxGraph } from "./onnx/index.js";
import {
  calibrateSchema,
  checkOptions,
  encodeSchema,
  guidanceModes,
  loadSchema,
  profileSchema,
  type ResolvedEncodeOptions,
  type ResolvedLoadOptions,
} from "./options.js";
import type { Program } from "./program/program.js";
import {
  beginRuntime,
  checkInt8Weights,
  checkPlatform,
  openRuntimes,
  platformWarning,
  type RuntimeChoice,
} from "./runtimes/index.js";
import type { Device, OpenedRuntime, Runtime } from "./runtimes/runtime.js";
import { areSomeMixed, type Block, blocksForEach, parseBlocks, type ScheduleDefaults } from "./schedule/index.js";
import { type Health, HealthMonitor, type ModelEvents, slowText } from "./serving/health.js";
import type { Terms } from "./serving/prediction.js";
import { batchesUpTo, type FurtherDevice, Service, type ServiceOptions } from "./serving/service.js";
import type { Stats } from "./serving/stats.js";
import { CostStore, type CostSubject, costKey } from "./serving/store.js";

/** Folder of the model that comes with the package. */
export const embeddedModel = packagePath("models/shapes");

/**
 * As `FlowTurbo.load`, for a caller whose first request is known: the graphs that it launches are compiled while the rest is read.
 * What is wrong with it is said when it is drawn.
 */
export let loadFor: (folder: string | undefined, options: LoadOptions, first: GenerateOptions) => Promise<FlowTurbo>;

/** Nobody is told of a request of the model's own. */
const unwatched = { events: null, trace: null };

/** Pictures to edit that are decoded at a time: each may take some 300 MB. */
const decodedAtOnce = 2;

// Said when this is imported: a service learns of it before its first request.
const warning = platformWarning();
if (warning !== null) process.emitWarning(warning, { type: "FlowTurboWarning", code: "FLOWTURBO_PLATFORM" });

/**
 * A loaded model. Calls made at the same time are served side by side: their launches are shared where that pays, and each
 * is answered when it is done.
 */
export class FlowTurbo implements ImageModel {
  /** Name of the checkpoint's folder, of its file without ".safetensors", or of the repository whose snapshot it is; "shapes" for the embedded model. */
  readonly name: string;
  /** Folder of the checkpoint, or its file where it is one. */
  readonly folder: string;
  /** The runtime that the model runs on, and why those that would be preferred were passed over. */
  readonly runtime: RuntimeChoice;
  /** Size of a picture that the model was trained for, in pixels. */
  readonly nativeSize: { readonly width: number; readonly height: number };
  /** Whether schedules may have blocks that evaluate the velocity refiner (`R` and `C`). */
  readonly hasRefiner: boolean;
  /**
   * What is missing or there twice in the checkpoint's folder, and how it was read because of it: a single file beside newer
   * shards, files of T5 that were not downloaded; that the hub could not be asked, so that the copy in the cache was taken; that
   * T5 is stored in 8 bits already, so that `t5Weights: "int8"` has no effect; and with `weights: "int8"` the parts whose results are off by
   * more than 3 %, and those that have no layer in 8 bits.
   * `logger.warn` was told the same.
   */
  readonly warnings: readonly string[];
  /** What is drawn with where a request says nothing. */
  readonly defaults: ModelDefaults;
  /** What requests may name: the dynamic LoRAs of `LoadOptions.loras`, and the ControlNets of `LoadOptions.controlNets`. */
  readonly adapters: AdapterNames;

  readonly #model: LoadedModel;
  /** Those of the first device's form. */
  readonly #graphs: GraphLibrary;
  /** What it runs on: a runtime for each device. */
  readonly #runtimes: readonly OpenedDevice[];
  /** The devices that hold the weights, with the bytes that those of the networks that draw take; none on the CPU. */
  readonly #held: readonly { readonly graphs: GraphLibrary; readonly device: Device; readonly draw: number }[];
  readonly #service: Service;
  readonly #cache: string;
  readonly #decoding = new Gate({ capacity: decodedAtOnce });
  readonly #events: HealthMonitor["events"];
  readonly #calls = new Calls();
  /** Graphs with ControlNets that the runtime was told of. */
  readonly #controlled = new Set<string>();
  #colours: SharedTask<LatentColours> | null = null;
  #drained: Promise<void> | null = null;
  #disposed: Promise<void> | null = null;

  /**
   * Opens a checkpoint and starts a runtime for it: a folder in the diffusers layout, or one .safetensors file in Stability's and
   * ComfyUI's layout, whose missing parts are taken from `base`. Weights are not read: the runtime maps them. `base` and `previewVae` may be on the hub, too.
   * @param folder a folder, a file, or a model of the Hugging Face hub as `owner/name` or `owner/name@revision`, which is downloaded into the
   *   cache that Python's programs share; a path of that name comes first. Default: the embedded model
   * @throws HubError if it is to be downloaded and cannot be; CheckpointError if it is not a complete SD3 or SD3.5 checkpoint, OptionError for a wrong option,
   *   InstallationError if a package or file that it needs is missing or has no binaries for this platform, RuntimeUnavailableError if the runtime asked for cannot be used here, MemoryError if the model does not fit;
   *   `signal.reason` after an abort
   */
  static async load(folder: string = embeddedModel, options: LoadOptions = {}): Promise<FlowTurbo> {
    return FlowTurbo.#open(folder, options);
  }

  static {
    loadFor = (folder, options, first) => FlowTurbo.#open(folder, options, first);
  }

  static async #open(
    folder: string = embeddedModel,
    options: LoadOptions = {},
    first: GenerateOptions | null = null,
  ): Promise<FlowTurbo> {
    const start = performance.now();
    if (typeof folder !== "string")
      throw new OptionError(
        "folder",
        `Expected the path of a folder or file for folder but received ${typeof folder}.`,
      );
    const checked = checkOptions(loadSchema, options, "load()");
    if (checked.capture && (checked.pinBatch ?? 1) > 1) throw pinnedWithCapture();
    checked.signal?.throwIfAborted();
    checkInstallation();
    await checkPlatform(checked.runtime, checked);
    const endUnused = beginRuntime(checked.runtime);
    try {
      return await FlowTurbo.#load(folder, checked, first, start);
    } finally {
      endUnused();
    }
  }

  /** @param first the first request, if it is known: what it launches is compiled while the rest is read */
  static async #load(
    folder: string,
    checked: ResolvedLoadOptions,
    first: GenerateOptions | null,
    start: number,
  ): Promise<FlowTurbo> {
    const { variant, textEncoder3, signal, onProgress, logger = {} } = checked;
    const report = (phase: LoadProgress["phase"], done: number) => {
      signal?.throwIfAborted();
      onProgress?.({ phase, done, total: 3 });
    };

    // 1. The folder, which may have to be downloaded: configs, headers of the weights, tokenizers. What the pictures need at the end is loaded meanwhile.
    if (folder === embeddedModel) packageFile("models/shapes");
    const isInt8 = checked.weights === "int8";
    const isT5Int8 = checked.t5Weights === "int8";
    if (isInt8 || isT5Int8) checkInt8Weights(checked.runtime, isInt8 ? "weights" : "t5Weights");
    const located = await locateAll(folder, {
      ...checked,
      onDownload: (progress) => onProgress?.({ phase: "download", ...progress }),
    });
    const { base, previewVae } = located;
    report("checkpoint", 0);
    const opening = openCheckpoint(located.path, { variant, base, previewVae, textEncoder3, signal });
    const naming = namedLoras(checked.loras);
    const [asStored, loras] = await Promise.all([opening, naming, sharp.check()]);
    const cache = checked.cache ?? defaultCacheFolder();
    const files: FileVersion[] = [];
    const given = (checked.controlNets ?? []).map((net, index) => {
      return { given: net.folder, name: net.name, folder: located.controlNets[index]! };
    });
    const controlNets = await ControlNets.open(asStored, given, {
      ...{ variant, signal },
      onOpen: ({ weights }) => rememberFiles(files, weights.files),
    });
    const dynamic = await dynamicLoras(asStored, loras, signal);
    const merged = {
      ...(await withMergedLoras(asStored, loras, cache, { signal, logger })),
      controlNets: controlNets.byId,
    };
    // Examining takes minutes: what a LoRA has wrong is said before.
    if (isInt8) new LoraInputs(new GraphLibrary(merged), dynamic).check();
    // T5 is as its own option says, where that says anything.
    const { threads, watchdogMs } = checked;
    const int8Options = { textEncoder3: checked.t5Weights === undefined, threads, watchdogMs, signal, logger };
    const stored = isInt8 ? await withInt8Weights(merged, cache, int8Options) : merged;
    for (const [id, controlNet] of stored.controlNets) controlNets.byId.set(id, controlNet);
    const t5 = isT5Int8 ? stored.textEncoder3 : null;
    const quantised = t5 && (await quantisedT5(t5, cache, { signal, logger }));
    const left = t5 && !quantised ? [leftAsStored(t5)] : [];
    const warnings = [...located.warnings, ...stored.warnings, ...controlNets.warnings, ...left];
    for (const warning of warnings) logger.warn?.(warning);
    const checkpoint = {
      ...stored,
      ...{ controlNets: controlNets.byId, warnings },
      ...(quantised && { textEncoder3: quantised }),
    };
    const defaults = await defaultsOf(checkpoint, checked.distilled, logger);
    const ladder = ladderOf(asStored);
    const calibrated = await calibratedSchedulesOf(checkpoint, cache);

    // 2. The graphs by name; 3. a runtime.
    report("graphs", 1);
    const emitted = new GraphLibrary(checkpoint);
    new LoraInputs(emitted, dynamic).check();
    report("runtime", 2);
    rememberFiles(files, emitted.files);
    const weights = { files, bytesOf16Bit: () => emitted.bytesOf16Bit };
    // Weights that lack or have another shape are named now.
    for (const id of controlNets.byId.keys()) emitted.get(graphName({ network: "predict", controls: id }));
    const monitor = new HealthMonitor();
    monitor.events.on("slow", (launch) => logger.warn?.(slowText(launch)));
    const int8Option = isInt8 ? ("weights" as const) : quantised ? ("t5Weights" as const) : undefined;
    const settings = { ...checked, int8Option, listener: monitor };
    /** Graphs in the form of each runtime: the same for all devices of a kind. */
    const forms = new Map<string, GraphLibrary>();
    const graphsOf = ({ runtime, settings, emitOptions }: OpenedRuntime) => {
      const form = JSON.stringify([runtime.name, settings]);
      const known = forms.get(form) ?? emitted.emittedAs(emitOptions);
      forms.set(form, known);
      return known;
    };
    const listeners = new Map<number, ReturnType<HealthMonitor["listenerOf"]>>();
    const { opened, choice } = await openRuntimes(checked.runtime, settings, weights, {
      devices: checked.devices,
      check: (each) => {
        if (each.device) checkDeviceMemory(graphsOf(each), each.device);
      },
      listenerOf: (device) => {
        const listener = monitor.listenerOf(device);
        listeners.set(device.number, listener);
        return listener;
      },
    });
    if (choice.devices) monitor.follow(choice.devices.map(({ number }) => listeners.get(number)!));
    for (const { number, name, reason } of choice.leftOut ?? [])
      logger.warn?.(`The device ${number} (${name}) is left out: ${reason}`);
    const graphs = graphsOf(opened[0]!);
    const { runtime } = opened[0]!;
    try {
      const loras = new LoraInputs(graphs, dynamic);
      const text = new PromptEncoder(graphs, loras);
      const facts = {
        ...{ ladder, defaults, calibrated, text, logger, loras, controlNets },
        templates: new Templates(checkpoint, text),
        ...{ keepTextEncoders: checked.keepTextEncoders, pinBatch: checked.pinBatch ?? null },
        allowPaths: checked.allowPaths,
        ...{ captured: checked.capture && runtime.capabilities.capture, cache },
      };
      const changed = first ? prepareFor(first, { ...facts, checkpoint, runtime }, graphs) : {};
      // Emitting them in the runtime's form checks every weight's name, type and shape.
      const devices = opened.map((each) => {
        const graphs = graphsOf(each);
        const subject = costSubject(graphs, each.runtime, { ...each.settings, ...changed });
        const store = new CostStore(costKey(subject), checked.cache);
        const about = { folder: checkpoint.folder, runtime: subject.runtime, machine: subject.machine };
        return { ...each, graphs, store, about };
      });
      // Those of the package, for checkpoints in one file, are read only now that all weights are known to be right.
      for (const tokenizer of [checkpoint.tokenizer, checkpoint.tokenizer2, checkpoint.tokenizer3])
        await tokenizer?.encode("", tokenizer.maxLength);
      report("runtime", 3);

      // 4. What launches cost, if it has been measured before.
      const known = await Promise.all(devices.map(({ store }) => store.read()));
      return new FlowTurbo(
        devices.map((device, index) => ({ ...device, known: known[index]! })),
        choice,
        {
          ...facts,
          loadMilliseconds: performance.now() - start,
        },
        {
          ...{ monitor, maxWaitMs: checked.maxWaitMs, maxQueue: checked.maxQueue },
          ...{ watchdogMs: checked.watchdogMs, devices: choice.devices },
          batches: checked.batches ?? batchesUpTo(checked.maxBatch),
          // No engine is built only to be measured; batches that were named have one.
          background: checked.measureCosts && (runtime.capabilities.anyShape || checked.batches !== undefined),
        },
      );
    } catch (error) {
      await Promise.all(opened.map((each) => each.runtime.dispose()));
      throw error;
    }
  }

  private constructor(
    runtimes: readonly OpenedDevice[],
    choice: RuntimeChoice,
    {
      cache,
      ...model
    }: Omit<LoadedModel, "name" | "checkpoint" | "runtime" | "colours" | "unload"> & {
      readonly defaults: ScheduleDefaults;
      readonly cache: string;
    },
    serving: Omit<ServiceOptions, "graph" | "onError" | "captured" | "store" | "about"> & {
      readonly monitor: HealthMonitor;
    },
  ) {
    const [first, ...others] = runtimes as [OpenedDevice, ...OpenedDevice[]];
    const { runtime, graphs, known, store, about } = first;
    const { checkpoint } = graphs;
    this.name = checkpointName(checkpoint.folder);
    this.folder = checkpoint.folder;
    this.runtime = choice;
    this.hasRefiner = checkpoint.refiner !== null;
    this.warnings = checkpoint.warnings;
    this.nativeSize = nativeSize(checkpoint);
    this.adapters = { loras: model.loras.names, controlNets: model.controlNets?.names ?? [] };
    const { distilled, sampler, steps, guidanceScale } = model.defaults;
    this.defaults = { distilled, sampler, steps, guidanceScale };
    this.#graphs = graphs;
    this.#cache = cache;
    this.#runtimes = runtimes;
    this.#held = runtimes.flatMap(({ device, graphs }) =>
      device ? [{ graphs, device, draw: deviceMemoryNeeded(graphs, device.widening).draw }] : [],
    );
    this.#model = {
      ...{ ...model, name: this.name, checkpoint, runtime },
      colours: (signal) => this.#latentColours(signal),
      unload: async (names) => {
        this.#service.forget(names);
        await Promise.all(runtimes.map(({ runtime }) => runtime.unload?.(names)));
      },
    };
    if (model.controlNets)
      model.controlNets.onDrop = (id) => {
        // What cannot be freed now is freed with the runtime.
        if (!this.#disposed) this.#calls.track(() => this.#freeControlNet(id)).catch(() => undefined);
      };
    this.#events = serving.monitor.events;
    const options = {
      ...{ ...serving, store, about, captured: model.captured, graph: (name: string) => this.#graph(name) },
      onError: (error: unknown) =>
        model.logger.debug?.(`The table of costs could not be kept up: ${(error as Error).message}`),
    };
    this.#service = new Service(runtime, known, options, others);
  }

  /**
   * Draws `count` pictures for each prompt, split over launches as costs least.
   * @throws OptionError before any work if an option is wrong or does not fit the model; MemoryError before any work if the
   *   GPU cannot hold what a picture takes, and later if its memory ran out at a launch; DeviceLostError if the GPU was lost; DeadlineError before any work if
   *   no schedule is done within `deadlineMs`; QueueFullError if too many requests wait; NotFiniteError naming the step
   *   if the network's values overflow; RuntimeDiedError if the runtime's process ended while it worked on this call;
   *   TimeoutError after `timeoutMs`; DisposedError; DrainingError after `drain`; `signal.reason` after an abort
   */
  async generate(options: GenerateOptions): Promise<GenerateResult> {
    const about = { model: this.name, runtime: this.runtime.name };
    return traced(about, options, (trace) => this.#generate(options, trace));
  }

  async #generate(options: GenerateOptions, trace: CallTrace | null): Promise<GenerateResult> {
    const start = performance.now();
    this.#checkOpen();
    // Until the work is a call of its own.
    const leave = options?.controls ? this.#calls.enter() : () => {};
    try {
      const controlNets = options?.controls && (await this.#openControlNets(options));
      return await this.#begin(options, trace, start, controlNets || this.#model.controlNets, leave);
    } finally {
      leave();
    }
  }

  /**
   * @param controlNets that the request may name
   * @param begun called when `dispose` waits for the request's work
   */
  async #begin(
    options: GenerateOptions,
    trace: CallTrace | null,
    start: number,
    controlNets: KnownControlNets | undefined,
    begun: () => void,
  ): Promise<GenerateResult> {
    const request = settleRequest(options, this.#model, controlNets);
    trace?.settled(request);
    request.signal?.throwIfAborted();
    this.#checkMemory(request);
    const { timeoutMs } = request;
    const events = new RequestEvents(request);
    const timer =
      timeoutMs === undefined ? undefined : setTimeout(() => events.abort(new TimeoutError(timeoutMs)), timeoutMs);
    try {
      // dispose() waits for the work, and not for handlers: one of them may be waiting for dispose().
      const work = this.#calls.track(() =>
        this.#serve({ ...request, signal: events.signal }, start, { events, trace }),
      );
      begun();
      return await events.around(work);
    } finally {
      clearTimeout(timer);
    }
  }

  /** As `generate`, to be iterated over: see `ImageModel.generateStream`. */
  generateStream(options: GenerateOptions): GenerateStream {
    return generateStream((each) => this.generate(each), options);
  }

  /**
   * What the text encoders make of prompts: see `ImageModel.encode`.
   * @throws OptionError before any work if an option is wrong or does not fit the model; QueueFullError if too many requests wait;
   *   NotFiniteError if an encoder's values overflow; RuntimeDiedError if the runtime's process ended while it worked on this call;
   *   DisposedError; DrainingError after `drain`; `signal.reason` after an abort
   */
  async encode(options: EncodeOptions): Promise<PromptEmbeds> {
    const start = performance.now();
    this.#checkOpen();
    const checked = checkOptions(encodeSchema, options, "encode()");
    checked.signal?.throwIfAborted();
    return this.#calls.track(() => this.#encode(checked, start));
  }

  /** Counters and histograms of all calls. */
  stats(): Stats {
    return this.#service.stats();
  }

  /** Whether calls are answered, and what is wrong if something is: for the probes of an orchestrator. */
  health(): Health {
    return this.#service.health(this.#disposed ? "disposed" : this.#drained ? "draining" : null);
  }

  /** Listens to what befalls the runtime: see `ImageModel.on`. */
  on<Name extends keyof ModelEvents>(name: Name, listener: (...event: ModelEvents[Name]) => void): this {
    (this.#events as EventEmitter).on(name, listener);
    return this;
  }

  /** Undoes one `on` with the same name and listener. */
  off<Name extends keyof ModelEvents>(name: Name, listener: (...event: ModelEvents[Name]) => void): this {
    (this.#events as EventEmitter).off(name, listener);
    return this;
  }

  /** What launches cost on this machine, measured by `profile()`, in the background, or while drawing. */
  get costs(): Costs {
    const tables = this.#service.tables.map((costs, index) => ({
      entries: costs.entries,
      folder: this.#runtimes[index]!.store.folder,
      drift: costs.drift,
      estimate: (graph: string, size: string, batch: number) => costs.estimate(graph, size, batch),
    }));
    const devices = this.runtime.devices?.map((device, index) => ({ ...device, ...tables[index]! }));
    return { ...tables[0]!, ...(devices && { devices }), reset: () => this.#service.reset() };
  }

  /**
   * Measures what every launch of a picture costs, at each size and batch, and keeps the table for later loads.
   * @throws OptionError for a size that the model does not draw; DisposedError; DrainingError after `drain`; `signal.reason` after an abort
   */
  async profile(options: ProfileOptions = {}): Promise<Costs> {
    this.#checkOpen();
    const checked = checkOptions(profileSchema, options, "profile()");
    const sizes = checked.sizes ?? [this.nativeSize];
    checkSizes(this.#model.checkpoint, sizes);
    return this.#calls.track(() => this.#measure(sizes, checked));
  }

  /**
   * Finds schedules of few steps for this model, and keeps them in a file that later loads read: see `CalibrateOptions`. It takes the
   * runtime beside what else is drawn, for some hundred evaluations of each picture and schedule; `dispose` waits for it, unless
   * `signal` ends it.
   * @throws OptionError for an option that is wrong or a size that the model does not draw; OutputError if the file cannot be written;
   *   DisposedError; DrainingError after `drain`; `signal.reason` after an abort
   */
  async calibrate(options: CalibrateOptions = {}): Promise<Calibration> {
    this.#checkOpen();
    const checked = checkOptions(calibrateSchema, options, "calibrate()");
    if (this.defaults.distilled)
      throw new OptionError(
        "distilled",
        "The model was distilled: its pictures of many steps, which calibrating comes near to, are not those that it was made for. Load it with distilled: false to calibrate it all the same.",
      );
    const { checkpoint, text, runtime, keepTextEncoders, unload } = this.#model;
    const sizes = checked.sizes ?? [this.nativeSize];
    checkSizes(checkpoint, sizes);
    const sequenceLength = checked.maxSequenceLength ?? text.defaultSequenceLength;
    checkSequenceLength(sequenceLength, text.maxSequenceLength);
    const { pictures, signal, onProgress, reset, intervals } = checked;
    const seed = seedToJson(checked.seed);
    for (const { graphs, device, draw } of this.#held)
      for (const size of sizes) {
        const latentShape = latentShapeOf(checkpoint, 1, size);
        checkPictureMemory(graphs, device, draw, { ...size, latentShape, sequenceLength, rows: 2 });
      }
    return this.#calls.track(async () => {
      const file = checked.file ?? (await calibrationFile(checkpoint, this.#cache));
      const schedules = await calibrate(
        {
          ...{ checkpoint, text, file, cache: path.join(this.#cache, "calibration") },
          run: (program) => this.#run(program, signal ?? new AbortController().signal),
          encoded: async () => {
            if (!keepTextEncoders) await unload(text.graphs);
          },
        },
        {
          ...{ sizes, pictures, seed, signal, onProgress, reset, intervals, sequenceLength },
          named: [
            ...(["pictures", "seed"] as const).filter((name) => options[name] !== undefined),
            ...(options.prompts || options.maxSequenceLength ? (["prompts"] as const) : []),
          ],
          guidanceScales: [...new Set(checked.guidanceScales)],
          steps: [...new Set(checked.steps)].sort((a, b) => a - b),
          prompts: checked.prompts ?? (await calibrationPromptsOf(checkpoint.folder)) ?? calibrationPrompts,
          batch: checked.batch ?? (runtime.capabilities.anyShape ? 8 : 1),
        },
      );
      return { file, schedules };
    });
  }

  /**
   * Takes no new calls from now on: they reject with a DrainingError, and `health().ready` is false.
   * @returns a promise, the same for every call, that resolves when the work of calls under way is done (not handlers of their events)
   */
  drain(): Promise<void> {
    this.#drained ??= this.#calls.idle();
    return this.#drained;
  }

  /** Waits for the work of calls under way (not for handlers of their events), then frees everything. Safe to call twice. */
  dispose(): Promise<void> {
    this.#disposed ??= (async () => {
      await this.#calls.idle();
      await this.#service.close();
      await Promise.all(this.#runtimes.map(({ runtime }) => runtime.dispose()));
    })();
    return this.#disposed;
  }

  /** As `dispose`, for `await using`. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }

  /** @throws DisposedError or DrainingError where no calls are taken any more */
  #checkOpen(): void {
    if (this.#disposed) throw new DisposedError("This model");
    if (this.#drained) throw new DrainingError("This model");
  }

  /** @throws MemoryError if some device cannot hold what one picture takes: each picture may come to any of them */
  #checkMemory({ candidates, guidance, additions, sequenceLength }: Request): void {
    const { stages } = candidates[0];
    const rows = additions.skipLayers ? 3 : guidance.isOn ? 2 : 1;
    for (const { graphs, device, draw } of this.#held) {
      const added = additionsMemoryNeeded(graphs, device.widening, additions, guidance.mode, stages);
      for (const stage of stages) {
        const drawn = { ...stage, sequenceLength, rows, lora: additions.lora };
        checkPictureMemory(graphs, device, draw, drawn, added);
      }
    }
  }

  /**
   * Opens the ControlNets that a request names by their folders; what else is wrong with it is said later.
   * @throws CheckpointError for a folder that is none, or whose ControlNet does not fit the model
   */
  async #openControlNets(options: GenerateOptions): Promise<KnownControlNets | undefined> {
    const { controls, allowPaths = true, signal } = options;
    const { controlNets, allowPaths: isAllowed } = this.#model;
    // The number of them is checked with the other options.
    if (!Array.isArray(controls) || controls.length > 64 || !allowPaths || !isAllowed) return controlNets;
    const folders = controls.map((control: Partial<Control> | null | undefined) => control?.folder);
    return controlNets?.prepare(folders, signal instanceof AbortSignal ? signal : undefined);
  }

  async #encode({ signal, ...options }: ResolvedEncodeOptions, start: number): Promise<PromptEmbeds> {
    const { text, loras, pinBatch, keepTextEncoders, unload, logger } = this.#model;
    const uses = loras.settle(options.loras);
    const texts = settleTexts(options, text, uses);
    const reading = loras.reading(uses);
    const rows = texts.prompts.length;
    const prepared = await text.prepare(
      [...texts.prompts, ...texts.negativePrompts],
      texts.sequenceLength,
      pinBatch,
      signal,
    );
    // Texts wait their turn as pictures do, of a size that no picture has. What is cached need not wait.
    const terms: Terms = {
      ...{ priority: 0, prefer: "admission", arrival: start, deadlineMs: null, pictures: rows, size: "text" },
      ...{ pin: pinBatch, signal },
    };
    const encoded = await text.encode(prepared, async (programs) => {
      const admitted = await this.#service.admit(terms, [{ text: "", demands: textDemands(programs) }]);
      const results = await admitted.complete(admitted.run({ rows: programs.map(({ program }) => program) }));
      if (!keepTextEncoders) await unload(text.graphs);
      return results;
    });
    const [positive, negative] = [text.stack(encoded.slice(0, rows)), text.stack(encoded.slice(rows))];
    const warnings = [...warningsOf(encoded), ...texts.warnings];
    for (const warning of warnings) logger.warn?.(warning);
    return {
      ...{ promptEmbeds: positive.context, pooledPromptEmbeds: positive.pooled },
      ...{ negativePromptEmbeds: negative.context, negativePooledPromptEmbeds: negative.pooled },
      ...(reading.length > 0 && { loras: reading }),
      ...{ tokens: tokensOfPrompts(encoded.slice(0, rows)), warnings },
    };
  }

  /** @param watchers who is told how it goes; none for a request of the model's own */
  async #serve(
    request: Request,
    start: number,
    { events, trace }: { readonly events: RequestEvents | null; readonly trace: CallTrace | null },
  ): Promise<GenerateResult> {
    const { candidates, pinBatch, signal, priority, prefer, ticket, pictures, deadlineMs = null } = request;
    const { stages } = candidates[0];
    const { width, height } = stages.at(-1)!;
    const terms: Terms = {
      ...{ priority, prefer, ticket, arrival: start, deadlineMs, pictures, size: `${width}x${height}` },
      ...{ pin: pinBatch, signal },
    };
    if (request.edit || request.controls.length > 0) this.#service.refuseEarly(terms);
    const edit = request.edit && (await this.#readEdit(request.edit, stages, signal));
    const controls = await this.#readControls(request, edit);
    const { text, templates } = this.#model;
    const texts = request.texts ? [...request.texts.prompts, ...request.texts.negativePrompts] : [];
    const prompts = await text.prepare(texts, request.sequenceLength, pinBatch, signal);
    const prepared = candidates.map((candidate) => templates.prepare(request, candidate, prompts, edit, controls));
    const admitting = this.#service.admit(terms, prepared, ({ candidate, predictedMs, place, aloneMs, leastMs }) => {
      trace?.accepted(prepared[candidate]!, { place, predictedMs });
      const blocks = blocksOf(prepared[candidate]!.stages);
      events?.send("onAccept", { predictedMs, place, blocks, seeds: request.seeds, aloneMs, leastMs });
    });
    const admitted = await admitting.catch((error) => {
      trace?.left(error);
      throw error;
    });
    const candidate = prepared[admitted.candidate]!;
    const { queuedMs } = admitted;
    trace?.started(candidate, queuedMs);
    events?.send("onStart", { queuedMs, blocks: blocksOf(candidate.stages) });
    const observed = trace?.observed(admitted) ?? admitted;
    const drawing = draw(this.#model, request, candidate, observed, events, start).catch((error: unknown) => {
      throw withLoras(error, request.loras);
    });
    return admitted.complete(drawing);
  }

  /** Decoded pictures are large: few at a time, whatever number of requests bring some. */
  async #readEdit(edit: EditRequest, stages: readonly Size[], signal: AbortSignal | undefined): Promise<Edit> {
    const leave = await this.#decoding.enter(undefined, 1, signal);
    try {
      return await readEdit(edit, stages, this.#model.checkpoint.vae.config.factor);
    } finally {
      leave();
      signal?.throwIfAborted();
    }
  }

  /** For each control its picture at the sizes of the stages that need it. */
  async #readControls(
    { controls, candidates, signal }: Request,
    edit: Edit | null,
  ): Promise<readonly (readonly (StageControl | null)[])[]> {
    const { factor } = this.#model.checkpoint.vae.config;
    const read: (readonly (StageControl | null)[])[] = [];
    for (const control of controls) {
      const needed = candidates.map(({ stages }) => controlledStages(control, stages));
      const sizes = candidates[0].stages.map((size, index) => (needed.some((each) => each[index]) ? size : null));
      const leave = await this.#decoding.enter(undefined, 1, signal);
      try {
        read.push(await readControl(control, sizes, factor, edit?.at(-1)?.crop));
      } finally {
        leave();
        signal?.throwIfAborted();
      }
    }
    return read;
  }

  async #measure(sizes: readonly Size[], options: z.output<typeof profileSchema>): Promise<Costs> {
    const { signal, onProgress, rounds, batches, maxSequenceLength, guidanceMode } = options;
    const { guidance: asked = this.defaults.distilled ? "off" : "on" } = options;
    const requests = sizes.flatMap((size) =>
      guidanceModes(asked, areSomeMixed(this.#model.calibrated)).map((guidance): GenerateOptions => {
        const { checkpoint } = this.#model;
        // H leaves the two velocities that S extrapolates: its launch is what every method with a memory has.
        const every = `H1S1${blocksForEach((type) => fitsPositions(checkpoint, type, size))}`;
        // CFG-Zero* leaves the first block out.
        const blocks = guidance && guidanceMode === "cfg_zero" ? `E1${every}` : every;
        const guided = { guidanceScale: guidance ? 2 : 1, guidanceMode };
        return { prompt: "", seed: 0, ...guided, maxSequenceLength, signal, ...size, blocks };
      }),
    );
    const { text, templates } = this.#model;
    const programs: Program[] = [];
    for (const request of [...requests, ...requests.flatMap((each) => this.#withAdditions(each, options))]) {
      const settled = settleRequest(request, this.#model);
      const { stages } = settled.candidates[0];
      programs.push(
        ...(await text.programs({ ...promptOf(""), loras: settled.loras }, settled.sequenceLength)),
        templates.sampling(settled, stages, null).program,
        encoderProgram("slot", stages[0]!.latentShape, this.#model.checkpoint.vae.config.factor),
      );
    }
    const report = (done: number, total: number) => onProgress?.({ done, total });
    if (options.reset) await this.#service.reset();
    await this.#service.measure(programs, [...new Set(batches)], { rounds, signal, onProgress: report });
    // What is not in launches is known by drawing: first warm, then at the least and the greatest batch.
    for (const request of requests.filter(({ guidanceScale }) => guidanceScale === requests[0]!.guidanceScale))
      for (const count of new Set([1, Math.min(...batches), Math.max(...batches)]))
        for (let round = 0; round < 5; round++)
          await this.#serve(settleRequest({ ...request, count }, this.#model), performance.now(), unwatched);
    await this.#service.store();
    return this.costs;
  }

  /** A request to be measured with what `profile` names besides: one that is not drawn, or none where there is nothing. */
  #withAdditions(
    request: GenerateOptions,
    { loras, controls, skipLayers }: z.output<typeof profileSchema>,
  ): GenerateOptions[] {
    const { guidanceScale } = request;
    const skipped = guidanceScale === 1 ? undefined : skipLayers;
    if (!loras && !controls && !skipped) return [];
    // Nothing reads it: programs are measured with values of their own.
    const image = new Uint8Array(1);
    return [
      {
        ...request,
        // The first step leaves no blocks out.
        blocks: "E3",
        loras: loras?.map((name) => ({ name, scale: 1 })),
        controls: controls?.map((folder) => {
          const known = this.#model.controlNets?.get(folder, false);
          return { folder, image, ...(known?.controlNet.config.takesMask && { mask: image }) };
        }),
        skipLayers: skipped && { layers: [...skipped], start: 0, stop: 1 },
      },
    ];
  }

  /** The preview's map. Its fit belongs to all callers that wait for it, and goes on while one of them does. */
  async #latentColours(signal: AbortSignal | undefined): Promise<LatentColours> {
    signal?.throwIfAborted();
    if (!this.#colours || this.#colours.abandoned) {
      const { config } = this.#model.checkpoint.vae;
      const task = new SharedTask((own) =>
        fitLatentColours(config, (program) => this.#run(program, own)).catch((error) => {
          // The next call tries again.
          if (this.#colours === task) this.#colours = null;
          throw error;
        }),
      );
      this.#colours = task;
    }
    return this.#colours.join(signal);
  }

  /** A graph, which the runtimes are told of when it is first needed; that of the first device. */
  #graph(name: string): OnnxGraph {
    for (const { runtime, graphs } of this.#runtimes) {
      if (runtime.has(name)) continue;
      runtime.add(graphs.get(name));
      if (graphKey(name).controls !== undefined) this.#controlled.add(name);
    }
    return this.#graphs.get(name);
  }

  /** Frees what the graphs of a ControlNet take, until their next launch. */
  async #freeControlNet(id: string): Promise<void> {
    const names = [...this.#controlled].filter((name) => graphKey(name).controls!.split("+").includes(id));
    if (names.length > 0) await this.#model.unload(names);
  }

  /** Runs a program of its own, beside the requests, on the first device that there is. */
  #run(program: Program, signal: AbortSignal) {
    for (const instruction of program.instructions) if (instruction.op === "launch") this.#graph(instruction.graph);
    const { runtime } = this.#runtimes[this.#service.there[0]!]!;
    return runtime.run(program, { signal });
  }
}

/** A runtime that was opened on a device, with the graphs in its form and what launches have cost there. */
interface OpenedDevice extends OpenedRuntime, FurtherDevice {
  readonly graphs: GraphLibrary;
}

/**
 * What the costs of a model's launches depend on: whatever shares all of it shares a table. Graphs count by their
 * fingerprints, as engines are keyed: fine-tunes of one model cost the same.
 */
function costSubject(graphs: GraphLibrary, runtime: Runtime, settings: OpenedRuntime["settings"]): CostSubject {
  const model = createHash("sha256");
  for (const { graph } of graphs.essential) model.update(graph.fingerprint);
  const { previewVae, joiningVae } = graphs.checkpoint;
  if (previewVae) model.update(graphs.get(joiningVae ? "preview_upscale" : "preview_decoder").fingerprint);
  return {
    model: model.digest("hex"),
    runtime: { name: runtime.name, ...settings },
    machine: { cpu: os.cpus()[0]?.model ?? "unknown", cores: os.availableParallelism(), arch: process.arch },
  };
}

/**
 * Has the graphs of a request compiled. What is wrong with the request is said where it is drawn.
 * @returns what the runtime's settings have in addition from then on
 */
function prepareFor(
  options: GenerateOptions,
  model: Omit<LoadedModel, "name" | "colours" | "unload" | "loadMilliseconds">,
  graphs: GraphLibrary,
): OpenedRuntime["settings"] {
  const { runtime } = model;
  let changed: OpenedRuntime["settings"] = {};
  let names: readonly string[];
  try {
    const request = settleRequest(options, model);
    const [{ stages }, ...others] = request.candidates;
    // A time limit is kept by what launches are known to cost, with the settings as they are.
    if (others.length === 0) {
      const evaluations = stages.reduce((sum, { schedule }) => sum + schedule.evaluations.predictor, 0);
      // The forms of its graphs follow from that alone.
      if (runtime.expect?.((name) => (isOfSteps(name) ? evaluations : 1))) changed = { evaluations };
    }
    names = graphsAhead(request, model);
  } catch {
    return changed;
  }
  for (const name of names) {
    // The next one is emitted while this one is compiled.
    if (!runtime.has(name)) runtime.add(graphs.get(name));
    runtime.prepare?.([name]);
  }
  return changed;
}

/** Whether a picture launches a graph again and again, as against once for its texts or its end. */
function isOfSteps(name: string): boolean {
  const { role } = networks[graphKey(name).network]!;
  return role === "step" || role === "edit";
}

/** Adds the versions of files, in place of those of the same files before. */
function rememberFiles(files: FileVersion[], versions: readonly FileVersion[]): void {
  for (const version of versions) {
    const at = files.findIndex(({ file }) => file === version.file);
    if (at < 0) files.push(version);
    else files[at] = version;
  }
}

/**
 * The checkpoint's own ladder, as far as it can be run; null without one.
 * @throws CheckpointError for an entry that is no schedule
 */
function ladderOf(checkpoint: Checkpoint): readonly (readonly Block[])[] | null {
  const {
    schedulesFile,
    schedules: { ladder },
  } = checkpoint;
  const own = (ladder ?? []).map((text) => {
    try {
      return parseBlocks(text);
    } catch (cause) {
      const file = schedulesFile!;
      const reason = (cause as Error).message;
      throw new CheckpointError(
        file,
        `${file}: ${reason} Correct it, or remove the file: the usual schedules are then taken.`,
        { cause },
      );
    }
  });
  const usable = own.filter((blocks) => canRun(checkpoint, blocks));
  return usable.length > 0 ? usable : null;
}
