/**
 * How much work arrives while other work is under way, by priority: what a request leaves free for those that will come. Averages over
 * several spans are kept, since what matters to a request is the work that arrives within its own time limit.
 *
 * Refused calls are work that would have come, too, but nobody knows how many of them are the same caller again. They count
 * for no more than a part of what was accepted: enough to see a load that is too much, whatever callers do.
 */

/** Spans of the averages, in milliseconds. */
const spans = [1e3, 4e3, 16e3, 64e3, 256e3, 1024e3] as const;

/** An average is over at least so many time limits: fewer hold too few arrivals to be sure of. */
const limitsAveraged = 5;

/** Refused work that counts, as a part of the accepted work, and how much of it may come at once, in accepted requests. */
const refusedShare = { part: 0.5, most: 8 } as const;

interface Level {
  /** Moment of the first and of the latest arrival. */
  readonly first: number;
  latest: number;
  /** Milliseconds of work that arrive in a millisecond, by span: exponential averages as of the latest arrival. */
  readonly rates: number[];
}

export class Arrivals {
  readonly #levels = new Map<number, Level>();

  /** Refused work that would still count. */
  #credit = 0;

  /** @param work milliseconds of the device that a request takes at the least */
  accepted(level: number, work: number, now: number): void {
    this.#credit = Math.min(this.#credit + refusedShare.part * work, Math.max(this.#credit, refusedShare.most * work));
    this.#add(level, work, now);
  }

  /** One that may come again. */
  refused(level: number, work: number, now: number): void {
    const counted = Math.min(work, this.#credit);
    if (counted <= 0) return;
    this.#credit -= counted;
    this.#add(level, counted, now);
  }

  #add(level: number, work: number, now: number): void {
    let known = this.#levels.get(level);
    if (!known) {
      known = { first: now, latest: now, rates: spans.map(() => 0) };
      this.#levels.set(level, known);
    }
    for (const [index, span] of spans.entries())
      known.rates[index] = known.rates[index]! * Math.exp((known.latest - now) / span) + work / span;
    known.latest = now;
  }

  /** Milliseconds of work, of this level and higher ones, that are expected to arrive within a time limit. */
  expected(level: number, limit: number, now: number): number {
    const at = spans.findIndex((span) => span >= limitsAveraged * limit);
    const index = at < 0 ? spans.length - 1 : at;
    const span = spans[index]!;
    let rate = 0;
    for (const [other, { first, latest, rates }] of this.#levels) {
      if (other < level) continue;
      // The average of a span that has only begun is one of what there was, over one time limit at least.
      const seen = 1 - Math.exp(-Math.max(now - first, limit) / span);
      rate += (rates[index]! * Math.exp((latest - now) / span)) / seen;
    }
    return rate * limit;
  }
}
