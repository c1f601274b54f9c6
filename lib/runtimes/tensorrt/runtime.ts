/**
 * TensorRT and TensorRT-RTX: programs on a GPU. Graphs become engines at their first launch, from the cache where it
 * holds them; a program becomes one submission to the native executor, which runs it without asking JavaScript again.
 * This file keeps the order of programs: each is prepared and submitted after those that were given before it.
 */

import { untilAborted } from "../../common/abort.js";
import type { Logger } from "../../common/logger.js";
import type { Tensor } from "../../common/tensor.js";
import { DisposedError, MemoryError } from "../../errors.js";
import type { Program } from "../../program/program.js";
import { ConstantReader } from "../../program/stored.js";
import { validateProgram } from "../../program/validate.js";
import type { Capabilities, CompilableGraph, LaunchReport, RunOptions, Runtime, Workspace } from "../runtime.js";
import type { NativeExecutor, NativeExecutorStatistics } from "./addon.js";
import { CapturedPrograms } from "./capture.js";
import { type DeviceOptions, SharedDevice } from "./device.js";
import { type EngineSource, LoadedEngines } from "./engines.js";
import type { TensorRtKind } from "./flavours.js";
import { layOutRegisters, layOutSubmission } from "./layout.js";
import { type PreparedRun, type Run, submit } from "./run.js";
import { type DeviceOwner, DeviceWorkspace } from "./workspace.js";

export interface TensorRtRuntimeOptions extends DeviceOptions {
  readonly engines: EngineSource;
  /** Replays each program as one CUDA graph from its second run on: the least latency, but no stop between launches. */
  readonly capture?: boolean | undefined;
  readonly logger?: Logger | undefined;
}

export const capabilities: Capabilities = { preemption: false, capture: true, anyShape: false };

export class TensorRtRuntime implements Runtime, DeviceOwner, AsyncDisposable {
  readonly name: TensorRtKind;
  readonly capabilities = capabilities;
  readonly device: SharedDevice;
  readonly engines: LoadedEngines;
  readonly #capture: boolean;
  readonly #captured: CapturedPrograms;
  readonly #graphs = new Map<string, CompilableGraph>();
  readonly #constantReader = new ConstantReader();
  readonly #runs = new Set<Run>();
  readonly #workspaces = new Set<Workspace>();
  readonly #closing = new AbortController();
  /** Ends when everything before has been submitted. */
  #turn: Promise<unknown> = Promise.resolve();
  /** Ends when everything that has been submitted has ended. */
  #last: Promise<unknown> = Promise.resolve();
  #disposed: Promise<void> | null = null;

  constructor(options: TensorRtRuntimeOptions) {
    const { engines: source, capture = false, logger } = options;
    this.name = options.kind;
    this.#capture = capture;
    const captured = new CapturedPrograms(logger);
    this.#captured = captured;
    this.device = new SharedDevice(options, () => {
      captured.clear();
      this.engines.clear();
      for (const workspace of [...this.#workspaces]) workspace.close();
    });
    this.engines = new LoadedEngines({
      ...{ device: this.device, source, graphs: this.#graphs, closing: this.#closing.signal, logger },
      onRelease: (graph) => captured.forgetLaunchesOf(graph),
    });
  }

  /** Opens the device. @throws RuntimeUnavailableError if there is none, DeviceLostError, DisposedError */
  async start(): Promise<{ readonly device: NativeExecutor["device"] }> {
    this.throwIfDisposed();
    return { device: (await this.device.open()).device };
  }

  add(graph: CompilableGraph): void {
    this.throwIfDisposed();
    this.#graphs.set(graph.name, graph);
    this.engines.release(graph.name);
  }

  has(name: string): boolean {
    return this.#graphs.has(name);
  }

  throwIfDisposed(): void {
    if (this.#disposed) throw new DisposedError("This runtime");
  }

  /**
   * @throws RuntimeError for a program that cannot run, CompileError, MemoryError (GPU or host), LaunchError,
   *   NotFiniteError, DeviceLostError, RuntimeUnavailableError, DisposedError, or `signal.reason`
   */
  async run(program: Program, options: RunOptions = {}): Promise<Record<string, Tensor>> {
    this.throwIfDisposed();
    options.signal?.throwIfAborted();
    if (this.device.lost) throw this.device.lost;
    validateProgram(program, (name) => this.has(name));
    let begun = false;
    const onLaunch = (report: LaunchReport) => {
      begun = true;
      options.onLaunch?.(report);
    };
    const attempt = () => this.execute({ ...options, onLaunch }, (signal) => this.#prepare(program, signal));
    return attempt().catch((error) => {
      // What is lacking may be the memory of CUDA graphs that are kept for later.
      if (!(error instanceof MemoryError) || begun || this.#captured.size === 0 || this.#disposed) throw error;
      this.#captured.clear();
      return attempt();
    });
  }

  open(): Workspace {
    this.throwIfDisposed();
    if (this.device.lost) throw this.device.lost;
    const workspace = new DeviceWorkspace(this, (closed) => this.#workspaces.delete(closed));
    this.#workspaces.add(workspace);
    return workspace;
  }

  async unload(graphs: readonly string[]): Promise<void> {
    // After what was submitted so far: an engine is not taken from a program that is about to launch it.
    const turn = this.#turn.then(() => {
      for (const name of graphs) this.engines.release(name);
    });
    this.#turn = turn;
    await turn;
  }

  /** Counters of the process's executor, which all runtimes on the device share; null before the first run. */
  statistics(): NativeExecutorStatistics | null {
    return this.device.executor?.statistics() ?? null;
  }

  dispose(): Promise<void> {
    this.#disposed ??= (async () => {
      const reason = new DisposedError("This runtime");
      this.#closing.abort(reason);
      // What has not begun is withdrawn; what runs may end.
      for (const run of this.#runs) if (run.native?.withdraw()) run.stopped ??= { reason };
      await this.#turn;
      await this.#last;
      await this.device.close();
      this.#graphs.clear();
    })();
    return this.#disposed;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  /**
   * Prepares and submits in the order of the calls, then waits for the end.
   * @param missed called, in that order, for what is never submitted
   */
  execute(
    options: RunOptions,
    prepare: (signal: AbortSignal | undefined) => Promise<PreparedRun>,
    missed: () => void = () => undefined,
  ): Promise<Record<string, Tensor>> {
    const { signal } = options;
    const run: Run = { options, native: null, stopped: null };
    // Disposal waits for what has begun.
    const isFirst = this.#runs.size === 0;
    this.#runs.add(run);
    const begin = async () => {
      if (!isFirst) this.#closing.signal.throwIfAborted();
      signal?.throwIfAborted();
      const prepared = await prepare(signal).catch((error) => {
        // Where another runtime has noticed meanwhile that the device is lost, it was closed for this one too.
        throw signal?.aborted ? error : (this.device.lost ?? error);
      });
      if (signal?.aborted) prepared.done?.(true);
      signal?.throwIfAborted();
      const outcome = submit(run, prepared, this.device, this.#last);
      this.#last = Promise.allSettled([this.#last, outcome]).then(() => undefined);
      return { outcome };
    };
    const submitted = this.#turn.then(() =>
      begin().catch((error) => {
        missed();
        throw error;
      }),
    );
    this.#turn = submitted.catch(() => undefined);
    const outcome = submitted.then(({ outcome }) => outcome).finally(() => this.#runs.delete(run));
    // The caller may be answered before, by an abort.
    outcome.catch(() => undefined);
    // An abort that comes before the submission is answered at once, however far the preparation is.
    return untilAborted(submitted, signal).then(() => outcome);
  }

  async constants(program: Pick<Program, "constants">): Promise<ReadonlyMap<string, Tensor>> {
    const tensors = new Map<string, Tensor>();
    for (const [name, constant] of Object.entries(program.constants)) {
      tensors.set(name, await this.#constantReader.tensor(name, constant));
    }
    return tensors;
  }

  async #prepare(program: Program, signal: AbortSignal | undefined): Promise<PreparedRun> {
    const executor = await this.device.open();
    const constants = await this.constants(program);
    const engineOf = await this.engines.ready(executor, program, constants, signal);
    const layout = layOutRegisters(program.registers, program.results);
    const submission = layOutSubmission(program, layout, constants, engineOf, this.#capture);
    const parts = { layout, submission, engineOf, program };
    if (!this.#capture) {
      const registers = executor.registers(layout.bytes);
      return { ...parts, registers, done: () => registers.release() };
    }
    const { registers, done } = this.#captured.use(executor, submission, layout.bytes, program);
    return { ...parts, registers, done, notCaptured: (reason) => this.#captured.warn(reason) };
  }
}
