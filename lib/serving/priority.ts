/**
 * Who goes first: higher priority, then the earlier deadline, then whoever came first. Two rules keep anybody from
 * waiting for ever: who has waited long rises in priority, and who names no deadline has one all the same.
 */

export interface Priority {
  readonly priority: number;
  /** Moment by which it should be done; null without a limit. */
  readonly deadline: number | null;
  /** Moment of arrival, and a number that tells apart those of the same moment: later ones are higher. */
  readonly arrival: number;
  readonly sequence: number;
}

/** Waiting this long raises the priority by one. */
export const agingMilliseconds = 10_000;

/** The deadline of those without one, from their arrival. */
const patience = 60_000;

/** Negative if `a` goes before `b`. All moments are milliseconds of one clock. */
export function comparePriorities(a: Priority, b: Priority, now: number): number {
  return effectivePriority(b, now) - effectivePriority(a, now) || dueOf(a) - dueOf(b) || a.sequence - b.sequence;
}

function effectivePriority({ priority, arrival }: Priority, now: number): number {
  return priority + Math.floor(Math.max(0, now - arrival) / agingMilliseconds);
}

function dueOf({ deadline, arrival }: Priority): number {
  return deadline ?? arrival + patience;
}
