/**
 * Serves requests of a model at the same time. Before any work it chooses the candidate that fits a time limit, or refuses
 * and says when to try again; then it admits requests by priority, and hands their rows to the dispatcher.
 */

import { Gate } from "../common/gate.js";
import type { Tensor } from "../common/tensor.js";
import { DeadlineError, QueueFullError, RuntimeError, TimeoutError } from "../errors.js";
import type { Program } from "../program/program.js";
import type { Runtime } from "../runtimes/runtime.js";
import { Calibration, type CalibrationOptions } from "./calibration.js";
import { type CostEntry, CostTable, hostGraph } from "./costs.js";
import type { Choice } from "./deadline.js";
import { Dispatcher, type DispatcherOptions, type Job } from "./dispatcher.js";
import { type Health, HealthMonitor } from "./health.js";
import type { MeasureOptions } from "./measure.js";
import { type Accepted, type AloneTimes, type CandidateWork, Predictor, type Terms } from "./prediction.js";
import { byPriority, type Priority } from "./priority.js";
import { Progress } from "./progress.js";
import { type Ending, type Refusal, type Stats, StatsRecorder } from "./stats.js";

export interface ServiceOptions extends CalibrationOptions, Omit<DispatcherOptions, "costs" | "stats" | "onSlow"> {
  /** Requests that may wait to be admitted. */
  readonly maxQueue: number;
  /** Hears what befalls the runtime; default: one that does not. */
  readonly monitor?: HealthMonitor;
  /** Spreads the times that refused callers are told, from 0 to 1; default: Math.random. */
  readonly random?: () => number;
}

/** A request that has been admitted. */
export interface Admitted extends Choice {
  readonly queuedMs: number;
  run(job: Pick<Job, "rows" | "reports" | "onLaunch">): Promise<Record<string, Tensor>[]>;
  /** Ends the request with its work. @returns what the work results in */
  complete<T>(work: Promise<T>): Promise<T>;
}

export class Service {
  readonly costs: CostTable;
  readonly #options: ServiceOptions;
  readonly #batches: readonly number[];
  readonly #stats = new StatsRecorder();
  readonly #monitor: HealthMonitor;
  readonly #admission: Gate<Priority>;
  readonly #dispatcher: Dispatcher;
  readonly #accepted = new Set<Accepted>();
  readonly #predictor: Predictor;
  readonly #calibration: Calibration;
  #sequence = 0;

  /** @param known the stored costs */
  constructor(runtime: Runtime, known: readonly CostEntry[], options: ServiceOptions) {
    this.#options = options;
    this.costs = new CostTable(known);
    const { maxQueue, captured, monitor = new HealthMonitor() } = options;
    this.#monitor = monitor;
    const batches = [...new Set(options.batches)].sort((a, b) => a - b);
    // Captured programs have one row.
    this.#batches = captured ? [1] : batches;
    // Few pictures are in flight at a time, so that memory is bounded and a request of high priority need not wait for all
    // that came before.
    const capacity = 2 * batches.at(-1)!;
    this.#admission = new Gate({ limit: maxQueue, capacity, compare: byPriority });
    this.#predictor = new Predictor(this.costs, this.#batches, this.#accepted, { ...options, capacity });
    const onSlow = monitor.slow.bind(monitor);
    monitor.events.on("lost", () => this.lost());
    const shared = { ...options, batches: this.#batches, costs: this.costs, stats: this.#stats, onSlow };
    this.#calibration = new Calibration(runtime, this.costs, shared, () => this.#admission.idle());
    this.#dispatcher = new Dispatcher(runtime, shared);
  }

  stats(): Stats {
    const { waiting, inside } = this.#admission;
    return this.#stats.snapshot({
      queue: { waiting, limit: this.#options.maxQueue },
      running: { requests: inside.entries, pictures: inside.weight },
      runtime: this.#monitor.counters,
    });
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
      await this.#calibration.learn(candidates, terms).catch((error) => {
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
    this.#calibration.remember(candidates);
    const isBack = this.#predictor.isBack(terms);
    const chosen = this.#predictor.choose(priority, terms, candidates);
    if (chosen instanceof DeadlineError) {
      if (this.#accepted.size === 0) this.#calibration.rest({ isAfterWork: false });
      this.#refuse(chosen, chosen.retryAfterMs === null ? "impossible" : "deadline");
    }

    const candidate = candidates[chosen.candidate]!;
    const price = this.#predictor.price(candidate, terms);
    const accepted: Accepted = {
      ...{ priority, promised, pictures, at: performance.now(), isInside: false, launchedMs: 0 },
      ...{ price, progress: new Progress(price.units) },
      undisturbed: this.#accepted.size === 0 && this.#calibration.isWarm(candidate),
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
          if (accepted.undisturbed) this.#calibration.observeHost(terms, total - queuedMs - accepted.launchedMs);
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
   * Measures the launches of row programs at the batches given, puts them into the table and stores it.
   * @throws what the runtime or the file system throws, or `signal.reason`
   */
  measure(
    programs: readonly Program[],
    batches: readonly number[],
    options: Pick<MeasureOptions, "rounds" | "signal" | "onProgress">,
  ): Promise<void> {
    return this.#calibration.measure(programs, this.#options.captured ? this.#batches : batches, options);
  }

  /** Keeps the table for later, if it has changed. @throws the file system's error */
  store(): Promise<void> {
    return this.#calibration.store();
  }

  /** Forgets all costs, here and on disk. @throws the file system's error */
  reset(): Promise<void> {
    return this.#calibration.reset();
  }

  /** The runtime frees what these graphs were compiled to: their next launches are slower. */
  forget(graphs: readonly string[]): void {
    this.#dispatcher.forget(graphs);
  }

  /** The runtime has been lost, with all that it had loaded. Times of requests under way hold its start as well. */
  lost(): void {
    this.#calibration.lost();
    for (const accepted of this.#accepted) accepted.undisturbed = false;
  }

  /** Waits until no request is under way. */
  async close(): Promise<void> {
    // A launch that is measured in the background keeps no process alive, but a caller who waits here for its end needs
    // the event loop (Node would end with code 13).
    const alive = setInterval(() => {}, 2 ** 30);
    try {
      await this.#calibration.stop();
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
    if (this.#accepted.size === 0) this.#calibration.rest();
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
      onRestart: (row) => progress.again(run, row),
      onLaunch: (row, report, first) => {
        // Times of what is made twice are no part of the launches' cost.
        if (progress.made(run, row, report.index)) accepted.undisturbed = false;
        if (first) accepted.launchedMs += report.milliseconds;
        this.#calibration.launched(report);
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
