/**
 * Keeps a host process for those who use it: starts it, starts it again when it has ended, tells each user of that, and
 * ends it with its last user. The models of this process that run on the same GPU share one, so that a graph which several
 * have is compiled once, and its weights are on the device once. On the CPU each model has its own: weights are mapped there,
 * threads are chosen by model, and a crash stays with the model that caused it.
 */

import type { Logger } from "../../common/logger.js";
import type { RuntimeListener } from "../runtime.js";
import { HostConnection, type SentRun } from "./connection.js";
import type { HostSettings } from "./protocol.js";

/** What runs graphs in a host process. */
export interface HostUser {
  /** Milliseconds without a sign of life after which the process is replaced, where no other user allows less. */
  readonly watchdogMs: number;
  readonly listener?: RuntimeListener | undefined;
  readonly logger?: Logger | undefined;
  /** Whether it only waits for its last work: then it is told nothing more. */
  readonly isLeaving: boolean;
}

/** What a host process is started with. */
export interface HostOptions {
  /** The built host.ts. */
  readonly file: URL;
  readonly settings: HostSettings;
  /** Environment variables besides this process's own. */
  readonly env: Readonly<Record<string, string>>;
}

/** Milliseconds until a process that could not be started is started again: doubled each time. */
const firstPause = 1000;
const longestPause = 60_000;

/** Those of GPUs, by what their process is started with, as long as they have users. */
const shared = new Map<string, HostKeeper>();

/** Variables of this process that decide what a GPU's number means, and which there are. */
const choosesGpu = /^(CUDA|NVIDIA|VK)_/;

/** A keeper for such a process: that of others on the same GPU, or one of its own. It is to be joined at once. */
export function keeperOf(options: HostOptions): HostKeeper {
  const { file, settings, env } = options;
  if ((settings.provider ?? "cpu") === "cpu") return new HostKeeper(options, () => {});
  const choices = Object.entries(process.env).filter(([name]) => choosesGpu.test(name));
  const key = JSON.stringify([file.href, settings, env, choices.sort()]);
  let keeper = shared.get(key);
  if (!keeper) {
    keeper = new HostKeeper(options, () => shared.delete(key));
    shared.set(key, keeper);
  }
  return keeper;
}

export class HostKeeper {
  readonly #options: HostOptions;
  readonly #onEmpty: () => void;
  readonly #users = new Set<HostUser>();
  /** Users that were told that the process has ended, and not yet that another one is ready. */
  readonly #lost = new Set<HostUser>();
  #connection: HostConnection | null = null;
  /** Processes in a row that ended before they were ready. */
  #failedStarts = 0;
  /** Work of users under way that must keep the event loop alive. */
  #busy = 0;
  /** Submissions under way that may be preempted, each with its user. */
  readonly #preemptible = new Map<SentRun, HostUser>();

  constructor(options: HostOptions, onEmpty: () => void) {
    this.#options = options;
    this.#onEmpty = onEmpty;
  }

  /** The process, if there is one now. */
  get current(): HostConnection | null {
    return this.#connection;
  }

  /** Starts the process if there is none. */
  join(user: HostUser): void {
    this.#users.add(user);
    this.#watch();
    try {
      this.connection();
    } catch (error) {
      // The system refused to start it.
      void this.leave(user);
      throw error;
    }
  }

  /**
   * Frees what a user has in the process, once it has sent its last message. The last user's leaving ends the process, and
   * waits for that.
   */
  async leave(user: HostUser): Promise<void> {
    if (!this.#users.delete(user)) return;
    this.#lost.delete(user);
    if (this.#users.size > 0) {
      this.#connection?.unload(user);
      this.#watch();
      return;
    }
    this.#onEmpty();
    await this.#connection?.process.kill();
    this.#connection = null;
  }

  /** The process, started if there is none. */
  connection(): HostConnection {
    if (this.#connection && !this.#connection.isOver) return this.#connection;
    const { file, settings, env } = this.#options;
    const onSilence = (milliseconds: number | null) => {
      for (const { listener } of this.#users) listener?.silent(milliseconds);
    };
    const connection = new HostConnection(file, settings, { silentMs: this.#silentMs, onSilence }, env);
    this.#connection = connection;
    connection.process.keepsAlive = this.#busy > 0;
    connection.ready.then(
      ({ version }) => {
        this.#failedStarts = 0;
        this.#log("debug", `onnxruntime-node ${version} is ready in a process of its own.`);
        for (const user of this.#lost) {
          this.#lost.delete(user);
          if (!user.isLeaving) user.listener?.restarted();
        }
      },
      () => {},
    );
    void connection.ended.then((error) => {
      if (this.#connection === connection) this.#connection = null;
      this.#log("warn", error.message);
      for (const user of this.#staying) {
        this.#lost.add(user);
        user.listener?.lost(error);
      }
      if (!connection.wasReady && this.#lost.size > 0) this.#tryAgainLater();
    });
    return connection;
  }

  async keepingAlive<T>(work: () => Promise<T>): Promise<T> {
    if (this.#busy++ === 0 && this.#connection) this.#connection.process.keepsAlive = true;
    try {
      return await work();
    } finally {
      if (--this.#busy === 0 && this.#connection) this.#connection.process.keepsAlive = false;
    }
  }

  /** A submission may be preempted, until what is returned is called. */
  mayPreempt(user: HostUser, run: SentRun): () => void {
    this.#preemptible.set(run, user);
    return () => this.#preemptible.delete(run);
  }

  /**
   * A user is about to send work. A submission that may be preempted can be long: work of others does not wait for all of it, nor does
   * an ordinary program of its own user's.
   */
  makeWay(user: HostUser, isProgram: boolean): void {
    for (const [run, owner] of this.#preemptible)
      if (owner !== user) run.yield();
      else if (isProgram) run.preempt();
  }

  get #staying(): HostUser[] {
    return [...this.#users].filter(({ isLeaving }) => !isLeaving);
  }

  get #silentMs(): number {
    return Math.min(...[...this.#users].map(({ watchdogMs }) => watchdogMs));
  }

  #watch(): void {
    if (this.#connection) this.#connection.silentMs = this.#silentMs;
  }

  /** Once to each logger, however many users have it. */
  #log(level: "debug" | "warn", message: string): void {
    for (const logger of new Set(this.#staying.map(({ logger }) => logger))) logger?.[level]?.(message);
  }

  /**
   * Starts a process that could not be started, without a call: a service that is not ready gets none. Later and later; it
   * keeps no process alive.
   */
  #tryAgainLater(): void {
    const pause = Math.min(longestPause, firstPause * 2 ** this.#failedStarts++);
    const timer = setTimeout(() => {
      if ([...this.#lost].some(({ isLeaving }) => !isLeaving)) this.connection();
    }, pause);
    timer.unref();
  }
}
