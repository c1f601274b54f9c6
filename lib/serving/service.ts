/**
 * Serves requests of a model at the same time. Before any work it chooses the candidate that fits a time limit, or refuses
 * and says when to try again; then it admits requests by priority, and hands their rows to the dispatcher.
 */

import { Gate } from "../common/gate.js";
import type { Tensor } from "../common/tensor.js";
import { DeadlineError, QueueFullError, RuntimeError, TimeoutError } from "../errors.js";
import type { Program } from "../program/program.js";
import type { DeviceName, Runtime } from "../runtimes/runtime.js";
import { Calibration, type CalibrationOptions } from "./calibration.js";
import { type CostEntry, CostTable, hostGraph } from "./costs.js";
import type { Choice } from "./deadline.js";
import { Dispatcher, type DispatcherOptions, type Job } from "./dispatcher.js";
import { type Health, HealthMonitor } from "./health.js";
import type { MeasureOptions } from "./measure.js";
import { type Accepted, type AloneTimes, type CandidateWork, Predictor, type Terms } from "./prediction.js";
import { byPriority, type Priority } from "./priority.js";
import { Progress } from "./progress.js";
import { isLostForGood } from "./station.js";
import { type Ending, type Refusal, type Stats, StatsRecorder } from "./stats.js";
import type { CostStore } from "./store.js";

/** One more device that serves a model. */
export interface FurtherDevice {
  readonly runtime: Runtime;
  /** The stored costs. */
  readonly known: readonly CostEntry[];
  readonly store: CostStore;
  /** For people who look into the stored table. */
  readonly about: Readonly<Record<string, unknown>>;
}

export interface ServiceOptions extends CalibrationOptions, Omit<DispatcherOptions, "costs" | "stats" | "onSlow"> {
  /** Requests that may wait to be admitted. */
  readonly maxQueue: number;
  /** Hears what befalls the runtime; default: one that does not. */
  readonly monitor?: HealthMonitor;
  /** Spreads the times that refused callers are told, from 0 to 1; default: Math.random. */
  readonly random?: () => number;
  /** The devices by name, in their order, for statistics and events; default: they are not told apart. */
  readonly devices?: readonly DeviceName[] | undefined;
}

/** A request that has been admitted. */
export interface Admitted extends Choice {
  readonly queuedMs: number;
  run(job: Pick<Job, "rows" | "reports" | "onLaunch">): Promise<Record<string, Tensor>[]>;
  /** Ends the request with its work. @returns what the work results in */
  complete<T>(work: Promise<T>): Promise<T>;
}

export class Service {
  /** What launches cost on the first device. */
  readonly costs: CostTable;
  /** What they cost on each, in their order. */
  readonly tables: readonly CostTable[];
  readonly #options: ServiceOptions;
  readonly #batches: readonly number[];
  readonly #stats: StatsRecorder;
  readonly #monitor: HealthMonitor;
  readonly #admission: Gate<Priority>;
  readonly #dispatcher: Dispatcher;
  readonly #accepted = new Set<Accepted>();
  readonly #predictor: Predictor;
  /** Of each device. */
  readonly #calibrations: readonly Calibration[];
  #sequence = 0;

  /**
   * @param known the stored costs
   * @param others devices that serve the model as well, with runtimes of the same kind
   */
  constructor(
    runtime: Runtime,
    known: readonly CostEntry[],
    options: ServiceOptions,
    others: readonly FurtherDevice[] = [],
  ) {
    this.#options = options;
    const { store, about } = options;
    const all: readonly FurtherDevice[] = [{ runtime, known, store, about }, ...others];
    this.tables = all.map(({ known }) => new CostTable(known));
    this.costs = this.tables[0]!;
    this.#stats = new StatsRecorder(options.devices);
    const { maxQueue, captured, monitor = new HealthMonitor() } = options;
    this.#monitor = monitor;
    const batches = [...new Set(options.batches)].sort((a, b) => a - b);
    // Captured programs have one row.
    this.#batches = captured ? [1] : batches;
    // Few pictures are in flight at a time, so that memory is bounded and a request of high priority need not wait for all
    // that came before.
    const there = () => this.#dispatcher.there;
    const capacity = () => 2 * batches.at(-1)! * there().length;
    this.#admission = new Gate({ limit: maxQueue, capacity, compare: byPriority });
    this.#predictor = new Predictor(this.tables, this.#batches, this.#accepted, { ...options, capacity, there });
    const onSlow = monitor.slow.bind(monitor);
    monitor.events.on("lost", ({ error, device }) => this.#lost(error, device));
    const shared = { ...options, batches: this.#batches, stats: this.#stats, onSlow };
    this.#calibrations = all.map(
      ({ runtime, store, about }, index) =>
        new Calibration(runtime, this.tables[index]!, { ...shared, store, about }, () => this.#admission.idle()),
    );
    this.#dispatcher = new Dispatcher(
      all.map(({ runtime }) => runtime),
      { ...shared, costs: this.tables },
    );
  }

  stats(): Stats {
    const { waiting, inside } = this.#admission;
    const now = {
      queue: { waiting, limit: this.#options.maxQueue },
      running: { requests: inside.entries, pictures: inside.weight },
      runtime: this.#monitor.counters,
    };
    // The last one that is lost stays where rows go, and fails them.
    return this.#stats.snapshot(
      now,
      this.there.filter((device) => !this.#monitor.isLost(device)),
    );
  }

  /** Indices of the devices that are not lost for good; all if the last one is. */
  get there(): readonly number[] {
    return this.#dispatcher.there;
  }

  /** Whether calls are answered. @param closed why none are taken; null where they are */
  health(closed: "draining" | "disposed" | null): Health {
    return this.#monitor.report(this.#dispatcher.running, closed);
  }

  /**
   * Waits until a request may work.
   * @param candidates the richest first; without a time limit the first is taken
   * @param onAccept called when the request has been accepted, with its place in the queue; must not throw
   * @returns the candidate that was chosen, and what runs its programs; `complete` must follow
   * @throws QueueFullError or DeadlineError before any work; `signal.reason`
   */
  async admit(
    terms: Terms,
    candidates: readonly CandidateWork[],
    onAccept?: (accepted: Choice & AloneTimes & { readonly place: number }) => void,
  ): Promise<Admitted> {
    const { arrival, pictures, signal, deadlineMs } = terms;
    this.#predictor.called();
    this.#refuseIfFull(terms, candidates);
    if (deadlineMs !== null) {
      await this.#onEach((each) => each.learn(candidates, terms)).catch((error) => {
        this.#note(error);
        throw error;
      });
      signal?.throwIfAborted();
      this.#refuseIfFull(terms, candidates);
    }
    const promised = deadlineMs === null ? null : arrival + deadlineMs;
    // Launches have to be done somewhat before the pictures.
    const host = this.costs.estimate(hostGraph, terms.size, pictures) ?? 0;
    const due = deadlineMs === null ? null : arrival + deadlineMs / this.#predictor.margin.value - host;
    const priority: Priority = { level: terms.priority, due, arrival, sequence: this.#sequence++ };
    // Also what is refused: the costs that it is refused by may be wrong.
    for (const each of this.#calibrationsThere) each.remember(candidates);
    const isBack = this.#predictor.isBack(terms);
    const chosen = this.#predictor.choose(priority, terms, candidates);
    if (chosen instanceof DeadlineError) {
      if (this.#accepted.size === 0) for (const each of this.#calibrationsThere) each.rest({ isAfterWork: false });
      this.#refuse(chosen, chosen.retryAfterMs === null ? "impossible" : "deadline");
    }

    const candidate = candidates[chosen.candidate]!;
    const price = this.#predictor.price(candidate, terms);
    const warmOn = this.there.filter((index) => this.#calibrations[index]!.isWarm(candidate));
    const accepted: Accepted = {
      ...{ priority, promised, pictures, at: performance.now(), isInside: false, launchedMs: 0, device: null },
      ...{ price, progress: new Progress(price.units) },
      undisturbed: this.#accepted.size === 0 && warmOn.length > 0,
    };
    for (const other of this.#accepted) other.undisturbed = false;
    this.#accepted.add(accepted);
    this.#stats.requests.accepted++;
    if (onAccept) {
      const alone = this.#predictor.alone(chosen.candidate, terms, candidates);
      onAccept({ ...chosen, ...alone, place: this.#admission.placeOf(priority, pictures) });
    }
    const entering = this.#admission.enter(priority, pictures, signal, isBack);
    const leave = await entering.catch((error) => {
      this.#end(accepted, terms, this.#endingOf(error, signal));
      throw error;
    });
    accepted.isInside = true;
    const queuedMs = performance.now() - arrival;
    this.#stats.queued.add(queuedMs);
    return {
      ...this.#predictor.chooseAgain(accepted, chosen, terms, candidates),
      queuedMs,
      run: (job) => this.#run(job, accepted, terms),
      complete: async (work) => {
        let ending: Ending = "failed";
        try {
          const result = await work;
          ending = "completed";
          const total = performance.now() - arrival;
          if (accepted.undisturbed && (accepted.device === null || warmOn.includes(accepted.device)))
            this.#calibrations[0]!.observeHost(terms, total - queuedMs - accepted.launchedMs);
          return result;
        } catch (error) {
          ending = this.#endingOf(error, signal);
          throw error;
        } finally {
          this.#end(accepted, terms, ending);
          leave();
        }
      },
    };
  }

  /**
   * Measures the launches of row programs at the batches given, puts them into the table and stores it: on one device after
   * another, so that none disturbs the times of another.
   * @throws what the runtime or the file system throws, or `signal.reason`
   */
  async measure(
    programs: readonly Program[],
    batches: readonly number[],
    options: Pick<MeasureOptions, "rounds" | "signal" | "onProgress">,
  ): Promise<void> {
    const measured = this.#options.captured ? this.#batches : batches;
    const devices = this.#calibrationsThere;
    for (const [index, each] of devices.entries())
      await each.measure(programs, measured, {
        ...options,
        onProgress: (done, total) => options.onProgress?.(index * total + done, devices.length * total),
      });
  }

  /** Keeps the tables for later, if they have changed. @throws the file system's error */
  async store(): Promise<void> {
    for (const each of this.#calibrations) await each.store();
  }

  /** Forgets all costs, here and on disk. @throws the file system's error */
  async reset(): Promise<void> {
    for (const each of this.#calibrations) await each.reset();
  }

  /** The runtimes free what these graphs were compiled to: their next launches are slower. */
  forget(graphs: readonly string[]): void {
    this.#dispatcher.forget(graphs);
  }

  /** The runtime has been lost, with all that it had loaded. Times of requests under way hold its start as well. */
  lost(): void {
    this.#lost(null, undefined);
  }

  /** @param device number of the one that is lost; undefined where there is only one */
  #lost(error: Error | null, device: number | undefined): void {
    const index = Math.max(0, this.#options.devices?.findIndex(({ number }) => number === device) ?? 0);
    this.#calibrations[index]!.lost();
    for (const accepted of this.#accepted) accepted.undisturbed = false;
    if (isLostForGood(error)) this.#dispatcher.lose(index);
  }

  /** Those of the devices that are not lost for good. */
  get #calibrationsThere(): readonly Calibration[] {
    return this.there.map((index) => this.#calibrations[index]!);
  }

  /** Does something on all devices at once. One that is lost meanwhile does not count while others are left. */
  async #onEach(work: (calibration: Calibration) => Promise<void>): Promise<void> {
    const devices = this.there;
    await Promise.all(
      devices.map((index) =>
        work(this.#calibrations[index]!).catch((error) => {
          if (!isLostForGood(error)) throw error;
          this.#dispatcher.lose(index);
          if (this.there.includes(index)) throw error;
        }),
      ),
    );
  }

  /** Waits until no request is under way. */
  async close(): Promise<void> {
    // A launch that is measured in the background keeps no process alive, but a caller who waits here for its end needs
    // the event loop (Node would end with code 13).
    const alive = setInterval(() => {}, 2 ** 30);
    try {
      for (const each of this.#calibrations) await each.stop();
      await this.#admission.idle();
      await this.#dispatcher.idle();
    } finally {
      clearInterval(alive);
    }
    this.#dispatcher.close();
    await this.store().catch((error) => this.#options.onError?.(error));
  }

  /** Before work that a request needs to be admitted, such as decoding a picture. @throws QueueFullError */
  refuseEarly(terms: Terms): void {
    if (!this.#isFull(terms)) return;
    this.#predictor.called();
    this.#refuseIfFull(terms, []);
  }

  #refuseIfFull(terms: Terms, candidates: readonly CandidateWork[]): void {
    if (!this.#isFull(terms)) return;
    const { waiting } = this.#admission;
    const retryAfterMs = this.#predictor.placeAfter(this.#options.maxQueue, terms, candidates);
    this.#refuse(
      new QueueFullError(
        `${waiting} request${waiting === 1 ? " waits" : "s wait"}, which is as many as may; try again in ${retryAfterMs} ms.`,
        waiting,
        retryAfterMs,
      ),
      "queueFull",
    );
  }

  /**
   * Also if the places that are free are kept for others. Who comes back when it was told to has a place, for which the queue may be a
   * quarter longer: the times that are told are forecasts.
   */
  #isFull(terms: Terms): boolean {
    const { maxQueue } = this.#options;
    const { waiting } = this.#admission;
    const isFull = this.#admission.isFull(terms.pictures);
    if (this.#predictor.isBack(terms)) return isFull && waiting >= maxQueue + Math.ceil(maxQueue / 4);
    if (isFull) return true;
    const kept = this.#predictor.placesKept;
    return kept > 0 && waiting > 0 && waiting + kept >= maxQueue;
  }

  #refuse(error: Error, why: Refusal): never {
    this.#stats.requests.refused[why]++;
    throw error;
  }

  #endingOf(error: unknown, signal: AbortSignal | undefined): Ending {
    if (signal?.aborted && error === signal.reason) return error instanceof TimeoutError ? "timedOut" : "aborted";
    this.#note(error);
    return "failed";
  }

  /** Remembers a failure that was not the caller's. */
  #note(error: unknown): void {
    if (error instanceof RuntimeError) this.#monitor.failed(error);
  }

  #end(accepted: Accepted, { arrival }: Terms, ending: Ending): void {
    const now = performance.now();
    const { promised } = accepted;
    const isLate = promised !== null && now > promised;
    this.#stats.ended(ending, now - arrival, isLate);
    if (promised !== null && ending === "completed") this.#predictor.margin.observe(isLate, accepted.at);
    this.#accepted.delete(accepted);
    if (this.#accepted.size === 0) for (const each of this.#calibrationsThere) each.rest();
  }

  #run(
    { rows, reports, onLaunch }: Pick<Job, "rows" | "reports" | "onLaunch">,
    accepted: Accepted,
    { pin, signal }: Terms,
  ) {
    const { progress } = accepted;
    const run = progress.begin(rows);
    return this.#dispatcher.run({
      ...{ rows, reports, priority: accepted.priority, pin, signal },
      onPlaced: (row, device) => progress.placed(run, row, device),
      onRestart: (row) => progress.again(run, row),
      onLaunch: (row, report, first) => {
        // Times of what is made twice are no part of the launches' cost.
        if (progress.made(run, row, report.index)) accepted.undisturbed = false;
        if (first) accepted.launchedMs += report.milliseconds;
        // Launches of several devices run side by side: their times say nothing about the rest.
        accepted.device ??= report.device;
        if (accepted.device !== report.device) accepted.undisturbed = false;
        this.#calibrations[report.device]!.launched(report);
        onLaunch?.(row, report, first);
      },
    });
  }
}

/** Powers of two, and the largest batch itself. */
export function batchesUpTo(maxBatch: number): number[] {
  const batches: number[] = [];
  for (let batch = 1; batch < maxBatch; batch *= 2) batches.push(batch);
  return [...batches, maxBatch];
}
