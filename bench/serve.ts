/**
 * The server over HTTP on loopback: a process with the embedded model, clients in another one. Requests per second and latency against the
 * library called in its caller's process; arrivals beyond the capacity with a time limit, and clients that obey `retry-after-ms`; clients that
 * hang up; memory over requests of all kinds. Writes bench/results/serve.{json,md}, with a bar for each. Linux.
 *
 *   npm run bench:serve [-- --rounds 8 --only throughput,overload,hangups,memory --cpu-prof <folder>]
 */

import { mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { parseArgs } from "node:util";
import { hangups } from "./serve/hangups.js";
import { memory } from "./serve/memory.js";
import { overload } from "./serve/overload.js";
import { type Setting, steps } from "./serve/setting.js";
import { throughput } from "./serve/throughput.js";
import { type Findings, machineLine, report, table } from "./support.js";

const parts = { throughput, overload, hangups, memory };
const { values: flags } = parseArgs({
  options: {
    /** Turns of whatever is compared. */
    rounds: { type: "string", default: "8" },
    only: { type: "string", default: Object.keys(parts).join() },
    /** Where processor profiles of the server and of the library are written. */
    "cpu-prof": { type: "string" },
  },
});
const chosen = flags.only.split(",");
const unknown = chosen.find((name) => !(name in parts));
if (unknown !== undefined) {
  console.error(`There is no part ${unknown}; there are: ${Object.keys(parts).join(", ")}`);
  process.exit(2);
}

const cache = await mkdtemp(path.join(os.tmpdir(), "flowturbo-serve-"));
const profiles = flags["cpu-prof"] === undefined ? null : path.resolve(flags["cpu-prof"]);
const setting: Setting = { cache, rounds: Number(flags.rounds), profiles };
const findings: Record<string, Findings> = {};
try {
  for (const [name, run] of Object.entries(parts)) if (chosen.includes(name)) findings[name] = await run(setting);
} finally {
  await rm(cache, { recursive: true, force: true });
}

const found = Object.values(findings);
const bars = found.flatMap((each) => each.bars);
const barTable = table([
  ["bar", "measured", ""],
  ...bars.map(({ bar, value, met }) => [bar, value, met ? "met" : "missed"]),
]);
await report(
  "serve",
  {
    ...{ rounds: setting.rounds, parts: Object.keys(findings), seconds: Math.round(performance.now() / 1000), bars },
    ...Object.fromEntries(Object.entries(findings).map(([name, { results }]) => [name, results])),
  },
  `# The server over HTTP

\`npm run bench:serve -- --rounds ${flags.rounds}\` on ${machineLine()}

\`createServer\` with the embedded model, one process; its clients on loopback, another one, on the same cores. Pictures of 64 px, ${steps} steps, guidance 2, PNG in base64.

${barTable}

${found.map(({ page }) => page).join("\n\n")}
`,
);
console.log(barTable);
