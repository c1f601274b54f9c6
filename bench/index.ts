/**
 * Every benchmark by one command, the page that collects them (bench/results/README.md), and the figures in the README.
 *
 *   npm run bench                          a few minutes: peers, scaling and trials in brief, and a GPU where there is one
 *   npm run bench -- --full                everything at full length; quality and full-width engines take hours and 15 GB
 *   npm run bench -- --only peers,stages   some of them, at full length
 *   npm run bench -- --page                nothing is measured, the pages are written again
 *
 * What follows `--` after that goes to each benchmark that runs.
 */

import { spawnSync } from "node:child_process";
import { existsSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { benchmarks, measurements } from "./pages.js";
import { refreshReadme } from "./readme.js";
import { resultsFolder, root } from "./support.js";

const { values: flags, positionals } = parseArgs({
  options: {
    full: { type: "boolean", default: false },
    only: { type: "string" },
    page: { type: "boolean", default: false },
  },
  allowPositionals: true,
});
const available = benchmarks.filter(({ name }) => existsSync(path.join(root, "bench", `${name}.ts`)));
const wanted = flags.only?.split(",");
for (const name of wanted ?? [])
  if (!available.some((benchmark) => benchmark.name === name)) {
    console.error(
      `There is no benchmark ${name}; there are: ${available.map((benchmark) => benchmark.name).join(", ")}`,
    );
    process.exit(2);
  }
const chosen = flags.page
  ? []
  : available.filter(({ name, brief }) => wanted?.includes(name) ?? (flags.full || brief !== undefined));

const failed: string[] = [];
for (const [index, { name, about, brief }] of chosen.entries()) {
  console.log(`\n[${index + 1}/${chosen.length}] ${name}: ${about}`);
  const args = positionals.length > 0 || flags.full || wanted ? positionals : (brief ?? []);
  const start = performance.now();
  const { status } = spawnSync("npx", ["tsx", "--tsconfig", "bench/tsconfig.json", `bench/${name}.ts`, ...args], {
    cwd: root,
    stdio: "inherit",
  });
  // 3: what it needs is not here, as it has said.
  if (status !== 0 && status !== 3) failed.push(name);
  console.log(`${name}: ${((performance.now() - start) / 60_000).toFixed(1)} minutes`);
}

writeFileSync(path.join(resultsFolder, "README.md"), measurements(resultsFolder));
if (resultsFolder === path.join(root, "bench/results")) refreshReadme();
console.log(`\nwritten to ${path.relative(root, resultsFolder)}/README.md`);
if (failed.length) {
  console.error(`failed: ${failed.join(", ")}`);
  process.exitCode = 1;
}
