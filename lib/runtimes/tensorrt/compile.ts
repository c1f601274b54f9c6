/**
 * Graphs to engines: one engine a graph, with one optimisation profile for each set of input shapes, taken from the
 * cache where it holds the very same. What the same is, is the key: the library and its version, the device, the
 * graph, the weights by content, the profiles, and this package's own revision.
 */

import { onAbort, untilAborted } from "../../common/abort.js";
import {
  type BuilderSettings,
  type CompileCallOptions,
  type CompiledEngine,
  type CompileProgress,
  type EngineBuilder,
  type EngineRequest,
  type ProfileShapes,
  profileKey,
} from "../builder.js";
import type { CompilableGraph } from "../runtime.js";
import { type Addon, type NativeBuildResult, type NativeError, versionText } from "./addon.js";
import { BuildMemory } from "./build-memory.js";
import { type CachedEngine, EngineCache, keyOf, type Manifest } from "./cache.js";
import { explainBuild } from "./complaints.js";
import type { FileDigest } from "./digests.js";
import { type EngineDevice, flavours, type TensorRtKind } from "./flavours.js";
import { type Installation, type Library, requireTensorRt } from "./libraries.js";

/** Counts up whenever the same inputs would be built into another engine by this file or by native/core. */
const revision = 1;

/** Share of an engine's progress that its weights' digests and its build take. */
const total = 1000;
const weightsShare = 50;

/** What the library does where it is not told. */
const defaultLevel = -1;

export interface CompilerSettings extends BuilderSettings {
  /** Number of the present GPU, where there are several; default: CUDA's first. */
  readonly gpu?: number | undefined;
  /** Builder optimisation level, 0 to 5: lower builds sooner and runs slower. Default: the library's own. */
  readonly level?: number | undefined;
}

export class EngineCompiler implements EngineBuilder {
  readonly library: Library;
  readonly cache: EngineCache;
  readonly device: EngineDevice;
  readonly #addon: Addon;
  readonly #memory: BuildMemory;
  readonly #level: number;
  readonly #gpu: number | undefined;

  private constructor(
    { addon, library }: Installation,
    cache: EngineCache,
    device: EngineDevice,
    { memory, level = defaultLevel, gpu }: CompilerSettings,
  ) {
    this.library = library;
    this.cache = cache;
    this.device = device;
    this.#addon = addon;
    this.#memory = new BuildMemory(flavours[library.kind].buildBaseBytes, memory);
    this.#level = level;
    this.#gpu = gpu;
  }

  /**
   * @param installation what to build with; default: what is found on this machine
   * @throws RuntimeUnavailableError if the library is missing, or there is no GPU to build for; OptionError for a wrong
   *   target; CacheError if the cache cannot be used
   */
  static async open(
    options: CompilerSettings & { readonly kind: TensorRtKind },
    installation?: Installation,
  ): Promise<EngineCompiler> {
    const { kind, targets = [], gpu = 0 } = options;
    const found = installation ?? (await requireTensorRt(kind, "building", options));
    const device = flavours[kind].deviceOf(targets, found.cuda, gpu);
    const cache = await EngineCache.open(options.cache);
    await cache.sweep(found.addon);
    return new EngineCompiler(found, cache, device, options);
  }

  get version(): string {
    return versionText(this.library.version);
  }

  get folder(): string {
    return this.cache.folder;
  }

  /** SM numbers that engines are built for. */
  get targets(): readonly number[] {
    return "targets" in this.device ? this.device.targets : [this.device.sm];
  }

  async compile(request: EngineRequest, options: CompileCallOptions): Promise<CompiledEngine> {
    const { graph, profiles } = request;
    const { signal } = options;
    const start = performance.now();
    const report = reporter(graph.name, options.onProgress);
    signal?.throwIfAborted();

    // 1. The key.
    report("weights", "Reading the weights", 0);
    const files = await this.#digests(graph, options, (share) =>
      report("weights", "Reading the weights", Math.floor(share * weightsShare)),
    );
    const family = this.#family(graph, files);
    const keys = { key: this.#keyIn(family, profiles), family };

    // 2. The cache, at first without its lock: nobody waits for an engine that is there.
    const early = await this.cache.find(graph.name, keys.key, signal);
    const engine =
      early?.damage === null
        ? compiled(early, secondsSince(start))
        : // The thread of a build may go on for a while after an abort; lock and memory are held until it ends.
          await untilAborted(this.#findOrBuild(request, keys, files, options, report), signal);
    report("done", engine.cached ? "Found in the cache" : "Built", total);
    return engine;
  }

  /**
   * As `compile`, but any engine in the cache is taken that has all the profiles, whatever others it has: one that was
   * built ahead of time for many sizes and batches is right for every program over some of them. One of another
   * optimisation level is taken where there is none of this compiler's.
   */
  async find({ graph, profiles }: EngineRequest, options: CompileCallOptions): Promise<CompiledEngine> {
    const start = performance.now();
    const files = await this.#digests(graph, options);
    // An engine that was built for several GPUs is right for each of them.
    const serves = ({ device, family }: Manifest) =>
      family === this.#family(graph, files, device) &&
      ("targets" in device && "targets" in this.device
        ? this.device.targets.every((sm) => device.targets.includes(sm))
        : family === this.#family(graph, files));
    const serving = (await this.cache.list({ graph: graph.name }))
      .flatMap(({ manifest }) => (manifest && serves(manifest) ? [manifest] : []))
      .sort((a, b) => this.#rank(a.level) - this.#rank(b.level) || a.profiles.length - b.profiles.length);
    for (const manifest of serving) {
      const has = new Set(manifest.profiles.map(profileKey));
      if (!profiles.every((profile) => has.has(profileKey(profile)))) continue;
      const found = await this.cache.find(graph.name, manifest.key, options.signal);
      if (found?.damage === null) return compiled(found, secondsSince(start));
    }
    return this.compile({ graph, profiles }, options);
  }

  async checkMemory(requests: readonly EngineRequest[], options: CompileCallOptions): Promise<void> {
    for (const { graph, profiles } of requests) {
      const refusal = this.#memory.refusal(graph);
      if (!refusal) continue;
      const family = this.#family(graph, await this.#digests(graph, options));
      if (!(await this.cache.has(graph.name, this.#keyIn(family, profiles)))) throw refusal;
    }
  }

  #rank(level: number): number {
    return level === this.#level ? 0 : level === defaultLevel ? 1 : 2;
  }

  #keyIn(family: string, profiles: readonly ProfileShapes[]): string {
    return keyOf([family, profiles.map(profileKey), ...(this.#level === defaultLevel ? [] : [this.#level])]);
  }

  /** The key of everything but the profiles and the optimisation level. */
  #family(graph: CompilableGraph, files: ReadonlyMap<string, FileDigest>, device: EngineDevice = this.device): string {
    const externals = [...graph.externals.values()];
    return keyOf([
      ["revision", revision],
      ["runtime", this.library.kind],
      ["version", this.version],
      ["platform", `${process.platform}-${process.arch}`],
      ["device", device],
      ["graph", graph.name, graph.fingerprint],
      [
        "weights",
        externals.map(({ name, file }) => [name, files.get(file)!.sha256]),
        externals.map(({ offset }) => offset),
      ],
    ]);
  }

  /** Under the engine's lock: another process may have built it meanwhile. */
  async #findOrBuild(
    request: EngineRequest,
    keys: Pick<Manifest, "key" | "family">,
    files: ReadonlyMap<string, FileDigest>,
    options: CompileCallOptions,
    report: Report,
  ): Promise<CompiledEngine> {
    const { graph } = request;
    const { signal } = options;
    const start = performance.now();
    report("waiting", "Waiting for memory, or for another process that builds it", weightsShare);
    // The lock comes before memory: what another process takes for this very engine must not count against it.
    const unlock = await this.cache.lock(this.#addon, graph.name, keys.key, signal);
    let freeMemory: (() => void) | undefined;
    try {
      const present = await this.cache.find(graph.name, keys.key, signal);
      if (present?.damage === null) return compiled(present, secondsSince(start));
      freeMemory = await this.#memory.enter(graph, signal);
      const { engine, warnings } = await this.#build(request, keys, files, options, report);
      const { seconds } = engine.manifest;
      return { ...compiled(engine, seconds), cached: false, rebuilt: present?.damage ?? null, warnings };
    } finally {
      freeMemory?.();
      unlock();
    }
  }

  async #build(
    { graph, profiles }: EngineRequest,
    keys: Pick<Manifest, "key" | "family">,
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
        targets: "targets" in this.device ? this.targets : [],
        // A library that builds for other GPUs needs none.
        ...("gpu" in this.device && this.#gpu !== undefined && { device: this.#gpu }),
        flags: [],
        optimizationLevel: this.#level,
        workspaceBytes: 0,
        planPath: temporary,
        timingsPath: flavours[this.library.kind].timesKernels
          ? this.cache.timings(keyOf(["timings", this.library.kind, this.version, this.device]))
          : "",
        logPath: logFile ?? "",
      },
      ({ phase, done, total: steps }) =>
        report("building", phase, weightsShare + Math.floor((done / steps) * (total - weightsShare - 1))),
    );
    const stopFollowing = onAbort(signal, task.cancel);
    let built: NativeBuildResult;
    try {
      built = await task.promise;
    } catch (error) {
      throw signal?.aborted ? signal.reason : explainBuild(error as NativeError, graph, this.folder);
    } finally {
      stopFollowing();
    }
    const engine = await this.cache.keep(temporary, {
      ...{ ...keys, graph: graph.name, runtime: this.library.kind, version: this.version },
      ...{ device: this.device, level: this.#level, profiles: [...profiles] },
      ...{ seconds: secondsSince(start), created: new Date().toISOString() },
    });
    return { engine, warnings: built.warnings };
  }

  async #digests(graph: CompilableGraph, options: CompileCallOptions, onShare = (_share: number) => {}) {
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

/** What the cache holds, as an engine that was found there. */
function compiled({ plan, manifest }: CachedEngine, seconds: number): CompiledEngine {
  const { graph, bytes, sha256, profiles } = manifest;
  return { graph, plan, bytes, sha256, profiles, seconds, cached: true, rebuilt: null, warnings: [] };
}

function secondsSince(start: number): number {
  return (performance.now() - start) / 1000;
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
      // Called from native code, which cannot pass an exception on: it surfaces as an unhandled error of the caller's.
      queueMicrotask(() => {
        throw error;
      });
    }
  };
}
