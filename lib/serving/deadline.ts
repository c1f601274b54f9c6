/**
 * The choice for a time limit: the first candidate whose prediction fits, with a margin that grows where promises are
 * broken.
 */

import { Fading } from "./fading.js";

/**
 * What a prediction has to leave free, as a factor. Predictions are medians: without it every second picture whose
 * prediction equals the limit would be late.
 */
export const deadlineMargin = 1.15;

/** A candidate with the time that it is predicted to take. */
export interface PredictedCandidate {
  /** The schedule. */
  readonly text: string;
  /** From now to the pictures, waiting included. */
  readonly milliseconds: number;
  /** What it takes of the device, alone. */
  readonly own: number;
}

export interface Choice {
  /** Index among the candidates. */
  readonly candidate: number;
  /** Why this one, in a sentence; null without a time limit. */
  readonly reason: string | null;
  /** From the call to the pictures; null if the costs are not known. */
  readonly predictedMs: number | null;
}

/** The smallest limit that a prediction fits. */
export function limitFor(milliseconds: number, margin = deadlineMargin): number {
  // A product such as 100 · 1.15 may be a little more than 115.
  return Math.ceil(milliseconds * margin - 1e-6);
}

/**
 * The margin that a machine needs to keep its promises: at least the usual one, more after each that was broken, and a very
 * little less after each that was kept, so that it stays where about one in a thousand is broken. What one incident
 * makes late counts once, and while no promise ends it goes back to the usual one.
 */
export class Margin {
  readonly #clock: () => number;
  readonly #margin: Fading;
  /** Moment of the latest broken promise that counted. */
  #broken = Number.NEGATIVE_INFINITY;

  /** @param clock the present moment, in milliseconds */
  constructor(clock = () => performance.now()) {
    this.#clock = clock;
    this.#margin = new Fading(deadlineMargin, undefined, clock);
  }

  get value(): number {
    return this.#margin.value;
  }

  /** What it will be in so many milliseconds, if no promise ends until then. */
  after(milliseconds: number): number {
    return this.#margin.after(milliseconds);
  }

  /** @param promisedAt moment that the promise was given */
  observe(isLate: boolean, promisedAt: number): void {
    if (isLate) {
      // Promises given before the margin had grown say nothing about the present one.
      if (promisedAt < this.#broken) return;
      this.#broken = this.#clock();
    }
    const next = this.value + (isLate ? marginStep : -marginStep / 999);
    this.#margin.set(Math.min(largestMargin, Math.max(deadlineMargin, next)));
  }
}

const marginStep = 0.15;
const largestMargin = 2.5;

/**
 * The first candidate that fits and leaves room for others; where none leaves room, the cheapest that fits.
 * @param candidates the best first
 * @param deadlineMs the time limit, from the call
 * @param margin what a prediction has to leave free, as a factor
 * @param room milliseconds of work that leave room for the requests to come; default: any
 * @returns null if none fits
 */
export function chooseCandidate(
  candidates: readonly PredictedCandidate[],
  deadlineMs: number,
  margin = deadlineMargin,
  room = Number.POSITIVE_INFINITY,
): Choice | null {
  const fitting = [...candidates.keys()].filter((at) => limitFor(candidates[at]!.milliseconds, margin) <= deadlineMs);
  if (fitting.length === 0) return null;
  const richest = fitting[0]!;
  const candidate =
    fitting.find((at) => candidates[at]!.own <= room) ??
    fitting.reduce((a, b) => (candidates[b]!.own < candidates[a]!.own ? b : a));
  const { text, milliseconds } = candidates[candidate]!;
  const better = candidates[candidate - 1];
  const rank =
    candidates.length === 1
      ? "."
      : candidate !== richest
        ? `; ${candidates[richest]!.text} would fit too, but leave no room for the requests that are expected at the present load.`
        : better === undefined
          ? `, and is the richest of ${candidates.length} schedules.`
          : `, and is the richest of ${candidates.length} schedules that fits; ${better.text} would need ${limitFor(better.milliseconds, margin)} ms.`;
  const reason = `${text} is predicted to take ${Math.round(milliseconds)} ms of ${Math.round(deadlineMs)} ms${rank}`;
  return { candidate, reason, predictedMs: milliseconds };
}
