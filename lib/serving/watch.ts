/**
 * Watches the launch that runs: a runtime that hangs in one says nothing by itself. A launch is slow if it takes longer
 * than a time limit and ten times its cost, and is taken for hung after several times as much. A launch whose cost is not
 * known may compile its graph, or read gigabytes of weights: it is neither.
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
  /** Milliseconds since the launch before it was reported, or since the runtime began with it. */
  readonly milliseconds: number;
  /** What it usually takes, in milliseconds; null if that is not known. */
  readonly usualMs: number | null;
}

export interface LaunchWatchOptions {
  /** The least time after which a launch is slow. */
  readonly watchdogMs: number;
  /** Milliseconds that a launch takes; null if that is not known. */
  costOf(launch: AssignedLaunch): number | null;
  /** Called once for each slow launch. */
  onSlow(launch: SlowLaunch): void;
  /** Called once for each launch that is taken for hung. */
  onHung(launch: SlowLaunch): void;
}

/** A launch is slow from this many times its cost on. */
const slowFactor = 10;
/** It is taken for hung after this many times what makes it slow. */
const hungFactor = 5;
/** Looks within the time limit. */
const looksWithin = 5;

interface Watched {
  readonly launches: readonly AssignedLaunch[];
  /** Whether the runtime has begun with it: before, it may do other work than submissions. */
  begun: boolean;
  /** Launches that have been reported. */
  made: number;
  told: "nothing" | "slow" | "hung";
}

export class LaunchWatch {
  readonly #options: LaunchWatchOptions;
  /** In the order in which they run. */
  readonly #submissions = new Map<number, Watched>();
  /** Since when the first of them shows no progress. */
  #since = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(options: LaunchWatchOptions) {
    this.#options = options;
  }

  /** The launch that runs now, as far as it has been reported; null if none does. */
  get running(): SlowLaunch | null {
    const [first] = this.#submissions.values();
    const launch = first?.begun && first.launches[first.made];
    if (!launch) return null;
    const { graph, size, batch } = launch;
    const usualMs = this.#options.costOf(launch);
    return { graph, size, batch, milliseconds: performance.now() - this.#since, usualMs };
  }

  /** A submission runs after those before. */
  submitted(id: number, launches: readonly AssignedLaunch[]): void {
    this.#submissions.set(id, { launches, begun: false, made: 0, told: "nothing" });
    if (this.#timer) return;
    this.#timer = setInterval(() => this.#look(), this.#options.watchdogMs / looksWithin);
    this.#timer.unref();
  }

  /** The runtime begins with a submission. */
  begun(id: number): void {
    const watched = this.#submissions.get(id);
    if (!watched) return;
    watched.begun = true;
    this.#since = performance.now();
  }

  /** So many launches of a submission have been made. */
  made(id: number, launches: number): void {
    const watched = this.#submissions.get(id);
    if (!watched) return;
    watched.begun = true;
    watched.made = launches;
    watched.told = "nothing";
    this.#since = performance.now();
  }

  /** A submission has ended; unknown ones are ignored. */
  over(id: number): void {
    this.#submissions.delete(id);
    if (this.#submissions.size > 0) return;
    clearInterval(this.#timer);
    this.#timer = undefined;
  }

  #look(): void {
    const launch = this.running;
    if (!launch || launch.usualMs === null) return;
    const { watchdogMs, onSlow, onHung } = this.#options;
    const slowMs = Math.max(watchdogMs, slowFactor * launch.usualMs);
    const [first] = this.#submissions.values();
    if (launch.milliseconds > slowMs && first!.told === "nothing") {
      first!.told = "slow";
      onSlow(launch);
    }
    if (launch.milliseconds > hungFactor * slowMs && first!.told === "slow") {
      first!.told = "hung";
      onHung(launch);
    }
  }
}
