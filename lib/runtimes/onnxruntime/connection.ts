/**
 * The messages between the runtime and one child process: what the child has received, which runs are under way in it,
 * and the error of each run where the child fails or ends. A child that owes an answer is watched: one that gives no sign
 * of life for too long (stopped, or swapped out for good) is ended, so that no call waits for ever.
 */

import { thisPlatform } from "../../common/platform.js";
import type { Tensor } from "../../common/tensor.js";
import {
  DeviceLostError,
  InstallationError,
  MemoryError,
  NotFiniteError,
  RuntimeDiedError,
  RuntimeError,
  RuntimeUnavailableError,
} from "../../errors.js";
import type { Program } from "../../program/program.js";
import { Preempted, type RunOptions } from "../runtime.js";
import { whyBroken, whyUnsupported } from "./binaries.js";
import { pack, partsOf } from "./packing.js";
import { type HostEnd, HostProcess, hostLaunch } from "./process.js";
import type { DeviceFeatures, Failure, FinishedLaunch, FromHost, HostSettings, SentGraph, ToHost } from "./protocol.js";
import { takeSpare } from "./spare.js";

/** How a child that owes an answer is watched. */
export interface WatchSettings {
  /** Milliseconds without a sign of life after which it is ended; while it starts, three times as long, and at least 30 s. */
  readonly silentMs: number;
  /** Told while it gives no sign of life, with the milliseconds since the last; null when it does again. */
  onSilence?(milliseconds: number | null): void;
}

/** A child is asked for signs of life so often within the time after which it is ended. */
const pingsWithin = 10;
/** Answers that are missing before that is told. */
const missingAnswers = 3;
/** A child that starts may have to read its files from a slow disk before it answers, and before it is ready. */
const leastStartMs = 30_000;
const longestStartMs = 120_000;

/** Whether a child answers pings: see host.ts. */
const givesSigns = !process.versions.bun && !process.versions.deno;

/** Who follows a run, and how it is reported. */
interface RunFollower extends Pick<RunOptions, "onBegin" | "onProgress" | "reports"> {
  onLaunch(report: FinishedLaunch): void;
}

/** A run under way. */
interface PendingRun {
  /** Whether the child works on it: then it may be what ends the child. */
  readonly begun: boolean;
  begin(): void;
  /** The child says which of its launches it works on. */
  progress(index: number): void;
  receive(message: FromHost): void;
  reject(error: Error): void;
}

/** A run that was sent. */
export type SentRun = ReturnType<HostConnection["run"]>;

/** What a child says when it is ready. */
export interface ReadyHost {
  readonly version: string;
  readonly features: DeviceFeatures | null;
}

export class HostConnection {
  readonly process: HostProcess;
  /** Resolves with ONNX Runtime's version, and what the device of its provider can do; null for the CPU. */
  readonly ready: Promise<ReadyHost>;
  /** Resolves when the child has ended, with the reason: that of `ready` if it never was ready. */
  readonly ended: Promise<Error>;
  /** The graphs that it has received, by digest, each with the users that have launched it since. */
  readonly #known = new Map<string, Set<object>>();
  readonly #onSilence: WatchSettings["onSilence"];
  #silentMs: number;
  #workspaces = 0;
  #isOver = false;
  #ids = 0;
  /** In the order in which they were sent. */
  readonly #runs = new Map<number, PendingRun>();
  /** The error of runs that begin after the child has ended. */
  #end: Error | null = null;
  /** Why it was ended from here, and whether its work may be the cause. */
  #givenUp: { readonly why: string; readonly duringWork: boolean } | null = null;
  /** Messages for when the child is ready. */
  #outbox: ToHost[] | null = [];
  #timer: NodeJS.Timeout | undefined;
  /** Moments of the last sign of life, of the last look at it, and of the start. */
  #heard = 0;
  #looked = 0;
  #started = performance.now();
  #isSilent = false;

  /** @param env variables of the child, besides this process's own */
  constructor(file: URL, settings: HostSettings, watch: WatchSettings, env: Readonly<Record<string, string>> = {}) {
    this.#onSilence = watch.onSilence;
    this.#silentMs = watch.silentMs;
    let ready: { resolve(host: ReadyHost): void; reject(error: Error): void };
    this.ready = new Promise((resolve, reject) => {
      ready = { resolve, reject };
    });
    const receive = (message: FromHost) => {
      this.#hear();
      if (message.type === "ready") {
        for (const waiting of this.#outbox!) this.process.send(waiting);
        this.#outbox = null;
        ready.resolve({ version: message.version, features: message.features });
      } else if (message.type === "broken") {
        const { reason, remedy } = whyBroken(message.message, thisPlatform());
        ready.reject(new InstallationError("onnxruntime-node", reason, remedy));
        void this.process.kill();
      } else if (message.type === "deviceless") {
        ready.reject(new RuntimeUnavailableError(settings.provider ?? "cpu", message.message));
        void this.process.kill();
      } else this.#runs.get(message.id)?.receive(message);
    };
    const launch = hostLaunch(file, settings.libraries, env);
    this.process = takeSpare(launch) ?? new HostProcess(launch);
    this.process.begin(settings, receive, (answer) => this.#answered(answer));
    void this.process.ended.then((ending) => {
      // Before anybody is told: who tries again needs another child.
      this.#isOver = true;
      clearInterval(this.#timer);
      // Libraries for glibc can crash with musl, where they load at all.
      const unsupported = this.#outbox && whyUnsupported(thisPlatform());
      ready.reject(
        unsupported
          ? new InstallationError("onnxruntime-node", unsupported.reason, unsupported.remedy)
          : this.#diedError(ending, false),
      );
    });
    // Each caller that waits for it gets the error; where nobody waits, a child that cannot start must not end the program.
    this.ready.catch(() => {});
    this.ended = this.process.ended
      .then((ending) => this.ready.then(() => this.#diedError(ending, false)))
      .catch((error: Error) => error);
    void Promise.all([this.process.ended, this.ended]).then(([ending, error]) => {
      this.#end = error;
      for (const { begun, reject } of this.#runs.values()) reject(begun ? this.#diedError(ending, true) : error);
    });
    this.#expect();
  }

  /** Whether the child has ever been ready. */
  get wasReady(): boolean {
    return this.#outbox === null;
  }

  /** Whether the child has ended. */
  get isOver(): boolean {
    return this.#isOver;
  }

  /** Sends a message, in order, now or when the child is ready. */
  send(message: ToHost): void {
    if (this.#outbox) this.#outbox.push(message);
    else this.process.send(message);
  }

  /** A number for a workspace in the child. */
  openWorkspace(): number {
    return this.#workspaces++;
  }

  /** How long it may be silent, from now on: see `WatchSettings`. */
  set silentMs(value: number) {
    if (value === this.#silentMs) return;
    this.#silentMs = value;
    if (!this.#timer) return;
    // It is asked as often as the limit says.
    clearInterval(this.#timer);
    this.#timer = undefined;
    this.#expect();
  }

  /** Frees those of a user's graphs that nobody else has launched. */
  unload(user: object, digests: Iterable<string> = this.#known.keys()): void {
    const graphs: string[] = [];
    for (const digest of digests) {
      const users = this.#known.get(digest);
      if (!users?.delete(user) || users.size > 0) continue;
      this.#known.delete(digest);
      graphs.push(digest);
    }
    if (graphs.length > 0) this.send({ type: "unload", graphs });
  }

  /**
   * Sends a program. The outcome comes when the child is done with it.
   * @param user whose it is: its graphs are kept for that user, until it unloads them
   * @param graphs those of the program by name
   */
  run(
    user: object,
    graphs: ReadonlyMap<string, SentGraph>,
    program: Program,
    { onBegin, onProgress, onLaunch, reports }: RunFollower,
    workspace: number | undefined,
  ) {
    const id = this.#ids++;
    const outcome = new Promise<Record<string, Tensor>>((resolve, reject) => {
      let begun = false;
      const run: PendingRun = {
        get begun() {
          return begun;
        },
        begin() {
          if (begun) return;
          begun = true;
          onBegin?.();
        },
        progress(index) {
          run.begin();
          onProgress?.(index);
        },
        reject,
        receive: (message) => {
          run.begin();
          if (message.type === "launched" || message.type === "done")
            for (const report of message.reports) onLaunch(report);
          if (message.type !== "done" && message.type !== "failed") return;
          this.#runs.delete(id);
          // The child goes on with the next one at once.
          const [next] = this.#runs.values();
          next?.begin();
          if (message.type === "done") resolve(message.results);
          else {
            const { kind } = message.failure;
            const fail = () => reject(errorOf(message.failure));
            if (kind !== "memory" && kind !== "lost") return fail();
            // Whatever was on the device: nothing of it can be relied on. Who is told may call again at once, and needs another
            // child then.
            this.giveUp(`${kind === "memory" ? "ran out of GPU memory" : "lost the GPU"}, and was replaced`, false);
            void this.process.ended.then(fail);
          }
        },
      };
      this.#runs.set(id, run);
      if (this.#end) reject(this.#end);
    });
    const missing = this.#unsent(user, graphs.values());
    const digests = Object.fromEntries([...graphs].map(([name, { digest }]) => [name, digest]));
    for (const part of partsOf(program)) this.send({ type: "part", id, ...part });
    this.send({ type: "run", id, graphs: missing, digests, program: pack(program), reports, workspace });
    this.#expect();
    return {
      outcome,
      abort: () => this.send({ type: "abort", id }),
      preempt: () => this.send({ type: "preempt", id }),
      yield: () => this.send({ type: "yield", id }),
    };
  }

  /** Has graphs compiled that are about to be launched, when nothing else is to be done. */
  prepare(user: object, graphs: Iterable<SentGraph>): void {
    const missing = this.#unsent(user, graphs);
    if (missing.length > 0) this.send({ type: "prepare", graphs: missing });
  }

  /** Those of a user's graphs that the child has not received yet; it is sent them now. */
  #unsent(user: object, graphs: Iterable<SentGraph>): SentGraph[] {
    const missing: SentGraph[] = [];
    for (const graph of graphs) {
      let users = this.#known.get(graph.digest);
      if (!users) {
        users = new Set();
        this.#known.set(graph.digest, users);
        missing.push(graph);
      }
      users.add(user);
    }
    return missing;
  }

  /**
   * Ends the child.
   * @param why completes "The process that runs ONNX Runtime …"
   * @param duringWork whether what it works on may be the cause
   */
  giveUp(why: string, duringWork: boolean): void {
    this.#givenUp ??= { why, duringWork };
    void this.process.kill();
  }

  /** An answer is expected from now on. */
  #expect(): void {
    if (this.#timer || this.#isOver || !givesSigns) return;
    const pause = this.#silentMs / pingsWithin;
    this.#heard = performance.now();
    this.#looked = this.#heard;
    this.#timer = setInterval(() => this.#look(pause), pause);
    this.#timer.unref();
  }

  #look(pause: number): void {
    const now = performance.now();
    // This process was stopped or busy: what the child has said meanwhile is still to be read.
    if (now - this.#looked > 2 * pause) {
      this.#heard = now;
      this.#started += now - this.#looked;
    }
    this.#looked = now;
    const isStarting = !this.wasReady;
    if (!isStarting && this.#runs.size === 0) {
      this.#hear();
      clearInterval(this.#timer);
      this.#timer = undefined;
      return;
    }
    const silentMs = this.#silentMs;
    const silent = now - this.#heard;
    // A thread that answers does not say that the library loads.
    if (isStarting && now - this.#started > longestStartMs) this.giveUp("did not become ready, and was ended", true);
    else if (silent > (isStarting ? Math.max(leastStartMs, 3 * silentMs) : silentMs))
      this.giveUp(`gave no sign of life for ${Math.round(silent / 1000)} s, and was replaced`, false);
    else if (!isStarting && silent > missingAnswers * pause) {
      this.#isSilent = true;
      this.#onSilence?.(silent);
    }
    this.process.ping();
  }

  /** @param answer what runs, as host.ts writes it */
  #answered(answer: string): void {
    this.#hear();
    const state = BigInt.asIntN(64, /^-?\d+$/.test(answer) ? BigInt(answer) : -1n);
    if (state >= 0n) this.#runs.get(Number(state >> 16n))?.progress(Number(state & 0xffffn));
  }

  #hear(): void {
    this.#heard = performance.now();
    if (this.#isSilent) this.#onSilence?.(null);
    this.#isSilent = false;
  }

  #diedError({ exitCode, signal, stderr }: HostEnd, begun: boolean): RuntimeDiedError {
    const what = "The process that runs ONNX Runtime";
    if (this.#givenUp) {
      const { why, duringWork } = this.#givenUp;
      return new RuntimeDiedError(`${what} ${why}.`, exitCode, signal, (begun || !this.wasReady) && duringWork);
    }
    const how = signal
      ? `was ended by ${signal}`
      : exitCode === null
        ? "could not start"
        : `ended with code ${exitCode}`;
    const hint =
      signal === "SIGKILL"
        ? ' The system may have run out of memory: try smaller pictures, a smaller batch or `weights: "lazy"`.'
        : "";
    const output = stderr ? ` It wrote: ${stderr}` : "";
    // One that ends by itself while it starts would do so again: who started it is to be told.
    const byItself = !this.wasReady && signal !== "SIGKILL" && signal !== "SIGTERM";
    return new RuntimeDiedError(`${what} ${how}.${hint}${output}`, exitCode, signal, begun || byItself);
  }
}

function errorOf(failure: Failure): Error {
  if (failure.kind === "not-finite") return new NotFiniteError(failure.where, failure.message);
  if (failure.kind === "preempted") return new Preempted(failure.launches, failure.results);
  if (failure.kind === "memory")
    return new MemoryError(
      `${failure.message} The GPU has too little memory for it: draw fewer or smaller pictures at once, set keepTextEncoders to false, or end other programs on the GPU. The next call starts a new process.`,
      failure.needed,
      failure.available,
    );
  if (failure.kind === "lost")
    return new DeviceLostError(`${failure.message} The GPU was lost; the next call starts a new process on it.`, {
      permanent: false,
    });
  return new RuntimeError(failure.kind === "aborted" ? "The run was stopped." : failure.message);
}
