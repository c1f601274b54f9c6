/**
 * TensorRT and TensorRT-RTX: programs on a GPU. Graphs become engines at their first launch, from the cache where it
 * holds them; a program becomes one submission to the native executor, which runs it without asking JavaScript again.
 * This side keeps the order of programs, the engines that are loaded, and the names in every error.
 */

import { setTimeout } from "node:timers/promises";
import { untilAborted } from "../../common/abort.js";
import type { Logger } from "../../common/logger.js";
import type { Tensor } from "../../common/tensor.js";
import { DeviceLostError, DisposedError, FlowTurboError, MemoryError, RuntimeError } from "../../errors.js";
import type { Launch, Program } from "../../program/program.js";
import { ConstantReader } from "../../program/stored.js";
import { type Operand, validateProgram } from "../../program/validate.js";
import type { CompilableGraph, LaunchReport, RunOptions, Runtime, Workspace } from "../runtime.js";
import type {
  Addon,
  NativeEngine,
  NativeError,
  NativeExecutor,
  NativeExecutorStatistics,
  NativeLaunchReport,
  NativeRegisters,
  NativeRun,
  NativeSubmission,
  TensorRtKind,
} from "./addon.js";
import type { ProfileShapes } from "./compile.js";
import { explainDevice, explainEngine, explainRun, gigabytes } from "./failures.js";
import {
  bytesOf,
  layOutApart,
  layOutRegisters,
  layOutSubmission,
  operandsOf,
  type ProfiledEngine,
  type RegisterLayout,
  tensorOf,
} from "./layout.js";

/** Where plans come from: `EngineCompiler`, or in tests whatever stands in for it. */
export interface EngineSource {
  /**
   * A verified plan with a profile for each of `profiles`; one that has those of `kept` too is better, since an engine's
   * weights are on the device once however many profiles it has.
   * @param identity of the file, as `fileIdentity` says
   */
  engineFor(
    graph: CompilableGraph,
    profiles: readonly ProfileShapes[],
    kept: readonly ProfileShapes[],
    signal: AbortSignal,
  ): Promise<{ readonly plan: string; readonly identity: string }>;
}

export interface TensorRtRuntimeOptions {
  readonly kind: TensorRtKind;
  readonly addon: Addon;
  /** Files, or names for the loader. */
  readonly library: string;
  readonly parser: string;
  readonly engines: EngineSource;
  /** Replays each program as one CUDA graph from its second run on: the least latency, but no stop between launches. */
  readonly capture?: boolean | undefined;
  readonly logger?: Logger | undefined;
}

/** Milliseconds that are waited at most, doubling from 1, between attempts to open a device that was lost. */
const longestPatience = 512;

/** Programs whose CUDA graphs are kept. */
const keptGraphs = 4;

interface LoadedEngine {
  readonly native: NativeEngine;
  /** Input shapes, profile by profile, and the profiles by those. */
  readonly shapes: readonly ProfileShapes[];
  readonly profiles: ReadonlyMap<string, number>;
  /** Shapes of all tensors in the profiles that are ready. */
  readonly prepared: Map<number, readonly (readonly number[])[]>;
}

/** A program, or a part of one, that waits or runs. */
interface Job {
  readonly options: RunOptions;
  /** Whether disposal waits for it. */
  begun: boolean;
  run: NativeRun | null;
  /** Why it was stopped, where that was this side's doing. */
  stopped: { readonly reason: unknown } | null;
}

/** A register of a workspace, or a constant that it keeps: device memory of its own, from its first use on. */
class Slot {
  /** Pieces under way that name it. */
  uses = 0;
  /** Whether the last piece that was to write it never began. */
  missing = false;
  #freed = false;
  #native: NativeRegisters | null = null;

  constructor(readonly bytes: number) {}

  on(executor: NativeExecutor): NativeRegisters {
    this.#native ??= executor.registers(this.bytes);
    return this.#native;
  }

  free(): void {
    this.#freed = true;
    this.#release();
  }

  leave(): void {
    this.uses--;
    this.#release();
  }

  #release(): void {
    if (!this.#freed || this.uses > 0) return;
    this.#native?.release();
    this.#native = null;
  }
}

/** What a job runs. */
interface Prepared {
  readonly executor: NativeExecutor;
  readonly registers: NativeRegisters;
  readonly layout: RegisterLayout;
  readonly submission: NativeSubmission;
  readonly launches: readonly Launch[];
  readonly engineOf: (launch: Launch) => ProfiledEngine;
  readonly results: readonly string[];
  /** The operand in one of the submission's other registers. */
  readonly nameOf?: (block: number) => string;
  /** Called when it has ended. */
  readonly done: (failed: boolean) => void;
}

/** A program's CUDA graph lives in its registers. */
interface Captured {
  readonly registers: NativeRegisters;
  /** What it launches. */
  readonly graphs: ReadonlySet<string>;
}

export class TensorRtRuntime implements Runtime, AsyncDisposable {
  /** Runtimes of this thread with an open device: one that is lost comes back only when nobody holds on to it. */
  static readonly #onDevice = new Set<TensorRtRuntime>();
  /** Ends when all that were let go of have been freed; says whether the device was ever lost. */
  static #closings: Promise<boolean> = Promise.resolve(false);
  readonly name: TensorRtKind;
  readonly capabilities = { preemption: false, capture: true, anyShape: false };
  readonly #options: TensorRtRuntimeOptions;
  readonly #graphs = new Map<string, CompilableGraph>();
  readonly #constantReader = new ConstantReader();
  readonly #jobs = new Set<Job>();
  /** Closes each that is open: its registers go with the device. */
  readonly #workspaces = new Set<() => void>();
  readonly #closing = new AbortController();
  readonly #whenIdle: (() => void)[] = [];
  #opening: Promise<NativeExecutor> | null = null;
  #executor: NativeExecutor | null = null;
  /** Of the present executor. */
  #engines = new Map<string, LoadedEngine>();
  /** Programs that have a CUDA graph, the least recently used first. */
  #captured = new Map<string, Captured>();
  /** Ends when everything before has been submitted. */
  #turn: Promise<unknown> = Promise.resolve();
  /** Ends with the program submitted last. */
  #last: Promise<unknown> = Promise.resolve();
  #warnedOfCapture = false;
  #disposed: Promise<void> | null = null;

  constructor(options: TensorRtRuntimeOptions) {
    this.#options = options;
    this.name = options.kind;
  }

  /** Opens the device. @throws RuntimeUnavailableError if there is none, DeviceLostError, DisposedError */
  async start(): Promise<{ readonly device: NativeExecutor["device"] }> {
    if (this.#disposed) throw new DisposedError("This runtime");
    return { device: (await this.#open()).device };
  }

  add(graph: CompilableGraph): void {
    if (this.#disposed) throw new DisposedError("This runtime");
    this.#graphs.set(graph.name, graph);
    this.#release(graph.name);
  }

  has(name: string): boolean {
    return this.#graphs.has(name);
  }

  /**
   * @throws RuntimeError for a program that cannot run, CompileError, MemoryError (GPU or host), LaunchError,
   *   NotFiniteError, DeviceLostError, RuntimeUnavailableError, DisposedError, or `signal.reason`
   */
  async run(program: Program, options: RunOptions = {}): Promise<Record<string, Tensor>> {
    if (this.#disposed) throw new DisposedError("This runtime");
    options.signal?.throwIfAborted();
    validateProgram(program, (name) => this.has(name));
    let begun = false;
    const onLaunch = (report: LaunchReport) => {
      begun = true;
      options.onLaunch?.(report);
    };
    const attempt = () => this.#execute({ ...options, onLaunch }, (signal) => this.#prepare(program, signal));
    return attempt().catch((error) => {
      // What is lacking may be the memory of CUDA graphs that are kept for later.
      if (!(error instanceof MemoryError) || begun || this.#captured.size === 0 || this.#disposed) throw error;
      for (const key of [...this.#captured.keys()]) this.#forget(key);
      return attempt();
    });
  }

  open(): Workspace {
    if (this.#disposed) throw new DisposedError("This runtime");
    const kept = new Map<string, Operand>();
    const slots = new Map<string, Slot>();
    const home = new Slot(0);
    let executor: NativeExecutor | null = null;
    let closed = false;
    const lost = () => closed || (executor !== null && executor !== this.#executor);
    const close = () => {
      closed = true;
      for (const slot of [home, ...slots.values()]) slot.free();
      slots.clear();
      this.#workspaces.delete(close);
    };
    this.#workspaces.add(close);
    return {
      get lost() {
        return lost();
      },
      submit: async (piece, options = {}) => {
        if (this.#disposed) throw new DisposedError("This runtime");
        options.signal?.throwIfAborted();
        if (lost()) throw new RuntimeError("This workspace is gone with the GPU that held it; open a new one.");
        const left = validateProgram(piece, (name) => this.has(name), kept);
        for (const [name, operand] of left) kept.set(name, operand);

        // Names mean what they mean now: they may be freed, and given again, before the piece has its turn.
        const named = new Set([...left.keys(), ...piece.instructions.flatMap(operandsOf), ...piece.results]);
        const operands = Object.fromEntries([...named].map((name) => [name, kept.get(name)!]));
        const used = Object.entries(operands).map(([name, operand]) => {
          const slot = slots.get(name) ?? new Slot(bytesOf(operand));
          slots.set(name, slot);
          return [name, slot] as const;
        });
        const own = [home, ...used.map(([, slot]) => slot)];
        for (const slot of own) slot.uses++;
        const written = used.filter(([name]) => left.has(name)).map(([, slot]) => slot);

        const prepare = async (signal: AbortSignal | undefined) => {
          const read = new Set(piece.instructions.flatMap(operandsOf));
          for (const [name, slot] of used)
            if (slot.missing && read.has(name) && !left.has(name)) throw withoutValue(name);
          const present = await this.#open();
          executor ??= present;
          if (present !== executor) throw beforeItBegan();
          const constants = await this.#constants(piece);
          const registers = { ...piece.registers, ...operands };
          const engineOf = await this.#ready(present, { ...piece, registers }, constants, signal);
          const layout = layOutApart(operands);
          const submission = layOutSubmission(piece, layout, constants, engineOf, false);
          const [place, ...others] = own.map((slot) => slot.on(present));
          for (const slot of written) slot.missing = false;
          return {
            ...{ executor: present, registers: place!, layout, engineOf, ...launchesOf(piece) },
            submission: { ...submission, others: others.map(({ id }) => id) },
            nameOf: (block: number) => used[block - 1]?.[0] ?? "",
            done: () => undefined,
          };
        };
        const missed = () => {
          for (const slot of written) slot.missing = true;
        };
        return this.#execute(options, prepare, missed).finally(() => {
          for (const slot of own) slot.leave();
        });
      },
      free: (names) => {
        for (const name of names) {
          kept.delete(name);
          slots.get(name)?.free();
          slots.delete(name);
        }
      },
      close,
    };
  }

  async unload(graphs: readonly string[]): Promise<void> {
    // After what was submitted so far: an engine is not taken from a program that is about to launch it.
    const turn = this.#turn.then(() => {
      for (const name of graphs) this.#release(name);
    });
    this.#turn = turn;
    await turn;
  }

  /** Counters of the process's executor, which all runtimes on the device share; null before the first run. */
  statistics(): NativeExecutorStatistics | null {
    return this.#executor?.statistics() ?? null;
  }

  dispose(): Promise<void> {
    this.#disposed ??= (async () => {
      const reason = new DisposedError("This runtime");
      this.#closing.abort(reason);
      // What has not begun goes; what runs may end.
      for (const job of this.#jobs) if (job.run?.withdraw()) job.stopped ??= { reason };
      while (this.#jobs.size > 0) await new Promise<void>((resolve) => this.#whenIdle.push(resolve));
      await this.#turn;
      await this.#opening?.catch(() => undefined);
      if (this.#executor) await this.#drop(this.#executor);
      this.#graphs.clear();
    })();
    return this.#disposed;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  /**
   * Prepares and submits in the order of the calls, then waits for the end.
   * @param missed called, in that order, for what never comes to be submitted
   */
  #execute(
    options: RunOptions,
    prepare: (signal: AbortSignal | undefined) => Promise<Prepared>,
    missed: () => void = () => undefined,
  ): Promise<Record<string, Tensor>> {
    const { signal } = options;
    const job: Job = { options, begun: this.#jobs.size === 0, run: null, stopped: null };
    this.#jobs.add(job);
    const begin = async () => {
      if (!job.begun) this.#closing.signal.throwIfAborted();
      job.begun = true;
      signal?.throwIfAborted();
      const prepared = await prepare(signal).catch((error) => {
        // Another runtime has noticed that the device is lost, and taken it from under this one's feet.
        if (this.#executor !== null || error instanceof FlowTurboError || signal?.aborted) throw error;
        throw beforeItBegan(error);
      });
      if (signal?.aborted) prepared.done(true);
      signal?.throwIfAborted();
      const outcome = this.#submit(job, prepared, this.#last);
      this.#last = outcome.catch(() => undefined);
      return { outcome };
    };
    const submitted = this.#turn.then(() =>
      begin().catch((error) => {
        missed();
        throw error;
      }),
    );
    this.#turn = submitted.catch(() => undefined);
    const outcome = submitted.then(({ outcome }) => outcome);
    void outcome
      .catch(() => undefined)
      .then(() => {
        this.#jobs.delete(job);
        if (this.#jobs.size === 0) for (const resolve of this.#whenIdle.splice(0)) resolve();
      });
    // An abort that comes before the submission is answered at once, whatever the preparation is still at.
    return untilAborted(submitted, signal).then(() => outcome);
  }

  /** @param before ends with the program before: they end in order, but may be heard of in another */
  async #submit(job: Job, prepared: Prepared, before: Promise<unknown>): Promise<Record<string, Tensor>> {
    const { signal, onLaunch } = job.options;
    const { executor, registers, layout, submission, launches, engineOf, results, nameOf, done } = prepared;
    if (this.#executor !== executor) throw beforeItBegan();
    const read = (names: readonly string[], values: readonly Uint8Array[]) =>
      Object.fromEntries(names.map((name, index) => [name, tensorOf(layout.registers[name]!, values[index]!)]));
    // Programs are heard of each on a channel of its own, and so in any order: reports wait for the program before.
    let early: NativeLaunchReport[] | null = [];
    const heard = (reports: readonly NativeLaunchReport[]) => {
      if (early) {
        early.push(...reports);
        return;
      }
      for (const { launch: index, milliseconds, values } of reports) {
        if (job.stopped || signal?.aborted) return;
        const launch = launches[index]!;
        const report: LaunchReport = { launch, index, milliseconds, values: read(launch.reported ?? [], values) };
        try {
          onLaunch?.(report);
        } catch (reason) {
          job.stopped = { reason };
          run.cancel();
        }
      }
    };
    const run = registers.submit(submission, heard);
    const follow = before.then(() => {
      const waiting = early ?? [];
      early = null;
      heard(waiting);
    });
    job.run = run;
    signal?.addEventListener("abort", run.cancel);
    if (signal?.aborted) run.cancel();
    let failed = true;
    try {
      const outcome = await run.promise.finally(() => follow);
      if (outcome.notCaptured && !this.#warnedOfCapture) {
        this.#warnedOfCapture = true;
        this.#options.logger?.warn?.(
          `This program runs launch by launch, not as one CUDA graph: ${outcome.notCaptured}.`,
        );
      }
      // The caller's own reasons come first, whatever became of the last launch.
      if (job.stopped) throw job.stopped.reason;
      signal?.throwIfAborted();
      failed = false;
      return read(results, outcome.results);
    } catch (error) {
      if (job.stopped) throw job.stopped.reason;
      if (signal?.aborted) throw signal.reason;
      if (!isNative(error)) throw error;
      if (error.code === "DEVICE_LOST") this.#lose(executor);
      if (error.code === "NO_VALUE") throw withoutValue(nameOf?.(error.operand ?? 0) ?? "", error);
      throw explainRun(error, launches, (launch) => engineOf(launch).engine);
    } finally {
      signal?.removeEventListener("abort", run.cancel);
      done(failed);
    }
  }

  async #prepare(program: Program, signal: AbortSignal | undefined): Promise<Prepared> {
    const executor = await this.#open();
    const constants = await this.#constants(program);
    const engineOf = await this.#ready(executor, program, constants, signal);
    const layout = layOutRegisters(program.registers, program.results);
    const capture = this.#options.capture ?? false;
    const submission = layOutSubmission(program, layout, constants, engineOf, capture);
    const parts = { executor, layout, submission, engineOf, ...launchesOf(program) };
    if (!capture) {
      const registers = executor.registers(layout.bytes);
      return { ...parts, registers, done: () => registers.release() };
    }

    // The same instructions get the same registers, and with them their graph.
    const key = JSON.stringify([submission.constants.length, submission.instructions, submission.results]);
    const graphs = new Set(parts.launches.map(({ graph }) => graph));
    const captured = this.#captured.get(key) ?? { registers: executor.registers(layout.bytes), graphs };
    this.#captured.delete(key);
    this.#captured.set(key, captured);
    if (this.#captured.size > keptGraphs) this.#forget(this.#captured.keys().next().value!);
    const done = (failed: boolean) => {
      if (failed && this.#captured.get(key) === captured) this.#forget(key);
    };
    return { ...parts, registers: captured.registers, done };
  }

  /** Lets go of a program's CUDA graph, and of the memory that it runs in. */
  #forget(key: string): void {
    this.#captured.get(key)!.registers.release();
    this.#captured.delete(key);
  }

  async #constants(program: Pick<Program, "constants">): Promise<ReadonlyMap<string, Tensor>> {
    const tensors = new Map<string, Tensor>();
    for (const [name, constant] of Object.entries(program.constants)) {
      tensors.set(name, await this.#constantReader.tensor(name, constant));
    }
    return tensors;
  }

  /** Loads the engines of a program's launches and makes their profiles ready. */
  async #ready(
    executor: NativeExecutor,
    program: Pick<Program, "registers" | "instructions">,
    constants: ReadonlyMap<string, Tensor>,
    signal: AbortSignal | undefined,
  ): Promise<(launch: Launch) => ProfiledEngine> {
    const shapesOf = (launch: Launch): ProfileShapes =>
      Object.fromEntries(
        Object.entries(launch.inputs).map(([input, name]) => [
          input,
          (constants.get(name) ?? program.registers[name]!).shape,
        ]),
      );
    const launches = program.instructions.filter((instruction) => instruction.op === "launch");
    const graphs = new Set(launches.map(({ graph }) => graph));
    this.#checkMemory(executor, program.registers, constants, graphs);
    for (const graph of graphs) {
      const needed = new Map<string, ProfileShapes>();
      for (const launch of launches)
        if (launch.graph === graph) needed.set(shapesKey(shapesOf(launch)), shapesOf(launch));
      const engine = await this.#engine(executor, graph, [...needed.values()], graphs, signal);
      for (const key of needed.keys()) {
        const profile = engine.profiles.get(key);
        if (profile === undefined || engine.prepared.has(profile)) continue;
        signal?.throwIfAborted();
        const shapes = await executor.prepare(engine.native.id, profile).promise.catch((error: NativeError) => {
          if (error.code === "DEVICE_LOST") this.#lose(executor);
          throw explainEngine(error, graph);
        });
        engine.prepared.set(profile, shapes);
      }
    }
    // As they are now: others may load and release engines before this program has ended.
    const engines = new Map([...graphs].map((graph) => [graph, this.#engines.get(graph)!]));
    return (launch) => {
      const { native, profiles, prepared } = engines.get(launch.graph)!;
      const shapes = shapesOf(launch);
      const profile = profiles.get(shapesKey(shapes));
      if (profile === undefined)
        throw new RuntimeError(
          `The graph "${launch.graph}" (${launch.label.name}) failed: its engine has no profile for the inputs ${describe(shapes)}.`,
        );
      return { engine: native, profile, shapes: prepared.get(profile)! };
    };
  }

  /**
   * Refuses at once what would be refused after the engines have been built: weights, registers and constants that
   * the device could not hold if it were empty.
   * @throws MemoryError with both numbers
   */
  #checkMemory(
    { device }: NativeExecutor,
    registers: Program["registers"],
    constants: ReadonlyMap<string, Tensor>,
    graphs: ReadonlySet<string>,
  ): void {
    let needed = layOutRegisters(registers).bytes;
    for (const { data } of constants.values()) needed += data.byteLength;
    for (const name of graphs) for (const { length } of this.#graphs.get(name)!.externals.values()) needed += length;
    if (needed <= device.memoryBytes) return;
    throw new MemoryError(
      `This program needs at least ${gigabytes(needed)} GB of GPU memory for the weights of ${[...graphs].join(", ")} and its own values, but ${device.name} has ${gigabytes(device.memoryBytes)} GB. Draw fewer or smaller pictures at once, or use a larger GPU.`,
      needed,
      device.memoryBytes,
    );
  }

  async #engine(
    executor: NativeExecutor,
    name: string,
    needed: readonly ProfileShapes[],
    using: ReadonlySet<string>,
    signal: AbortSignal | undefined,
  ): Promise<LoadedEngine> {
    const present = this.#engines.get(name);
    if (present && needed.every((shapes) => present.profiles.has(shapesKey(shapes)))) return present;
    const graph = this.#graphs.get(name)!;
    // Disposal does not wait for a build.
    const stop = signal ? AbortSignal.any([signal, this.#closing.signal]) : this.#closing.signal;
    const { plan, identity } = await this.#options.engines.engineFor(graph, needed, present?.shapes ?? [], stop);
    signal?.throwIfAborted();
    // The old one makes room first: its weights are the same.
    this.#release(name);
    const load = () =>
      executor.load(plan, identity).promise.catch((error: NativeError) => {
        if (error.code === "DEVICE_LOST") this.#lose(executor);
        throw explainEngine(error, name);
      });
    const native = await load().catch((error) => {
      // What this program does not launch may go; it comes back from the cache when it is launched again.
      const others = [...this.#engines.keys()].filter((other) => !using.has(other));
      if (!(error instanceof MemoryError) || others.length === 0) throw error;
      this.#options.logger?.warn?.(`To make room for ${name}, the GPU lets go of ${others.join(", ")}.`);
      for (const other of others) this.#release(other);
      return load();
    });
    const shapes = native.profiles.map((dimensions) =>
      Object.fromEntries(
        native.tensors.flatMap(({ name: tensor, input }, index) => (input ? [[tensor, dimensions[index]!]] : [])),
      ),
    );
    const profiles = new Map(shapes.map((profile, index) => [shapesKey(profile), index]));
    const loaded: LoadedEngine = { native, shapes, profiles, prepared: new Map() };
    this.#engines.set(name, loaded);
    return loaded;
  }

  #release(name: string): void {
    const engine = this.#engines.get(name);
    if (!engine) return;
    engine.native.release();
    this.#engines.delete(name);
    // Else it would stay on the device with the CUDA graphs that launch it.
    for (const [key, { graphs }] of this.#captured) if (graphs.has(name)) this.#forget(key);
  }

  #open(): Promise<NativeExecutor> {
    const { addon, library, parser, kind } = this.#options;
    const attempt = async (patience: number): Promise<NativeExecutor> => {
      try {
        return await addon.openExecutor(library, parser, 0).promise;
      } catch (error) {
        // Somebody may still hold on to what was lost: a run that has just ended, another thread.
        if ((error as NativeError).code !== "DEVICE_LOST" || patience > longestPatience) throw error;
        await setTimeout(patience);
        return attempt(2 * patience);
      }
    };
    this.#opening ??= TensorRtRuntime.#closings
      .then((lost) => attempt(lost ? 1 : Number.POSITIVE_INFINITY))
      .then(
        (executor) => {
          this.#executor = executor;
          TensorRtRuntime.#onDevice.add(this);
          return executor;
        },
        (error: NativeError) => {
          this.#opening = null;
          throw explainDevice(error, kind);
        },
      );
    return this.#opening;
  }

  /** The device is lost: all runtimes let go of it, those too that have not noticed. */
  #lose(executor: NativeExecutor): void {
    if (this.#executor !== executor) return;
    for (const runtime of [...TensorRtRuntime.#onDevice]) void runtime.#drop(runtime.#executor!);
    TensorRtRuntime.#closings = TensorRtRuntime.#closings.then(() => true);
  }

  /** Lets go of a device; the next run opens it anew. */
  async #drop(executor: NativeExecutor): Promise<void> {
    if (this.#executor !== executor) return;
    this.#executor = null;
    this.#opening = null;
    TensorRtRuntime.#onDevice.delete(this);
    for (const key of [...this.#captured.keys()]) this.#forget(key);
    for (const { native } of this.#engines.values()) native.release();
    this.#engines = new Map();
    for (const close of [...this.#workspaces]) close();
    const closed = executor.close().promise;
    const before = TensorRtRuntime.#closings;
    TensorRtRuntime.#closings = closed.then(() => before);
    await closed;
  }
}

function withoutValue(name: string, cause?: unknown): RuntimeError {
  return new RuntimeError(`This program reads "${name}", which has no value, since an earlier part failed.`, { cause });
}

function beforeItBegan(cause?: unknown): DeviceLostError {
  return new DeviceLostError("The GPU was lost before this program began. Try again.", { cause });
}

function launchesOf({ instructions, results }: Pick<Program, "instructions" | "results">) {
  return { launches: instructions.filter((instruction) => instruction.op === "launch"), results };
}

function shapesKey(shapes: ProfileShapes): string {
  return describe(Object.fromEntries(Object.entries(shapes).sort(([a], [b]) => (a < b ? -1 : 1))));
}

function describe(shapes: ProfileShapes): string {
  return Object.entries(shapes)
    .map(([name, shape]) => `${name} [${shape}]`)
    .join(", ");
}

function isNative(error: unknown): error is NativeError {
  return error instanceof Error && typeof (error as NativeError).code === "string" && "log" in error;
}
