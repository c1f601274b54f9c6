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

/** How much denser levels are at both ends of a schedule, 0 for even ones. Few steps with mild guidance have none to spare. */
export function easing(steps: number, guidance: number): number {
  if (isMild(guidance)) return 0.3 * Math.min(1, Math.max(0, (steps - 6) / 2));
  return 0.3 / stiffness(steps, guidance);
}
