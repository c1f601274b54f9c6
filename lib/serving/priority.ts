/**
 * Who goes first: the higher level, then who is due earlier, then who arrived earlier. Two rules keep any request from
 * waiting for ever: waiting raises the level, and a request without a time limit has a due moment all the same.
 */

export interface Priority {
  readonly level: number;
  /** Moment that the work aims at, somewhat before what was promised; null without a time limit. */
  readonly due: number | null;
  /** Moment of arrival. */
  readonly arrival: number;
  /** Tells apart those of the same moment: later ones are higher. */
  readonly sequence: number;
}

/** Waiting this long raises the level by one. */
export const agingMilliseconds = 10_000;

/** When those without a time limit are due, from their arrival. */
const defaultDue = 60_000;

/** What a priority comes to at a moment. */
export interface Rank {
  readonly level: number;
  readonly due: number;
  readonly sequence: number;
}

/** All moments are milliseconds of one clock. */
export function rankOf({ level, due, arrival, sequence }: Priority, now: number): Rank {
  const aged = level + Math.floor(Math.max(0, now - arrival) / agingMilliseconds);
  return { level: aged, due: due ?? arrival + defaultDue, sequence };
}

/** Negative if `a` goes before `b`. */
export function compareRanks(a: Rank, b: Rank): number {
  return b.level - a.level || a.due - b.due || a.sequence - b.sequence;
}

/** Negative if `a` goes before `b`. */
export function comparePriorities(a: Priority, b: Priority, now: number): number {
  return compareRanks(rankOf(a, now), rankOf(b, now));
}

/** For a gate. */
export function byPriority(a: Priority, b: Priority): number {
  return comparePriorities(a, b, performance.now());
}
