/**
 * Whether a fleet takes a request: decided in each gateway, from its copy of the workers' states and of the jobs that wait. It has no clock and no
 * connection; every moment is milliseconds of one clock of the whole fleet.
 *
 * The rule is that of `serving/prediction.ts`. A time limit is a promise: it is given only if, by the prices and with all jobs drawn in order, the
 * request is done in time and no job that has been promised a time becomes late through it. Waiting jobs with a limit are counted
 * with the leanest schedule: workers draw a richer one only where nothing waits.
 */

import { DeadlineError, FleetEmptyError, QueueFullError } from "../errors.js";
import { deadlineMargin, limitFor, Margin } from "../serving/deadline.js";
import { compareRanks, type Priority, rankOf } from "../serving/priority.js";
import { cautionOf, cautious, Retry } from "../serving/retry.js";
import { classesOf, type Price, type Prices, type WorkerClasses } from "./classes.js";
import { lowerBound, Plan, type PlannedJob } from "./plan.js";

/** A worker as a gateway sees it. */
export interface WorkerView {
  /** Whether it takes jobs; one that drains does not. */
  readonly takes: boolean;
  /** Milliseconds of work that it still has to do of what it has taken, as of `at`, its own drift included. */
  readonly backlogMs: number;
  readonly at: number;
  /** Pictures that it would still take now. */
  readonly room: number;
  /** The same map as long as they have not changed: what follows from them is then not computed again. */
  readonly prices: Prices;
}

/** A job that waits, as a gateway sees it. */
export interface JobView {
  readonly id: string;
  /** What its price depends on, the number of pictures included. */
  readonly kind: string;
  readonly pictures: number;
  readonly level: number;
  readonly arrival: number;
  /** Promised moment; null without a time limit. */
  readonly due: number | null;
}

/** A copy of the fleet's state. */
export interface FleetView {
  /** Moment before it was read: what had been written by then is in it. */
  readonly at: number;
  readonly workers: readonly WorkerView[];
  /** In any order. */
  readonly jobs: readonly JobView[];
}

export interface FleetRequest extends Omit<JobView, "due"> {
  /** From the arrival; null for none. */
  readonly deadlineMs: number | null;
  /** Who calls, so that a caller that was refused is known when it comes back; undefined for nobody. */
  readonly ticket?: string | undefined;
}

export interface Verdict {
  /** From the arrival to the pictures; null if no worker knows what it takes. */
  readonly predictedMs: number | null;
  /** 0 for one that a worker takes at once, 1 for the first of those that wait. */
  readonly place: number;
  /** What it takes of the worker that the prediction is of, alone; null if no worker knows. */
  readonly price: Price | null;
}

interface Job extends PlannedJob {
  readonly id: string;
  readonly priority: Priority;
}

/** The state that a gateway decides by, as of the first decision after a copy came. */
interface State {
  readonly classes: WorkerClasses;
  readonly plan: Plan<Job>;
  /** Workers that take jobs. */
  readonly workers: readonly WorkerView[];
}

/** A request with its costs. */
interface Offer {
  readonly request: FleetRequest;
  readonly prices: readonly Price[];
  readonly costs: readonly number[];
  /** Milliseconds of the worker that draws it fastest. */
  readonly own: number;
}

/** A request counts as so many milliseconds where there is no worker to say what it takes: enough that one is started for it. */
export const unservedMs = 60_000;

/** A job that was accepted here, and neither put into the queue nor shown by a copy by then, will not be. */
const unseenMs = 1000;

/** By then nothing is left of a disturbance. */
const longestCalm = 600_000;

/** A promise that has not ended so long after its moment is forgotten. */
const promiseAge = 600_000;

export class FleetAdmission {
  readonly #maxQueueNow: () => number;
  readonly #random: () => number;
  readonly #margin: Margin;
  readonly #retry: Retry;
  /** Spreads the times that callers are told: one value for each call. */
  #draw = 0;
  #now = 0;
  #view: FleetView = { at: Number.NEGATIVE_INFINITY, workers: [], jobs: [] };
  #state: State | null = null;
  #classes: { readonly of: readonly Prices[]; readonly classes: WorkerClasses } | null = null;
  /** Jobs accepted here that the copy does not show yet, with the moment from which copies are right without them. */
  readonly #unseen = new Map<string, { readonly job: JobView; until: number }>();
  /** Promises given here. */
  readonly #promises = new Map<string, { readonly at: number; readonly due: number }>();

  /**
   * @param options `maxQueue`: jobs that may wait, asked at each request; `random`: even, from 0 to 1, spreads the times that refused callers are told, default: Math.random
   */
  constructor({ maxQueue, random = Math.random }: { maxQueue: () => number; random?: () => number }) {
    this.#maxQueueNow = maxQueue;
    this.#random = random;
    this.#margin = new Margin(() => this.#now);
    this.#retry = new Retry(() => this.#draw);
  }

  /** A new copy. Jobs that were accepted here since it was made are kept. */
  see(view: FleetView): void {
    this.#view = view;
    this.#state = null;
    if (this.#unseen.size > 0) for (const { id } of view.jobs) this.#unseen.delete(id);
    for (const [id, { until }] of this.#unseen) if (until <= view.at) this.#unseen.delete(id);
    // Those given first are first.
    for (const [id, { due }] of this.#promises) {
      if (due + promiseAge > view.at) break;
      this.#promises.delete(id);
    }
  }

  /**
   * Accepts a request, which is then to be put into the queue; `queued` and `ended` must follow, or `ended` alone.
   * @throws FleetEmptyError if no worker takes jobs, QueueFullError or DeadlineError
   */
  admit(request: FleetRequest, now: number): Verdict {
    this.#now = now;
    this.#draw = this.#random();
    this.#retry.called(now);
    const state = this.#stateAt(now);
    if (state.workers.length === 0)
      throw new FleetEmptyError(
        "No worker of the fleet takes jobs: none is there, or all of them drain. Start workers, or try again when they have been replaced.",
      );
    const { id, kind, level, arrival, deadlineMs, ticket, pictures } = request;
    const known = state.classes.pricesOf(kind);
    const prices = known ?? state.classes.unknown;
    const costs = costsOf(prices, deadlineMs !== null);
    const offer = { request, prices, costs, own: Math.min(...costs) };
    this.#refuseIfFull(state, offer, now);
    const due = deadlineMs === null ? null : arrival + deadlineMs;
    if (deadlineMs === null || known === null) this.#retry.claims(ticket, now);
    else this.#refuseIfLate(state, offer, deadlineMs, now);

    const priority = priorityOf({ level, arrival, due });
    const position = this.#positionOf(state, priority, now);
    const before = state.plan.waiting(now, position);
    const place = before === 0 && hasRoom(state, pictures) ? 0 : before + 1;
    const job: Job = { id, priority, costs, due: due ?? Number.POSITIVE_INFINITY };
    const { worker, finish } = state.plan.insert(job, position, now);
    this.#unseen.set(id, { job: { id, kind, pictures, level, arrival, due }, until: now + unseenMs });
    if (due !== null) this.#promises.set(id, { at: now, due });
    return { predictedMs: known && finish - arrival, place, price: known && prices[worker]! };
  }

  /** A job that was accepted here is in the queue: a copy that is read from now on and does not show it says that it was taken. */
  queued(id: string, now: number): void {
    const unseen = this.#unseen.get(id);
    if (unseen) unseen.until = now;
  }

  /**
   * A job that was accepted here is over, or was never put into the queue.
   * @param late whether its pictures came after the promised moment; null if it has none, failed or was aborted
   */
  ended(id: string, { late }: { readonly late: boolean | null }, now: number): void {
    this.#now = now;
    const promise = this.#promises.get(id);
    this.#promises.delete(id);
    if (promise && late !== null) this.#margin.observe(late, promise.at);
    if (this.#unseen.delete(id)) this.#state = null;
  }

  /** Seconds of work that the workers have, taken and waiting: in how long all that is accepted is done, if it were shared evenly. Without workers: a minute for each job. */
  backlogSeconds(now: number): number {
    this.#now = now;
    const { plan, workers } = this.#stateAt(now);
    if (workers.length > 0) return plan.work(now) / workers.length / 1000;
    return ((this.#view.jobs.length + this.#unseen.size) * unservedMs) / 1000;
  }

  get #maxQueue(): number {
    return this.#maxQueueNow();
  }

  /** Factor that predictions leave free now. */
  get margin(): number {
    return this.#margin.value;
  }

  #stateAt(now: number): State {
    this.#state ??= this.#make(now);
    return this.#state;
  }

  #make(now: number): State {
    const workers = this.#view.workers.filter(({ takes }) => takes);
    const classes = this.#classesOf(workers.map(({ prices }) => prices));
    const [usual, least] = [new Map<string, readonly number[]>(), new Map<string, readonly number[]>()];
    const costsFor = ({ kind, due }: JobView) => {
      const costs = due === null ? usual : least;
      let known = costs.get(kind);
      if (!known) {
        known = costsOf(classes.pricesOf(kind) ?? classes.unknown, due !== null);
        costs.set(kind, known);
      }
      return known;
    };
    // Clocks differ by some milliseconds: nothing was said later than now.
    const free = workers.map(({ at, backlogMs }) => Math.max(now, Math.min(at, now) + backlogMs));
    const views = [...this.#view.jobs, ...Array.from(this.#unseen.values(), ({ job }) => job)];
    const order = views.map((view) => {
      const { id, due } = view;
      const priority = priorityOf(view);
      const job: Job = { id, priority, costs: costsFor(view), due: due ?? Number.POSITIVE_INFINITY };
      return { job, rank: rankOf(priority, now) };
    });
    order.sort((a, b) => compareRanks(a.rank, b.rank));
    const byClass = Array.from({ length: Math.max(1, classes.size) }, (): number[] => []);
    for (const [index, moment] of free.entries()) byClass[classes.of[index]!]!.push(moment);
    return { classes, workers, plan: new Plan(byClass, workers.length > 0 ? order.map(({ job }) => job) : [], now) };
  }

  /** Prices seldom change. */
  #classesOf(prices: readonly Prices[]): WorkerClasses {
    const last = this.#classes;
    if (last && last.of.length === prices.length && prices.every((each, index) => each === last.of[index]))
      return last.classes;
    const classes = classesOf(prices);
    this.#classes = { of: prices, classes };
    return classes;
  }

  #positionOf({ plan }: State, priority: Priority, now: number): number {
    const { jobs } = plan;
    const rank = rankOf(priority, now);
    const isBefore = (index: number) => compareRanks(rank, rankOf(jobs[index]!.priority, now)) < 0;
    return lowerBound(plan.firstWaiting(now), jobs.length, isBefore);
  }

  /**
   * Also if the places that are free are kept for others. Who comes back when it was told to has a place, for which the queue may be a
   * quarter longer, as in a process (`serving/service.ts`).
   */
  #refuseIfFull(state: State, { request: { pictures, ticket }, own }: Offer, now: number): void {
    const waiting = state.plan.waiting(now);
    const isFull = waiting >= this.#maxQueue && (waiting > 0 || !hasRoom(state, pictures));
    const kept = this.#retry.expected(now);
    if (this.#retry.isBack(ticket, now)) {
      if (!isFull || waiting < this.#maxQueue + Math.ceil(this.#maxQueue / 4)) return;
    } else if (!isFull && !(kept > 0 && waiting > 0 && waiting + kept >= this.#maxQueue)) return;
    const places = (ending: { readonly waiting: number }) => this.#maxQueue - ending.waiting;
    const work = own / state.workers.length;
    const retryAfterMs = this.#retry.whenPlace(startsOf(state.plan, now), places, work, now, ticket);
    throw new QueueFullError(
      `${waiting} job${waiting === 1 ? " waits" : "s wait"}, which is as many as may; try again in ${retryAfterMs} ms.`,
      waiting,
      retryAfterMs,
    );
  }

  #refuseIfLate(state: State, offer: Offer, deadlineMs: number, now: number): void {
    const { request, prices, costs, own } = offer;
    const { arrival, ticket } = request;
    const margin = this.#margin.value;
    const isBack = this.#retry.claims(ticket, now);
    const fits = this.#attempt(state, offer, now, deadlineMs, margin, arrival) === null;
    // What a request takes of the fleet, and what is left of its limit for the work before it, are two things with several workers.
    const work = own / state.workers.length;
    const caller = { ticket, deadlineMs: deadlineMs - margin * (own - work) };
    if (fits) {
      const most = isBack ? Number.POSITIVE_INFINITY : this.#retry.mostWork(margin, now);
      if (most === Number.POSITIVE_INFINITY) return;
      if (work <= most - (now - arrival) - state.plan.work(now) / state.workers.length) return;
    }
    const bestMs = this.#leastLimit(state, offer, now, margin);
    const { blocks } = prices[costs.indexOf(own)]!;
    const aloneMs = limitFor(own, deadlineMargin);
    const calm = this.#calmAfter(own, deadlineMs);
    const retryAfterMs = fits
      ? this.#retry.afterAll(work, caller, now)
      : aloneMs <= deadlineMs
        ? this.#retry.whenDone([], this.#fitsAfter(state, offer, deadlineMs, now, calm), work, now, calm, caller)
        : null;
    const why =
      retryAfterMs === null
        ? ""
        : fits
          ? `, but that room is kept for callers who were told to come back; try again in ${retryAfterMs} ms`
          : calm > 0
            ? `, since the workers have lately been slower than usual. Usually it would take ${aloneMs} ms alone; try again in ${retryAfterMs} ms`
            : `, since others are served. Alone it would take ${aloneMs} ms; try again in ${retryAfterMs} ms`;
    throw new DeadlineError(
      `No schedule is done in ${Math.round(deadlineMs)} ms: the best possible time is ${bestMs} ms, with ${blocks}${why}.`,
      { deadlineMs, bestMs, blocks, retryAfterMs },
    );
  }

  /**
   * Whether a request with a limit could be accepted.
   * @param at moment that it is asked
   * @returns null if it could; how many milliseconds are missing, or 0 if that is not known, since it would make others late
   */
  #attempt(state: State, offer: Offer, at: number, deadlineMs: number, margin: number, arrival = at): number | null {
    const { request, costs } = offer;
    const priority = priorityOf({ level: request.level, arrival, due: arrival + deadlineMs });
    const position = this.#positionOf(state, priority, at);
    const { finish } = state.plan.find(costs, position, at);
    if (limitFor(finish - arrival, margin) > deadlineMs) return finish - arrival - deadlineMs / margin;
    return state.plan.harms(costs, position, at, margin) ? 0 : null;
  }

  /** The least limit that would be accepted now. */
  #leastLimit(state: State, offer: Offer, now: number, margin: number): number {
    const { plan } = state;
    const attempt = (limit: number) => {
      const missing = this.#attempt(state, offer, now, limit, margin);
      return missing && missing * margin;
    };
    const last = plan.find(offer.costs, plan.jobs.length, now).finish;
    const latest = plan.jobs.reduce((latest, { priority }) => Math.max(latest, rankOf(priority, now).due), last);
    const most = limitFor(latest - now, margin) + 1;
    // One of a higher level goes before all that have been promised a time, whatever its limit: then when all is done.
    if (attempt(most) !== null) return limitFor(last - now, margin);
    return search(limitFor(offer.own, margin), attempt, most);
  }

  /**
   * In how many milliseconds a request can be accepted, if nothing else comes: also when it comes as much later as callers are told to.
   * @param calm when a disturbance is over
   */
  #fitsAfter(state: State, offer: Offer, deadlineMs: number, now: number, calm: number): number {
    const attempt = (wait: number) => this.#attempt(state, offer, now + wait, deadlineMs, this.#margin.after(wait));
    const wait = search(Math.max(1, Math.ceil(calm)), attempt);
    const told = cautious(wait, this.#draw);
    if (attempt(told) === null) return wait;
    // Others have begun by then: the next time that there is room.
    return (search(told, attempt) - 1e-6) / cautionOf(this.#draw);
  }

  /** In how many milliseconds the margin lets work fit a limit again, if nothing disturbs the workers. */
  #calmAfter(own: number, deadlineMs: number): number {
    const fits = (after: number) => limitFor(own, this.#margin.after(after)) <= deadlineMs;
    return fits(0) ? 0 : lowerBound(1, longestCalm, fits);
  }
}

function priorityOf({ level, arrival, due }: Pick<JobView, "level" | "arrival" | "due">): Priority {
  return { level, arrival, due, sequence: arrival };
}

function costsOf(prices: readonly Price[], isLimited: boolean): readonly number[] {
  return prices.map(({ ms, leastMs }) => (isLimited ? leastMs : ms));
}

function hasRoom({ workers }: State, pictures: number): boolean {
  return workers.some(({ room }) => room >= pictures);
}

/** When places of the queue are free: a job that begins no longer waits. */
function* startsOf(plan: Plan<Job>, now: number) {
  let waiting = plan.waiting(now);
  for (let index = plan.firstWaiting(now); index < plan.jobs.length; index++) {
    if (plan.startOf(index) <= now) continue;
    waiting--;
    const at = plan.startOf(index) - now;
    yield { at, waiting, inside: { requests: 0, pictures: 0 }, done: 0, launch: 0 };
  }
}

/**
 * The least whole number that an attempt succeeds with. What an attempt says is missing is passed over. Otherwise steps grow, and then the
 * bound between failure and success is found by halving: within a sixty-fourth.
 * @param attempt null for success; how much is missing at least, or 0 if that is not known
 * @param most it succeeds there
 */
function search(from: number, attempt: (value: number) => number | null, most = Number.POSITIVE_INFINITY): number {
  let failed = from - 1;
  let value = from;
  let step = 1;
  for (let tries = 0; tries < mostTries && value < most; tries++) {
    const missing = attempt(value);
    if (missing === null) break;
    if (missing > 1) {
      value += Math.ceil(missing);
      failed = value - 1;
    } else {
      failed = value;
      value += step;
      step *= 2;
    }
  }
  value = Math.min(value, Math.max(from, most));
  while (value - failed > Math.max(1, (value - from) / 64)) {
    const middle = Math.floor((value + failed) / 2);
    if (attempt(middle) === null) value = middle;
    else failed = middle;
  }
  return value;
}

const mostTries = 100;
