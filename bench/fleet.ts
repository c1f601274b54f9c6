/**
 * A fleet by processes on a Redis of its own: throughput of 1, 2, 4 and 8 workers against one model in its caller's process, the time that queue and
 * gateway add to a request, what a picture takes of Redis, and, with `--chaos`, thousands of jobs while processes are killed. Workers wait in place of
 * computing (test/support/waiting.ts), so that cores are not the limit. Writes bench/results/fleet.{json,md}, with a bar for each; with `--quick`, and
 * for some parts alone, it writes nothing. Linux, with redis-server.
 *
 *   npm run bench:fleet -- --chaos [--rounds 5 --seed 1 --only throughput,added,limit,chaos --quick]
 */

import { mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import { TestRedis } from "../test/support/redis.js";
import { added } from "./fleet/added.js";
import { chaos } from "./fleet/chaos.js";
import { limit } from "./fleet/limit.js";
import type { Setting } from "./fleet/setting.js";
import { throughput } from "./fleet/throughput.js";
import { type Findings, machineLine, report, table } from "./support.js";

const parts = { throughput, added, limit, chaos };
const { values: flags } = parseArgs({
  options: {
    rounds: { type: "string", default: "5" },
    seed: { type: "string", default: "1" },
    only: { type: "string" },
    chaos: { type: "boolean", default: false },
    quick: { type: "boolean", default: false },
  },
});
const usual = Object.keys(parts).filter((name) => name !== "chaos" || flags.chaos);
const chosen = flags.only?.split(",") ?? usual;
const unknown = chosen.find((name) => !(name in parts));
if (unknown !== undefined) {
  console.error(`There is no part ${unknown}; there are: ${Object.keys(parts).join(", ")}`);
  process.exit(2);
}

const redis = await TestRedis.start();
const cache = await mkdtemp(path.join(os.tmpdir(), "flowturbo-bench-fleet-"));
const { quick } = flags;
const setting: Setting = {
  ...{ redis, cache, quick, rounds: quick ? 1 : Number(flags.rounds), seed: Number(flags.seed) },
};
const findings: Record<string, Findings> = {};
try {
  for (const [name, run] of Object.entries(parts)) if (chosen.includes(name)) findings[name] = await run(setting);
} catch (error) {
  // What was measured before is not lost.
  for (const { page } of Object.values(findings)) console.log(page);
  throw error;
} finally {
  await redis.stop();
  await rm(cache, { recursive: true, force: true });
}

const bars = Object.values(findings).flatMap((each) => each.bars);
const barTable = table([
  ["bar", "measured", ""],
  ...bars.map(({ bar, value, met }) => [bar, value, met ? "met" : "missed"]),
]);
const sections = Object.values(findings).map(({ page }) => page);
if (quick || flags.only) console.log([barTable, ...sections].join("\n\n"));
else {
  await report(
    "fleet",
    {
      ...{ rounds: setting.rounds, seconds: Math.round(performance.now() / 1000), bars },
      ...Object.fromEntries(Object.entries(findings).map(([name, { results }]) => [name, results])),
    },
    `# A fleet of processes

\`npm run bench:fleet -- --rounds ${flags.rounds} --seed ${flags.seed}${flags.chaos ? " --chaos" : ""}\` on ${machineLine()}

Workers, gateways, callers and a redis-server with a log (\`appendfsync everysec\`) as processes on one machine. Models wait in place of computing; all else is the library's own.

${barTable}

${sections.join("\n\n")}
`,
  );
  console.log(barTable);
}
