/**
 * Counters and histograms of a model at work, as plain data: what a service exports to whatever watches it.
 */

/** How often values fell into each range. */
export interface Histogram {
  /** Upper ends of the ranges, rising; one more count than bounds, for what is above the last. */
  readonly bounds: readonly number[];
  readonly counts: readonly number[];
  readonly count: number;
  readonly sum: number;
}

export interface Stats {
  readonly queue: {
    /** Requests that wait, and how many may. */
    readonly waiting: number;
    readonly limit: number;
  };
  readonly running: {
    readonly requests: number;
    /** Pictures of those requests. */
    readonly pictures: number;
  };
  /** Requests since the model was loaded. */
  readonly requests: {
    readonly accepted: number;
    /** Refused since the queue was full, or since they could not have been in time. */
    readonly refused: number;
    readonly completed: number;
    readonly failed: number;
    readonly aborted: number;
    /** Of the completed ones with a deadline: those that were late. */
    readonly late: number;
  };
  readonly launches: {
    readonly count: number;
    readonly rows: number;
    /** Rows that were computed for nothing, to fill a batch. */
    readonly padding: number;
    /** Rows that started again because a launch that they shared had failed. */
    readonly restarted: number;
  };
  /** How many launches had 1, 2, … rows. */
  readonly rowsPerLaunch: Readonly<Record<string, number>>;
  readonly milliseconds: {
    /** Waiting in the queue. */
    readonly queued: Histogram;
    /** From the call to the pictures. */
    readonly total: Histogram;
    /** Launches of each graph. */
    readonly launches: Readonly<Record<string, Histogram>>;
  };
}

/** 1, 2, 5, 10, … ms to a quarter of an hour. */
const bounds = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];

class Recorder {
  readonly #counts = new Array<number>(bounds.length + 1).fill(0);
  #sum = 0;
  #count = 0;

  add(value: number): void {
    const range = bounds.findIndex((bound) => value <= bound);
    this.#counts[range < 0 ? bounds.length : range]!++;
    this.#sum += value;
    this.#count++;
  }

  get histogram(): Histogram {
    return { bounds, counts: [...this.#counts], count: this.#count, sum: this.#sum };
  }
}

export type Ending = "completed" | "failed" | "aborted";

export class StatsRecorder {
  readonly #requests = { accepted: 0, refused: 0, completed: 0, failed: 0, aborted: 0, late: 0 };
  readonly #launches = { count: 0, rows: 0, padding: 0, restarted: 0 };
  readonly #rowsPerLaunch = new Map<number, number>();
  readonly #queued = new Recorder();
  readonly #total = new Recorder();
  readonly #byGraph = new Map<string, Recorder>();

  accepted(): void {
    this.#requests.accepted++;
  }

  refused(): void {
    this.#requests.refused++;
  }

  started(queuedMilliseconds: number): void {
    this.#queued.add(queuedMilliseconds);
  }

  ended(how: Ending, milliseconds: number, late: boolean): void {
    this.#requests[how]++;
    if (how !== "completed") return;
    this.#total.add(milliseconds);
    if (late) this.#requests.late++;
  }

  launched(graph: string, rows: number, batch: number, milliseconds: number): void {
    this.#launches.count++;
    this.#launches.rows += rows;
    this.#launches.padding += batch - rows;
    this.#rowsPerLaunch.set(rows, (this.#rowsPerLaunch.get(rows) ?? 0) + 1);
    const recorder = this.#byGraph.get(graph) ?? new Recorder();
    recorder.add(milliseconds);
    this.#byGraph.set(graph, recorder);
  }

  restarted(rows: number): void {
    this.#launches.restarted += rows;
  }

  snapshot(now: { waiting: number; limit: number; requests: number; pictures: number }): Stats {
    const sizes = [...this.#rowsPerLaunch].sort(([a], [b]) => a - b);
    return {
      queue: { waiting: now.waiting, limit: now.limit },
      running: { requests: now.requests, pictures: now.pictures },
      requests: { ...this.#requests },
      launches: { ...this.#launches },
      rowsPerLaunch: Object.fromEntries(sizes),
      milliseconds: {
        queued: this.#queued.histogram,
        total: this.#total.histogram,
        launches: Object.fromEntries([...this.#byGraph].map(([graph, recorder]) => [graph, recorder.histogram])),
      },
    };
  }
}
