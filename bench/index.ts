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
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { refreshReadme } from "./readme.js";
import { resultsFolder, root } from "./support.js";

interface Benchmark {
  readonly name: string;
  readonly about: string;
  /** Pages that it writes, by name; default: one of its own name. */
  readonly pages?: readonly string[];
  /** Its arguments where only minutes are given; without, it runs when it is asked for, or in full. */
  readonly brief?: readonly string[];
}
const benchmarks: readonly Benchmark[] = [
  {
    ...{ name: "peers", about: "against onnxruntime-node and diffusers" },
    brief: ["--rounds", "3", "--no-compile"],
  },
  { name: "scaling", about: "time and memory against steps, batch, size, layers", brief: ["--rounds", "1"] },
  { name: "trials", about: "what was tried to make a step cheaper", brief: ["--rounds", "3", "--only", "shapes"] },
  { name: "gpu", about: "on a GPU", brief: [] },
  { name: "overhead", about: "the pipeline against bare session runs" },
  { name: "event-loop", about: "delay of the event loop" },
  { name: "cold-start", about: "from process start to PNG, by part" },
  { name: "memory", about: "peak memory with 16-bit weights" },
  { name: "concurrency", about: "many callers at once" },
  { name: "executor", about: "the native executor, a launch at a time" },
  { name: "seam", about: "seams of inpainting" },
  { name: "stages", about: "one stage against two" },
  { name: "quality", about: "quality against cost, every sampler", pages: ["quality", "quality-128"] },
  { name: "build", about: "engines at full width" },
];

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

const pages = available
  .flatMap(({ name, pages }) => pages ?? [name])
  .filter((name) => existsSync(path.join(resultsFolder, `${name}.md`)));
const text = [
  "# Measurements",
  "",
  "Each page and each plot says the machine, the versions and the commit. The machines are shared and noisy: ratios of runs that were taken in",
  "turn mean something, milliseconds little. `npm run bench` measures again, the first pages in brief; `npm run bench:<name>` measures one at full length.",
  "",
  ...pages.map((name) => `- ${titleOf(name)}: [${name}.md](${name}.md), [${name}.json](${name}.json)`),
  "",
];
writeFileSync(path.join(resultsFolder, "README.md"), text.join("\n"));
if (resultsFolder === path.join(root, "bench/results")) refreshReadme();
console.log(`\nwritten to ${path.relative(root, resultsFolder)}/README.md`);
if (failed.length) {
  console.error(`failed: ${failed.join(", ")}`);
  process.exitCode = 1;
}

function titleOf(page: string): string {
  return readFileSync(path.join(resultsFolder, `${page}.md`), "utf8")
    .split("\n")[0]!
    .replace(/^#\s*/, "");
}
