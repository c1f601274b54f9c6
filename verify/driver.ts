/**
 * `npm run verify:gpu -- --driver`: the executor on a real driver, where there is no TensorRT. The library that it opens is
 * a stand-in (native/simulated), found as --tensorrt-dir would find TensorRT: its engines compute closed forms with a kernel of
 * our own. So everything between JavaScript and the device is what it is with TensorRT: symbols, contexts, streams,
 * events, captures, memory. executor-checks.ts has the checks; then the executor's own test runs, without Node.
 *
 * The report is written after every check. A check that takes too long ends the verification, since what waits for a
 * device cannot be called back.
 */

import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { mkdir, rename, writeFile } from "node:fs/promises";
import path from "node:path";
import { createInterface } from "node:readline";
import { gigabytes } from "../lib/common/memory.js";
import { packagePath } from "../lib/common/package.js";
import { smOf, smText, versionText } from "../lib/runtimes/tensorrt/addon.js";
import { diagnosis, examineTensorRt } from "../lib/runtimes/tensorrt/libraries.js";
import { ExecutorChecks } from "./executor-checks.js";

export interface DriverOptions {
  /** The stand-in's folder. Default: where `npm run build:native -- --simulated` puts it. */
  readonly folder?: string | undefined;
  /** For driver.md and driver.json. */
  readonly out: string;
  /** Of the mixture. Default: 1000. */
  readonly runs?: number | undefined;
  /** How long one check may take. Default: 60. */
  readonly limitSeconds?: number | undefined;
}

export interface DriverCheck {
  readonly check: string;
  readonly passed: boolean;
  readonly detail: string;
  readonly seconds: number;
}

export interface DriverReport {
  /** Whether it came to its end, and everything passed. */
  readonly passed: boolean;
  readonly complete: boolean;
  readonly created: string;
  readonly machine: {
    readonly gpu: string;
    readonly sm: string;
    readonly memoryBytes: number;
    readonly driver: string;
    /** The library in the place of TensorRT. */
    readonly library: string;
    readonly addon: string;
  };
  readonly checks: readonly DriverCheck[];
}

const say = (line: string) => process.stderr.write(`${line}\n`);

/** @returns the exit code: 0 all passed, 1 something failed or is lacking, 3 there is no GPU */
export async function verifyDriver({
  out,
  runs = 1000,
  limitSeconds = 60,
  ...options
}: DriverOptions): Promise<number> {
  const folder = options.folder ?? packagePath(".cache/simulated/stand-in");

  // 1. The GPU and the stand-in.
  const found = await examineTensorRt("tensorrt", { folder, gpuFirst: true });
  const { addon, cuda, library } = found;
  if (!addon || !cuda) {
    say("Nothing was verified: there is no GPU here that the executor could be run on.");
    say(diagnosis(found, "running"));
    return addon ? 3 : 1;
  }
  if (!library || path.dirname(library.library) !== path.resolve(folder)) {
    const tried = found.places.find(({ source }) => source === "option");
    say(`The stand-in for TensorRT is not in ${folder}: ${tried?.error ?? "another library was found first"}.`);
    say("`npm run build:native -- --simulated` builds it into .cache/simulated/stand-in.");
    return 1;
  }
  const [gpu] = cuda.devices;
  const machine = {
    ...{ gpu: gpu!.name, sm: smText(smOf(gpu!)), memoryBytes: gpu!.memoryBytes },
    driver: `${Math.floor(cuda.driverVersion / 1000)}.${Math.floor((cuda.driverVersion % 1000) / 10)}`,
    library: library.file,
    addon: `for TensorRT ${versionText(addon.describe().headers)}`,
  };

  // 2. The checks.
  const checks: DriverCheck[] = [];
  const created = new Date().toISOString();
  const reported = (complete: boolean): DriverReport => ({
    ...{ passed: complete && checks.every(({ passed }) => passed), complete, created, machine, checks },
  });
  const note = async (check: DriverCheck) => {
    checks.push(check);
    say(`${check.passed ? "ok" : "FAILED"} ${check.check}${check.detail ? `: ${check.detail}` : ""}`);
    await write(out, reported(false));
  };
  await write(out, reported(false));
  const verification = new ExecutorChecks({ addon, ...library }, runs);
  try {
    for (const [check, body] of verification.checks()) {
      const start = performance.now();
      const outcome = await within(limitSeconds, body).then(
        (detail) => ({ passed: true, detail }),
        (error: Error) => ({ passed: false, detail: `${error.name}: ${error.message}`, hung: error instanceof Hung }),
      );
      await note({ check, passed: outcome.passed, detail: outcome.detail, seconds: seconds(start) });
      if ("hung" in outcome && outcome.hung) {
        // It may never come back, and neither would the end of the process.
        verification.removeFolder();
        say(`Ended there. The report so far: ${path.join(out, "driver.md")}.`);
        process.exit(1);
      }
    }
    await verification.dispose();
    await runNative(path.join(folder, "executor_driver"), limitSeconds * 2, note);
  } finally {
    verification.removeFolder();
  }
  const report = reported(true);
  await write(out, report);
  process.stdout.write(driverMarkdown(report));
  say(`Written to ${path.join(out, "driver.md")} and driver.json.`);
  return report.passed ? 0 : 1;
}

class Hung extends Error {
  override readonly name = "Hung";
}

async function within<Value>(limit: number, body: () => Promise<Value>): Promise<Value> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Hung(`it did not end within ${limit} s`)), limit * 1000);
  });
  return Promise.race([body(), late]).finally(() => clearTimeout(timer));
}

const seconds = (start: number) => Math.round(performance.now() - start) / 1000;

/** Whole at any moment: a killed process leaves the report of the checks before. */
async function write(folder: string, report: DriverReport): Promise<void> {
  await mkdir(folder, { recursive: true });
  const files = { "driver.json": `${JSON.stringify(report, null, 2)}\n`, "driver.md": driverMarkdown(report) };
  for (const [name, text] of Object.entries(files)) {
    const temporary = path.join(folder, `${name}.part`);
    await writeFile(temporary, text);
    await rename(temporary, path.join(folder, name));
  }
}

export function driverMarkdown({ passed, complete, created, machine, checks }: DriverReport): string {
  const cell = (text: string) => text.replaceAll("|", "\\|").replaceAll("\n", " ");
  return `${[
    `# verify:gpu --driver: ${passed ? "passed" : complete ? "FAILED" : "not finished"}`,
    `${machine.gpu}, SM ${machine.sm}, ${gigabytes(machine.memoryBytes)} GB; driver for CUDA ${machine.driver}; addon ${machine.addon}. ${created}.`,
    "The executor on a real driver. In the place of TensorRT is a stand-in whose engines compute closed forms with one kernel; results are compared with the same forms on the host, bit for bit.",
    [
      "| check | | seconds | detail |",
      "| --- | --- | --- | --- |",
      ...checks.map(
        (each) =>
          `| ${cell(each.check)} | ${each.passed ? "ok" : "**failed**"} | ${each.seconds.toFixed(2)} | ${cell(each.detail)} |`,
      ),
    ].join("\n"),
  ].join("\n\n")}\n`;
}

/** The executor's own test, without Node: a line for each test that passed, the reason and an end with 1 at the first that did not. */
async function runNative(
  executable: string,
  limit: number,
  note: (check: DriverCheck) => Promise<void>,
): Promise<void> {
  const name = (test: string) => `executor without Node: ${test}`;
  let start = performance.now();
  if (!existsSync(executable)) {
    await note({ check: name("all"), passed: false, detail: `${executable} is missing`, seconds: 0 });
    return;
  }
  const child = spawn(executable, [], {
    stdio: ["ignore", "pipe", "pipe"],
    timeout: limit * 1000,
    killSignal: "SIGKILL",
  });
  let stderr = "";
  child.stderr.on("data", (chunk) => {
    stderr = (stderr + chunk).slice(-2000);
  });
  const ended = new Promise<string>((resolve) => {
    child.once("error", (error) => resolve(error.message));
    child.once("close", (code, signal) =>
      resolve(
        code === 0
          ? ""
          : signal
            ? `it did not end within ${limit} s, or was killed (${signal})`
            : `it ended with ${code}`,
      ),
    );
  });
  for await (const line of createInterface({ input: child.stdout })) {
    if (!line.startsWith("ok ")) continue;
    await note({ check: name(line.slice(3)), passed: true, detail: "", seconds: seconds(start) });
    start = performance.now();
  }
  const failure = await ended;
  if (failure === "") return;
  await note({
    check: name("the next"),
    passed: false,
    detail: `${failure}. ${stderr.trim()}`,
    seconds: seconds(start),
  });
}
