/**
 * The desk of a model: every request passes here. It knows what everything costs, and so it says before any work which
 * schedule fits a time limit, whom it has to refuse and when to come again; then it lets requests in, most urgent first, and
 * hands their rows to the dispatcher, which runs them side by side.
 *
 * A time limit is a promise. It is given only if, by the costs and served in the order of urgency, the newcomer is done in
 * time and nobody who has been promised a time comes late for it.
 */

import type { Tensor } from "../common/tensor.js";
import { DeadlineError, QueueFullError } from "../errors.js";
import type { Program } from "../program/program.js";
import type { LaunchReport, Runtime } from "../runtimes/runtime.js";
import { Admission } from "./admission.js";
import { type CostEntry, CostTable, entryOf } from "./costs.js";
import { chooseRung, limitFor, Margin } from "./deadline.js";
import { Dispatcher } from "./dispatcher.js";
import { type MeasureOptions, measure, type Sample, type Subject, samplesOf, subjectsOf } from "./measure.js";
import { comparePriorities, type Priority } from "./priority.js";
import type { GraphShapes } from "./rows.js";
import type { RowLaunch } from "./scheduler.js";
import { cheapestSplit } from "./split.js";
import { type Ending, type Stats, StatsRecorder } from "./stats.js";
import type { CostStore } from "./store.js";

/** What is not in launches: noise, tokens, pixels to bytes, messages. An entry of the table like any graph. */
const host = "host";
const hostObservationsKept = 15;
const hostObservationsNeeded = 3;

/** Milliseconds that are assumed of a request about which nothing is known. */
const unknownCost = 1000;

/** Launches are measured in the background where one takes at most this long. */
const backgroundLimit = 2000;
/** The model has been idle for so long when that begins. */
const backgroundDelay = 250;
const backgroundRounds = 7;
/** Timed runs of what a request with a time limit needs to know. */
const urgentRounds = 3;

export interface ServiceOptions {
  /** Numbers of pictures that a launch may have, at least one. */
  readonly batches: readonly number[];
  readonly maxWaitMs: number;
  readonly pinBatch: number | null;
  readonly maxQueue: number;
  /** Whether costs that are not known are measured when nobody asks for pictures. */
  readonly background: boolean;
  /** Whether each picture runs as one program, sharing nothing: what can be replayed as one CUDA graph. */
  readonly whole?: boolean;
  /** Shapes of a graph, which the runtime is told of when it is first needed. */
  readonly graph: (name: string) => GraphShapes;
  readonly store: CostStore;
  /** For people who look into the stored table. */
  readonly about: Readonly<Record<string, unknown>>;
  readonly onError?: (error: unknown) => void;
}

/** Rows that all run the same program, but for values. */
export interface Demand {
  readonly program: Program;
  readonly rows: number;
}

/** A way to draw what was asked for. */
export interface Rung {
  readonly blocks: string;
  readonly demands: readonly Demand[];
}

export interface Order {
  readonly priority: number;
  /** Moment of the call. */
  readonly arrival: number;
  readonly deadlineMs: number | null;
  readonly pictures: number;
  /** Of the finished pictures, such as "64x64". */
  readonly size: string;
  readonly pin: number | null;
  readonly signal?: AbortSignal | undefined;
}

export interface Job {
  readonly rows: readonly Program[];
  readonly onLaunch?: ((row: number, report: LaunchReport, first: boolean) => void) | undefined;
}

/** A request that has been let in. */
export interface Admitted {
  /** Index of the way to draw it. */
  readonly rung: number;
  /** Why that one; null without a time limit. */
  readonly reason: string | null;
  /** From the call to the pictures; null if the costs are not known. */
  readonly predictedMs: number | null;
  readonly queuedMs: number;
  run(job: Job): Promise<Record<string, Tensor>[]>;
}

/** Launches of a row's program that cost the same, and how many they are. */
interface LaunchKind extends Pick<RowLaunch, "graph" | "size" | "maxRows"> {
  readonly times: number;
}

type Choice = Pick<Admitted, "rung" | "reason" | "predictedMs">;

interface Accepted {
  /** Its deadline is somewhat before the one that was promised: that is what everybody works towards. */
  readonly claim: Priority;
  /** Moment that was promised. */
  readonly promised: number | null;
  /** Milliseconds that its work takes when it has the device to itself. */
  cost: number;
  /** Its launches in units of their cost for one row, and how many of them are done. */
  weight: number;
  done: number;
  /** Milliseconds of its launches. */
  launched: number;
  /** Whether nobody else has been there at any time, and nothing had to be compiled. */
  undisturbed: boolean;
}

export class Service {
  readonly costs: CostTable;
  readonly #runtime: Runtime;
  readonly #options: ServiceOptions;
  readonly #batches: readonly number[];
  readonly #stats = new StatsRecorder();
  readonly #admission: Admission;
  readonly #dispatcher: Dispatcher;
  readonly #accepted = new Set<Accepted>();
  readonly #margin = new Margin();
  readonly #kinds = new WeakMap<Program, readonly LaunchKind[]>();
  readonly #hostTimes = new Map<string, number[]>();
  /** Launches that have been asked for and whose costs are not all known. */
  readonly #unmeasured = new Map<string, Sample>();
  /** Milliseconds a row of what has run here, by graph and size. Graphs that are not here have yet to be compiled. */
  readonly #seen = new Map<string, number>();
  readonly #closing = new AbortController();
  #background: Promise<void> | null = null;
  #timer: NodeJS.Timeout | null = null;
  #idle: (() => void)[] = [];
  #stored: number;
  #sequence = 0;

  /** @param known the stored costs */
  constructor(runtime: Runtime, known: readonly CostEntry[], options: ServiceOptions) {
    this.#runtime = runtime;
    this.#options = options;
    this.costs = new CostTable(known);
    this.#stored = this.costs.version;
    const { maxWaitMs, pinBatch, maxQueue, graph, whole } = options;
    const batches = [...new Set(options.batches)].sort((a, b) => a - b);
    const maxBatch = batches.at(-1)!;
    // Pictures that share nothing go one by one.
    this.#batches = whole ? [1] : batches;
    this.#admission = new Admission(maxQueue, 2 * maxBatch);
    this.#dispatcher = new Dispatcher(runtime, {
      batches: this.#batches,
      maxBatch,
      maxWait: maxWaitMs,
      pin: pinBatch,
      whole: whole ?? false,
      graph,
      costs: this.costs,
      stats: this.#stats,
    });
  }

  /** Values that are held for requests under way: 0 when there are none. */
  get held(): number {
    return this.#dispatcher.held;
  }

  stats(): Stats {
    return this.#stats.snapshot({
      waiting: this.#admission.waiting,
      limit: this.#admission.limit,
      ...this.#admission.running,
    });
  }

  /**
   * Lets a request in, then draws it.
   * @param rungs ways to draw it, the richest first; without a time limit the first is taken
   * @param draw gets the way that was chosen
   * @throws QueueFullError or DeadlineError before any work; what `draw` throws; `signal.reason`
   */
  async serve<T>(order: Order, rungs: readonly Rung[], draw: (admitted: Admitted) => Promise<T>): Promise<T> {
    const { arrival, pictures, signal, deadlineMs } = order;
    if (deadlineMs !== null) {
      this.#refuseIfFull(pictures);
      await this.#learn(rungs, order);
      signal?.throwIfAborted();
    }
    const promised = deadlineMs === null ? null : arrival + deadlineMs;
    const deadline = deadlineMs === null ? null : arrival + deadlineMs / this.#margin.value;
    const claim: Priority = { priority: order.priority, deadline, arrival, sequence: this.#sequence++ };
    this.#refuseIfFull(pictures);
    const chosen = this.#choose(claim, order, rungs);
    for (const { demands } of rungs)
      for (const sample of samplesOf(demands.map(({ program }) => program)))
        if (subjectsOf([sample], this.#batches).some(({ graph, size, batch }) => !this.costs.get(graph, size, batch)))
          this.#unmeasured.set(keyOf(sample), sample);

    const accepted: Accepted = {
      claim,
      promised,
      ...this.#workOf(rungs[chosen.rung]!, order),
      done: 0,
      launched: 0,
      undisturbed: this.#accepted.size === 0 && this.#isWarm(rungs[chosen.rung]!),
    };
    for (const other of this.#accepted) other.undisturbed = false;
    this.#accepted.add(accepted);
    this.#stats.accepted();
    let leave = () => {};
    let ending: Ending = "failed";
    try {
      leave = await this.#admission.enter(claim, pictures, signal);
      const queuedMs = performance.now() - arrival;
      this.#stats.started(queuedMs);
      const result = await draw({
        ...this.#chooseAgain(accepted, chosen, order, rungs),
        queuedMs,
        run: (job) => this.#run(job, accepted, order),
      });
      ending = "completed";
      const total = performance.now() - arrival;
      if (accepted.undisturbed) this.#observeHost(order, total - queuedMs - accepted.launched);
      return result;
    } catch (error) {
      if (signal?.aborted && error === signal.reason) ending = "aborted";
      throw error;
    } finally {
      const now = performance.now();
      const isLate = promised !== null && now > promised;
      this.#stats.ended(ending, now - arrival, isLate);
      if (promised !== null && ending === "completed") this.#margin.observe(isLate);
      this.#accepted.delete(accepted);
      leave();
      this.#rest();
    }
  }

  /**
   * Measures samples at the batches given, puts them into the table and stores it.
   * @throws what the runtime or the file system throws, or `signal.reason`
   */
  async profile(
    samples: readonly Sample[],
    batches: readonly number[],
    options: Pick<MeasureOptions, "rounds" | "signal" | "onProgress">,
  ): Promise<void> {
    // Programs of their own have no other batch.
    const subjects = subjectsOf(samples, this.#options.whole ? this.#batches : batches);
    const entries = await this.#measure(subjects, { ...options, turn: () => this.#untilIdle() });
    for (const entry of entries) this.costs.set(entry);
    await this.store();
  }

  /** Keeps the table for later. @throws the file system's error */
  async store(): Promise<void> {
    this.#stored = this.costs.version;
    await this.#options.store.write(this.costs.entries, this.#options.about);
  }

  /** Waits until no request is under way. */
  async close(): Promise<void> {
    this.#closing.abort(new Error("The model is being disposed."));
    if (this.#timer) clearTimeout(this.#timer);
    // A launch that is measured in the background keeps no process alive, but whoever waits here for its end must not
    // lose the event loop (Node would end with code 13).
    const alive = setInterval(() => {}, 2 ** 30);
    try {
      await this.#background;
      await this.#untilIdle();
      await this.#dispatcher.idle();
    } finally {
      clearInterval(alive);
    }
    this.#dispatcher.close();
    if (this.costs.version !== this.#stored) await this.store().catch((error) => this.#options.onError?.(error));
  }

  // ── Choice ───────────────────────────────────────────────────────────────────────────────────────────────────────────

  #refuseIfFull(pictures: number): void {
    if (!this.#admission.isFull(pictures)) return;
    this.#stats.refused();
    const { waiting } = this.#admission;
    // The time in which one of those who are there ends, as the device is shared.
    const retryAfterMs = Math.max(1, Math.ceil(this.#backlog() / this.#accepted.size));
    throw new QueueFullError(
      `${waiting} request${waiting === 1 ? " waits" : "s wait"}, which is as many as may; try again in ${retryAfterMs} ms.`,
      waiting,
      retryAfterMs,
    );
  }

  #choose(claim: Priority, order: Order, rungs: readonly Rung[]): Choice {
    const { deadlineMs, arrival } = order;
    const now = performance.now();
    const elapsed = now - arrival;
    if (claim.deadline === null) {
      const own = this.#millisecondsOf(rungs[0]!, order);
      const predictedMs = own === null ? null : elapsed + this.#finish(claim, own, now).own;
      return { rung: 0, reason: null, predictedMs };
    }
    const predictions = rungs.map((rung) => {
      const own = this.#millisecondsOf(rung, order) ?? Number.POSITIVE_INFINITY;
      const finish = this.#finish(claim, own, now);
      const milliseconds = finish.isHarmless ? finish.own : finish.all;
      return { blocks: rung.blocks, own, milliseconds: elapsed + milliseconds };
    });
    const margin = this.#margin.value;
    const choice = chooseRung(predictions, deadlineMs!, margin);
    if (choice) {
      const { milliseconds } = predictions[choice.index]!;
      return { rung: choice.index, reason: choice.reason, predictedMs: milliseconds };
    }
    this.#stats.refused();
    const best = predictions.reduce((a, b) => (b.milliseconds < a.milliseconds ? b : a));
    // For a call that is made now: what it took to measure is not needed again.
    const bestMs = limitFor(best.milliseconds - elapsed, margin);
    const aloneMs = limitFor(Math.min(...predictions.map(({ own }) => own)), margin);
    const limit = `${Math.round(deadlineMs!)} ms`;
    const retryAfterMs = aloneMs <= deadlineMs! ? Math.max(1, Math.ceil(bestMs - deadlineMs!)) : null;
    const why =
      retryAfterMs === null
        ? ""
        : bestMs <= deadlineMs!
          ? `, but ${Math.round(elapsed)} ms went into measuring what it would take. Try again`
          : `, since others are served. Alone it would take ${aloneMs} ms; try again in ${retryAfterMs} ms`;
    throw new DeadlineError(
      `No schedule of ${rungs.length === 1 ? "one" : rungs.length} is done in ${limit}: the best possible time is ${bestMs} ms, with ${best.blocks}${why}.`,
      { deadlineMs: deadlineMs!, bestMs, blocks: best.blocks, retryAfterMs },
    );
  }

  /** When its turn has come: a poorer schedule, if the wait has been longer than was expected. */
  #chooseAgain(accepted: Accepted, chosen: Choice, order: Order, rungs: readonly Rung[]): Choice {
    const { claim, promised } = accepted;
    if (promised === null || chosen.rung === rungs.length - 1) return chosen;
    const now = performance.now();
    const others = [...this.#accepted].filter((other) => other !== accepted);
    const finish = (rung: Rung) => this.#finish(claim, this.#millisecondsOf(rung, order) ?? 0, now, others).own;
    const fits = (rung: Rung) => now + finish(rung) <= promised;
    if (fits(rungs[chosen.rung]!)) return chosen;
    let rung = rungs.findIndex((rung, index) => index > chosen.rung && fits(rung));
    if (rung < 0) rung = rungs.length - 1;
    Object.assign(accepted, this.#workOf(rungs[rung]!, order));
    const { blocks } = rungs[rung]!;
    return {
      rung,
      reason: `${blocks}, since the wait was longer than predicted and ${rungs[chosen.rung]!.blocks} would have come late.`,
      predictedMs: now - order.arrival + finish(rungs[rung]!),
    };
  }

  /**
   * When a newcomer would be done, in milliseconds from now, if everybody is served in the order of urgency.
   * @returns `own` for the newcomer, `all` for when everybody is done, and whether nobody comes late for its sake
   */
  #finish(claim: Priority, own: number, now: number, others: Iterable<Accepted> = this.#accepted) {
    interface Place {
      readonly claim: Priority;
      readonly promised: number | null;
      readonly milliseconds: number;
      readonly isNew: boolean;
    }
    const line = [...others].map((other): Place => {
      return { claim: other.claim, promised: other.promised, milliseconds: this.#left(other), isNew: false };
    });
    line.push({ claim, promised: null, milliseconds: own, isNew: true });
    line.sort((a, b) => comparePriorities(a.claim, b.claim, now));
    let at = 0;
    let done = 0;
    let isHarmless = true;
    for (const { claim, promised, milliseconds, isNew } of line) {
      at += milliseconds;
      if (isNew) done = at;
      // Who is late already, or has used up the room that was left free, is not made later.
      else if (done > 0 && promised !== null && now + at > claim.deadline! && now + at - own <= promised)
        isHarmless = false;
    }
    return { own: done, all: at, isHarmless };
  }

  /** Milliseconds of work of those who have been accepted. */
  #backlog(): number {
    let milliseconds = 0;
    for (const accepted of this.#accepted) milliseconds += this.#left(accepted);
    return milliseconds;
  }

  #left({ cost, weight, done }: Accepted): number {
    return cost * Math.max(0, 1 - done / weight);
  }

  #workOf(rung: Rung, order: Order): Pick<Accepted, "cost" | "weight"> {
    let weight = 0;
    for (const { program, rows } of rung.demands)
      for (const { graph, size, times } of this.#kindsOf(program))
        weight += times * rows * this.costs.relative(graph, size, 1);
    return { cost: this.#millisecondsOf(rung, order) ?? unknownCost, weight };
  }

  /** Milliseconds of a request that has the device to itself; null if some cost is not known. */
  #millisecondsOf({ demands }: Rung, { pin, size, pictures }: Order): number | null {
    let sum = this.costs.estimate(host, size, pictures) ?? 0;
    for (const { program, rows } of demands)
      for (const { graph, size, maxRows, times } of this.#kindsOf(program)) {
        const batches = this.#batchesFor(maxRows, pin);
        if (this.costs.estimate(graph, size, batches[0]!) === null) return null;
        const cost = (batch: number) => this.costs.estimate(graph, size, batch)!;
        sum += times * cheapestSplit(rows, batches, cost).milliseconds;
      }
    return sum;
  }

  /** Batches that a launch may have, rising. */
  #batchesFor(maxRows: number, pin: number | null): readonly number[] {
    const pinned = pin ?? this.#options.pinBatch;
    if (pinned !== null) return [Math.min(pinned, maxRows)];
    const batches = this.#batches.filter((batch) => batch <= maxRows);
    return batches.length > 0 ? batches : [maxRows];
  }

  /** Whether all of its launches have been made before. */
  #isWarm({ demands }: Rung): boolean {
    return demands.every(({ program }) => samplesOf([program]).every((sample) => this.#seen.has(keyOf(sample))));
  }

  #kindsOf(program: Program): readonly LaunchKind[] {
    const known = this.#kinds.get(program);
    if (known) return known;
    const kinds = new Map<string, LaunchKind>();
    for (const { graph, size, maxRows } of this.#dispatcher.rowsOf([program])[0]!.specs) {
      const key = `${graph}@${size} x ${maxRows}`;
      kinds.set(key, { graph, size, maxRows, times: (kinds.get(key)?.times ?? 0) + 1 });
    }
    const list = [...kinds.values()];
    this.#kinds.set(program, list);
    return list;
  }

  // ── Work ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

  #run({ rows, onLaunch }: Job, accepted: Accepted, { pin, signal }: Order): Promise<Record<string, Tensor>[]> {
    return this.#dispatcher.run({
      rows,
      claim: accepted.claim,
      pin: pin ?? undefined,
      signal,
      onLaunch: (row, report, first) => {
        const { graph, sharing } = report.launch;
        accepted.done += this.costs.relative(graph, sharing!.size, 1);
        if (first) accepted.launched += report.milliseconds;
        this.#seen.set(`${graph}@${sharing!.size}`, report.milliseconds);
        onLaunch?.(row, report, first);
      },
    });
  }

  #observeHost({ size, pictures }: Order, milliseconds: number): void {
    if (milliseconds <= 0) return;
    const key = `${size} x ${pictures}`;
    const times = this.#hostTimes.get(key) ?? [];
    times.push(milliseconds);
    if (times.length > hostObservationsKept) times.shift();
    this.#hostTimes.set(key, times);
    // One time is better than none, but not than the many that a stored entry is made of.
    const isBetter = times.length >= hostObservationsNeeded || !this.costs.get(host, size, pictures);
    if (isBetter) this.costs.set(entryOf(host, pictures, size, times));
  }

  // ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Before a promise: measures what is not known, and runs once what has not run here, since that is slower. */
  async #learn(rungs: readonly Rung[], { pin, signal }: Order): Promise<void> {
    const unknown = new Map<string, Subject>();
    const cold = new Map<string, Subject>();
    for (const { demands } of rungs)
      for (const { program, rows } of demands)
        for (const sample of samplesOf([program])) {
          const { graph, sharing } = sample.launch;
          const { size, maxRows } = sharing!;
          const batches = this.#batchesFor(maxRows ?? Number.POSITIVE_INFINITY, pin);
          // Of one picture the cost of larger batches does not matter; of several, two points make a line.
          const largest = batches.findLast((batch) => batch <= rows) ?? batches[0]!;
          for (const batch of new Set([batches[0]!, largest])) {
            const subject = { graph, size, batch, sample };
            if (!this.costs.get(graph, size, batch)) unknown.set(`${keyOf(sample)} x ${batch}`, subject);
            else if (!this.#seen.has(keyOf(sample))) cold.set(keyOf(sample), subject);
          }
        }
    await this.#measure([...cold.values()], { rounds: 0, signal });
    for (const entry of await this.#measure([...unknown.values()], { rounds: urgentRounds, signal }))
      if (!this.costs.get(entry.graph, entry.size, entry.batch)) this.costs.set(entry);
  }

  async #measure(subjects: readonly Subject[], options: MeasureOptions): Promise<CostEntry[]> {
    if (subjects.length === 0) return [];
    const entries = await measure(this.#runtime, subjects, this.#options.graph, options);
    for (const { sample } of subjects) if (!this.#seen.has(keyOf(sample))) this.#seen.set(keyOf(sample), 0);
    return entries;
  }

  /** After a request: if nobody else is there, somebody may be waiting, or there may be time to measure. */
  #rest(): void {
    if (this.#accepted.size > 0) return;
    for (const resolve of this.#idle.splice(0)) resolve();
    if (!this.#options.background || this.#background || this.#closing.signal.aborted) return;
    if (this.#timer) clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#background = this.#measureRest()
        .catch((error) => {
          if (!this.#closing.signal.aborted) this.#options.onError?.(error);
        })
        .finally(() => {
          this.#background = null;
        });
    }, backgroundDelay);
    this.#timer.unref();
  }

  /** Measures what has been asked for and is not in the table, between requests. */
  async #measureRest(): Promise<void> {
    for (const [key, sample] of this.#unmeasured) {
      const row = this.#seen.get(key);
      const subjects = subjectsOf([sample], this.#batches).filter(
        ({ graph, size, batch }) =>
          !this.costs.get(graph, size, batch) && (row === undefined || row * batch <= backgroundLimit),
      );
      this.#unmeasured.delete(key);
      if (subjects.length === 0) continue;
      const entries = await this.#measure(subjects, {
        rounds: backgroundRounds,
        background: true,
        signal: this.#closing.signal,
        turn: () => this.#untilIdle(),
      });
      for (const entry of entries) this.costs.set(entry);
    }
    if (this.costs.version !== this.#stored) await this.store();
  }

  async #untilIdle(): Promise<void> {
    while (this.#accepted.size > 0) await new Promise<void>((resolve) => this.#idle.push(resolve));
  }
}

function keyOf({ launch }: Sample): string {
  return `${launch.graph}@${launch.sharing!.size}`;
}

/** Powers of two, and the largest batch itself. */
export function batchesUpTo(maxBatch: number): number[] {
  const batches: number[] = [];
  for (let batch = 1; batch < maxBatch; batch *= 2) batches.push(batch);
  return [...batches, maxBatch];
}
