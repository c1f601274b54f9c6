/**
 * When a refused caller is told to come back: when there will be room for it beside all who have been told so before, so
 * that callers who obey find room and do not all come at once.
 *
 * Each refusal reserves the room that its caller waits for, until the moment that it was told. Nothing is kept free when
 * it comes: it takes what there is then, as anybody does.
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

interface Reservation {
  /** Moment that the caller was told. */
  readonly at: number;
  /** Milliseconds of work that it will bring. */
  readonly work: number;
}

export class Retry {
  readonly #random: () => number;
  #reservations: Reservation[] = [];

  /** @param random even, from 0 to 1 */
  constructor(random: () => number = Math.random) {
    this.#random = random;
  }

  /**
   * For a caller that found the queue full.
   * @param endings as forecast, from now
   * @param places how many requests such as this one could be accepted after an ending
   * @param work milliseconds that it will bring
   * @returns milliseconds from now
   */
  whenPlace(endings: Iterable<Ending>, places: (ending: Ending) => number, work: number, now: number): number {
    const wanted = this.#before(now).length + 1;
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
   * @param least milliseconds that it has to wait in any case
   */
  whenDone(endings: Iterable<Ending>, missing: number, work: number, now: number, least = 0): number {
    const wanted = missing + this.#before(now).reduce((sum, reservation) => sum + reservation.work, 0);
    let before = { at: 0, done: 0 };
    if (wanted > 0)
      for (const ending of endings) {
        if (ending.done >= wanted) {
          const part = (wanted - before.done) / (ending.done - before.done);
          const at = before.at + part * (ending.at - before.at) + ending.launch;
          return this.#reserve(Math.max(least, at), work, now);
        }
        before = ending;
      }
    return this.#reserve(Math.max(least, before.at + Math.max(0, wanted - before.done)), work, now);
  }

  /** The reservations whose callers are still to come, and go before the next one. */
  #before(now: number): readonly Reservation[] {
    this.#reservations = this.#reservations.filter(({ at }) => at > now);
    const { length } = this.#reservations;
    return length < mostReservations ? this.#reservations : this.#reservations.slice(0, this.#random() * length);
  }

  #reserve(wait: number, work: number, now: number): number {
    const milliseconds = Math.max(1, Math.ceil(wait * (1 + caution + jitter * this.#random())));
    if (this.#reservations.length < mostReservations) this.#reservations.push({ at: now + milliseconds, work });
    return milliseconds;
  }
}
