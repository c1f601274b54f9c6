/**
 * Graphs to engines: one engine a graph, with one optimisation profile for each set of input shapes, taken from the
 * cache where it holds the very same. What the same is, is the key: the library and its version, the device, the
 * graph, the weights by content, the flags by name, the profiles, and this package's own recipe.
 */

import os from "node:os";
import { untilAborted } from "../../common/abort.js";
import type { FileVersion } from "../../common/files.js";
import {
  CacheError,
  CheckpointError,
  CompileError,
  type FlowTurboError,
  MemoryError,
  OptionError,
  RuntimeUnavailableError,
} from "../../errors.js";
import type { CompilableGraph } from "../runtime.js";
import { type Addon, type NativeBuildResult, type NativeError, type TensorRtKind, versionText } from "./addon.js";
import { type CachedEngine, EngineCache, keyOf, type Manifest } from "./cache.js";
import type { FileDigest } from "./digests.js";
import {
  type Cuda,
  type FindOptions,
  type Library,
  layouts,
  requireLibrary,
  rtxTargets,
  smOf,
  smText,
} from "./libraries.js";
import { describeNode } from "./nodes.js";

/** Counts up whenever the same inputs would be built into another engine by this file or by native/core. */
const recipe = 1;

/** Dimensions of every input of a graph. */
export type ProfileShapes = Readonly<Record<string, readonly number[]>>;

export interface EngineRequest {
  readonly graph: CompilableGraph;
  readonly profiles: readonly ProfileShapes[];
}

export interface CompiledEngine {
  readonly graph: string;
  /** File of the verified plan. */
  readonly plan: string;
  readonly bytes: number;
  readonly sha256: string;
  readonly profiles: readonly ProfileShapes[];
  /** Of the build, or of finding and verifying a cached plan. */
  readonly seconds: number;
  readonly cached: boolean;
  /** Why a plan in the cache was not used but built again. */
  readonly rebuilt: string | null;
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

export interface CompilerOptions extends FindOptions {
  readonly kind: TensorRtKind;
  /** SM numbers that TensorRT-RTX builds for; default: the present GPU's. TensorRT builds for the present GPU only. */
  readonly targets?: readonly number[] | undefined;
  /** Folder of the cache; default: `defaultCacheFolder()`. */
  readonly cache?: string | undefined;
  /** Bytes of memory that builds may take; default: what is available when a build begins. */
  readonly memory?: number | undefined;
  /** Names of nvinfer1::BuilderFlag. */
  readonly flags?: readonly string[] | undefined;
}

export interface CompileCallOptions {
  /** Files of the weights as they were when the checkpoint was opened. */
  readonly files: readonly FileVersion[];
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((progress: CompileProgress) => void) | undefined;
  /** A new file for everything that the library logs during a build. */
  readonly logFile?: string | undefined;
}

/** Share of an engine's progress that its weights' digests and its build take. */
const total = 1000;
const weightsShare = 50;

export class EngineCompiler {
  readonly kind: TensorRtKind;
  readonly library: Library;
  readonly cache: EngineCache;
  readonly device: Manifest["device"];
  readonly #addon: Addon;
  readonly #flags: readonly string[];
  readonly #memory: MemoryGate;

  private constructor(
    addon: Addon,
    library: Library,
    cache: EngineCache,
    device: Manifest["device"],
    options: CompilerOptions,
  ) {
    this.kind = options.kind;
    this.library = library;
    this.cache = cache;
    this.device = device;
    this.#addon = addon;
    this.#flags = [...(options.flags ?? [])].sort();
    this.#memory = new MemoryGate(options.memory);
  }

  /**
   * @throws RuntimeUnavailableError if the library is missing, or there is no GPU to build for; OptionError for a wrong
   *   target or flag; CacheError if the cache cannot be used
   */
  static async open(options: CompilerOptions): Promise<EngineCompiler> {
    const { kind } = options;
    const { addon, library, cuda } = await requireLibrary(kind, options);
    const device = deviceOf(kind, options.targets, cuda);
    const { flags } = addon.describe();
    for (const flag of options.flags ?? [])
      if (!flags.includes(flag))
        throw new OptionError("flags", `Expected one of ${flags.join(", ")} for flags but received "${flag}".`);
    const cache = await EngineCache.open(options.cache);
    await cache.sweep(addon);
    return new EngineCompiler(addon, library, cache, device, options);
  }

  /**
   * One engine, from the cache or built.
   * @throws CompileError, MemoryError, CheckpointError (weights missing or changed), CacheError, `signal.reason`
   */
  async compile(request: EngineRequest, options: CompileCallOptions): Promise<CompiledEngine> {
    const { graph, profiles } = request;
    const { signal } = options;
    const start = performance.now();
    const seconds = () => (performance.now() - start) / 1000;
    const report = reporter(graph.name, options.onProgress);
    signal?.throwIfAborted();

    // 1. The key.
    report("weights", "Reading the weights", 0);
    const files = await this.#digests(graph, options, (share) =>
      report("weights", "Reading the weights", Math.floor(share * weightsShare)),
    );
    const family = this.#family(request.graph, files);
    const key = keyIn(family, profiles);

    // 2. The cache, at first without its lock: nobody waits for an engine that is there.
    const found = (plan: string, manifest: Manifest): CompiledEngine => {
      report("done", "Found in the cache", total);
      const { bytes, sha256 } = manifest;
      return {
        ...{ graph: graph.name, plan, bytes, sha256, profiles },
        ...{ seconds: seconds(), cached: true, rebuilt: null, warnings: [] },
      };
    };
    const early = await this.cache.find(graph.name, key, signal);
    if (early.state === "found") return found(early.engine.plan, early.engine.manifest);

    // 3. The lock, then memory: what another process takes for this very engine must not count against it.
    report("waiting", "Waiting for memory, or for another process that builds it", weightsShare);
    const unlock = await this.cache.lock(this.#addon, graph.name, key, signal);
    let freeMemory: (() => void) | undefined;
    const leave = () => {
      freeMemory?.();
      unlock();
    };
    let damage: string | null = null;
    try {
      const lookup = await this.cache.find(graph.name, key, signal);
      if (lookup.state === "found") {
        leave();
        return found(lookup.engine.plan, lookup.engine.manifest);
      }
      if (lookup.state === "damaged") damage = lookup.reason;
      freeMemory = await this.#memory.enter(graph.name, memoryNeeded(graph), signal);
    } catch (error) {
      leave();
      throw error;
    }

    // 4. The build. Its thread may go on for a while after an abort; lock and memory are held until it ends.
    const built = this.#build(request, { key, family: keyOf(family) }, files, options, report).finally(leave);
    const { engine, warnings } = await untilAborted(built, signal);
    const { bytes, sha256 } = engine.manifest;
    report("done", "Built", total);
    return {
      ...{ graph: graph.name, plan: engine.plan, bytes, sha256, profiles },
      ...{ seconds: engine.manifest.seconds, cached: false, rebuilt: damage, warnings },
    };
  }

  /**
   * As `compile`, but any engine in the cache will do that has all the profiles, whatever others it has: what was built
   * ahead of time for many sizes and batches serves every program over some of them.
   */
  async find({ graph, profiles }: EngineRequest, options: CompileCallOptions): Promise<CompiledEngine> {
    const start = performance.now();
    const files = await this.#digests(graph, options, () => undefined);
    const wanted = profiles.map(profileText);
    // An engine for several GPUs serves each of them.
    const serves = ({ device, family }: Manifest) =>
      family === keyOf(this.#family(graph, files, device)) &&
      ("targets" in device && "targets" in this.device
        ? this.device.targets.every((sm) => device.targets.includes(sm))
        : family === keyOf(this.#family(graph, files)));
    for (const manifest of await this.cache.ofGraph(graph.name, serves)) {
      const has = new Set(manifest.profiles.map(profileText));
      if (!wanted.every((profile) => has.has(profile))) continue;
      const lookup = await this.cache.find(graph.name, manifest.key, options.signal);
      if (lookup.state !== "found") continue;
      const { plan } = lookup.engine;
      return {
        ...{ graph: graph.name, plan, bytes: manifest.bytes, sha256: manifest.sha256, profiles: manifest.profiles },
        ...{ seconds: (performance.now() - start) / 1000, cached: true, rebuilt: null, warnings: [] },
      };
    }
    return this.compile({ graph, profiles }, options);
  }

  /**
   * Refuses at once what would be refused after long work on other engines: a build that does not fit into memory and
   * whose engine the cache does not hold.
   * @throws MemoryError, CheckpointError, `signal.reason`
   */
  async checkMemory(requests: readonly EngineRequest[], options: CompileCallOptions): Promise<void> {
    for (const request of requests) {
      const { graph } = request;
      const needed = memoryNeeded(graph);
      if (this.#memory.fits(needed)) continue;
      const family = this.#family(graph, await this.#digests(graph, options, () => undefined));
      const key = keyIn(family, request.profiles);
      if (!(await this.cache.has(graph.name, key))) this.#memory.refuse(graph.name, needed);
    }
  }

  /** What an engine is, but for its profiles. */
  #family(
    graph: CompilableGraph,
    files: ReadonlyMap<string, FileDigest>,
    device: Manifest["device"] = this.device,
  ): readonly unknown[] {
    const externals = [...graph.externals.values()];
    return [
      ["recipe", recipe],
      ["runtime", this.kind],
      ["version", versionText(this.library.version)],
      ["platform", `${process.platform}-${process.arch}`],
      ["device", device],
      ["graph", graph.name, graph.fingerprint],
      [
        "weights",
        externals.map(({ name, file }) => [name, files.get(file)!.sha256]),
        externals.map(({ offset }) => offset),
      ],
      ["flags", this.#flags],
    ];
  }

  async #build(
    { graph, profiles }: EngineRequest,
    keys: { readonly key: string; readonly family: string },
    files: ReadonlyMap<string, FileDigest>,
    { signal, logFile }: CompileCallOptions,
    report: Report,
  ): Promise<{ engine: CachedEngine; warnings: readonly string[] }> {
    report("building", "Starting", weightsShare);
    const start = performance.now();
    const temporary = await this.cache.temporary(graph.name, keys.key);
    signal?.throwIfAborted();
    const task = this.#addon.build(
      this.library.library,
      this.library.parser,
      {
        onnx: graph.bytes,
        ...weightsOf(graph, files),
        profiles: profiles.map((profile) =>
          Object.entries(profile).map(([input, dimensions]) => ({ input, dimensions })),
        ),
        targets: "targets" in this.device ? this.device.targets : [],
        flags: this.#flags,
        optimizationLevel: -1,
        workspaceBytes: 0,
        planPath: temporary,
        logPath: logFile ?? "",
      },
      ({ phase, done, total: steps }) =>
        report("building", phase, weightsShare + Math.floor((done / steps) * (total - weightsShare - 1))),
    );
    signal?.addEventListener("abort", task.cancel, { once: true });
    let built: NativeBuildResult;
    try {
      built = await task.promise;
    } catch (error) {
      throw signal?.aborted ? signal.reason : translate(error as NativeError, graph, this.cache.folder);
    } finally {
      signal?.removeEventListener("abort", task.cancel);
    }
    const engine = await this.cache.keep(temporary, {
      ...{ ...keys, graph: graph.name, runtime: this.kind, version: versionText(this.library.version) },
      ...{ device: this.device, profiles: profiles.map((profile) => mapValues(profile, (sizes) => [...sizes])) },
      ...{ seconds: (performance.now() - start) / 1000, created: new Date().toISOString() },
    });
    return { engine, warnings: built.warnings };
  }

  async #digests(graph: CompilableGraph, options: CompileCallOptions, onShare: (share: number) => void) {
    const files = new Map<string, FileDigest>();
    const versions = [...new Set([...graph.externals.values()].map(({ file }) => file))].map((file) => {
      const version = options.files.find((candidate) => candidate.file === file);
      if (!version) throw new RangeError(`The graph ${graph.name} reads ${file}, which is not among its files.`);
      return version;
    });
    const all = versions.reduce((sum, { size }) => sum + size, 0);
    let before = 0;
    for (const version of versions) {
      const digest = await this.cache.digests.digest(version, {
        signal: options.signal,
        onBytes: (bytes) => onShare((before + bytes) / all),
      });
      files.set(version.file, digest);
      before += version.size;
      onShare(before / all);
    }
    return files;
  }
}

function keyIn(family: readonly unknown[], profiles: readonly ProfileShapes[]): string {
  return keyOf([...family, ["profiles", profiles.map(sortedEntries)]]);
}

function sortedEntries(profile: ProfileShapes) {
  return Object.entries(profile).sort(([a], [b]) => (a < b ? -1 : 1));
}

function profileText(profile: ProfileShapes): string {
  return JSON.stringify(sortedEntries(profile));
}

function weightsOf(graph: CompilableGraph, digests: ReadonlyMap<string, FileDigest>) {
  const files = [...digests.keys()];
  return {
    files: files.map((file) => ({ path: file, identity: digests.get(file)!.identity })),
    initializers: [...graph.externals].map(([name, { file, offset, length }]) => ({
      name,
      file: files.indexOf(file),
      offset,
      length,
    })),
  };
}

/** What engines are built for. @throws OptionError, RuntimeUnavailableError */
function deviceOf(kind: TensorRtKind, targets: readonly number[] | undefined, cuda: Cuda | null): Manifest["device"] {
  const gpu = cuda?.devices[0];
  if (kind === "tensorrt") {
    if (targets !== undefined && targets.length > 0)
      throw new OptionError(
        "targets",
        "Expected no targets for the runtime tensorrt, which builds for the present GPU only. Use tensorrt-rtx to build for others.",
      );
    if (!gpu || !cuda)
      throw new RuntimeUnavailableError(
        kind,
        "TensorRT 11 builds engines on the GPU that will run them, and this machine has none. Use tensorrt-rtx with targets to build ahead of time.",
      );
    return { gpu: gpu.name, sm: smOf(gpu), driver: cuda.driverVersion };
  }
  const wanted = targets !== undefined && targets.length > 0 ? targets : gpu ? [smOf(gpu)] : [];
  const known = `${rtxTargets.map(smText).join(", ")}`;
  if (wanted.length === 0)
    throw new OptionError(
      "targets",
      `This machine has no GPU, so say for which to build: targets from ${known} (${targetExamples}).`,
    );
  for (const sm of wanted)
    if (!rtxTargets.includes(sm))
      throw new OptionError(
        "targets",
        `${layouts[kind].title} builds for ${known}, not for ${smText(sm)}${targets?.length ? "" : `, the present GPU (${gpu!.name}): use the runtime tensorrt`}.`,
      );
  return { targets: [...new Set(wanted)].sort((a, b) => a - b) };
}

const targetExamples = "8.6 is an RTX 3090, 8.9 an RTX 4090, 12.0 an RTX 5090";

/**
 * Memory that a build takes at its peak: measured with TensorRT-RTX 1.7 (bench/build), where plan and weights in the
 * library's own arrangement stand beside each other; the mapped weights themselves can be dropped at any time.
 */
function memoryNeeded(graph: CompilableGraph): number {
  let weights = 0;
  for (const { length } of graph.externals.values()) weights += length;
  return buildBaseBytes + buildFactor * weights;
}
const buildBaseBytes = 0.7e9;
const buildFactor = 3;

/** Bytes that this process could take without driving others out of memory. */
function availableMemory(): number {
  const ofProcess = (process as { availableMemory?: () => number }).availableMemory?.() ?? Number.POSITIVE_INFINITY;
  return Math.min(os.freemem(), ofProcess);
}

function signalOnce(): { promise: Promise<void>; resolve: () => void } {
  let resolve = () => {};
  const promise = new Promise<void>((settle) => {
    resolve = settle;
  });
  return { promise, resolve };
}

/** Lets builds through as long as they fit into memory together; the others wait. */
class MemoryGate {
  readonly #limit: number | undefined;
  readonly #inside = new Set<{ needed: number }>();
  #changed = signalOnce();

  constructor(limit: number | undefined) {
    this.#limit = limit;
  }

  #available(): number {
    return this.#limit ?? availableMemory();
  }

  /** Whether a build fits where it is alone. */
  fits(needed: number): boolean {
    return needed <= this.#available();
  }

  /** @throws MemoryError always, with the numbers */
  refuse(graph: string, needed: number): never {
    const available = this.#available();
    throw new MemoryError(
      `Building the engine of ${graph} takes about ${gigabytes(needed)} GB of memory, but ${gigabytes(available)} GB are available. ` +
        "Free some, build on a larger machine and copy the cache, or raise the limit (memory) if you know better.",
      needed,
      available,
    );
  }

  /** @throws MemoryError for a build that does not fit even alone; `signal.reason` */
  async enter(graph: string, needed: number, signal: AbortSignal | undefined): Promise<() => void> {
    for (;;) {
      signal?.throwIfAborted();
      const taken = [...this.#inside].reduce((sum, entry) => sum + entry.needed, 0);
      const available = this.#available();
      if (this.#inside.size === 0 && needed > available) this.refuse(graph, needed);
      if (this.#inside.size === 0 || needed <= available - taken) break;
      await untilAborted(this.#changed.promise, signal);
    }
    const entry = { needed };
    this.#inside.add(entry);
    return () => {
      if (!this.#inside.delete(entry)) return;
      this.#changed.resolve();
      this.#changed = signalOnce();
    };
  }
}

function gigabytes(bytes: number): string {
  return (bytes / 1e9).toFixed(1);
}

type Report = (phase: CompileProgress["phase"], detail: string, done: number) => void;

function reporter(graph: string, onProgress: CompileCallOptions["onProgress"]): Report {
  let highest = 0;
  let last = "";
  return (phase, detail, done) => {
    highest = Math.max(highest, done);
    const line = `${phase} ${detail} ${highest}`;
    if (!onProgress || line === last) return;
    last = line;
    try {
      onProgress({ graph, phase, detail, done: highest, total });
    } catch (error) {
      // Called from native code, which has nowhere to throw to: it surfaces as an unhandled error of the caller's.
      queueMicrotask(() => {
        throw error;
      });
    }
  };
}

function mapValues<A, B>(record: Readonly<Record<string, A>>, map: (value: A) => B): Record<string, B> {
  return Object.fromEntries(Object.entries(record).map(([key, value]) => [key, map(value)]));
}

/** The addon's errors as this package's, with a remedy. */
function translate(error: NativeError, graph: CompilableGraph, cacheFolder: string): FlowTurboError {
  // Without a GPU the library ends every failure with a complaint about the driver, which is not the cause.
  const log = (error.log ?? []).filter((line) => !line.includes("cudaError 35"));
  const cause = { cause: error };
  switch (error.code) {
    case "WEIGHTS_CHANGED":
      return new CheckpointError(error.path ?? "", `${error.message}. Load the model again.`, cause);
    case "IO": {
      if (!error.path?.startsWith(cacheFolder))
        return new CheckpointError(error.path ?? "", `${error.message}. Is the checkpoint complete?`, cause);
      return new CacheError(
        error.path,
        `${error.message}. Make room there, or name another cache folder; nothing was left behind.`,
        cause,
      );
    }
    case "PARSE": {
      const details = (error.complaints ?? []).map((complaint) => explainComplaint(complaint, graph));
      const first = details[0] ?? "It gave no reason.";
      return new CompileError(
        graph.name,
        `TensorRT's parser refused the graph ${graph.name}. ${first}`,
        details,
        cause,
      );
    }
    default:
      return new CompileError(
        graph.name,
        `The engine of ${graph.name} could not be built: ${error.message}.${log.length > 0 ? ` ${log[0]}` : ""}`,
        log,
        cause,
      );
  }
}

const parserWords: Record<string, string> = {
  kMODEL_DESERIALIZE_FAILED: "the bytes are no ONNX model",
  kINVALID_GRAPH: "the graph is invalid",
  kINVALID_NODE: "the node is invalid",
  kINVALID_VALUE: "a value is invalid",
  kUNSUPPORTED_GRAPH: "the graph is not supported",
  kUNSUPPORTED_NODE: "the node is not supported",
  kUNSUPPORTED_NODE_ATTR: "an attribute of the node is not supported",
  kUNSUPPORTED_NODE_INPUT: "an input of the node is not supported",
  kUNSUPPORTED_NODE_DATATYPE: "an element type of the node is not supported",
  kUNSUPPORTED_NODE_DYNAMIC: "a dynamic shape of the node is not supported",
  kUNSUPPORTED_NODE_SHAPE: "a shape of the node is not supported",
  kMEM_ALLOC_FAILED: "memory ran out",
};

function explainComplaint(complaint: NativeError["complaints"][number], graph: CompilableGraph): string {
  const node = complaint.node >= 0 ? describeNode(graph.bytes, complaint.node) : null;
  const operator = complaint.operator || node?.operator || "";
  const name = complaint.nodeName || node?.outputs[0] || "";
  const what = /plugin not found/i.test(complaint.description)
    ? `it knows no operator ${operator}`
    : (parserWords[complaint.code] ?? complaint.code);
  const where = node || name ? `Node ${complaint.node}, "${name}" (${operator}): ` : "";
  const tensors = node ? ` It reads ${list(node.inputs)} and writes ${list(node.outputs)}.` : "";
  const words = complaint.description ? ` In its own words: ${complaint.description}.` : "";
  return `${where}${what}.${tensors}${words}`;
}

function list(names: readonly string[]): string {
  return names.length > 0 ? names.map((name) => `"${name}"`).join(", ") : "nothing";
}
