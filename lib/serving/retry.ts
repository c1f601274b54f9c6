/**
 * When a refused caller is told to come back: when there will be room for it beside all who have been told so before, so
 * that callers who obey find room and do not all come at once.
 *
 * Each refusal reserves the room that its caller waits for, until the moment that it was told. Nothing is kept free when
 * it comes: it takes what there is then, as anybody does. Callers who never come, or come whenever they like, take no room
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

interface Reservation {
  /** Moment that the caller was told. */
  readonly at: number;
  /** Milliseconds before and after it in which calls are counted. */
  readonly window: number;
  /** Calls after it less calls before it. */
  calls: number;
  /** Milliseconds of work that it will bring. */
  readonly work: number;
}

export class Retry {
  readonly #random: () => number;
  #reservations: Reservation[] = [];
  /** Those whose moment has come, until it is known whether their callers have. */
  #due: Reservation[] = [];
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
  whenPlace(endings: Iterable<Ending>, places: (ending: Ending) => number, work: number, now: number): number {
    const wanted = this.#share * this.#before(now).length + 1;
    let at = 0;
    let most = 0;
    for (const ending of endings) {
      at = ending.at + ending.launch;
      most = Math.max(most, places(ending));
      if (most >= wanted) return this.#reserve(at, work, now);
    }
    // After all those there are, it goes on at the same pace.
    return this.#reserve((at * wanted) / Math.max(1, most), work, now);
  }

  /**
   * For a caller whose time limit cannot be met beside others.
   * @param missing milliseconds of work that have to be done first
   * @param least milliseconds that it has to wait in any case; it then reserves nothing, since others go before it
   */
  whenDone(endings: Iterable<Ending>, missing: number, work: number, now: number, least = 0): number {
    const reserved = this.#before(now).reduce((sum, reservation) => sum + reservation.work, 0);
    const wanted = missing + this.#share * reserved;
    let before = { at: 0, done: 0 };
    if (wanted > 0)
      for (const ending of endings) {
        if (ending.done >= wanted) {
          const part = (wanted - before.done) / (ending.done - before.done);
          const at = before.at + part * (ending.at - before.at) + ending.launch;
          return this.#reserve(Math.max(least, at), least > 0 ? null : work, now);
        }
        before = ending;
      }
    const at = before.at + Math.max(0, wanted - before.done);
    return this.#reserve(Math.max(least, at), least > 0 ? null : work, now);
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
  #reserve(wait: number, work: number | null, now: number): number {
    const milliseconds = Math.max(1, Math.ceil(wait * (1 + caution + jitter * this.#random())));
    const { part, intervals, least, most } = attention;
    const window = Math.min(most, Math.max(least, Math.min(part * milliseconds, intervals * this.#interval)));
    if (work !== null && this.#reservations.length < mostReservations)
      this.#reservations.push({ at: now + milliseconds, work, window, calls: 0 });
    return milliseconds;
  }
}
