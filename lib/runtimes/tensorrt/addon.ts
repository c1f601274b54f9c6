/**
 * The native boundary: every function of the addon (native/binding) once, marked [sync] or [async], and the only
 * place that loads a .node file. There is one addon for each library (see flavours.ts), all from one list of sources,
 * since the headers of TensorRT 11 and TensorRT-RTX are not compatible with each other. Loading one opens none of NVIDIA's
 * libraries, so it works on every machine that the addon was compiled for.
 */

import { createRequire } from "node:module";
import path from "node:path";
import { packagePath } from "../../common/package.js";
import type { Problem } from "../runtime.js";

/** Major, minor, patch, build. */
export type Version = readonly [number, number, number, number];

/** Work on a thread of its own. `cancel` asks it to stop; the promise then rejects with a NativeError "CANCELLED". */
export interface NativeTask<T> {
  readonly promise: Promise<T>;
  /** [sync] */
  cancel(): void;
}

export interface NativeDevice {
  readonly name: string;
  readonly memoryBytes: number;
  /** Compute capability: SM 8.9 is major 8, minor 9. */
  readonly major: number;
  readonly minor: number;
}

export interface Cuda {
  readonly driverVersion: number;
  readonly devices: readonly NativeDevice[];
}

/** One adapter of Vulkan's loader. */
export interface NativeGraphicsAdapter {
  readonly name: string;
  readonly vendorId: number;
  readonly deviceId: number;
  readonly type: "discrete" | "integrated" | "virtual" | "cpu" | "other";
  /** Empty where the driver does not say. */
  readonly driverName: string;
  readonly driverInfo: string;
  /** As the driver encodes it. */
  readonly driverVersion: number;
  /** Of Vulkan: major, minor, patch. */
  readonly apiVersion: readonly [number, number, number];
  /** Memory that is local to the device. */
  readonly memoryBytes: number;
  /** What this process may still use of it, as the driver estimates; null where it does not say. */
  readonly freeBytes: number | null;
  /** Whether shaders can compute in float16, and read it from buffers. */
  readonly float16: boolean;
  readonly maxStorageBufferRange: number;
}

export interface NativeBuildRequest {
  /** The model; initializers that are external data are looked up in `initializers`. */
  readonly onnx: Uint8Array;
  /** Files that hold weights; `identity` as `fileIdentity` says, so that a file that changed since is refused. */
  readonly files: readonly { readonly path: string; readonly identity: string }[];
  readonly initializers: readonly {
    readonly name: string;
    /** Index into `files`. */
    readonly file: number;
    readonly offset: number;
    readonly length: number;
  }[];
  /** The dimensions of every input, once for each profile. */
  readonly profiles: readonly (readonly { readonly input: string; readonly dimensions: readonly number[] }[])[];
  /** SM numbers (86 for 8.6), TensorRT-RTX only; empty for the present GPU. */
  readonly targets: readonly number[];
  /** Number of the GPU that is the present one; absent or -1 for CUDA's first. Of no account with targets. */
  readonly device?: number;
  /** Names of BuilderFlag; `describe().flags` lists those that are known. */
  readonly flags: readonly string[];
  /** 0 to 5; -1 for the library's default. */
  readonly optimizationLevel: number;
  /** Limit of scratch memory on the GPU; 0 for the library's default. */
  readonly workspaceBytes: number;
  /** Must not exist. Removed again if the build fails. */
  readonly planPath: string;
  /**
   * What kernels took in earlier builds, which is read and written anew; "" for none. TensorRT-RTX, which measures
   * nothing, ignores it.
   */
  readonly timingsPath: string;
  /** A new file for everything that the library logs; "" for none. */
  readonly logPath: string;
}

export interface NativeBuildProgress {
  /** As the library names it. */
  readonly phase: string;
  /** Never decreases; `total` is constant. */
  readonly done: number;
  readonly total: number;
}

export interface NativeBuildResult {
  readonly planBytes: number;
  readonly parseSeconds: number;
  readonly buildSeconds: number;
  readonly warnings: readonly string[];
}

/** A place in the registers, or in the submission's constants, where an operand begins: a multiple of 256. */
export interface NativeOperand {
  readonly constant: boolean;
  readonly offset: number;
  /** Which registers: 0 or absent for those submitted to, then the submission's others. */
  readonly block?: number;
}

export type NativeInstruction =
  | {
      readonly op: "launch";
      /** `id` of an engine. */
      readonly engine: number;
      readonly profile: number;
      /** One for each of the engine's tensors, in their order. */
      readonly operands: readonly NativeOperand[];
      /** Numbers of outputs whose values must be finite, and of those that go with the report. */
      readonly finite: readonly number[];
      readonly reported: readonly number[];
    }
  | {
      readonly op: "copy";
      /** Any multiple of a byte. */
      readonly from: NativeOperand;
      readonly to: NativeOperand;
      readonly bytes: number;
    };

export interface NativeSubmission {
  /** Uploaded at once before the first instruction. */
  readonly constants: Uint8Array;
  readonly instructions: readonly NativeInstruction[];
  /** Ranges of the registers, downloaded after the last instruction. */
  readonly results: readonly { readonly offset: number; readonly bytes: number; readonly block?: number }[];
  /**
   * `id` of more registers. With any, a failure is not that of the registers submitted to: instead, submissions that read
   * one of the others that this one was to write reject with "NO_VALUE", and its index as `operand`.
   */
  readonly others?: readonly number[];
  /** Turns the instructions into one CUDA graph, which later submissions of the same instructions replay. */
  readonly capture: boolean;
}

export interface NativeLaunchReport {
  /** Number of the launch within its submission. */
  readonly launch: number;
  /** By the device's clock. */
  readonly milliseconds: number;
  /** Of the outputs in `reported`, in that order. */
  readonly values: readonly Uint8Array[];
}

export interface NativeOutcome {
  readonly results: readonly Uint8Array[];
  /** Whether it ran as one CUDA graph. */
  readonly replayed: boolean;
  /** Why it could not be captured, or "". That is not tried again with the same registers and instructions. */
  readonly notCaptured: string;
}

/** A submission under way. `cancel` stops it before its next launch. */
export interface NativeRun extends NativeTask<NativeOutcome> {
  /** [sync] Takes it out of the queue if it has not begun; its promise then rejects with "CANCELLED". */
  withdraw(): boolean;
}

/** Device memory that lasts from one submission to the next: zeros before the first. */
export interface NativeRegisters {
  readonly id: number;
  /**
   * [async] Queues instructions behind all that were submitted before, to any registers. Wrong operands are refused
   * before the first launch. After a submission that failed, later ones to the same registers reject with "CANCELLED".
   * @param onReports launches that have finished, in order; must not throw
   */
  submit(submission: NativeSubmission, onReports: (reports: readonly NativeLaunchReport[]) => void): NativeRun;
  /** [sync] Freed once the last submission has ended. */
  release(): void;
}

export interface NativeEngine {
  readonly id: number;
  readonly tensors: readonly { readonly name: string; readonly input: boolean; readonly dtype: "float32" | "int64" }[];
  /** Dimensions of every tensor, profile by profile; empty for outputs, which `prepare` returns. */
  readonly profiles: readonly (readonly (readonly number[])[])[];
  /** Scratch memory of a launch in each profile. */
  readonly scratchBytes: readonly number[];
  readonly planBytes: number;
  /** Of its weights on the device. */
  readonly weightBytes: number;
  /** [sync] Submissions that name it still run; its memory is freed with its last user in the process. */
  release(): void;
}

export interface NativeExecutorStatistics {
  readonly launches: number;
  readonly submissions: number;
  readonly replays: number;
  readonly engines: number;
  /** On the device: registers, constants and scratch memory. */
  readonly deviceBytes: number;
  /** On the device: the engines' weights, as the library says. */
  readonly weightBytes: number;
  /** On the device: what execution contexts keep, as far as it could be measured. */
  readonly contextBytes: number;
  /** On the host. */
  readonly pinnedBytes: number;
  /** Processor time of the executor's own threads. */
  readonly busySeconds: number;
}

/** The process's executor for one device: see native/core/executor.h. Every handle has to be closed. */
export interface NativeExecutor {
  readonly device: NativeDevice;
  /** [async] Loads a plan, or finds it loaded. `identity` as `fileIdentity` says: a file that changed is refused. */
  load(plan: string, identity: string): NativeTask<NativeEngine>;
  /** [async] Makes an engine ready for one profile, and returns the dimensions of all tensors in it. */
  prepare(engine: number, profile: number): NativeTask<readonly (readonly number[])[]>;
  /** [sync] Allocated when the first submission begins. */
  registers(bytes: number): NativeRegisters;
  /** [async] The device's memory, in bytes. */
  memory(): NativeTask<{ readonly free: number; readonly total: number }>;
  /** [sync] */
  statistics(): NativeExecutorStatistics;
  /** [async] Releases the handle and its engines; resolves when what was released has been freed. */
  close(): NativeTask<void>;
}

/** What the functions below reject with. `code` is stable. */
export interface NativeError extends Error {
  readonly code:
    | "LIBRARY_NOT_LOADED"
    | "LIBRARY_VERSION"
    | "NO_DRIVER"
    | "NO_DEVICE"
    | "CUDA"
    | "VULKAN"
    | "INVALID"
    | "WEIGHTS_CHANGED"
    | "PARSE"
    | "BUILD"
    | "PLAN"
    | "PLAN_CHANGED"
    | "DEVICE_MEMORY"
    | "DEVICE_LOST"
    | "LAUNCH"
    | "NOT_FINITE"
    | "NO_VALUE"
    | "CANCELLED"
    | "OUT_OF_MEMORY"
    | "IO"
    | "INTERNAL";
  readonly path?: string;
  readonly errno?: number;
  /** Bytes, where memory ran out. */
  readonly needed?: number;
  readonly available?: number;
  /** The launch that failed, within its submission, and the tensor of its engine that is meant. */
  readonly launch?: number;
  readonly operand?: number;
  /** What the library logged as errors. */
  readonly log: readonly string[];
  readonly complaints: readonly {
    /** nvonnxparser::ErrorCode by name. */
    readonly code: string;
    /** Index of the ONNX node; -1 for none. */
    readonly node: number;
    readonly nodeName: string;
    readonly operator: string;
    readonly description: string;
  }[];
}

export interface Addon {
  /** [sync] What the addon was compiled for, and the versions [floor, ceiling) of the library that it accepts. */
  describe(): {
    readonly kind: string;
    readonly headers: Version;
    readonly floor: Version;
    readonly ceiling: Version;
    readonly flags: readonly string[];
  };
  /** [async] Driver and GPUs, from libcuda.so.1. */
  cuda(): NativeTask<Cuda>;
  /**
   * [async] Graphics adapters, from libvulkan.so.1, which loads their drivers into this process: a broken one may end it.
   * Rejects with "LIBRARY_NOT_LOADED" or "VULKAN".
   */
  graphicsAdapters(): NativeTask<readonly NativeGraphicsAdapter[]>;
  /** [async] Opens the library and its ONNX parser (paths, or names for the loader) and checks the version. */
  open(
    library: string,
    parser: string,
  ): NativeTask<{ readonly version: Version; readonly library: string; readonly parser: string }>;
  /** [async] Builds one engine and writes its plan. `onProgress` must not throw. */
  build(
    library: string,
    parser: string,
    request: NativeBuildRequest,
    onProgress: (progress: NativeBuildProgress) => void,
  ): NativeTask<NativeBuildResult>;
  /**
   * [async] The executor for a device by its number, shared in the process. Rejects with "NO_DRIVER", "NO_DEVICE",
   * "INVALID" (no such device), "CUDA", "DEVICE_LOST" (for good: the process has lost it).
   */
  openExecutor(library: string, parser: string, ordinal: number): NativeTask<NativeExecutor>;
  /**
   * [sync] Locks a file among processes and threads, creating it; null while another holds it. The kernel releases
   * the lock of a process that dies. @returns a function that releases it and removes the file
   */
  tryLock(file: string): (() => void) | null;
}

/** [sync] Loads the addon for one library: a prebuilt one, or the one that `npm run build:native` made. */
export function findAddon(kind: string): Addon | Problem {
  const problem = (cause: string, remedy: string): Problem => ({ prevents: "building", cause, remedy });
  if (process.platform !== "linux" || process.arch !== "x64")
    return problem(
      `${kind} is supported on linux-x64 only; this is ${process.platform}-${process.arch}.`,
      'Use the runtime "onnxruntime", which needs nothing.',
    );
  const require = createRequire(packagePath("package.json"));
  let find: { path(folder: string): string };
  try {
    find = require("node-gyp-build");
  } catch {
    return problem("The package node-gyp-build, which finds the addons, is missing.", "Run `npm install` again.");
  }
  let file: string;
  try {
    // FLOWTURBO_ADDON_DIR holds addons compiled in another way, with sanitizers for instance.
    file = find.path(path.join(process.env.FLOWTURBO_ADDON_DIR ?? packagePath("native"), kind));
  } catch {
    return problem(
      `This installation of flowturbo has no native addon for ${kind}.`,
      "Install the published package, which brings one for linux-x64 with glibc, or run `npm run build:native` in a clone.",
    );
  }
  try {
    return require(file) as Addon;
  } catch (error) {
    return problem(
      `The native addon ${file} cannot be loaded: ${(error as Error).message}.`,
      "It needs glibc 2.34 or later; on older systems run `npm run build:native` in a clone.",
    );
  }
}

/** `1.7.1.116` */
export function versionText(version: Version): string {
  return version.join(".");
}

/** 86 → "8.6" */
export function smText(sm: number): string {
  return `${Math.floor(sm / 10)}.${sm % 10}`;
}

export function smOf(device: NativeDevice): number {
  return device.major * 10 + device.minor;
}
