/**
 * Counters and histograms of a model at work, as plain data, for monitoring.
 */

import type { DeviceName } from "../runtimes/runtime.js";

/** How often values fell into each range. */
export interface Histogram {
  /** Upper ends of the ranges, in milliseconds, rising. */
  readonly bounds: readonly number[];
  /** Values in each range: one more than `bounds`, the last for values above the last bound. */
  readonly counts: readonly number[];
  /** Number of all values. */
  readonly count: number;
  /** Sum of all values, in milliseconds. */
  readonly sum: number;
}

/** What a device has done since the model was loaded. */
export interface DeviceStats extends DeviceName {
  /** Whether it is lost for good. */
  readonly lost: boolean;
  /** Runs of networks for requests. */
  readonly launches: number;
  /** Rows of them, without padding: a row is one picture or text. */
  readonly rows: number;
  /** Milliseconds that they took. */
  readonly milliseconds: number;
}

/** What a model has done since it was loaded, and what it does now. */
export interface Stats {
  /** Requests that wait. */
  readonly queue: {
    /** Requests that wait to be admitted. */
    readonly waiting: number;
    /** How many may wait: the option `maxQueue`. */
    readonly limit: number;
  };
  /** Requests that have been admitted. */
  readonly running: {
    /** Requests that have been admitted and are not over. */
    readonly requests: number;
    /** Pictures of those requests. */
    readonly pictures: number;
  };
  /** Numbers of requests since the model was loaded. */
  readonly requests: {
    /** Those that were not refused. */
    readonly accepted: number;
    /** Refused before any work, by reason. */
    readonly refused: {
      /** As many requests waited as may. */
      readonly queueFull: number;
      /** No schedule fitted the time limit beside the requests of others. */
      readonly deadline: number;
      /** No schedule fits the time limit, whatever else is drawn. */
      readonly impossible: number;
    };
    /** Ended with pictures. */
    readonly completed: number;
    /** Ended by an error. */
    readonly failed: number;
    /** Ended by their signal, or by an error of a handler of events. */
    readonly aborted: number;
    /** Ended by their `timeoutMs`. */
    readonly timedOut: number;
    /** Of the completed ones with a time limit: those that were late. */
    readonly late: number;
  };
  /** Runs of networks for requests. */
  readonly launches: {
    /** Runs. */
    readonly count: number;
    /** Rows of all launches, without padding: a row is one picture or text. */
    readonly rows: number;
    /** Rows that were computed only to fill a batch. */
    readonly padding: number;
    /** Rows that started again because a launch that they shared had failed. */
    readonly restarted: number;
  };
  /** What the model runs on: a process, or a device. */
  readonly runtime: {
    /** How often it was lost and started again. */
    readonly restarts: number;
    /** Launches that took far longer than they cost. */
    readonly slowLaunches: number;
  };
  /** Of a model that was loaded with `devices`: what each of them has done, in their order. Absent otherwise. */
  readonly devices?: readonly DeviceStats[];
  /** How many launches had 1, 2, … rows. */
  readonly rowsPerLaunch: Readonly<Record<string, number>>;
  /** Times, in milliseconds. */
  readonly milliseconds: {
    /** From the call until the request was admitted. */
    readonly queued: Histogram;
    /** From the call to the pictures, of completed requests. */
    readonly total: Histogram;
    /** Launches, by graph. */
    readonly launches: Readonly<Record<string, Histogram>>;
  };
}

/** 1, 2, 5, 10, … ms to a quarter of an hour. */
const bounds = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];

class Recorder implements Histogram {
  readonly bounds = bounds;
  readonly counts = new Array<number>(bounds.length + 1).fill(0);
  count = 0;
  sum = 0;

  add(value: number): void {
    const range = bounds.findIndex((bound) => value <= bound);
    this.counts[range < 0 ? bounds.length : range]!++;
    this.sum += value;
    this.count++;
  }
}

export type Ending = "completed" | "failed" | "aborted" | "timedOut";

/** Why a request was refused. */
export type Refusal = keyof Stats["requests"]["refused"];

export class StatsRecorder {
  readonly requests = {
    accepted: 0,
    refused: { queueFull: 0, deadline: 0, impossible: 0 },
    ...{ completed: 0, failed: 0, aborted: 0, timedOut: 0, late: 0 },
  };
  readonly launches = { count: 0, rows: 0, padding: 0, restarted: 0 };
  readonly queued = new Recorder();
  readonly #rowsPerLaunch: Record<string, number> = {};
  readonly #total = new Recorder();
  readonly #byGraph: Record<string, Recorder> = {};
  readonly #devices: (DeviceName & { launches: number; rows: number; milliseconds: number })[];

  /** @param devices those that are counted apart; default: none */
  constructor(devices: readonly DeviceName[] = []) {
    this.#devices = devices.map(({ number, name }) => ({ number, name, launches: 0, rows: 0, milliseconds: 0 }));
  }

  ended(how: Ending, milliseconds: number, isLate: boolean): void {
    this.requests[how]++;
    if (how !== "completed") return;
    this.#total.add(milliseconds);
    if (isLate) this.requests.late++;
  }

  /** @param device index of the device that made it */
  launched(graph: string, rows: number, batch: number, milliseconds: number, device = 0): void {
    const own = this.#devices[device];
    if (own) {
      own.launches++;
      own.rows += rows;
      own.milliseconds += milliseconds;
    }
    this.launches.count++;
    this.launches.rows += rows;
    this.launches.padding += batch - rows;
    this.#rowsPerLaunch[rows] = (this.#rowsPerLaunch[rows] ?? 0) + 1;
    this.#byGraph[graph] ??= new Recorder();
    this.#byGraph[graph].add(milliseconds);
  }

  /**
   * A copy of everything, with what is under way.
   * @param there indices of the devices that are not lost for good
   */
  snapshot(now: Pick<Stats, "queue" | "running" | "runtime">, there: readonly number[] = []): Stats {
    const { requests, launches, queued } = this;
    // Keys that are integers come in rising order.
    const rowsPerLaunch = this.#rowsPerLaunch;
    const milliseconds = { queued, total: this.#total, launches: this.#byGraph };
    const devices = this.#devices.map((device, index) => ({ ...device, lost: !there.includes(index) }));
    const own = devices.length > 0 && { devices };
    return structuredClone({ ...now, requests, launches, ...own, rowsPerLaunch, milliseconds });
  }
}
