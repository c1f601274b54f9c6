/**
 * What a request costs, when it would be done beside the others, and which of its candidates is drawn.
 *
 * A time limit is a promise. It is given only if, by the costs and with all requests run by priority, the new request is done
 * in time and no request that has been promised a time becomes late through it.
 *
 * Several devices are predicted as a list is scheduled: requests one after another by priority, the pictures of each shared out over
 * the devices, a picture at a time to the one that is done with it first by its own costs (`shares.ts`). Pictures that have begun
 * stay where they are. What does not fit into pictures (work that is expected, room that is kept) is counted in milliseconds of
 * all devices together, as if every request took its part of each of them.
 */

import { DeadlineError } from "../errors.js";
import type { Program } from "../program/program.js";
import { Arrivals } from "./arrivals.js";
import { type CostTable, hostGraph, unitsOf } from "./costs.js";
import { type Choice, chooseCandidate, deadlineMargin, limitFor, Margin, type PredictedCandidate } from "./deadline.js";
import { type Ending, forecast, type Phase } from "./forecast.js";
import { comparePriorities, type Priority } from "./priority.js";
import type { Progress } from "./progress.js";
import { Retry } from "./retry.js";
import { type LaunchKind, launchKinds, launchPhases } from "./rows.js";
import { type DeviceTimes, shareOut, togetherMs } from "./shares.js";
import { cheapestSplit, launchBatches } from "./split.js";

/** Milliseconds that are assumed of a request about which nothing is known. */
const unknownCost = 1000;

/** By then nothing is left of a disturbance, in milliseconds. */
const longestCalm = 600_000;

/** Milliseconds that a forecast is used for. */
const forecastAge = 20;

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

/** What a request takes on an idle model, in milliseconds; null where costs are not known. */
export interface AloneTimes {
  /** With the candidate that was chosen. */
  readonly aloneMs: number | null;
  /** With the cheapest candidate. */
  readonly leastMs: number | null;
}

/** Whether requests leave room for those that come after them, or take the richest candidate that fits. */
export type Preference = "admission" | "quality";

/** What a request asks of the service. */
export interface Terms {
  readonly priority: number;
  /** Moment of the call. */
  readonly arrival: number;
  readonly deadlineMs: number | null;
  /** What counts more where a time limit leaves a choice of candidates. */
  readonly prefer: Preference;
  /** Who calls, so that a caller that was refused is known when it comes back; undefined for nobody. */
  readonly ticket?: string | undefined;
  readonly pictures: number;
  /** Of the finished pictures, such as "64x64". */
  readonly size: string;
  /** The batch that every launch is padded to, as far as it allows; null for none. */
  readonly pin: number | null;
  readonly signal?: AbortSignal | undefined;
}

/** Launches of a request, with their weight. */
interface WeighedPhase extends Phase {
  readonly weight: number;
}

/** What a request has to do, by the costs when it was priced. */
export interface Price {
  readonly candidate: CandidateWork;
  readonly terms: Terms;
  /** Milliseconds that its work takes when it has the device to itself; of several, all of them together. */
  readonly cost: number;
  /** What some of its pictures take on a device. */
  readonly times: DeviceTimes;
  /** Milliseconds of one row in a launch, by kind: the unit of `weight` and of what is done. */
  readonly units: ReadonlyMap<string, number>;
  /** Its launches in those units. */
  readonly weight: number;
  /** Its launches in order. */
  readonly phases: readonly WeighedPhase[];
  /** Version of the costs if some were not known; null if all were. */
  readonly guessedBy: number | null;
}

/** A request that has been accepted, until it ends. */
export interface Accepted {
  readonly priority: Priority;
  readonly pictures: number;
  /** Whether it has been let in. */
  isInside: boolean;
  /** Moment that was promised. */
  readonly promised: number | null;
  /** Moment that it was accepted. */
  readonly at: number;
  price: Price;
  readonly progress: Progress;
  /** Milliseconds of the launches that it was a part of. */
  launchedMs: number;
  /** Whether it has been the only one all the time, on one device, and nothing had to be compiled. */
  undisturbed: boolean;
  /** The device of its launches so far; null before the first. */
  device: number | null;
}

export class Predictor {
  readonly margin = new Margin();
  /** By device. */
  readonly #tables: readonly CostTable[];
  readonly #there: () => readonly number[];
  readonly #batches: readonly number[];
  readonly #accepted: ReadonlySet<Accepted>;
  readonly #capacity: () => number;
  readonly #maxWaitMs: number;
  readonly #arrivals = new Arrivals();
  readonly #retry: Retry;
  /** What programs take on a machine without drift, by rows and pin, while the costs do not change. */
  #usual: { version: number; programs: WeakMap<Program, Map<string, number | null>> }[];
  #forecast: { readonly at: number; readonly size: number; readonly endings: Iterable<Ending> } | null = null;

  /**
   * @param costs of each device, in their order; what is not in launches is in the first
   * @param accepted the requests that are not over: a set that its owner changes
   * @param options `capacity`: pictures that are let in at a time; `maxWaitMs`: how long a launch may be held back;
   *   `there`: the devices that are not lost, default: all; `random` spreads the times that refused callers are told, default: Math.random
   */
  constructor(
    costs: CostTable | readonly CostTable[],
    batches: readonly number[],
    accepted: ReadonlySet<Accepted>,
    options: {
      capacity: number | (() => number);
      maxWaitMs: number;
      there?: (() => readonly number[]) | undefined;
      random?: (() => number) | undefined;
    },
  ) {
    const { capacity, there } = options;
    this.#tables = "estimate" in costs ? [costs] : costs;
    const all = [...this.#tables.keys()];
    this.#there = there ?? (() => all);
    this.#usual = this.#tables.map(() => ({ version: -1, programs: new WeakMap() }));
    this.#batches = batches;
    this.#accepted = accepted;
    this.#capacity = typeof capacity === "number" ? () => capacity : capacity;
    this.#maxWaitMs = options.maxWaitMs;
    this.#retry = new Retry(options.random);
  }

  /** Changes with what is known of costs, and with the devices that there are. */
  get #version(): number {
    const lost = this.#tables.length - this.#there().length;
    return this.#tables.reduce((sum, { version }) => sum + version, 2 ** 40 * lost);
  }

  /** How much slower launches are than when they were measured, in so many milliseconds: the mean of all devices. */
  #drift(after: number): number {
    const drifts = this.#there().map((device) => this.#tables[device]!.driftAfter(after));
    return drifts.reduce((sum, drift) => sum + drift, 0) / drifts.length;
  }

  /** A call has come, to be accepted or refused. */
  called(): void {
    this.#retry.called(performance.now());
  }

  /** How many places of the queue are kept for callers who were told to come about now. */
  get placesKept(): number {
    return this.#retry.expected(performance.now());
  }

  /** Whether a caller comes back that was refused, when it was told to. */
  isBack({ ticket }: Terms): boolean {
    return this.#retry.isBack(ticket, performance.now());
  }

  /** The candidate for a new request: without a time limit the first, otherwise the first that fits. */
  choose(priority: Priority, terms: Terms, candidates: readonly CandidateWork[]): Choice | DeadlineError {
    const { deadlineMs, arrival } = terms;
    const now = performance.now();
    const elapsed = now - arrival;
    this.#priceAgain();
    if (deadlineMs === null) {
      this.#retry.claims(terms.ticket, now);
      const own = this.#timesOf(candidates[0]!, terms);
      this.#arrived(terms, own ? this.#togetherMs(own, terms) : this.price(candidates[0]!, terms).cost, now, true);
      const predictedMs = own === null ? null : elapsed + this.#finishing(priority, now)(own, terms.pictures).own;
      return { candidate: 0, reason: null, predictedMs };
    }
    let isKnown = true;
    const finishOf = this.#finishing(priority, now);
    const predictions = candidates.map((candidate) => {
      const known = this.#timesOf(candidate, terms);
      if (known === null) isKnown = false;
      const times = known ?? this.price(candidate, terms).times;
      const finish = finishOf(times, terms.pictures);
      const milliseconds = finish.isHarmless ? finish.own : finish.all;
      const { isHarmless } = finish;
      const [own, alone] = [this.#togetherMs(times, terms), this.#aloneMs(times, terms)];
      return { text: candidate.text, own, alone, milliseconds: elapsed + milliseconds, isHarmless };
    });
    const margin = this.margin.value;
    const leanest = Math.min(...predictions.map(({ own }) => own));
    const soonest = Math.min(...predictions.map(({ alone }) => alone));
    const room = this.#room(terms, now);
    // Room that other callers were told of is left free for them. Who comes back for its own has it.
    const backlog = elapsed + [...this.#accepted].reduce((sum, other) => sum + leftOf(other), 0);
    const isBack = this.#retry.claims(terms.ticket, now);
    const most = isBack ? Number.POSITIVE_INFINITY : this.#retry.mostWork(margin, now) - backlog;
    const free = predictions.map((each) =>
      each.own <= most ? each : { ...each, milliseconds: Number.POSITIVE_INFINITY },
    );
    // Costs can have been reset at this very moment: nothing is promised on a guess, and nothing impossible by one.
    const choice = isKnown ? chooseCandidate(free, deadlineMs, margin, room) : null;
    if (choice) {
      this.#arrived(terms, leanest, now, true);
      return choice;
    }
    const best = predictions.reduce((a, b) => (b.milliseconds < a.milliseconds ? b : a));
    // For a call that is made now: what it took to measure is not needed again.
    const bestMs = limitFor(best.milliseconds - elapsed, margin);
    // What disturbs the machine at present will be over: impossible is what does not fit on a usual day.
    const aloneMs = limitFor(soonest / Math.max(1, this.#drift(0)), deadlineMargin);
    const calm = isKnown ? this.#calmAfter(soonest, deadlineMs) : 0;
    const isKept = isKnown && chooseCandidate(predictions, deadlineMs, margin, room) !== null;
    const retryAfterMs = isKept
      ? this.#retry.afterAll(leanest, { ticket: terms.ticket, deadlineMs }, now)
      : aloneMs <= deadlineMs || !isKnown
        ? this.#limitAfter(best, elapsed, priority, deadlineMs, now, calm, terms.ticket)
        : null;
    // What is impossible takes nothing from others.
    if (retryAfterMs !== null) this.#arrived(terms, leanest, now, false);
    const limit = `${Math.round(deadlineMs)} ms`;
    const why =
      retryAfterMs === null
        ? ""
        : !isKnown
          ? `, by a guess, since the costs have just been forgotten; try again in ${retryAfterMs} ms`
          : isKept
            ? `, but that room is kept for callers who were told to come back; try again in ${retryAfterMs} ms`
            : bestMs <= deadlineMs
              ? `, but ${Math.round(elapsed)} ms went into measuring what it would take; try again in ${retryAfterMs} ms`
              : calm > 0
                ? `, since the machine has lately been slower than usual. Usually it would take ${aloneMs} ms alone; try again in ${retryAfterMs} ms`
                : `, since others are served. Alone it would take ${aloneMs} ms; try again in ${retryAfterMs} ms`;
    return new DeadlineError(
      `No schedule of ${candidates.length === 1 ? "one" : candidates.length} is done in ${limit}: the best possible time is ${bestMs} ms, with ${best.text}${why}.`,
      { deadlineMs, bestMs, blocks: best.text, retryAfterMs },
    );
  }

  /**
   * When a limit that others prevent, or a disturbance, can be met, in milliseconds from now.
   * @param calm when the disturbance is over
   */
  #limitAfter(
    best: PredictedCandidate & { isHarmless: boolean },
    elapsed: number,
    priority: Priority,
    deadlineMs: number,
    now: number,
    calm: number,
    ticket: string | undefined,
  ) {
    const slower = this.#drift(calm) / this.#drift(0);
    const missing = (best.milliseconds - elapsed) * slower - deadlineMs / this.margin.after(calm);
    // One that harms nobody waits only for those that go before it.
    const endings = best.isHarmless
      ? this.#endings(now, (other) => comparePriorities(other.priority, priority, now) < 0)
      : this.#allEndings(now);
    return this.#retry.whenDone(endings, missing, best.own, now, calm, { ticket, deadlineMs });
  }

  /** In how many milliseconds the margin and the drift let work fit a limit again, if nothing disturbs the machine. */
  #calmAfter(own: number, deadlineMs: number): number {
    const usual = own / this.#drift(0);
    const fits = (after: number) => limitFor(usual * this.#drift(after), this.margin.after(after)) <= deadlineMs;
    if (fits(0)) return 0;
    let [low, high] = [0, 1];
    while (!fits(high) && high < longestCalm) [low, high] = [high, 2 * high];
    while (high - low > 1) {
      const middle = (low + high) / 2;
      if (fits(middle)) high = middle;
      else low = middle;
    }
    return high;
  }

  /** Counts a request as load. A caller who asks again whenever it has its pictures is none: nobody waits for it. */
  #arrived({ priority }: Terms, leanest: number, now: number, isAccepted: boolean): void {
    if (this.#accepted.size > 0) this.#arrivals[isAccepted ? "accepted" : "refused"](priority, leanest, now);
  }

  /**
   * What a request with a limit may take without sending away others, in milliseconds: the limit, less what those of its
   * level and above have still to do, and less what is expected to arrive meanwhile.
   */
  #room({ prefer, deadlineMs, priority, arrival }: Terms, now: number): number {
    if (prefer === "quality" || deadlineMs === null) return Number.POSITIVE_INFINITY;
    let taken = now - arrival + this.#arrivals.expected(priority, deadlineMs, now);
    for (const other of this.#accepted)
      if (other.promised !== null || other.priority.level >= priority) taken += leftOf(other);
    return deadlineMs / this.margin.value - taken;
  }

  /** When its turn has come: a shorter schedule, if the wait has been longer than was expected. */
  chooseAgain(request: Accepted, chosen: Choice, terms: Terms, candidates: readonly CandidateWork[]): Choice {
    const { priority, promised } = request;
    if (promised === null || chosen.candidate === candidates.length - 1) return chosen;
    const now = performance.now();
    const others = [...this.#accepted].filter((other) => other !== request);
    const finishOf = this.#finishing(priority, now, others);
    const finish = (candidate: CandidateWork) =>
      finishOf(this.#timesOf(candidate, terms) ?? (() => 0), terms.pictures).own;
    const fits = (candidate: CandidateWork) => now + finish(candidate) <= promised;
    const before = candidates[chosen.candidate]!;
    if (fits(before)) return chosen;
    let index = candidates.findIndex((candidate, index) => index > chosen.candidate && fits(candidate));
    if (index < 0) index = candidates.length - 1;
    const candidate = candidates[index]!;
    request.price = this.price(candidate, terms);
    request.progress.priced(request.price.units);
    return {
      candidate: index,
      reason: `${candidate.text}, since the wait was longer than predicted and ${before.text} would have been late.`,
      predictedMs: now - terms.arrival + finish(candidate),
    };
  }

  /** What a candidate takes of an idle model, and the cheapest of them; null where costs are not known. */
  alone(candidate: number, terms: Terms, candidates: readonly CandidateWork[]): AloneTimes {
    const all = candidates.map((each) => {
      const times = this.#timesOf(each, terms);
      return times && this.#aloneMs(times, terms);
    });
    const known = all.filter((each) => each !== null);
    return { aloneMs: all[candidate]!, leastMs: known.length < all.length ? null : Math.min(...known) };
  }

  /** When there will be a place in a full queue of `limit` requests, in milliseconds from now. */
  placeAfter(limit: number, terms: Terms, candidates: readonly CandidateWork[]): number {
    const now = performance.now();
    const { pictures } = terms;
    const places = ({ waiting, inside }: Ending) => {
      if (waiting > 0) return limit - waiting;
      const fit = Math.floor((this.#capacity() - inside.pictures) / pictures);
      return limit + Math.max(fit, inside.requests === 0 ? 1 : 0);
    };
    const last = candidates.at(-1);
    const work = last ? this.price(last, terms).cost : unknownCost;
    this.#priceAgain();
    return this.#retry.whenPlace(this.#allEndings(now), places, work, now, terms.ticket);
  }

  /** Endings of all that is accepted. Many callers who are refused at about the same time have the same ones. */
  #allEndings(now: number): Iterable<Ending> {
    const last = this.#forecast;
    if (last && last.size === this.#accepted.size && now - last.at < forecastAge) return last.endings;
    const endings = remembering(this.#endings(now, () => true));
    this.#forecast = { at: now, size: this.#accepted.size, endings };
    return endings;
  }

  /** @param counts whose work counts as done */
  #endings(now: number, counts: (other: Accepted) => boolean): Generator<Ending> {
    // Requests of one kind ask for the same splits again and again.
    const splits = new Map<string, ReturnType<Phase["split"]>>();
    const remembered = (phase: Phase): Phase => ({
      ...phase,
      split: (rows) => {
        const key = `${phase.key} x ${rows}`;
        const known = splits.get(key) ?? phase.split(rows);
        splits.set(key, known);
        return known;
      },
    });
    const requests = [...this.#accepted]
      .sort((a, b) => comparePriorities(a.priority, b.priority, now))
      .map((other) => {
        const { pictures, isInside } = other;
        return { pictures, isInside, phases: phasesLeft(other).map(remembered), counts: counts(other) };
      });
    return forecast(requests, this.#capacity(), this.#maxWaitMs);
  }

  /** What a candidate has to do, by the costs as they are now. */
  price(candidate: CandidateWork, terms: Terms): Price {
    const { units, isGuess } = this.#unitsOf(candidate);
    let weight = 0;
    const phases: WeighedPhase[] = [];
    for (const { program, rows } of candidate.demands)
      for (const { kind, times } of launchPhases(program)) {
        const unit = units.get(kind.key)!;
        const phase = this.#phase(kind, unit, rows, times, terms);
        const own = times * rows * unit;
        weight += own;
        phases.push({ ...phase, weight: own });
      }
    const times = this.#timesOf(candidate, terms) ?? guessedTimes(phases, terms, this.#there().length);
    const cost = this.#togetherMs(times, terms);
    return { candidate, terms, cost, times, units, weight, phases, guessedBy: isGuess ? this.#version : null };
  }

  /** Guesses are replaced when more is known. Other prices stay: what is done is counted in their units. */
  #priceAgain(): void {
    const version = this.#version;
    for (const request of this.#accepted) {
      const { candidate, terms, guessedBy } = request.price;
      if (guessedBy === null || guessedBy === version) continue;
      request.price = this.price(candidate, terms);
      request.progress.priced(request.price.units);
    }
  }

  /**
   * Milliseconds of one row in each kind of launch. Those about which nothing is known cost as much as the others, or what is
   * missing to the usual cost of a request if the others are the smaller part.
   */
  #unitsOf({ demands }: CandidateWork): { units: Map<string, number>; isGuess: boolean } {
    const units = new Map<string, number>();
    const unknown = new Map<string, number>();
    let isGuess = false;
    const known = { launches: 0, milliseconds: 0 };
    for (const { program, rows } of demands)
      for (const { key, graph, size, times } of launchKinds(program)) {
        const unit = this.#first((table) => table.guess(graph, size, 1));
        if (this.#first((table) => table.estimate(graph, size, 1)) === null) isGuess = true;
        if (unit === null) unknown.set(key, (unknown.get(key) ?? 0) + times * rows);
        else {
          units.set(key, unit);
          known.launches += times * rows;
          known.milliseconds += times * rows * unit;
        }
      }
    if (unknown.size === 0) return { units, isGuess };
    const launches = [...unknown.values()].reduce((sum, count) => sum + count, 0);
    const usual = known.launches === 0 ? 0 : known.milliseconds / known.launches;
    const rest = (unknownCost - known.milliseconds) / launches;
    const unit = known.launches > launches ? usual : Math.max(usual, rest);
    for (const key of unknown.keys()) units.set(key, unit);
    return { units, isGuess };
  }

  #phase(kind: LaunchKind, unit: number, rows: number, times: number, { pin }: Terms): Phase {
    const { key, graph, size, maxRows, launch } = kind;
    const batches = launchBatches(this.#batches, maxRows, pin);
    const splitOn = (device: number, rows: number) => {
      // Costs that are reset meanwhile are as they were.
      const cost = (batch: number) => this.#tables[device]!.estimate(graph, size, batch) ?? unit * unitsOf(batch);
      const { batches: chosen, milliseconds } = cheapestSplit(rows, batches, cost);
      return { batch: chosen[0]!, milliseconds };
    };
    const split = (rows: number) => {
      const there = this.#there();
      if (there.length === 1) return splitOn(there[0]!, rows);
      const times: DeviceTimes = (device, count) => splitOn(device, count).milliseconds;
      const { counts, end } = shareOut(times, rows, there, new Map());
      const batch = [...counts].reduce((sum, [device, count]) => sum + splitOn(device, count).batch, 0);
      return { batch, milliseconds: end, work: togetherMs(times, rows, there) };
    };
    return { key: `${key} ${pin}`, rows, times, deferrable: launch.sharing!.deferrable ?? false, split };
  }

  /**
   * When a new request would be done, in milliseconds from now, if all requests run one after another, by priority. The
   * others are put in order once, whatever number of candidates it has.
   * @returns of the milliseconds that it takes: `own` for the new request, `all` for when every request is done, and
   *   whether none becomes late through it
   */
  #finishing(priority: Priority, now: number, others: Iterable<Accepted> = this.#accepted) {
    const there = this.#there();
    const queue = Array.from(others, (other) => ({ other, run: this.#running(other, there) }));
    queue.sort((a, b) => comparePriorities(a.other.priority, b.other.priority, now));
    const isAfter = ({ other }: (typeof queue)[number]) => comparePriorities(priority, other.priority, now) < 0;
    const after = queue.filter(isAfter);
    /** Milliseconds until each device has done what goes before. */
    const before = new Map<number, number>();
    for (const each of queue) if (!isAfter(each)) each.run(before);
    const latest = (ready: ReadonlyMap<number, number>) => Math.max(0, ...ready.values());
    const without = new Map(before);
    const endsWithout = after.map(({ run }) => run(without));
    return (times: DeviceTimes, pictures: number) => {
      const ready = new Map(before);
      const { end: done } = shareOut(times, pictures, there, ready);
      let isHarmless = true;
      for (const [index, { other, run }] of after.entries()) {
        const { priority, promised } = other;
        const end = run(ready);
        // It would end after its due moment, and in time without the new request. One that is late in any case does not count.
        if (promised !== null && now + end > priority.due! && now + endsWithout[index]! <= promised) isHarmless = false;
      }
      return { own: done, all: latest(ready), isHarmless };
    };
  }

  /**
   * What is left of a request, to be added to what devices have to do. Pictures that have begun stay where they are.
   * @returns a function of the milliseconds until each device is ready, which it changes, to when the request ends
   */
  #running(other: Accepted, there: readonly number[]): (ready: Map<number, number>) => number {
    const { price, progress, pictures } = other;
    const { times } = price;
    const part = leftPart(other);
    const left: DeviceTimes = (device, count) => times(device, count) * part;
    const places = there.length === 1 ? null : progress.places(price.weight);
    const bound = places ? [...places.on].filter(([device]) => there.includes(device)) : [];
    if (!places || bound.length === 0) return (ready) => shareOut(left, pictures, there, ready).end;
    const begun = bound.map(([device, { rows, done }]) => {
      const share = rows / places.rows;
      const doneHere = done + places.before * share;
      const partHere = Math.max(0, 1 - doneHere / (price.weight * share));
      return { device, count: pictures * share, milliseconds: times(device, pictures * share) * partHere };
    });
    const free = pictures - begun.reduce((sum, { count }) => sum + count, 0);
    return (ready) => {
      let end = 0;
      for (const { device, milliseconds } of begun) {
        const at = (ready.get(device) ?? 0) + milliseconds;
        ready.set(device, at);
        end = Math.max(end, at);
      }
      return free < 1 ? end : Math.max(end, shareOut(times, Math.round(free), there, ready).end);
    };
  }

  #togetherMs(times: DeviceTimes, { pictures }: Terms): number {
    return togetherMs(times, pictures, this.#there());
  }

  /** Milliseconds of a request that has all devices to itself. */
  #aloneMs(times: DeviceTimes, { pictures }: Terms): number {
    return shareOut(times, pictures, this.#there(), new Map()).end;
  }

  /** What the first device says that says something. */
  #first(ask: (table: CostTable) => number | null): number | null {
    for (const device of this.#there()) {
      const answer = ask(this.#tables[device]!);
      if (answer !== null) return answer;
    }
    return null;
  }

  /**
   * Milliseconds of some pictures of a request on a device that they have to themselves, as it is now; infinite on one whose costs are not
   * all known. Each device does its part of every demand, in whole rows. null if no device knows.
   */
  #timesOf({ demands }: CandidateWork, { pin, size, pictures }: Terms): DeviceTimes | null {
    const host = this.#tables[0]!.usual(hostGraph, size, pictures) ?? 0;
    const known = new Map<string, number>();
    const times: DeviceTimes = (device, count) => {
      const key = `${device} ${count}`;
      const before = known.get(key);
      if (before !== undefined) return before;
      let sum: number | null = host;
      for (const { program, rows } of demands) {
        const usual = this.#usualOf(device, { program, rows: Math.ceil((rows * count) / pictures) }, pin);
        sum = usual === null || sum === null ? null : sum + usual;
      }
      // Costs may be reset while what is returned is kept: then a part is as it would have been.
      const all = known.get(`${device} ${pictures}`) ?? Number.POSITIVE_INFINITY;
      const milliseconds = sum === null ? (all * count) / pictures : sum * this.#tables[device]!.drift;
      known.set(key, milliseconds);
      return milliseconds;
    };
    const there = this.#there();
    const isKnown = there.filter((device) => times(device, pictures) < Number.POSITIVE_INFINITY);
    return isKnown.length === 0 ? null : times;
  }

  /** Milliseconds of a program's launches on a device, without the drift. Every request asks it of all its candidates. */
  #usualOf(device: number, { program, rows }: Demand, pin: number | null): number | null {
    const costs = this.#tables[device]!;
    const { version } = costs;
    if (this.#usual[device]!.version !== version) this.#usual[device] = { version, programs: new WeakMap() };
    const { programs } = this.#usual[device]!;
    const key = `${rows} ${pin}`;
    const known = programs.get(program)?.get(key);
    if (known !== undefined) return known;
    let sum: number | null = 0;
    for (const { graph, size, maxRows, times } of launchKinds(program)) {
      const batches = launchBatches(this.#batches, maxRows, pin);
      if (costs.usual(graph, size, batches[0]!) === null) {
        sum = null;
        break;
      }
      const cost = (batch: number) => costs.usual(graph, size, batch)!;
      sum += times * cheapestSplit(rows, batches, cost).milliseconds;
    }
    programs.set(program, (programs.get(program) ?? new Map()).set(key, sum));
    return sum;
  }
}

/** Of a request whose costs are not known: the same on each of so many devices. */
function guessedTimes(phases: readonly Phase[], { pictures }: Terms, devices: number): DeviceTimes {
  const all = phases.reduce((sum, { rows, times, split }) => {
    const { milliseconds, work = milliseconds } = split(rows);
    return sum + times * devices * work;
  }, 0);
  return (_, count) => (all * count) / pictures;
}

/** What part of a request is still to be done. */
function leftPart({ price: { weight }, progress }: Accepted): number {
  return Math.max(0, 1 - progress.done / weight);
}

/** Milliseconds that a request still needs of all devices together. */
function leftOf(request: Accepted): number {
  return request.price.cost * leftPart(request);
}

/** The launches that it still has to make. */
function phasesLeft({ price: { phases }, progress }: Accepted): Phase[] {
  let passed = progress.done;
  return phases.flatMap(({ weight, times, ...phase }) => {
    const part = Math.min(1, passed / weight);
    passed -= part * weight;
    return part < 1 ? [{ ...phase, times: times * (1 - part) }] : [];
  });
}

/** The values of a generator, as often as they are asked for: each is made when it is first needed. */
function remembering<T>(source: Generator<T>): Iterable<T> {
  const values: T[] = [];
  return {
    *[Symbol.iterator]() {
      for (let index = 0; ; index++) {
        if (index === values.length) {
          const { done, value } = source.next();
          if (done) return;
          values.push(value);
        }
        yield values[index]!;
      }
    },
  };
}
