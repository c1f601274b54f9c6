/**
 * The embedded model's ladder of schedules for time limits, from the quality benchmark: bench/results/quality.json →
 * models/shapes/schedules.json. To be run after `npm run bench:quality`.
 *
 *   npm run bench:ladder [-- --from bench/results/quality.json --to models/shapes/schedules.json]
 */

import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";
import { scheduleFile } from "./shapes/ladder.js";
import { root } from "./support.js";

const { values: flags } = parseArgs({
  options: {
    from: { type: "string", default: path.join(root, "bench/results/quality.json") },
    to: { type: "string", default: path.join(root, "models/shapes/schedules.json") },
  },
});
const text = scheduleFile(await readFile(flags.from, "utf8"), path.relative(root, flags.from));
await writeFile(flags.to, text);
console.log(`${text}written to ${flags.to}`);
