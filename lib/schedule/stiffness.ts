/**
 * How far a schedule without calibration has to be careful. Guidance makes the first steps of a run stiff: the guided estimate of the
 * picture is several times too large at σ = 1 and shrinks fast (4.5: root mean square 3.8 at σ = 1, 1.25 at 0.9), and a step that is long
 * beside that overshoots, which extrapolation amplifies. Found on the embedded model at guidance 1 to 4.5 and 3 to 12 steps
 * (bench/results/quality.md): it is near 1 where steps are many or guidance is mild, and then nothing is held back.
 */

/** At most so much. */
const most = 4;

/**
 * m = 1 + 2·((g − 1)/n)³, at most 4.
 * @param steps n, of the whole schedule
 * @param guidance g, the largest scale; 1 without guidance
 */
export function stiffness(steps: number, guidance: number): number {
  return Math.min(most, 1 + 2 * ((Math.max(guidance, 1) - 1) / steps) ** 3);
}

/**
 * Whether guidance is so mild that UniPC, whose corrector amplifies a transient more than anything else does, is the nearest of all
 * (34.5 dB against 34.3 of the damped method at scale 2 and six steps; 19.7 against 26.4 at 4.5).
 */
export function isMild(guidance: number): boolean {
  return guidance <= 2.5;
}

/** A step from noise straight to the picture is guided a little even so: what is asked for is not left out. */
const leastPart = 0.1;

/** A step of a schedule whose guidance is one scale. */
export interface GuidedStep {
  /** Noise level where it begins. */
  readonly from: number;
  /** Where it ends, lower. */
  readonly to: number;
  /** Of the whole schedule. */
  readonly steps: number;
  /** Guidance scale of the schedule, above 1. */
  readonly guidance: number;
}

/**
 * The guidance scale that a step takes where one scale g is named for n steps. What guidance adds to the velocity shrinks on the way from
 * noise to picture, and a step takes all of it as it is at its beginning: too much, the more so the larger the part r = 1 − σ'/σ is that it
 * goes of the way to its estimate of the picture. The last step goes all of it.
 *
 *   1 + (g − 1)·f,  f = 1 − r^e·(1 − (1 − σ)^1.5), at least 0.1,  e = n/√(g − 1) − 4, at least 1 and at most 2
 *
 * With many steps r and σ of the last step are small, and f is near 1. e is larger there, since extrapolation follows the change by itself.
 * Found on the embedded model at scales 2, 4.5 and 7 and 3 to 16 steps (bench/results/quality-guidance-4.5.md).
 */
export function taperedScale({ from, to, steps, guidance }: GuidedStep): number {
  const exponent = Math.min(2, Math.max(1, steps / Math.sqrt(guidance - 1) - 4));
  // Shifting rounds, so that the first level may be above 1 by a unit in the last place.
  const signal = Math.max(0, 1 - from);
  const f = 1 - (1 - to / from) ** exponent * (1 - signal ** 1.5);
  return 1 + (guidance - 1) * Math.max(leastPart, f);
}

/** How much denser levels are at both ends of a schedule, 0 for even ones. Few steps with mild guidance have none to spare. */
export function easing(steps: number, guidance: number): number {
  if (isMild(guidance)) return 0.3 * Math.min(1, Math.max(0, (steps - 6) / 2));
  return 0.3 / stiffness(steps, guidance);
}
