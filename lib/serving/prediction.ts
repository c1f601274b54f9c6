/**
 * What a request costs, when it would be done beside the others, and which of its candidates is drawn.
 *
 * A time limit is a promise. It is given only if, by the costs and with all requests run by priority, the new request is done
 * in time and no request that has been promised a time becomes late through it.
 */

import { DeadlineError } from "../errors.js";
import type { Program } from "../program/program.js";
import { type CostTable, hostGraph } from "./costs.js";
import { type Choice, chooseCandidate, limitFor, Margin } from "./deadline.js";
import { comparePriorities, type Priority } from "./priority.js";
import { launchKinds } from "./rows.js";
import { cheapestSplit, launchBatches } from "./split.js";

/** Milliseconds that are assumed of a request about which nothing is known. */
const unknownCost = 1000;

/** Rows that all run the same program, but for values. */
export interface Demand {
  readonly program: Program;
  readonly rows: number;
}

/** What a request has to run with one of its candidates. */
export interface CandidateWork {
  /** The schedule's text. */
  readonly text: string;
  readonly demands: readonly Demand[];
}

/** What a request asks of the service. */
export interface Terms {
  readonly priority: number;
  /** Moment of the call. */
  readonly arrival: number;
  readonly deadlineMs: number | null;
  readonly pictures: number;
  /** Of the finished pictures, such as "64x64". */
  readonly size: string;
  /** The batch that every launch is padded to, as far as it allows; null for none. */
  readonly pin: number | null;
  readonly signal?: AbortSignal | undefined;
}

/** A request that has been accepted, until it ends. */
export interface Accepted {
  readonly priority: Priority;
  /** Moment that was promised. */
  readonly promised: number | null;
  /** Milliseconds that its work takes when it has the device to itself. */
  cost: number;
  /** Its launches in units of their cost for one row, and how many of them are done. */
  weight: number;
  done: number;
  /** Milliseconds of the launches that it was a part of. */
  launchedMs: number;
  /** Whether it has been the only one all the time, and nothing had to be compiled. */
  undisturbed: boolean;
}

export class Predictor {
  readonly margin = new Margin();
  readonly #costs: CostTable;
  readonly #batches: readonly number[];
  readonly #accepted: ReadonlySet<Accepted>;

  /** @param accepted the requests that are not over: a set that its owner changes */
  constructor(costs: CostTable, batches: readonly number[], accepted: ReadonlySet<Accepted>) {
    this.#costs = costs;
    this.#batches = batches;
    this.#accepted = accepted;
  }

  /** The candidate for a new request: without a time limit the first, otherwise the first that fits. */
  choose(priority: Priority, terms: Terms, candidates: readonly CandidateWork[]): Choice | DeadlineError {
    const { deadlineMs, arrival } = terms;
    const now = performance.now();
    const elapsed = now - arrival;
    if (deadlineMs === null) {
      const own = this.#millisecondsOf(candidates[0]!, terms);
      const predictedMs = own === null ? null : elapsed + this.#finish(priority, own, now).own;
      return { candidate: 0, reason: null, predictedMs };
    }
    const predictions = candidates.map((candidate) => {
      const own = this.#millisecondsOf(candidate, terms) ?? Number.POSITIVE_INFINITY;
      const finish = this.#finish(priority, own, now);
      const milliseconds = finish.isHarmless ? finish.own : finish.all;
      return { text: candidate.text, own, milliseconds: elapsed + milliseconds };
    });
    const margin = this.margin.value;
    const choice = chooseCandidate(predictions, deadlineMs, margin);
    if (choice) return choice;
    const best = predictions.reduce((a, b) => (b.milliseconds < a.milliseconds ? b : a));
    // For a call that is made now: what it took to measure is not needed again.
    const bestMs = limitFor(best.milliseconds - elapsed, margin);
    const aloneMs = limitFor(Math.min(...predictions.map(({ own }) => own)), margin);
    const limit = `${Math.round(deadlineMs)} ms`;
    const retryAfterMs = aloneMs <= deadlineMs ? Math.max(1, Math.ceil(bestMs - deadlineMs)) : null;
    const why =
      retryAfterMs === null
        ? ""
        : bestMs <= deadlineMs
          ? `, but ${Math.round(elapsed)} ms went into measuring what it would take. Try again`
          : `, since others are served. Alone it would take ${aloneMs} ms; try again in ${retryAfterMs} ms`;
    return new DeadlineError(
      `No schedule of ${candidates.length === 1 ? "one" : candidates.length} is done in ${limit}: the best possible time is ${bestMs} ms, with ${best.text}${why}.`,
      { deadlineMs, bestMs, blocks: best.text, retryAfterMs },
    );
  }

  /** When its turn has come: a shorter schedule, if the wait has been longer than was expected. */
  chooseAgain(request: Accepted, chosen: Choice, terms: Terms, candidates: readonly CandidateWork[]): Choice {
    const { priority, promised } = request;
    if (promised === null || chosen.candidate === candidates.length - 1) return chosen;
    const now = performance.now();
    const others = [...this.#accepted].filter((other) => other !== request);
    const finish = (candidate: CandidateWork) =>
      this.#finish(priority, this.#millisecondsOf(candidate, terms) ?? 0, now, others).own;
    const fits = (candidate: CandidateWork) => now + finish(candidate) <= promised;
    const before = candidates[chosen.candidate]!;
    if (fits(before)) return chosen;
    let index = candidates.findIndex((candidate, index) => index > chosen.candidate && fits(candidate));
    if (index < 0) index = candidates.length - 1;
    const candidate = candidates[index]!;
    Object.assign(request, this.workOf(candidate, terms));
    return {
      candidate: index,
      reason: `${candidate.text}, since the wait was longer than predicted and ${before.text} would have been late.`,
      predictedMs: now - terms.arrival + finish(candidate),
    };
  }

  /** Milliseconds after which one of the accepted requests will have ended, as they share the device. */
  get retryAfterMs(): number {
    let milliseconds = 0;
    for (const request of this.#accepted) milliseconds += leftOf(request);
    return Math.max(1, Math.ceil(milliseconds / this.#accepted.size));
  }

  workOf(candidate: CandidateWork, terms: Terms): Pick<Accepted, "cost" | "weight"> {
    let weight = 0;
    for (const { program, rows } of candidate.demands)
      for (const { graph, size, times } of launchKinds(program))
        weight += times * rows * this.#costs.relative(graph, size, 1);
    return { cost: this.#millisecondsOf(candidate, terms) ?? unknownCost, weight };
  }

  /**
   * When a new request would be done, in milliseconds from now, if all requests run one after another, by priority.
   * @returns `own` for the new request, `all` for when every request is done, and whether none becomes late through it
   */
  #finish(priority: Priority, own: number, now: number, others: Iterable<Accepted> = this.#accepted) {
    const queue = Array.from(others, (other) => ({ ...other, milliseconds: leftOf(other), isNew: false }));
    const added = { priority, promised: null, milliseconds: own, isNew: true };
    let at = 0;
    let done = 0;
    let isHarmless = true;
    for (const { priority, promised, milliseconds, isNew } of [...queue, added].sort((a, b) =>
      comparePriorities(a.priority, b.priority, now),
    )) {
      at += milliseconds;
      if (isNew) done = at;
      // It would end after its due moment, and in time without the new request. One that is late in any case does not count.
      else if (done > 0 && promised !== null && now + at > priority.due! && now + at - own <= promised)
        isHarmless = false;
    }
    return { own: done, all: at, isHarmless };
  }

  /** Milliseconds of a request that has the device to itself; null if some cost is not known. */
  #millisecondsOf({ demands }: CandidateWork, { pin, size, pictures }: Terms): number | null {
    let sum = this.#costs.estimate(hostGraph, size, pictures) ?? 0;
    for (const { program, rows } of demands)
      for (const { graph, size, maxRows, times } of launchKinds(program)) {
        const batches = launchBatches(this.#batches, maxRows, pin);
        if (this.#costs.estimate(graph, size, batches[0]!) === null) return null;
        const cost = (batch: number) => this.#costs.estimate(graph, size, batch)!;
        sum += times * cheapestSplit(rows, batches, cost).milliseconds;
      }
    return sum;
  }
}

/** Milliseconds that a request still needs. */
function leftOf({ cost, weight, done }: Accepted): number {
  return cost * Math.max(0, 1 - done / weight);
}
