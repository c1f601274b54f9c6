/**
 * What a runtime is: something that compiles graphs and runs programs; and what a row in the table of runtimes says of
 * one. The rest of the package uses these interfaces only, so that ONNX Runtime on the CPU and TensorRT on a GPU receive
 * the same graphs and the same programs.
 */

import type { FileVersion } from "../common/files.js";
import type { Logger } from "../common/logger.js";
import type { Tensor } from "../common/tensor.js";
import { type InstallationError, RuntimeDiedError } from "../errors.js";
import type { EmitOptions, EmittedNetwork, OnnxGraph } from "../onnx/index.js";
import type { Launch, Program } from "../program/program.js";
import type { BuilderRow } from "./builder.js";

/** What a runtime can do: callers ask for this, and never for a name. */
export interface Capabilities {
  /**
   * Whether a submission can be preempted, that is, ended before its next launch, so that one submission may hold all of
   * a lone request. Worth having where JavaScript between two submissions takes time from the graphs, as on a CPU.
   */
  readonly preemption: boolean;
  /** Whether a program can be captured, and replayed as one CUDA graph. */
  readonly capture: boolean;
  /** Whether a graph runs at any batch and size. Otherwise each has to be built first, which takes minutes. */
  readonly anyShape: boolean;
}

/**
 * An ONNX model whose large initializers are external data in the checkpoint's own files. The location of each is its
 * path relative to the root of the file system; `externals` has them by the name that they have in the ONNX, for runtimes
 * that map the files themselves, and `fingerprint` is for runtimes that keep what they compile.
 */
export type CompilableGraph = Pick<OnnxGraph, "name" | "bytes" | "externals" | "fingerprint"> &
  Partial<Pick<OnnxGraph, "widened">>;

/** One finished launch. */
export interface LaunchReport {
  readonly launch: Launch;
  readonly index: number;
  readonly milliseconds: number;
  /** Values of the registers that the launch names in `reported`. */
  readonly values: Readonly<Record<string, Tensor>>;
}

export interface RunOptions {
  /** Aborting stops the program before its next launch; the run rejects with `signal.reason`. */
  readonly signal?: AbortSignal | undefined;
  /** Called when the runtime begins with the program, once those before have ended. */
  readonly onBegin?: (() => void) | undefined;
  /**
   * Called now and then with the index of the launch that runs, by a runtime that is asked for it: reports may come bunched.
   */
  readonly onProgress?: ((index: number) => void) | undefined;
  /** Called after each launch, in order. An error it throws stops the program and rejects the run. */
  readonly onLaunch?: ((report: LaunchReport) => void) | undefined;
  /**
   * Whether reports are wanted as soon as each launch is done, or may come several at a time, where that costs less.
   * Default: bunched.
   */
  readonly reports?: "each" | "bunched" | undefined;
  /** Whether the process may end while this runs: for work that nobody waits for. */
  readonly background?: boolean | undefined;
}

export interface SubmissionOptions extends RunOptions {
  /**
   * When it aborts, a runtime with the capability `preemption` ends the submission before its next launch: what it
   * uploads is there, the launches made so far have been reported, and `submit` rejects with a Preempted.
   */
  readonly preempt?: AbortSignal | undefined;
}

/** A submission was preempted: no failure, the rest of it may be submitted again. */
export class Preempted extends Error {
  /** How many of the submission's launches were made; fewer than it has. */
  readonly launches: number;
  /** Those of its results that had been written, by this submission or before. */
  readonly results: Readonly<Record<string, Tensor>>;
  constructor(launches: number, results: Readonly<Record<string, Tensor>>) {
    super(`The submission was preempted after ${launches} of its launches.`);
    this.name = "Preempted";
    this.launches = launches;
    this.results = results;
  }
}

/**
 * Whether an error says that a runtime's process was killed through no fault of the work that failed with it: that work
 * may simply be done again. A process that ends by itself before it works would do so again.
 */
export function isBlameless(error: unknown): boolean {
  return error instanceof RuntimeDiedError && error.signal !== null && !error.duringWork;
}

/**
 * Registers that outlive programs, so that a scheduler can submit a run part by part, ahead of the device, and gather
 * rows of several runs into one launch. A submission is a program whose instructions may also read what earlier ones have
 * written or uploaded; everything stays until it is freed by name.
 */
export interface Workspace {
  /** Whether its registers are gone: later submissions would be refused. Start again in a new one. */
  readonly lost: boolean;
  /**
   * Runs a program after all that were submitted before, without waiting for them here. Where one fails or is
   * aborted, the registers that it would have written hold no value or an older one.
   * @throws Preempted
   */
  submit(program: Program, options?: SubmissionOptions): Promise<Record<string, Tensor>>;
  /** Frees registers and constants when what was submitted before has run. Unknown names are ignored. */
  free(names: readonly string[]): void;
  /** Frees everything. */
  close(): void;
}

/** What befalls a runtime, told as it happens. */
export interface RuntimeListener {
  /** What it ran on (a process, a device) is gone, with the work that was there; for good if it is a DeviceLostError that is permanent. */
  lost(error: Error): void;
  /** It runs again after a loss. */
  restarted(): void;
  /** It owes an answer and has given no sign of life for so many milliseconds; null when it does again. */
  silent(milliseconds: number | null): void;
}

export interface Runtime {
  /** As in the table of runtimes. */
  readonly name: string;
  readonly capabilities: Capabilities;
  /** Names a graph so that programs can launch it. Compiling it may wait until its first launch. */
  add(graph: CompilableGraph): void;
  has(name: string): boolean;
  /**
   * Told before graphs are added, where one request is all that is expected.
   * @param launches how often one of its pictures launches a graph, by name, at most
   * @returns whether launches take another time from then on than `OpenedRuntime.settings` say
   */
  expect?(launches: (graph: string) => number): boolean;
  /** Compiles graphs that are about to be launched, in this order, when nothing else is to be done. Waits for nothing, and fails at nothing. */
  prepare?(graphs: readonly string[]): void;
  /** Runs a program; programs given at the same time run one after another, in order. */
  run(program: Program, options?: RunOptions): Promise<Record<string, Tensor>>;
  open(): Workspace;
  /**
   * Gives up what it runs on, where that can be replaced: runs under way reject as if it had ended, later ones begin anew.
   * @param why completes a sentence about it, such as "has worked on one launch for 90 s"
   */
  giveUp?(why: string): void;
  /** Frees the memory that graphs take, until their next launch; after the programs given so far. */
  unload?(graphs: readonly string[]): Promise<void>;
  /** Waits for the run in flight to stop, then frees everything. Later calls reject with a DisposedError. */
  dispose(): Promise<void>;
}

/** Options of loading a model that may have its weights quantised. */
export type Int8Option = "weights" | "t5Weights";

/** Options of loading a model that are a runtime's own. */
export interface RuntimeSettings {
  readonly threads?: number | undefined;
  readonly weights: "auto" | "lazy" | "folded" | "int8";
  readonly tensorrtFolder?: string | undefined;
  readonly cudaProviderFolder?: string | undefined;
  /** Folder of the caches; default: `defaultCacheFolder()`. */
  readonly cache?: string | undefined;
  /** Whether optimised graphs are kept in the cache, for later loads; default: true. */
  readonly keepsGraphs?: boolean | undefined;
  readonly capture: boolean;
  /** Number of the device to run on, one of `RuntimeRow.listDevices`; default: the first that can be used. */
  readonly device?: number | undefined;
  /** The option that has weights quantised as the model is loaded; absent where none are. A runtime whose row does not take them is not opened. */
  readonly int8Option?: Int8Option | undefined;
  /** Whether the runtime was asked for by name; otherwise it is one of several that will do. */
  readonly named?: boolean | undefined;
  /** Milliseconds without a sign of life after which a runtime's process is replaced; default: 10 000. */
  readonly watchdogMs?: number | undefined;
  readonly listener?: RuntimeListener | undefined;
  readonly logger?: Logger | undefined;
}

/** Where the libraries of runtimes are looked for first. */
export type LibraryFolders = Pick<RuntimeSettings, "tensorrtFolder" | "cudaProviderFolder">;

/** What a runtime has to know of a model before it opens. */
export interface ModelWeights {
  /** Files of the weights as they were when the checkpoint was opened. */
  readonly files: readonly FileVersion[];
  /** Bytes of weights in use that are float16 or bfloat16. */
  readonly bytesOf16Bit: () => number;
}

/** A device that has to hold the weights. */
export interface Device {
  readonly name: string;
  readonly memoryBytes: number;
  /** Bytes of one buffer at most; absent where that has no limit of its own. */
  readonly largestBuffer?: number | undefined;
  /** Whether attention holds all of its scores; otherwise it computes them block by block. */
  readonly holdsScores?: boolean | undefined;
  /** How it holds the 16-bit weights that a graph computes with in float32; absent: as they are. */
  readonly widening?: ((graph: CompilableGraph) => "lazy" | "folded") | undefined;
}

/** One of several devices that a model runs on. */
export interface DeviceName {
  /** Its number, in the order of CUDA. */
  readonly number: number;
  /** Its name, as the driver says. */
  readonly name: string;
}

/** A device that a runtime may be opened on. */
export interface DeviceFinding {
  /** As the driver says. */
  readonly name: string;
  /** Why this runtime cannot use it, in a sentence; null if it can. */
  readonly problem: string | null;
}

export interface OpenedRuntime {
  readonly runtime: Runtime;
  /** Version and settings: what the costs of launches depend on. */
  readonly settings: Readonly<Record<string, unknown>>;
  /** The device that has to hold the weights; null where that is this machine's memory. */
  readonly device: Device | null;
  /** @throws OptionError for a network that it cannot compute */
  emitOptions(network: EmittedNetwork): EmitOptions;
}

/** A place where a runtime's libraries were looked for. */
export interface PlaceTried {
  readonly source: "option" | "environment" | "package" | "pip" | "loader";
  /** The folder or file, or what was asked where there is none. */
  readonly place: string;
  /** Null for the place where the library was found. */
  readonly error: string | null;
}

export interface Problem {
  /** Building needs the addon and the library; running needs a driver and a GPU as well. */
  readonly prevents: "building" | "running";
  readonly cause: string;
  readonly remedy: string;
}

/** A runtime on this machine, for `flowturbo doctor`. */
export interface RuntimeFinding {
  readonly name: string;
  /** Whether programs can run on it. */
  readonly available: boolean;
  readonly version: string | null;
  /** Why it is missing, and what to do about it: one remedy for each cause. */
  readonly reason: string | null;
  readonly remedy: string | null;
  /** Of a runtime that builds engines: whether it can here (flowturbo compile). */
  readonly builds?: boolean;
  /** Of a runtime that looks for libraries of its own: where they are, each place that was tried, and what prevents its use. */
  readonly libraries?: {
    /** The file that is used; null if none can be. */
    readonly library: string | null;
    readonly places: readonly PlaceTried[];
    readonly problems: readonly Problem[];
  };
  /** The NVIDIA GPUs that it sees; null without a driver or a GPU. */
  readonly hardware?: {
    /** CUDA version that NVIDIA's driver serves, such as 13.0. */
    readonly driver: string;
    readonly gpus: readonly GpuFinding[];
  } | null;
  /** Of a runtime on graphics adapters: those of this machine, in the order of the system; null where they are not known. */
  readonly adapters?: readonly AdapterFinding[] | null;
}

/** A graphics adapter: a GPU, or software that stands in for one. */
export interface AdapterFinding {
  readonly name: string;
  /** The vendor's name, or its number if that is not known. */
  readonly vendor: string;
  readonly vendorId: number;
  readonly deviceId: number;
  /** `cpu` is software. */
  readonly type: "discrete" | "integrated" | "virtual" | "cpu" | "other";
  /** Name of the driver; null if it does not say. */
  readonly driver: string | null;
  readonly driverVersion: string;
  /** Version of Vulkan that it has. */
  readonly apiVersion: string;
  /** Memory of the device's own. */
  readonly memoryBytes: number;
  /** What this process may still use of it, as the driver estimates; null if it does not say. */
  readonly freeBytes: number | null;
  /** Whether shaders compute in float16 and read it from buffers (WebGPU's feature shader-f16). */
  readonly float16: boolean;
  /** Largest buffer that a shader may read. */
  readonly maxStorageBufferBytes: number;
}

export interface GpuFinding {
  readonly name: string;
  readonly memoryBytes: number;
  /** Compute capability, such as 8.9. */
  readonly sm: string;
}

/** A row in the table of runtimes. */
export interface RuntimeRow {
  readonly name: string;
  /** For help texts: what it runs on. */
  readonly runsOn: string;
  readonly capabilities: Capabilities;
  /** Whether it computes with weights that are quantised as the model is loaded. */
  readonly takesInt8Weights?: boolean | undefined;
  /**
   * Of a runtime that can be opened on each of several devices: those of this machine, by their numbers in the order of CUDA.
   * @throws RuntimeUnavailableError if it can be used on none
   */
  readonly listDevices?: (settings: LibraryFolders) => Promise<readonly DeviceFinding[]>;
  /** What to say where it has no binaries for this platform; null where it has them. Absent: that is found out by opening it. */
  readonly unsupported?: () => InstallationError | null;
  /**
   * Begins, before the options are known, what opening it takes longest. Never throws.
   * @returns ends what was begun, where `open` has not used it
   */
  readonly begin?: () => () => void;
  /** Fails quickly if it cannot be used. @throws RuntimeUnavailableError and whatever opening the runtime throws */
  open(settings: RuntimeSettings, weights: ModelWeights): Promise<OpenedRuntime>;
  /** Never rejects. */
  find(settings: LibraryFolders): Promise<RuntimeFinding>;
  /** Of a runtime whose graphs are built into engines first. */
  readonly builder?: BuilderRow;
}
