// Workers, gateways and Redis are ended at random under a load. A failure names the number that its randomness followed from: CHAOS_SEED
// has it used again. The moments at which processes are scheduled are not the same then.
import { expect, it } from "vitest";
import { chaos } from "../support/fleet/chaos.js";
import { noRedis } from "../support/redis.js";

const seed = Number(process.env.CHAOS_SEED ?? Math.floor(Math.random() * 2 ** 31));

it.skipIf(noRedis)(
  `every job has one result or one typed error, whatever is killed${noRedis ? ` (skipped: ${noRedis})` : ""}`,
  { timeout: 180_000 },
  async () => {
    const lines: string[] = [];
    const { counts, violations } = await chaos({
      ...{ seed, jobs: 200, workers: 3, gateways: 2, spanMs: 25_000, patienceMs: 40_000 },
      mishaps: {
        ...{ killWorker: 4, killGateway: 3, freezeWorker: 2, loseWorker: 1 },
        ...{ restartRedis: 1, forgetRedis: 1, pauseRedis: 1, freezeRedis: 1 },
      },
      model: { msPerLaunch: 35, msPerRow: 5 },
      ...{ lockMs: 1500, keepResultsMs: 10_000 },
      log: (line) => {
        lines.push(line);
        if (process.env.CHAOS_LOG) console.error(line);
      },
    });
    if (process.env.CHAOS_LOG) console.error(counts);
    const seen = JSON.stringify(counts);
    expect(violations, `CHAOS_SEED=${seed}\n${lines.join("\n")}\n${seen}`).toEqual([]);
    expect(counts["results compared"], seen).toBeGreaterThan(100);
    expect(counts.cancelled, seen).toBeGreaterThan(0);
    expect(counts["drawings under way at a worker that was killed or hung"], seen).toBeGreaterThan(0);
  },
);
