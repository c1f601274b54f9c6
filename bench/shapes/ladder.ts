/** From ranked schedules to a ladder for time limits. */

export interface Ranked {
  /** The schedule, such as "H1P7R2", for the families whose names begin with "FlowTurbo". */
  readonly name: string;
  readonly family: string;
  /** Sampling time, in any unit. */
  readonly time: number;
  /** Less is better. */
  readonly frechet: number;
}

/**
 * The schedules of the flowturbo sampler that are worth their time, the richest first: each is better than all that take no
 * longer.
 * @throws RangeError if there are none
 */
export function ladderOf(rows: readonly Ranked[]): string[] {
  const schedules = rows
    .filter(({ name, family }) => family.startsWith("FlowTurbo") && /^([EHPR]\d+)+$/.test(name))
    .sort((a, b) => a.time - b.time || a.frechet - b.frechet);
  const ladder: string[] = [];
  let best = Number.POSITIVE_INFINITY;
  for (const { name, frechet } of schedules)
    if (frechet < best) {
      best = frechet;
      ladder.unshift(name);
    }
  if (ladder.length === 0) throw new RangeError("The benchmark has no schedules of the flowturbo sampler.");
  return ladder;
}
