/**
 * ONNX Runtime on the CPU, the runtime that is always there. Graphs run in a child process (see process.ts), started
 * early so that loading the library overlaps with the work of the caller. This side keeps the graphs (their bytes are
 * small, weights are external), one queue of programs, and the rule that an idle child never keeps a script alive.
 */

import { parse } from "node:path";
import { onAbort, untilAborted } from "../../common/abort.js";
import type { Logger } from "../../common/logger.js";
import type { Tensor } from "../../common/tensor.js";
import { DisposedError, NotFiniteError, RuntimeDiedError, RuntimeError } from "../../errors.js";
import type { Program } from "../../program/program.js";
import { type Operand, validateProgram } from "../../program/validate.js";
import {
  type CompilableGraph,
  Preempted,
  type RunOptions,
  type Runtime,
  type SubmissionOptions,
  type Workspace,
} from "../runtime.js";
import { pack } from "./packing.js";
import { type Ending, HostProcess } from "./process.js";
import type { Failure, FinishedLaunch, FromHost, SentGraph, ToHost, Widening } from "./protocol.js";

export { resolveWeights } from "./weights.js";

export interface OnnxRuntimeOptions {
  /** Threads of one operator; default: the physical cores. */
  readonly threads?: number | undefined;
  /** 16-bit weights: "lazy" widens them at each use, "folded" once, in memory; see `resolveWeights`. */
  readonly weights: Widening;
  /** The built host.ts; default: beside this bundle. */
  readonly host?: URL | undefined;
  readonly logger?: Logger | undefined;
}

/** A program that waits or runs. */
interface Job {
  readonly program: Program;
  readonly options: RunOptions;
  settle(outcome: Outcome): void;
}

type Outcome = { readonly results: Record<string, Tensor> } | { readonly error: unknown };

const installRemedy =
  "Run `npm install onnxruntime-node`; where its download of GPU libraries fails, set ONNXRUNTIME_NODE_INSTALL=skip for that command (the CPU needs none of them).";

export class OnnxRuntime implements Runtime, AsyncDisposable {
  readonly name = "onnxruntime";
  readonly capabilities = { preemption: true, capture: false, anyShape: true };
  readonly #options: OnnxRuntimeOptions;
  readonly #graphs = new Map<string, SentGraph>();
  readonly #queue: Job[] = [];
  #host: Host | null = null;
  /** Things under way that must keep the event loop alive: starts, runs, disposal. */
  #busy = 0;
  #working: Promise<void> | null = null;
  #disposed: Promise<void> | null = null;
  #workspaces = 0;
  /** Submissions to workspaces under way. */
  readonly #submissions = new Set<Promise<unknown>>();
  /** Preempts those of them that may be. */
  readonly #preemptions = new Set<() => void>();

  /** Starts the child; nothing waits for it until `start` or the first run. */
  constructor(options: OnnxRuntimeOptions) {
    this.#options = options;
    this.#launchHost();
  }

  /**
   * Resolves when ONNX Runtime has loaded, with its version.
   * @throws RuntimeError if it cannot be loaded, RuntimeDiedError if its process ended, DisposedError
   */
  async start(): Promise<{ readonly version: string }> {
    if (this.#disposed) throw new DisposedError("This runtime");
    return this.#keepingAlive(async () => ({ version: await this.#launchHost().ready }));
  }

  add(graph: CompilableGraph): void {
    if (this.#disposed) throw new DisposedError("This runtime");
    const [weight] = graph.externals.values();
    const { root } = parse(weight?.file ?? process.cwd());
    this.#graphs.set(graph.name, { name: graph.name, bytes: graph.bytes, root });
    this.#host?.known.delete(graph.name);
  }

  has(name: string): boolean {
    return this.#graphs.has(name);
  }

  /**
   * @throws RuntimeError for a program that cannot run or a graph that fails (with ONNX Runtime's words),
   *   NotFiniteError, RuntimeDiedError, DisposedError, or `signal.reason`
   */
  async run(program: Program, options: RunOptions = {}): Promise<Record<string, Tensor>> {
    if (this.#disposed) throw new DisposedError("This runtime");
    const { signal } = options;
    signal?.throwIfAborted();
    validateProgram(program, (name) => this.has(name));
    const queued = () =>
      new Promise<Record<string, Tensor>>((resolve, reject) => {
        const leave = () => {
          const position = this.#queue.indexOf(job);
          if (position < 0) return;
          this.#queue.splice(position, 1);
          job.settle({ error: signal?.reason });
        };
        const job: Job = {
          program,
          options,
          settle(outcome) {
            signal?.removeEventListener("abort", leave);
            if ("results" in outcome) resolve(outcome.results);
            else reject(outcome.error);
          },
        };
        signal?.addEventListener("abort", leave);
        this.#queue.push(job);
        this.#working ??= this.#work();
      });
    return options.background ? queued() : this.#keepingAlive(queued);
  }

  /** Submissions are sent as soon as they are submitted; ordinary programs run between them. */
  open(): Workspace {
    if (this.#disposed) throw new DisposedError("This runtime");
    const id = this.#workspaces++;
    const host = this.#launchHost();
    const kept = new Map<string, Operand>();
    let lost = false;
    void host.process.ended.then(() => {
      lost = true;
    });
    const free = (names: readonly string[] | "all") => host.send({ type: "free", workspace: id, names });
    return {
      get lost() {
        return lost;
      },
      submit: async (program, options = {}) => {
        if (this.#disposed) throw new DisposedError("This runtime");
        options.signal?.throwIfAborted();
        if (lost) throw new RuntimeError("This workspace is gone with the process that held it; open a new one.");
        const left = validateProgram(program, (name) => this.has(name), kept);
        for (const [name, operand] of left) kept.set(name, operand);
        const outcome = this.#keepingAlive(() => this.#run(host, program, options, id));
        this.#submissions.add(outcome);
        const settled = await outcome.finally(() => this.#submissions.delete(outcome));
        if ("results" in settled) return settled.results;
        throw settled.error;
      },
      free: (names) => {
        for (const name of names) kept.delete(name);
        if (!lost) free(names);
      },
      close: () => {
        if (!lost) free("all");
        lost = true;
      },
    };
  }

  /** After the programs given so far. */
  async unload(graphs: readonly string[]): Promise<void> {
    // What is under way may be a background program, which alone would let the process end.
    await this.#keepingAlive(async () => this.#working);
    this.#host?.process.send({ type: "unload", graphs });
  }

  dispose(): Promise<void> {
    this.#disposed ??= this.#keepingAlive(async () => {
      for (const job of this.#queue.splice(0)) job.settle({ error: new DisposedError("This runtime") });
      await this.#working;
      await Promise.all(this.#submissions);
      await this.#host?.process.kill();
      this.#host = null;
      this.#graphs.clear();
    });
    return this.#disposed;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  /** One program after another until the queue is empty. */
  async #work(): Promise<void> {
    for (let job = this.#queue.shift(); job; job = this.#queue.shift()) job.settle(await this.#execute(job));
    this.#working = null;
  }

  async #execute({ program, options }: Job): Promise<Outcome> {
    try {
      const host = this.#launchHost();
      await untilAborted(host.ready, options.signal);
      // A submission may be all of somebody's request: nobody waits for that.
      for (const preempt of this.#preemptions) preempt();
      return await this.#run(host, program, options);
    } catch (error) {
      return { error: options.signal?.aborted ? options.signal.reason : error };
    }
  }

  /** Sends a program at once, behind those that were sent before. Never rejects. */
  async #run(host: Host, program: Program, options: SubmissionOptions, workspace?: number): Promise<Outcome> {
    const { signal, onLaunch, preempt } = options;
    const listening: (() => void)[] = [];
    try {
      const launches = program.instructions.filter((instruction) => instruction.op === "launch");
      const names = new Set(launches.map(({ graph }) => graph).filter((name) => !host.known.has(name)));
      const graphs = [...names].map((name) => this.#graphs.get(name)!);
      let thrown: { error: unknown } | null = null;
      const report = ({ index, milliseconds, values }: FinishedLaunch) => {
        if (thrown || signal?.aborted) return;
        try {
          onLaunch?.({ launch: launches[index]!, index, milliseconds, values });
        } catch (error) {
          thrown = { error };
          run.abort();
        }
      };
      const run = host.run(graphs, program, report, workspace);
      if (preempt) {
        this.#preemptions.add(run.preempt);
        listening.push(() => this.#preemptions.delete(run.preempt), onAbort(preempt, run.preempt));
      }
      if (signal) listening.push(onAbort(signal, run.abort));
      const outcome = await run.outcome;
      // The caller's own reasons come first, whatever the child made of its last launch.
      if (thrown) return thrown;
      if (signal?.aborted) return { error: signal.reason };
      return outcome;
    } finally {
      for (const stop of listening) stop();
    }
  }

  #launchHost(): Host {
    if (this.#host) return this.#host;
    const { threads, weights, logger, host: file = new URL("./onnxruntime-host.js", import.meta.url) } = this.#options;
    const host = new Host(file, { threads, weights });
    this.#host = host;
    host.process.keepsAlive = this.#busy > 0;
    host.ready.then(
      (version) => logger?.debug?.(`onnxruntime-node ${version} is ready in a process of its own.`),
      () => {},
    );
    void host.process.ended.then(async (ending) => {
      this.#host = null;
      if (this.#disposed) return;
      const waiting = this.#queue.splice(0);
      const error = await host.ready.then(
        () => diedError(ending),
        (reason: Error) => reason,
      );
      logger?.warn?.(error.message);
      for (const job of waiting) job.settle({ error });
    });
    return host;
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

/** A child with what it knows: the conversation of process.ts's messages. */
class Host {
  readonly process: HostProcess;
  /** Resolves with ONNX Runtime's version. */
  readonly ready: Promise<string>;
  /** Names of the graphs that it has received. */
  readonly known = new Set<string>();
  #runs = 0;
  /** Of the runs under way. */
  readonly #listeners = new Map<number, { heard(message: FromHost): void; settle(outcome: Outcome): void }>();
  /** The outcome of runs that find the child ended. */
  #end: Outcome | null = null;
  /** Messages for when the child is ready. */
  #outbox: ToHost[] | null = [];

  constructor(file: URL, settings: ConstructorParameters<typeof HostProcess>[1]) {
    let greeted: (message: FromHost) => void = () => {};
    this.process = new HostProcess(file, settings, (message) => {
      if (message.type === "ready" || message.type === "broken") greeted(message);
      else this.#listeners.get(message.id)?.heard(message);
    });
    this.ready = new Promise((resolve, reject) => {
      greeted = (message) => {
        if (message.type === "ready") {
          const waiting = this.#outbox!;
          this.#outbox = null;
          for (const message of waiting) this.process.send(message);
          resolve(message.version);
        }
        if (message.type !== "broken") return;
        reject(new RuntimeError(`onnxruntime-node cannot be loaded: ${message.message} ${installRemedy}`));
        void this.process.kill();
      };
      void this.process.ended.then((ending) => reject(diedError(ending)));
    });
    // Whoever waits for it hears of it; if nobody does, a child that cannot start is no reason to end the program.
    this.ready.catch(() => {});
    void this.process.ended.then(async (ending) => {
      // A child that never was ready ended for the reason that `ready` gives.
      this.#end = await this.ready.then(
        () => ({ error: diedError(ending) }),
        (error) => ({ error }),
      );
      for (const { settle } of this.#listeners.values()) settle(this.#end);
    });
  }

  /** Sends a message, in order, now or when the child is ready. */
  send(message: ToHost): void {
    if (this.#outbox) this.#outbox.push(message);
    else this.process.send(message);
  }

  /** Sends a program. The outcome comes when the child is done with it. */
  run(
    graphs: readonly SentGraph[],
    program: Program,
    onLaunch: (report: FinishedLaunch) => void,
    workspace: number | undefined,
  ) {
    const id = this.#runs++;
    const outcome = new Promise<Outcome>((resolve) => {
      const settle = (outcome: Outcome) => {
        this.#listeners.delete(id);
        resolve(outcome);
      };
      const heard = (message: FromHost) => {
        if (message.type === "launched" || message.type === "done")
          for (const report of message.reports) onLaunch(report);
        if (message.type === "done") settle({ results: message.results });
        if (message.type === "failed") settle({ error: errorOf(message.failure) });
      };
      this.#listeners.set(id, { heard, settle });
      if (this.#end) settle(this.#end);
    });
    this.send({ type: "run", id, graphs, program: pack(program), workspace });
    for (const { name } of graphs) this.known.add(name);
    return {
      outcome,
      abort: () => this.send({ type: "abort", id }),
      preempt: () => this.send({ type: "preempt", id }),
    };
  }
}

function errorOf(failure: Failure): Error {
  if (failure.kind === "not-finite") return new NotFiniteError(failure.where, failure.message);
  if (failure.kind === "preempted") return new Preempted(failure.launches, failure.results);
  return new RuntimeError(failure.kind === "aborted" ? "The run was stopped." : failure.message);
}

function diedError({ exitCode, signal, stderr }: Ending): RuntimeDiedError {
  const how = signal ? `was ended by ${signal}` : exitCode === null ? "could not start" : `ended with code ${exitCode}`;
  const hint =
    signal === "SIGKILL"
      ? ' The system may have run out of memory: try smaller pictures, a smaller batch or `weights: "lazy"`.'
      : "";
  const words = stderr ? ` Its last words: ${stderr}` : "";
  return new RuntimeDiedError(`The process that runs ONNX Runtime ${how}.${hint}${words}`, exitCode, signal);
}

/** What `flowturbo doctor` says about this runtime. */
export interface OnnxRuntimeProbe {
  readonly available: boolean;
  readonly version?: string;
  readonly error?: string;
  readonly remedy?: string;
}

/** Whether onnxruntime-node loads in a child process, and its version. Never rejects. */
export async function probeOnnxRuntime(options: { readonly host?: URL } = {}): Promise<OnnxRuntimeProbe> {
  const runtime = new OnnxRuntime({ weights: "lazy", host: options.host });
  try {
    return { available: true, ...(await runtime.start()) };
  } catch (error) {
    return { available: false, error: error instanceof Error ? error.message : String(error), remedy: installRemedy };
  } finally {
    await runtime.dispose();
  }
}
