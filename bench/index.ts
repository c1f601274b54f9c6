/**
 * Every benchmark by one command, and the page that collects them: bench/results/README.md.
 *
 *   npm run bench                          a few minutes: what needs no long preparation
 *   npm run bench -- --full                everything; quality and full-width engines take hours and 15 GB
 *   npm run bench -- --only peers,stages   some of them
 *   npm run bench -- --page                nothing is measured, the page is written again
 *
 * What follows `--` after that goes to each benchmark that runs.
 */

import { spawnSync } from "node:child_process";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { resultsFolder, root } from "./support.js";

interface Benchmark {
  readonly name: string;
  readonly about: string;
  /** Pages that it writes, by name. */
  readonly pages: readonly string[];
  readonly long?: boolean;
  /** Arguments by default. */
  readonly brief?: readonly string[];
}
const benchmarks: Benchmark[] = [
  { name: "peers", about: "against onnxruntime-node and diffusers", pages: ["peers"], brief: ["--rounds", "3"] },
  { name: "overhead", about: "the pipeline against bare session runs", pages: ["overhead"] },
  { name: "event-loop", about: "delay of the event loop", pages: ["event-loop"] },
  { name: "cold-start", about: "from process start to PNG, by part", pages: ["cold-start"] },
  { name: "memory", about: "peak memory with 16-bit weights", pages: ["memory"] },
  { name: "scaling", about: "time and memory against steps, batch, size, layers", pages: ["scaling"] },
  { name: "concurrency", about: "many callers at once", pages: ["concurrency"] },
  { name: "executor", about: "the native executor, a launch at a time", pages: ["executor"] },
  { name: "gpu", about: "on a GPU", pages: ["gpu"] },
  { name: "seam", about: "seams of inpainting", pages: ["seam"], long: true },
  { name: "stages", about: "one stage against two", pages: ["stages"], long: true },
  { name: "quality", about: "quality against cost, every sampler", pages: ["quality", "quality-128"], long: true },
  { name: "build", about: "engines at full width", pages: ["build"], long: true },
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
const chosen = flags.page ? [] : available.filter(({ name, long }) => wanted?.includes(name) ?? (flags.full || !long));

const failed: string[] = [];
for (const [index, { name, about, brief }] of chosen.entries()) {
  console.log(`\n[${index + 1}/${chosen.length}] ${name}: ${about}`);
  const args = positionals.length || flags.full ? positionals : (brief ?? []);
  const { status } = spawnSync("npx", ["tsx", "--tsconfig", "bench/tsconfig.json", `bench/${name}.ts`, ...args], {
    cwd: root,
    stdio: "inherit",
  });
  if (status !== 0) failed.push(name);
}

const pages = available
  .flatMap(({ pages }) => pages)
  .filter((name) => existsSync(path.join(resultsFolder, `${name}.md`)));
const text = [
  "# Measurements",
  "",
  "Each page says the command, the machine and the versions. The machines are shared and noisy: ratios of runs that were taken in turn",
  "mean something, milliseconds little. `npm run bench` measures again.",
  "",
  ...pages.map((name) => `- ${titleOf(name)}: [${name}.md](${name}.md), [${name}.json](${name}.json)`),
  "",
];
writeFileSync(path.join(resultsFolder, "README.md"), text.join("\n"));
console.log("\nwritten to bench/results/README.md");
if (failed.length) {
  console.error(`failed: ${failed.join(", ")}`);
  process.exitCode = 1;
}

function titleOf(page: string): string {
  return readFileSync(path.join(resultsFolder, `${page}.md`), "utf8")
    .split("\n")[0]!
    .replace(/^#\s*/, "");
}
