/** Thousands of jobs while workers, gateways and Redis are ended at random: see test/support/fleet/chaos.ts. */

import { chaos as run } from "../../test/support/fleet/chaos.js";
import { type Findings, log, table } from "../support.js";
import { keepResultsMs, type Setting } from "./setting.js";

/** Jobs a second. */
const rate = 10;

export async function chaos({ quick, seed }: Setting): Promise<Findings> {
  const jobs = quick ? 300 : 5000;
  const spanMs = (1000 * jobs) / rate;
  /** One of each kind in so many seconds. */
  const every = (seconds: number) => Math.max(1, Math.round(spanMs / 1000 / seconds));
  const { counts, violations } = await run({
    ...{ seed, jobs, workers: 3, gateways: 2, spanMs, patienceMs: 60_000, lockMs: 1500, keepResultsMs },
    mishaps: {
      ...{ killWorker: every(7), killGateway: every(10), freezeWorker: every(15), loseWorker: every(40) },
      ...{ restartRedis: every(30), forgetRedis: every(40), pauseRedis: every(60), freezeRedis: every(40) },
    },
    model: { msPerLaunch: 35, msPerRow: 5 },
    log: (line) => log(`chaos: ${line}`),
  });
  for (const violation of violations) log(violation);
  return {
    bars: [
      {
        bar: `Of ${jobs} jobs every one ends once, with the picture that is drawn alone or with a typed error, and nothing is left on Redis`,
        value: `${violations.length} exceptions`,
        met: violations.length === 0,
      },
    ],
    results: { jobs, seed, counts, violations },
    page: `## Chaos

${jobs} jobs at ${rate} a second to two gateways, three workers with locks of 1.5 s; kinds, sizes, priorities, limits, cancels and what is killed follow from seed ${seed}. Clients whose gateway was killed, or that were told to, ask again
with the same seed.

${table([["", ""], ...Object.entries(counts).sort(([a], [b]) => (a < b ? -1 : 1)).map(([name, count]) => [name, count])])}`, // biome-ignore format: one line
  };
}
