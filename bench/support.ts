/**
 * What the benchmarks share: paired runs, medians, the memory of a tree of processes, the machine's description. The
 * machines that these run on are shared and noisy: only ratios of runs taken in turn, in one sequence, mean anything.
 */

import { execFileSync, spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import os from "node:os";
import path from "node:path";
import { refreshReadme } from "./readme.js";

export const root = path.resolve(import.meta.dirname, "..");

export interface Spread {
  readonly median: number;
  readonly min: number;
  readonly max: number;
  readonly runs: number;
}

export function spread(values: readonly number[]): Spread {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
  return { median, min: sorted[0]!, max: sorted.at(-1)!, runs: sorted.length };
}

/** Runs each contender in turn, `rounds` times after `warmUp` rounds; milliseconds per contender and round. */
export async function paired(
  contenders: Record<string, () => Promise<number>>,
  rounds: number,
  warmUp = 2,
): Promise<Record<string, number[]>> {
  const times: Record<string, number[]> = Object.fromEntries(Object.keys(contenders).map((name) => [name, []]));
  for (let round = -warmUp; round < rounds; round++) {
    // Every other round backwards, so that neither always follows the other.
    const order = Object.entries(contenders);
    if (round % 2) order.reverse();
    for (const [name, run] of order) {
      const milliseconds = await run();
      if (round >= 0) times[name]!.push(milliseconds);
    }
  }
  return times;
}

/** Ratio of each round, a over b. */
export function ratios(a: readonly number[], b: readonly number[]): Spread {
  return spread(a.map((value, round) => value / b[round]!));
}

/** A process and its descendants, by /proc (Linux). */
export function processTree(pid: number): number[] {
  const parents = new Map<number, number>();
  for (const entry of readdirSync("/proc").filter((name) => /^\d+$/.test(name)))
    try {
      const stat = readFileSync(`/proc/${entry}/stat`, "utf8");
      parents.set(Number(entry), Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[1]));
    } catch {
      // It ended meanwhile.
    }
  const tree = [pid];
  for (const parent of tree) for (const [child, of] of parents) if (of === parent) tree.push(child);
  return tree;
}

/** Bytes resident now, summed over a tree of processes. Shared pages count once for each. */
export function residentBytes(pid: number): number {
  let bytes = 0;
  for (const process of processTree(pid))
    try {
      const kilobytes = readFileSync(`/proc/${process}/status`, "utf8").match(/^VmRSS:\s+(\d+)/m)?.[1];
      bytes += Number(kilobytes ?? 0) * 1024;
    } catch {
      // It ended meanwhile.
    }
  return bytes;
}

/**
 * Runs a process to its end: what it printed, how long it took, and the largest resident size of its tree.
 * @throws Error with the last lines of its standard error if it fails
 */
export async function measureProcess(
  command: string,
  args: readonly string[],
): Promise<{ stdout: string; milliseconds: number; peak: number }> {
  const start = performance.now();
  const child = spawn(command, args, { stdio: ["ignore", "pipe", "pipe"] });
  let [stdout, stderr, peak] = ["", "", 0];
  child.stdout.on("data", (chunk) => {
    stdout += chunk;
  });
  child.stderr.on("data", (chunk) => {
    stderr = (stderr + chunk).slice(-4000);
  });
  const poll = setInterval(() => {
    peak = Math.max(peak, residentBytes(child.pid!));
  }, 20);
  try {
    const code = await new Promise<number | null>((resolve, reject) => {
      child.once("error", reject);
      child.once("close", resolve);
    });
    const milliseconds = performance.now() - start;
    if (code !== 0)
      throw Object.assign(new Error(`${path.basename(command)} ended with code ${code}`), { stderr: stderr.trim() });
    return { stdout, milliseconds, peak };
  } finally {
    clearInterval(poll);
  }
}

/** Where and on what a benchmark ran. */
export function environment(): Record<string, unknown> {
  const manifest = JSON.parse(readFileSync(path.join(root, "package.json"), "utf8")) as { version: string };
  // In node_modules of this repository, or beside this package.
  const { resolve } = createRequire(path.join(root, "package.json"));
  const dependency = (name: string) =>
    (JSON.parse(readFileSync(resolve(`${name}/package.json`), "utf8")) as { version: string }).version;
  return {
    cpu: os.cpus()[0]?.model ?? "unknown",
    cores: os.availableParallelism(),
    memoryGiB: Math.round(os.totalmem() / 2 ** 30),
    platform: `${process.platform}-${process.arch}`,
    node: process.versions.node,
    flowturbo: manifest.version,
    onnxruntime: dependency("onnxruntime-node"),
    commit: gitCommit(),
  };
}

/** With "-dirty" behind it where code was changed since. */
function gitCommit(): string {
  // Outside of the repository, whoever starts a benchmark says what it is of.
  if (process.env.FLOWTURBO_COMMIT) return process.env.FLOWTURBO_COMMIT;
  const git = (...args: string[]) => execFileSync("git", args, { cwd: root, encoding: "utf8" }).trim();
  try {
    const changed = git("status", "--porcelain", "-uno", "--", "lib", "native", "bench", "models", ":!bench/results");
    return git("rev-parse", "--short", "HEAD") + (changed ? "-dirty" : "");
  } catch {
    return "unknown";
  }
}

/** Trials of the benchmarks themselves go elsewhere. */
const elsewhere = process.env.FLOWTURBO_BENCH_RESULTS;
export const resultsFolder = elsewhere ? path.resolve(elsewhere) : path.join(root, "bench/results");

/** Writes bench/results/<name>.json, <name>.md where a page is given, and the figures that the README quotes. */
export async function report(name: string, results: Record<string, unknown>, page?: string): Promise<void> {
  await mkdir(resultsFolder, { recursive: true });
  const file = path.join(resultsFolder, `${name}.json`);
  await writeFile(file, `${JSON.stringify({ benchmark: name, environment: environment(), ...results }, null, 2)}\n`);
  if (page) await writeFile(path.join(resultsFolder, `${name}.md`), `${page.trim()}\n`);
  if (!elsewhere) refreshReadme();
  console.log(`written to ${path.relative(root, file)}${page ? " and .md" : ""}`);
}

/** A Markdown table; the first row is its head. */
export const table = (rows: readonly (readonly (string | number)[])[]): string =>
  rows
    .flatMap((row, index) => [row, ...(index ? [] : [row.map(() => "---")])])
    .map((row) => `| ${row.join(" | ")} |`)
    .join("\n");

/** One line for the foot of a page: where it was measured, and with what. */
export function machineLine(more: Record<string, string> = {}): string {
  const { cpu, cores, memoryGiB, node, onnxruntime, commit } = environment() as Record<string, string>;
  const versions = Object.entries(more).map(([name, version]) => `, ${name} ${version}`);
  return `${cpu}, ${cores} cores, ${memoryGiB} GiB; Node ${node}, ONNX Runtime ${onnxruntime}${versions.join("")}; commit ${commit}.`;
}

/** Least squares through points: y = fixed + slope·x. */
export function line(points: readonly (readonly [x: number, y: number])[]): { fixed: number; slope: number } {
  const [mx, my] = [mean(points.map(([x]) => x)), mean(points.map(([, y]) => y))];
  const slope =
    points.reduce((sum, [x, y]) => sum + (x - mx) * (y - my), 0) / points.reduce((sum, [x]) => sum + (x - mx) ** 2, 0);
  return { fixed: my - slope * mx, slope };
}

export const mean = (values: readonly number[]): number =>
  values.reduce((sum, value) => sum + value, 0) / values.length;

/** A mean and half the width of its 95 % interval; 0 wide for fewer than two values. */
export function meanInterval(values: readonly number[]): { mean: number; margin: number } {
  const centre = mean(values);
  const variance = mean(values.map((value) => (value - centre) ** 2)) / Math.max(1, values.length - 1);
  return { mean: centre, margin: 1.96 * Math.sqrt(variance) };
}

export const format = ({ median, min, max }: Spread, digits = 2): string =>
  `${median.toFixed(digits)} (${min.toFixed(digits)} to ${max.toFixed(digits)})`;

/** A bar that a benchmark holds its figures to. */
export interface Bar {
  readonly bar: string;
  readonly value: string;
  readonly met: boolean;
}

/** What a part of a benchmark found. */
export interface Findings {
  readonly bars: readonly Bar[];
  readonly results: unknown;
  /** Its section of the page. */
  readonly page: string;
}

/** The least value that so much of them does not exceed. @param part from 0 to 1 */
export const quantile = (values: readonly number[], part: number): number => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(part * sorted.length) - 1))] ?? Number.NaN;
};

export const percent = (part: number, digits = 0) => `${(100 * part).toFixed(digits)} %`;

/** A line for who waits, with the seconds since the start. */
export const log = (line: string) => console.error(`${(performance.now() / 1000).toFixed(0).padStart(4)} s  ${line}`);
