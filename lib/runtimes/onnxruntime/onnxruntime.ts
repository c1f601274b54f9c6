/**
 * ONNX Runtime, on the CPU (the runtime that is always there) or on a GPU by one of its providers. Graphs run in a child process (see process.ts), started
 * early so that loading the library overlaps with the work of the caller, and shared on a GPU (see host-keeper.ts). This file keeps the graphs (their bytes are
 * small, weights are external), the order of programs, and the rule that an idle child never keeps a script alive.
 */

import { createHash } from "node:crypto";
import { parse } from "node:path";
import { onAbort, untilAborted } from "../../common/abort.js";
import type { FileVersion } from "../../common/files.js";
import type { Logger } from "../../common/logger.js";
import type { StoredTensor, Tensor } from "../../common/tensor.js";
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
import type { HostConnection, ReadyHost } from "./connection.js";
import { type HostKeeper, type HostUser, keeperOf } from "./host-keeper.js";
import type { FinishedLaunch, HostSettings, SentGraph, Widening } from "./protocol.js";
import { packagedHost } from "./spare.js";
import { foldingPays } from "./weights.js";

export interface OnnxRuntimeOptions extends Pick<HostSettings, "provider" | "deviceId" | "libraries" | "threads"> {
  /** Its name in the table of runtimes; default: "onnxruntime". */
  readonly name?: string | undefined;
  /** 16-bit weights: "lazy" widens them at each use, "folded" once, in memory; see `resolveWeights`. */
  readonly weights: Widening | ((graph: CompilableGraph) => Widening);
  /** Where one request is all that is expected, "folded" weights are lazy in graphs that it launches too rarely; default: false. */
  readonly foldsOnlyWhatPays?: boolean | undefined;
  /** Folder of optimised graphs, absolute; none are kept without it. */
  readonly optimised?: string | undefined;
  /** Files of weights as they were when they were opened: graphs of other versions are others. */
  readonly files?: readonly FileVersion[] | undefined;
  /** Environment variables of the child, besides this process's own. */
  readonly env?: Readonly<Record<string, string>> | undefined;
  /** The built host.ts; default: the package's. */
  readonly host?: URL | undefined;
  /** Milliseconds without a sign of life after which a child that owes an answer is replaced; default: 10 000. */
  readonly watchdogMs?: number | undefined;
  readonly listener?: RuntimeListener | undefined;
  readonly logger?: Logger | undefined;
}

/** Bytes of weights that may be in the file of an optimised graph. */
const mostRewritten = 16e6;

const defaultWatchdogMs = 10_000;

/** How often in a row a child may be killed before it works on a program until that program fails. */
const killsSurvived = 3;

export const capabilities: Capabilities = { preemption: true, capture: false, anyShape: true };

export class OnnxRuntime implements Runtime, WorkspaceOwner, AsyncDisposable {
  readonly name: string;
  readonly capabilities = capabilities;
  readonly #options: OnnxRuntimeOptions;
  readonly #graphs = new Map<string, SentGraph>();
  readonly #keeper: HostKeeper;
  readonly #user: HostUser;
  /** Programs that wait or run. */
  #runs = 0;
  /** Ends with the last of them. */
  #turn: Promise<unknown> = Promise.resolve();
  #disposed: Promise<void> | null = null;
  readonly #workspaces = new Set<HostWorkspace>();
  /** Submissions to workspaces under way. */
  readonly #submissions = new Set<Promise<unknown>>();
  /** How often the only request that is expected launches a graph. */
  #launches: ((graph: string) => number) | null = null;

  /** Starts the child; nothing waits for it until `start` or the first run. @throws InstallationError without its entry */
  constructor(options: OnnxRuntimeOptions) {
    this.name = options.name ?? "onnxruntime";
    this.#options = options;
    const { provider, deviceId, libraries, threads, weights, env = {}, watchdogMs, listener, logger } = options;
    const file = options.host ?? packagedHost();
    const settings = {
      provider,
      deviceId,
      libraries,
      threads,
      weights: typeof weights === "function" ? "folded" : weights,
      optimised: options.optimised,
    } as const;
    const isLeaving = () => this.#disposed !== null;
    this.#user = {
      ...{ watchdogMs: watchdogMs ?? defaultWatchdogMs, listener, logger },
      get isLeaving() {
        return isLeaving();
      },
    };
    this.#keeper = keeperOf({ file, settings, env });
    this.#keeper.join(this.#user);
  }

  /**
   * Resolves when ONNX Runtime has loaded, with its version and what its device can do.
   * @throws InstallationError if it cannot be loaded, RuntimeUnavailableError if its provider has no device,
   *   RuntimeDiedError if its process ended, DisposedError
   */
  async start(): Promise<ReadyHost> {
    this.throwIfDisposed();
    return this.#keeper.keepingAlive(() => this.#surviving((host) => host.ready));
  }

  expect(launches: (graph: string) => number): boolean {
    const { foldsOnlyWhatPays = false, weights } = this.#options;
    if (weights !== "folded" || !foldsOnlyWhatPays) return false;
    this.#launches = launches;
    return true;
  }

  add(graph: CompilableGraph): void {
    this.throwIfDisposed();
    const [weight] = graph.externals.values();
    const { root } = parse(weight?.file ?? process.cwd());
    const { files = [] } = this.#options;
    const widening = this.#wideningOf(graph);
    const read = new Set([...graph.externals.values()].map(({ file }) => file));
    const versions = files.filter(({ file }) => read.has(file));
    // The bytes have the places of the weights, and an optimised graph that is kept may have some of their values.
    const digest = createHash("sha256")
      .update(JSON.stringify([root, widening, versions]))
      .update(graph.bytes)
      .digest("hex");
    const old = this.#graphs.get(graph.name);
    this.#graphs.set(graph.name, { digest, bytes: graph.bytes, root, widening, mayBeKept: mayBeKept(graph) });
    if (old && old.digest !== digest) this.#keeper.current?.unload(this.#user, [old.digest]);
  }

  #wideningOf(graph: CompilableGraph): Widening {
    const { weights } = this.#options;
    if (typeof weights === "function") return weights(graph);
    const stored = [...graph.externals.values()].filter(({ dtype }) => dtype === "F16" || dtype === "BF16");
    return this.widening(
      graph.name,
      stored.reduce((sum, { length }) => sum + length, 0),
    );
  }

  /** How a graph with so many bytes of 16-bit weights has them. */
  widening(graph: string, bytesOf16Bit: number): Widening {
    const { weights } = this.#options;
    if (typeof weights === "function" || weights === "lazy") return "lazy";
    return !this.#launches || foldingPays(this.#launches(graph), bytesOf16Bit) ? "folded" : "lazy";
  }

  has(name: string): boolean {
    return this.#graphs.has(name);
  }

  prepare(graphs: readonly string[]): void {
    // On a GPU a graph takes memory that is planned for what runs.
    if (this.#disposed || (this.#options.provider ?? "cpu") !== "cpu") return;
    this.#keeper.current?.prepare(
      this.#user,
      graphs.map((name) => this.#graphs.get(name)!),
    );
  }

  throwIfDisposed(): void {
    if (this.#disposed) throw new DisposedError("This runtime");
  }

  /**
   * @throws RuntimeError for a program that cannot run or a graph that fails (with ONNX Runtime's message),
   *   NotFiniteError, MemoryError and DeviceLostError of a GPU, RuntimeDiedError, DisposedError, or `signal.reason`
   */
  async run(program: Program, options: RunOptions = {}): Promise<Record<string, Tensor>> {
    this.throwIfDisposed();
    const { signal } = options;
    signal?.throwIfAborted();
    validateProgram(program, (name) => this.has(name));
    this.#keeper.connection();
    const before = this.#turn;
    const isFirst = this.#runs++ === 0;
    const begin = async () => {
      signal?.throwIfAborted();
      // Disposal waits for the program in flight only.
      if (!isFirst) this.throwIfDisposed();
      return this.#surviving(async (host) => {
        await untilAborted(host.ready, signal);
        this.#keeper.makeWay(this.#user, true);
        return this.#send(host, program, options);
      });
    };
    const outcome = before.then(begin).finally(() => this.#runs--);
    this.#turn = outcome.catch(() => {});
    const settled = () => untilAborted(before, signal).then(() => outcome);
    return options.background ? settled() : this.#keeper.keepingAlive(settled);
  }

  /** Submissions are sent as soon as they are submitted; ordinary programs run between them. */
  open(): Workspace {
    this.throwIfDisposed();
    const host = this.#keeper.connection();
    const id = host.openWorkspace();
    const submit = (program: Program, options: SubmissionOptions) => {
      this.#keeper.makeWay(this.#user, false);
      const outcome = this.#keeper.keepingAlive(() => this.#send(host, program, options, id));
      this.#submissions.add(outcome);
      return outcome.finally(() => this.#submissions.delete(outcome));
    };
    const workspace: HostWorkspace = new HostWorkspace(this, host, id, submit, () =>
      this.#workspaces.delete(workspace),
    );
    this.#workspaces.add(workspace);
    return workspace;
  }

  giveUp(why: string): void {
    this.#keeper.current?.giveUp(`${why}, and was replaced`, true);
  }

  /** After the programs given so far. */
  async unload(graphs: readonly string[]): Promise<void> {
    // What is under way may be a background program, which alone would let the process end.
    await this.#keeper.keepingAlive(async () => this.#turn);
    const digests = graphs.map((name) => this.#graphs.get(name)?.digest).filter((digest) => digest !== undefined);
    this.#keeper.current?.unload(this.#user, digests);
  }

  dispose(): Promise<void> {
    this.#disposed ??= this.#keeper.keepingAlive(async () => {
      await this.#turn;
      await Promise.allSettled(this.#submissions);
      for (const workspace of this.#workspaces) workspace.close();
      await this.#keeper.leave(this.#user);
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
      const graphs = new Map(launches.map(({ graph }) => [graph, this.#graphs.get(graph)!]));
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
      const run = host.run(
        this.#user,
        graphs,
        program,
        { onBegin, onProgress, onLaunch: launched, reports },
        workspace,
      );
      if (preempt) {
        cleanUp.push(this.#keeper.mayPreempt(this.#user, run), onAbort(preempt, run.preempt));
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
        return await work(this.#keeper.connection());
      } catch (error) {
        if (!isBlameless(error) || kills > killsSurvived || this.#disposed) throw error;
      }
  }
}

/**
 * Whether the file of the optimised graph is small. ONNX Runtime orders float32 weights of convolutions as its kernels read them, and makes
 * those of 8 bits unsigned: they are in the file then, in place of the checkpoint's own. Behind a cast weights stay where they are.
 */
function mayBeKept({ externals }: CompilableGraph): boolean {
  const isRewritten = ({ dtype, shape }: StoredTensor) => (dtype === "F32" && shape.length > 2) || dtype === "I8";
  const rewritten = [...externals.values()].filter(isRewritten);
  return rewritten.reduce((sum, { length }) => sum + length, 0) <= mostRewritten;
}

/** A workspace in the child: lost with it. */
class HostWorkspace extends NamedWorkspace {
  lost = false;

  constructor(
    owner: WorkspaceOwner,
    private readonly host: HostConnection,
    private readonly id: number,
    protected readonly run: (program: Program, options: SubmissionOptions) => Promise<Record<string, Tensor>>,
    private readonly onGone: () => void,
  ) {
    super(owner, "process");
    void host.process.ended.then(() => this.#gone());
  }

  close(): void {
    this.release("all");
    this.#gone();
  }

  #gone(): void {
    this.lost = true;
    this.onGone();
  }

  protected release(names: readonly string[] | "all"): void {
    if (!this.lost) this.host.send({ type: "free", workspace: this.id, names });
  }
}
