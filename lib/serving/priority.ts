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

/** Negative if `a` goes before `b`. All moments are milliseconds of one clock. */
export function comparePriorities(a: Priority, b: Priority, now: number): number {
  return agedLevel(b, now) - agedLevel(a, now) || dueOf(a) - dueOf(b) || a.sequence - b.sequence;
}

function agedLevel({ level, arrival }: Priority, now: number): number {
  return level + Math.floor(Math.max(0, now - arrival) / agingMilliseconds);
}

/** The moment that decides between those of one level. */
export function dueOf({ due, arrival }: Priority): number {
  return due ?? arrival + defaultDue;
}

/** For a gate. */
export function byPriority(a: Priority, b: Priority): number {
  return comparePriorities(a, b, performance.now());
}
