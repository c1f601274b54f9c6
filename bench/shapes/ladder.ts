/** From the quality benchmark's results to a ladder for time limits. */

export interface Ranked {
  /** The schedule, such as "H1P7R2", for the families whose names begin with "FlowTurbo". */
  readonly name: string;
  readonly family: string;
  /** Sampling time, in any unit. */
  readonly time: number;
  /** Against the reference, dB: of the benchmark's measures the one with the narrowest intervals. */
  readonly psnr: number;
}

/**
 * The schedules of the flowturbo sampler that are worth their time, the richest first: each is better than all that take no
 * longer.
 * @throws RangeError if there are none
 */
export function ladderOf(rows: readonly Ranked[]): string[] {
  const schedules = rows
    .filter(({ name, family }) => family.startsWith("FlowTurbo") && /^([EHPR]\d+)+$/.test(name))
    .sort((a, b) => a.time - b.time || b.psnr - a.psnr);
  const ladder: string[] = [];
  let best = Number.NEGATIVE_INFINITY;
  for (const { name, time, psnr } of schedules) {
    if (!Number.isFinite(time) || !Number.isFinite(psnr)) throw new RangeError(`${name} has no time or no PSNR.`);
    if (psnr > best) {
      best = psnr;
      ladder.unshift(name);
    }
  }
  if (ladder.length === 0) throw new RangeError("The benchmark has no schedules of the flowturbo sampler.");
  return ladder;
}

/** The parts of quality.json that a ladder is made of. */
export interface Quality {
  readonly rows: readonly Ranked[];
  readonly captions: number;
  readonly environment: { readonly commit: string };
}

/**
 * The text of schedules.json.
 * @param quality the text of quality.json
 * @throws RangeError if it is not what the benchmark writes
 */
export function scheduleFile(quality: string, name: string): string {
  const { rows, captions, environment } = JSON.parse(quality) as Partial<Quality>;
  if (!Array.isArray(rows) || !captions || !environment)
    throw new RangeError(`${name} is not what the quality benchmark writes: it has no rows, captions or environment.`);
  const source = `PSNR against 100 evaluations on ${captions} captions, ${name} at ${environment.commit}`;
  return `${JSON.stringify({ ladder: ladderOf(rows), source }, null, 2)}\n`;
}
