/**
 * Watches the launch that runs: a runtime that hangs in one says nothing by itself. A launch is slow if it takes longer
 * than a time limit and ten times its cost, and is taken for hung after several times as much. The first launch of a kind
 * may compile its graph, or read gigabytes of weights: it has much more time, and where its cost is not known it is only
 * reported. Time counts by looks, so that a machine or a process that was suspended does not make a launch slow.
 */

import type { AssignedLaunch } from "./scheduler.js";

/** A launch that runs. */
export interface SlowLaunch {
  /** Name of its graph. */
  readonly graph: string;
  /** What the graph runs on besides rows: "64x64" for a picture in pixels, "77 tokens" for a text. */
  readonly size: string;
  /** Rows, padding included. */
  readonly batch: number;
  /** Milliseconds since the runtime was known to begin with it, as far as it has said. */
  readonly milliseconds: number;
  /** What it usually takes, in milliseconds; null if that is not known. */
  readonly usualMs: number | null;
}

export interface LaunchWatchOptions {
  /** The least time after which a launch is slow. */
  readonly watchdogMs: number;
  /** Milliseconds that a launch takes; null if that is not known. */
  costOf(launch: AssignedLaunch): number | null;
  /** Whether such a launch has been made before: then nothing has to be compiled or read. */
  isWarm(launch: AssignedLaunch): boolean;
  /** Called once for each slow launch. */
  onSlow(launch: SlowLaunch): void;
  /** Called once for each launch that is taken for hung. */
  onHung(launch: SlowLaunch): void;
}

/** A launch is slow from this many times its cost on. */
const slowFactor = 10;
/** It is taken for hung after this many times what makes it slow. */
const hungFactor = 5;
/** The first launch of a kind may take this many times as long. */
const coldFactor = 60;
/** Looks within the time limit. */
const looksWithin = 5;

interface Watched {
  readonly launches: readonly AssignedLaunch[];
  /** Whether the runtime has begun with it: before, it may do other work than submissions. */
  begun: boolean;
  /** The launch that runs, as far as is known. */
  at: number;
  told: "nothing" | "slow" | "hung";
}

export class LaunchWatch {
  readonly #options: LaunchWatchOptions;
  readonly #pause: number;
  /** In the order in which they run. */
  readonly #submissions = new Map<number, Watched>();
  /** Milliseconds that the present launch has been seen to take, until the last look. */
  #taken = 0;
  #looked = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(options: LaunchWatchOptions) {
    this.#options = options;
    this.#pause = options.watchdogMs / looksWithin;
  }

  /** The launch that runs now, as far as it is known; null if none does. */
  get running(): SlowLaunch | null {
    const launch = this.#launch();
    if (!launch) return null;
    const { graph, size, batch } = launch;
    return { graph, size, batch, milliseconds: this.#taken + this.#sinceLook(), usualMs: this.#options.costOf(launch) };
  }

  /** A submission runs after those before. */
  submitted(id: number, launches: readonly AssignedLaunch[]): void {
    this.#submissions.set(id, { launches, begun: false, at: 0, told: "nothing" });
    if (this.#timer) return;
    this.#looked = performance.now();
    this.#timer = setInterval(() => this.#look(), this.#pause);
    this.#timer.unref();
  }

  /** The runtime begins with a submission. */
  begun(id: number): void {
    const watched = this.#submissions.get(id);
    if (!watched || watched.begun) return;
    watched.begun = true;
    this.#restart();
  }

  /** A submission is at one of its launches, those before have been made. */
  at(id: number, launch: number): void {
    const watched = this.#submissions.get(id);
    if (!watched || (watched.begun && watched.at >= launch)) return;
    Object.assign(watched, { begun: true, at: launch, told: "nothing" });
    this.#restart();
  }

  /** A submission has ended; unknown ones are ignored. */
  over(id: number): void {
    this.#submissions.delete(id);
    if (this.#submissions.size > 0) return;
    clearInterval(this.#timer);
    this.#timer = undefined;
  }

  #launch(): AssignedLaunch | undefined {
    const [first] = this.#submissions.values();
    return first?.begun ? first.launches[first.at] : undefined;
  }

  #restart(): void {
    this.#taken = 0;
    this.#looked = performance.now();
  }

  /** No more than a look takes: this process may have been suspended, and the runtime with it. */
  #sinceLook(): number {
    return Math.min(performance.now() - this.#looked, 2 * this.#pause);
  }

  #look(): void {
    this.#taken += this.#sinceLook();
    this.#looked = performance.now();
    const launch = this.#launch();
    const running = this.running;
    if (!launch || !running) return;
    const { watchdogMs, isWarm, onSlow, onHung } = this.#options;
    const isCold = running.usualMs === null || !isWarm(launch);
    const slowMs = Math.max(watchdogMs * (isCold ? coldFactor : 1), slowFactor * (running.usualMs ?? 0));
    const [first] = this.#submissions.values();
    if (running.milliseconds > slowMs && first!.told === "nothing") {
      first!.told = "slow";
      onSlow(running);
    } else if (running.milliseconds > hungFactor * slowMs && first!.told === "slow" && running.usualMs !== null) {
      first!.told = "hung";
      onHung(running);
    }
  }
}
