/**
 * What builds engines ahead of time, of the runtimes that need them: the part of a row in the table of runtimes that
 * `compileEngines()` uses. An engine is a graph compiled for one device, with a profile for each set of input shapes.
 */

import type { FileVersion } from "../common/files.js";
import type { CompilableGraph, OpenedRuntime } from "./runtime.js";

/** Dimensions of every input of a graph. */
export type ProfileShapes = Readonly<Record<string, readonly number[]>>;

/** The same text for the same shapes, whatever the order of the inputs. */
export function profileKey(shapes: ProfileShapes): string {
  return JSON.stringify(Object.entries(shapes).sort(([a], [b]) => (a < b ? -1 : 1)));
}

export interface EngineRequest {
  readonly graph: CompilableGraph;
  readonly profiles: readonly ProfileShapes[];
}

/** A graph that was compiled for a device. */
export interface CompiledEngine {
  /** Name of its graph. */
  readonly graph: string;
  /** File of the verified plan. */
  readonly plan: string;
  /** Size of the plan, in bytes. */
  readonly bytes: number;
  /** SHA-256 of the plan, in hexadecimal. */
  readonly sha256: string;
  /** What it runs on. */
  readonly profiles: readonly ProfileShapes[];
  /** Seconds that the build took, or finding and verifying a cached plan. */
  readonly seconds: number;
  /** Whether the cache held it. */
  readonly cached: boolean;
  /** Why a plan in the cache was not used but built again; null if there was none, or it was used. */
  readonly rebuilt: string | null;
  /** What the library logged as warnings. */
  readonly warnings: readonly string[];
}

/** `done` never decreases; `total` is constant. */
export interface CompileProgress {
  readonly graph: string;
  /**
   * `weights`: their digest is computed. `waiting`: for memory, or for another process that builds the same engine.
   * `building`; `done`: built, or found in the cache.
   */
  readonly phase: "weights" | "waiting" | "building" | "done";
  /** What the library says that it does. */
  readonly detail: string;
  readonly done: number;
  readonly total: number;
}

export interface CompileCallOptions {
  /** Files of the weights as they were when the checkpoint was opened. */
  readonly files: readonly FileVersion[];
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((progress: CompileProgress) => void) | undefined;
  /** A new file for everything that the library logs during a build. */
  readonly logFile?: string | undefined;
}

export interface EngineBuilder {
  /** Of the library, four parts. */
  readonly version: string;
  /** Of the engines. */
  readonly folder: string;
  /**
   * One engine, from the cache or built.
   * @throws CompileError, MemoryError, CheckpointError (weights missing or changed), CacheError, `signal.reason`
   */
  compile(request: EngineRequest, options: CompileCallOptions): Promise<CompiledEngine>;
  /**
   * Refuses at once what would be refused after long work on other engines: a build that does not fit into memory and
   * whose engine the cache does not hold.
   * @throws MemoryError, CheckpointError, `signal.reason`
   */
  checkMemory(requests: readonly EngineRequest[], options: CompileCallOptions): Promise<void>;
}

export interface BuilderSettings {
  /** Folder with the runtime's libraries: the first place that is tried. */
  readonly folder?: string | undefined;
  /** SM numbers to build for; default: the present GPU's. */
  readonly targets?: readonly number[] | undefined;
  /** Folder of the caches; default: `defaultCacheFolder()`. */
  readonly cache?: string | undefined;
  /** Bytes of memory that builds may take; default: what is available when a build begins. */
  readonly memory?: number | undefined;
}

export interface OpenedBuilder {
  readonly compiler: EngineBuilder;
  /** How to emit graphs for its targets: see OpenedRuntime. */
  readonly emitOptions: OpenedRuntime["emitOptions"];
}

/** The part of a row in the table of runtimes. */
export interface BuilderRow {
  /** Whether engines can be built for other GPUs than the present one. */
  readonly takesTargets: boolean;
  /** @throws RuntimeUnavailableError if engines cannot be built here, OptionError for wrong targets, CacheError */
  open(settings: BuilderSettings): Promise<OpenedBuilder>;
}
