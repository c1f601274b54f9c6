/**
 * ONNX Runtime, on the CPU (the runtime that is always there) or on a GPU by one of its providers. Graphs run in a child process (see process.ts), started
 * early so that loading the library overlaps with the work of the caller. This file keeps the graphs (their bytes are
 * small, weights are external), the order of programs, and the rule that an idle child never keeps a script alive.
 */

import { parse } from "node:path";
import { pathToFileURL } from "node:url";
import { onAbort, untilAborted } from "../../common/abort.js";
import type { Logger } from "../../common/logger.js";
import { packageFile } from "../../common/package.js";
import type { Tensor } from "../../common/tensor.js";
import { DisposedError } from "../../errors.js";
import type { Program } from "../../program/program.js";
import { validateProgram } from "../../program/validate.js";
import {
  type Capabilities,
  type CompilableGraph,
  isBlameless,
  type RunOptions,
  type Runtime,
  type RuntimeListener,
  type SubmissionOptions,
  type Workspace,
} from "../runtime.js";
import { NamedWorkspace, type WorkspaceOwner } from "../workspace.js";
import { HostConnection, type ReadyHost } from "./connection.js";
import type { FinishedLaunch, HostSettings, SentGraph, Widening } from "./protocol.js";

export interface OnnxRuntimeOptions extends Pick<HostSettings, "provider" | "deviceId" | "libraries" | "threads"> {
  /** Its name in the table of runtimes; default: "onnxruntime". */
  readonly name?: string | undefined;
  /** 16-bit weights: "lazy" widens them at each use, "folded" once, in memory; see `resolveWeights`. */
  readonly weights: Widening | ((graph: CompilableGraph) => Widening);
  /** Environment variables of the child, besides this process's own. */
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** The built host.ts; default: the package's. */
  readonly host?: URL | undefined;
  /** Milliseconds without a sign of life after which a child that owes an answer is replaced; default: 10 000. */
  readonly watchdogMs?: number | undefined;
  readonly listener?: RuntimeListener | undefined;
  readonly logger?: Logger | undefined;
}

const defaultWatchdogMs = 10_000;

/** Milliseconds until a child that could not be started is started again: doubled each time. */
const firstPause = 1000;
const longestPause = 60_000;

/** How often in a row a child may be killed before it works on a program until that program fails. */
const killsSurvived = 3;

export const capabilities: Capabilities = { preemption: true, capture: false, anyShape: true };

export class OnnxRuntime implements Runtime, WorkspaceOwner, AsyncDisposable {
  readonly name: string;
  readonly capabilities = capabilities;
  readonly #options: OnnxRuntimeOptions;
  readonly #graphs = new Map<string, SentGraph>();
  #host: HostConnection | null = null;
  /** Whether a child has ended and no other one has become ready since. */
  #isLost = false;
  /** Children in a row that ended before they were ready. */
  #failedStarts = 0;
  /** Starts, runs and disposals under way, which must keep the event loop alive. */
  #busy = 0;
  /** Programs that wait or run. */
  #runs = 0;
  /** Ends with the last of them. */
  #turn: Promise<unknown> = Promise.resolve();
  #disposed: Promise<void> | null = null;
  #workspaces = 0;
  /** Submissions to workspaces under way. */
  readonly #submissions = new Set<Promise<unknown>>();
  /** Preempts those of them that may be. */
  readonly #preemptions = new Set<() => void>();

  /** Starts the child; nothing waits for it until `start` or the first run. @throws InstallationError without its entry */
  constructor(options: OnnxRuntimeOptions) {
    this.name = options.name ?? "onnxruntime";
    this.#options = options;
    this.#launchHost();
  }

  /**
   * Resolves when ONNX Runtime has loaded, with its version and what its device can do.
   * @throws InstallationError if it cannot be loaded, RuntimeUnavailableError if its provider has no device,
   *   RuntimeDiedError if its process ended, DisposedError
   */
  async start(): Promise<ReadyHost> {
    this.throwIfDisposed();
    return this.#keepingAlive(() => this.#surviving((host) => host.ready));
  }

  add(graph: CompilableGraph): void {
    this.throwIfDisposed();
    const [weight] = graph.externals.values();
    const { root } = parse(weight?.file ?? process.cwd());
    const { weights } = this.#options;
    const widening = typeof weights === "function" ? weights(graph) : undefined;
    this.#graphs.set(graph.name, { name: graph.name, bytes: graph.bytes, root, widening });
    this.#host?.known.delete(graph.name);
  }

  has(name: string): boolean {
    return this.#graphs.has(name);
  }

  throwIfDisposed(): void {
    if (this.#disposed) throw new DisposedError("This runtime");
  }

  /**
   * @throws RuntimeError for a program that cannot run or a graph that fails (with ONNX Runtime's message),
   *   NotFiniteError, RuntimeDiedError, DisposedError, or `signal.reason`
   */
  async run(program: Program, options: RunOptions = {}): Promise<Record<string, Tensor>> {
    this.throwIfDisposed();
    const { signal } = options;
    signal?.throwIfAborted();
    validateProgram(program, (name) => this.has(name));
    this.#launchHost();
    const before = this.#turn;
    const isFirst = this.#runs++ === 0;
    const begin = async () => {
      signal?.throwIfAborted();
      // Disposal waits for the program in flight only.
      if (!isFirst) this.throwIfDisposed();
      return this.#surviving(async (host) => {
        await untilAborted(host.ready, signal);
        // A submission that may be preempted can be long: an ordinary program does not wait for it.
        for (const preempt of this.#preemptions) preempt();
        return this.#send(host, program, options);
      });
    };
    const outcome = before.then(begin).finally(() => this.#runs--);
    this.#turn = outcome.catch(() => {});
    const settled = () => untilAborted(before, signal).then(() => outcome);
    return options.background ? settled() : this.#keepingAlive(settled);
  }

  /** Submissions are sent as soon as they are submitted; ordinary programs run between them. */
  open(): Workspace {
    this.throwIfDisposed();
    const id = this.#workspaces++;
    const host = this.#launchHost();
    return new HostWorkspace(this, host, id, (program, options) => {
      const outcome = this.#keepingAlive(() => this.#send(host, program, options, id));
      this.#submissions.add(outcome);
      return outcome.finally(() => this.#submissions.delete(outcome));
    });
  }

  giveUp(why: string): void {
    this.#host?.giveUp(`${why}, and was replaced`, true);
  }

  /** After the programs given so far. */
  async unload(graphs: readonly string[]): Promise<void> {
    // What is under way may be a background program, which alone would let the process end.
    await this.#keepingAlive(async () => this.#turn);
    this.#host?.send({ type: "unload", graphs });
  }

  dispose(): Promise<void> {
    this.#disposed ??= this.#keepingAlive(async () => {
      await this.#turn;
      await Promise.allSettled(this.#submissions);
      await this.#host?.process.kill();
      this.#host = null;
      this.#graphs.clear();
    });
    return this.#disposed;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  /** Sends a program at once, behind those that were sent before. */
  async #send(
    host: HostConnection,
    program: Program,
    options: SubmissionOptions,
    workspace?: number,
  ): Promise<Record<string, Tensor>> {
    const { signal, onBegin, onProgress, onLaunch, preempt, reports } = options;
    const cleanUp: (() => void)[] = [];
    try {
      const launches = program.instructions.filter((instruction) => instruction.op === "launch");
      const names = new Set(launches.map(({ graph }) => graph).filter((name) => !host.known.has(name)));
      const graphs = [...names].map((name) => this.#graphs.get(name)!);
      let thrown: { error: unknown } | null = null;
      const launched = ({ index, milliseconds, values }: FinishedLaunch) => {
        if (thrown || signal?.aborted) return;
        try {
          onLaunch?.({ launch: launches[index]!, index, milliseconds, values });
        } catch (error) {
          thrown = { error };
          run.abort();
        }
      };
      const run = host.run(graphs, program, { onBegin, onProgress, onLaunch: launched, reports }, workspace);
      if (preempt) {
        this.#preemptions.add(run.preempt);
        cleanUp.push(() => this.#preemptions.delete(run.preempt), onAbort(preempt, run.preempt));
      }
      cleanUp.push(onAbort(signal, run.abort));
      return await run.outcome.finally(() => {
        // The caller's own reasons come first, whatever the child made of its last launch.
        if (thrown) throw thrown.error;
        signal?.throwIfAborted();
      });
    } finally {
      for (const each of cleanUp) each();
    }
  }

  /** Does what a child is needed for, again with a fresh one where it was killed before it worked on that. */
  async #surviving<T>(work: (host: HostConnection) => Promise<T>): Promise<T> {
    for (let kills = 1; ; kills++)
      try {
        return await work(this.#launchHost());
      } catch (error) {
        if (!isBlameless(error) || kills > killsSurvived || this.#disposed) throw error;
      }
  }

  #launchHost(): HostConnection {
    if (this.#host && !this.#host.isOver) return this.#host;
    const { logger, listener, watchdogMs: silentMs = defaultWatchdogMs } = this.#options;
    const { provider, deviceId, libraries, threads, weights, env } = this.#options;
    const file = this.#options.host ?? pathToFileURL(packageFile("dist/onnxruntime-host.js"));
    const onSilence = (milliseconds: number | null) => listener?.silent(milliseconds);
    const widening = typeof weights === "function" ? "folded" : weights;
    const settings = { provider, deviceId, libraries, threads, weights: widening };
    const host = new HostConnection(file, settings, { silentMs, onSilence }, env);
    this.#host = host;
    host.process.keepsAlive = this.#busy > 0;
    host.ready.then(
      ({ version }) => {
        logger?.debug?.(`onnxruntime-node ${version} is ready in a process of its own.`);
        if (this.#isLost) listener?.restarted();
        this.#isLost = false;
        this.#failedStarts = 0;
      },
      () => {},
    );
    void host.ended.then((error) => {
      if (this.#host === host) this.#host = null;
      if (this.#disposed) return;
      this.#isLost = true;
      logger?.warn?.(error.message);
      listener?.lost(error);
      if (!host.wasReady) this.#tryAgainLater();
    });
    return host;
  }

  /**
   * Starts a child that could not be started, without a call: a service that is not ready gets none. Later and later; it
   * keeps no process alive.
   */
  #tryAgainLater(): void {
    const pause = Math.min(longestPause, firstPause * 2 ** this.#failedStarts++);
    const timer = setTimeout(() => {
      if (!this.#disposed && this.#isLost) this.#launchHost();
    }, pause);
    timer.unref();
  }

  async #keepingAlive<T>(work: () => Promise<T>): Promise<T> {
    if (this.#busy++ === 0 && this.#host) this.#host.process.keepsAlive = true;
    try {
      return await work();
    } finally {
      if (--this.#busy === 0 && this.#host) this.#host.process.keepsAlive = false;
    }
  }
}

/** A workspace in the child: lost with it. */
class HostWorkspace extends NamedWorkspace {
  lost = false;

  constructor(
    owner: WorkspaceOwner,
    private readonly host: HostConnection,
    private readonly id: number,
    protected readonly run: (program: Program, options: SubmissionOptions) => Promise<Record<string, Tensor>>,
  ) {
    super(owner, "process");
    void host.process.ended.then(() => {
      this.lost = true;
    });
  }

  close(): void {
    this.release("all");
    this.lost = true;
  }

  protected release(names: readonly string[] | "all"): void {
    if (!this.lost) this.host.send({ type: "free", workspace: this.id, names });
  }
}
