/**
 * The embedded model's ladder of schedules for time limits, from the quality benchmark: bench/results/quality.json →
 * models/shapes/schedules.json. To be run after `npm run bench:quality`.
 *
 *   npm run bench:ladder
 */

import { readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { embeddedModel } from "flowturbo";
import { ladderOf, type Ranked } from "./shapes/ladder.js";
import { resultsFolder } from "./support.js";

const { rows, captions, environment } = JSON.parse(
  await readFile(path.join(resultsFolder, "quality.json"), "utf8"),
) as {
  rows: Ranked[];
  captions: number;
  environment: { commit: string };
};
const ladder = ladderOf(rows);
const file = path.join(embeddedModel, "schedules.json");
const source = `Fréchet distance on ${captions} captions, bench/results/quality.json at ${environment.commit}`;
await writeFile(file, `${JSON.stringify({ ladder, source }, null, 2)}\n`);
console.log(`${ladder.join(" ")}\nwritten to ${file}`);
