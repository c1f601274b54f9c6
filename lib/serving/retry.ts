/**
 * When a refused caller is told to come back: when there will be room for it beside all who have been told so before, so
 * that callers who obey find room and do not all come at once.
 *
 * Each refusal reserves the room that its caller waits for, until the moment that it was told. Where the caller is known by a ticket, others leave that
 * room free, and it has it when it comes back; otherwise nothing is kept free when it comes: it takes what there is then, as anybody does. Callers who never come, or come whenever they like, take no room
 * by that: a reservation counts as much as earlier ones were followed by a call at the moment that was told.
 */

import type { Ending } from "./forecast.js";

/** Forecasts are of medians: a caller is told somewhat more, and no two callers quite the same, as parts of the time. */
const caution = 0.15;
const jitter = 0.2;

/**
 * So many are remembered. Further ones are told the time of one of these: callers who ask again and again without waiting
 * must not make it longer and longer for all.
 */
const mostReservations = 128;

/**
 * Calls this long after the moment that was told may be of the caller who was told it: a part of the time told, some times
 * the time between two calls, and bounds in milliseconds. Those as long before it are of others, and as many of others are
 * expected after it.
 */
const attention = { part: 0.25, intervals: 4, least: 25, most: 1200 } as const;

/** Weight of one call in the time between two, of one reservation in the share that was followed, and the least share. */
const intervalWeight = 1 / 32;
const followedWeight = 1 / 64;
const leastFollowed = 1 / 16;

/** Who comes so many milliseconds before the moment that it was told is on time: clocks differ. */
const early = 5;

/** By which factor a caller is told more than it should wait. @param random from 0 to 1 */
export function cautionOf(random: number): number {
  return 1 + caution + jitter * random;
}

/** What a caller is told that should wait so long. @param random from 0 to 1 */
export function cautious(milliseconds: number, random: number): number {
  return Math.max(1, Math.ceil(milliseconds * cautionOf(random)));
}

interface Reservation {
  /** Moment that the caller was told. */
  readonly at: number;
  /** Milliseconds before and after it in which calls are counted. */
  readonly window: number;
  /** Calls after it less calls before it. */
  calls: number;
  /** Milliseconds of work that it will bring. */
  readonly work: number;
  /** Who was told; undefined if that is not known, and nothing can be kept. */
  readonly ticket: string | undefined;
  /** The time limit that it comes with; null for none. */
  readonly deadlineMs: number | null;
}

/** A caller that is refused. */
interface Caller {
  readonly ticket: string | undefined;
  readonly deadlineMs: number | null;
}

const nobody: Caller = { ticket: undefined, deadlineMs: null };

export class Retry {
  readonly #random: () => number;
  #reservations: Reservation[] = [];
  /** Those whose moment has come, until it is known whether their callers have. */
  #due: Reservation[] = [];
  /** Of both, those whose callers have come back. */
  readonly #claimed = new WeakSet<Reservation>();
  /** Part of the reservations that were followed by a call. */
  #followed = 1;
  /** Moment of the last call, and the mean time between two, in milliseconds. */
  #last = Number.NEGATIVE_INFINITY;
  #interval: number = attention.most;

  /** @param random even, from 0 to 1 */
  constructor(random: () => number = Math.random) {
    this.#random = random;
  }

  /** A call, of whoever it is. */
  called(now: number): void {
    this.#interval += intervalWeight * (Math.min(attention.most, now - this.#last) - this.#interval);
    this.#last = now;
    this.#settle(now);
    for (const reservation of this.#due) reservation.calls++;
    for (const reservation of this.#reservations) if (reservation.at - now <= reservation.window) reservation.calls--;
  }

  /**
   * For a caller that found the queue full.
   * @param endings as forecast, from now
   * @param places how many requests such as this one could be accepted after an ending
   * @param work milliseconds that it will bring
   * @returns milliseconds from now
   */
  whenPlace(
    endings: Iterable<Ending>,
    places: (ending: Ending) => number,
    work: number,
    now: number,
    ticket?: string | undefined,
  ): number {
    const caller = { ticket, deadlineMs: null };
    const wanted = this.#share * this.#before(now).length + 1;
    let at = 0;
    let most = 0;
    for (const ending of endings) {
      at = ending.at + ending.launch;
      most = Math.max(most, places(ending));
      if (most >= wanted) return this.#reserve(at, work, now, caller);
    }
    // After all those there are, it goes on at the same pace.
    return this.#reserve((at * wanted) / Math.max(1, most), work, now, caller);
  }

  /**
   * For a caller whose time limit cannot be met beside others.
   * @param missing milliseconds of work that have to be done first
   * @param least milliseconds that it has to wait in any case; it then reserves nothing, since others go before it
   */
  whenDone(
    endings: Iterable<Ending>,
    missing: number,
    work: number,
    now: number,
    least = 0,
    caller: Caller = nobody,
  ): number {
    const reserved = this.#before(now).reduce((sum, reservation) => sum + reservation.work, 0);
    const wanted = missing + this.#share * reserved;
    let before = { at: 0, done: 0 };
    if (wanted > 0)
      for (const ending of endings) {
        if (ending.done >= wanted) {
          const part = (wanted - before.done) / (ending.done - before.done);
          const at = before.at + part * (ending.at - before.at) + ending.launch;
          return this.#reserve(Math.max(least, at), least > 0 ? null : work, now, caller);
        }
        before = ending;
      }
    const at = before.at + Math.max(0, wanted - before.done);
    return this.#reserve(Math.max(least, at), least > 0 ? null : work, now, caller);
  }

  /** For a caller that would take the room of others who were told to come: after the last of them. */
  afterAll(work: number, caller: Caller, now: number): number {
    const last = this.#kept(now).reduce((latest, { at, work }) => Math.max(latest, at + work), now);
    // No caution: each would add its part to all those before.
    const milliseconds = Math.max(1, Math.ceil(last - now));
    this.#remember(milliseconds, work, caller, now);
    return milliseconds;
  }

  /** Whether a caller comes back for its own room, when it was told to; it then has it no more. */
  claims(ticket: string | undefined, now: number): boolean {
    const own = this.#ownOf(ticket, now);
    if (own) this.#claimed.add(own);
    return own !== undefined;
  }

  /** Whether a caller comes back for its own room, when it was told to. */
  isBack(ticket: string | undefined, now: number): boolean {
    return this.#ownOf(ticket, now) !== undefined;
  }

  /**
   * How many milliseconds of work leave room for those who were told to come: of all that is accepted, and a new request.
   * @param margin factor that predictions have to leave free
   */
  mostWork(margin: number, now: number): number {
    let most = Number.POSITIVE_INFINITY;
    let reserved = 0;
    for (const { at, work, deadlineMs } of this.#kept(now)) {
      if (deadlineMs === null) continue;
      reserved += this.#share * work;
      most = Math.min(most, deadlineMs / margin - reserved + Math.max(0, at - now));
    }
    return most;
  }

  /** How many callers are to come for a place in the queue about now. */
  expected(now: number): number {
    const due = this.#kept(now).filter(({ at, window, deadlineMs }) => deadlineMs === null && at - now <= window);
    return Math.floor(this.#share * due.length);
  }

  #ownOf(ticket: string | undefined, now: number): Reservation | undefined {
    if (ticket === undefined) return undefined;
    return this.#kept(now).find((each) => each.ticket === ticket && each.at - now <= early);
  }

  /** What is kept free: reservations of known callers who are still to come, or may be on their way, in their order. */
  #kept(now: number): Reservation[] {
    this.#settle(now);
    return [...this.#due, ...this.#reservations]
      .filter((each) => each.ticket !== undefined && !this.#claimed.has(each))
      .sort((a, b) => a.at - b.at);
  }

  /** How much of what is reserved will be asked for. */
  get #share(): number {
    return Math.min(1, Math.max(leastFollowed, this.#followed));
  }

  /** The reservations whose callers are still to come, and go before the next one. */
  #before(now: number): readonly Reservation[] {
    this.#settle(now);
    const { length } = this.#reservations;
    return length < mostReservations ? this.#reservations : this.#reservations.slice(0, this.#random() * length);
  }

  #settle(now: number): void {
    const due = this.#reservations.filter(({ at }) => at <= now);
    if (due.length > 0) {
      this.#reservations = this.#reservations.filter(({ at }) => at > now);
      this.#due.push(...due);
    }
    const over = this.#due.filter(({ at, window }) => now > at + window);
    if (over.length === 0) return;
    this.#due = this.#due.filter(({ at, window }) => now <= at + window);
    for (const { calls } of over) this.#followed += followedWeight * (calls - this.#followed);
    // Chance goes both ways.
    this.#followed = Math.min(2, Math.max(-1, this.#followed));
  }

  /** @param work null to reserve nothing */
  #reserve(wait: number, work: number | null, now: number, caller: Caller): number {
    const milliseconds = cautious(wait, this.#random());
    if (work !== null) this.#remember(milliseconds, work, caller, now);
    return milliseconds;
  }

  #remember(milliseconds: number, work: number, { ticket, deadlineMs }: Caller, now: number): void {
    const { part, intervals, least, most } = attention;
    const window = Math.min(most, Math.max(least, Math.min(part * milliseconds, intervals * this.#interval)));
    if (this.#reservations.length < mostReservations)
      this.#reservations.push({ at: now + milliseconds, work, window, calls: 0, ticket, deadlineMs });
  }
}
