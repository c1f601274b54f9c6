/**
 * Runs steps one after the other within a budget of time, each a process with a limit of its own, and keeps a summary that
 * is whole after every step. One that fails, hangs or crashes does not keep the next from running. coreutils' `timeout`
 * stands between this process and a step: it ends all that the step has started, also where this process has been killed.
 */

import { spawn } from "node:child_process";
import { createWriteStream } from "node:fs";
import path from "node:path";
import { finished } from "node:stream/promises";
import { writeFileAtomic } from "../lib/common/files.js";

/** What a step's process came to. */
export interface Ended {
  /** Its exit code; null if it was killed or could not be started. */
  readonly code: number | null;
  /** The end of what it wrote to its standard output, and to both outputs. */
  readonly stdout: string;
  readonly output: string;
}

export interface Verdict {
  readonly passed: boolean;
  /** A line for the summary. */
  readonly detail: string;
}

export interface Step {
  readonly name: string;
  /** Seconds that it may take. */
  readonly limit: number;
  /** Why it does not run here. Asked when its turn comes, as all that follow. */
  skip?(): string | null;
  /** @param seconds that it has: its limit, or what is left of the budget */
  command(seconds: number): {
    readonly file: string;
    readonly args: readonly string[];
    readonly env?: Readonly<Record<string, string>>;
  };
  /** Default: the exit code 0 is a pass, and the last line that it wrote the detail. Of a step that took too long, `passed` is not looked at. */
  judge?(ended: Ended): Promise<Verdict>;
}

/** `cut`: by the end of the budget, where its own limit would have left it time. `skipped` is no failure; all but it and `passed` are. */
export type Outcome = "passed" | "failed" | "timed out" | "cut" | "not started" | "skipped";

export interface StepResult extends Pick<Verdict, "detail"> {
  readonly step: string;
  readonly outcome: Outcome;
  readonly seconds: number;
}

export interface Summary {
  readonly state: "unfinished" | "finished";
  /** Whether it is finished, there is a GPU, and nothing failed or was left out for want of time. */
  readonly passed: boolean;
  /** Where there is no GPU to verify anything on: why not. */
  readonly noGpu: string | null;
  /** The step that ran when this was written. */
  readonly running: string | null;
  readonly budgetSeconds: number;
  readonly seconds: number;
  /** What is known of the machine and the pack, a line each. */
  readonly about: readonly string[];
  /** What went wrong outside of a step. */
  readonly problems: readonly string[];
  readonly steps: readonly StepResult[];
}

export interface StepsOptions {
  /** Folder for summary.txt and summary.json, and a log of each step. */
  readonly out: string;
  /** Seconds that are left, and of how many in all. */
  readonly seconds: number;
  readonly budgetSeconds: number;
  /** What went wrong before. */
  readonly problems: readonly string[];
  readonly signal: AbortSignal;
  say(line: string): void;
}

/** With less than that nothing is begun. */
const leastSeconds = 2;
/** Seconds between being asked to end and being killed. */
const graceSeconds = 3;
/** What is kept of a process's outputs in memory; its log has all. */
const keptCharacters = 2 ** 20;

export class Steps {
  readonly #options: StepsOptions;
  readonly #begin = performance.now();
  readonly #results: StepResult[] = [];
  readonly about: string[] = [];
  readonly #problems: string[];
  #noGpu: string | null = null;
  #running: string | null = null;
  #state: Summary["state"] = "unfinished";

  constructor(options: StepsOptions) {
    this.#options = options;
    this.#problems = [...options.problems];
  }

  get summary(): Summary {
    const { budgetSeconds, seconds } = this.#options;
    const problems = [...this.#problems];
    const sound = problems.length === 0 && this.#results.every(({ outcome }) => fine(outcome));
    return {
      state: this.#state,
      passed: this.#state === "finished" && sound && this.#noGpu === null,
      ...{ noGpu: this.#noGpu, running: this.#running, budgetSeconds },
      seconds: Math.round(budgetSeconds - seconds + (performance.now() - this.#begin) / 1000),
      ...{ about: [...this.about], problems, steps: [...this.#results] },
    };
  }

  /** 0 all passed, 1 something failed, 3 there is no GPU and nothing else is wrong. */
  get exitCode(): number {
    const { passed, noGpu, problems } = this.summary;
    if (passed) return 0;
    return noGpu !== null && problems.length === 0 && this.#results.every(({ outcome }) => fine(outcome)) ? 3 : 1;
  }

  resultOf(step: string): StepResult | undefined {
    return this.#results.find((result) => result.step === step);
  }

  /** @throws the reason of the signal, when the step's processes have ended */
  async run(step: Step): Promise<StepResult> {
    const { out, signal, say } = this.#options;
    signal.throwIfAborted();
    const reason = step.skip?.() ?? null;
    const left = this.#left();
    if (reason !== null) return this.#note({ step: step.name, outcome: "skipped", seconds: 0, detail: reason });
    if (left < leastSeconds + graceSeconds)
      return this.#note({ step: step.name, outcome: "not started", seconds: 0, detail: "the budget is spent" });
    this.#running = step.name;
    await this.#write();
    const limit = Math.floor(Math.min(step.limit, left - graceSeconds));
    const begin = performance.now();
    const spent = () => Math.round((performance.now() - begin) / 100) / 10;
    let result: StepResult;
    try {
      const ended = await runWithin(limit, step.command(limit), path.join(out, `${step.name}.log`), signal);
      signal.throwIfAborted();
      const { passed, detail } = await (step.judge ?? judgeByCode)(ended);
      const isLate = spent() >= limit && (ended.code === 124 || ended.code === null || ended.code === 137);
      const late = limit < step.limit ? "cut" : "timed out";
      result = {
        step: step.name,
        outcome: isLate ? late : passed ? "passed" : "failed",
        seconds: spent(),
        detail: isLate ? `it did not end within ${limit} s${detail ? `; ${detail}` : ""}` : detail,
      };
    } catch (error) {
      signal.throwIfAborted();
      result = { step: step.name, outcome: "failed", seconds: spent(), detail: oneLine((error as Error).message) };
    }
    this.#running = null;
    say(lineOf(result));
    return this.#note(result, true);
  }

  /** Something went wrong outside of a step. */
  fail(problem: string): void {
    this.#problems.push(problem);
  }

  /** There is no GPU, so that no further step has a meaning. */
  withoutGpu(why: string): void {
    this.#noGpu = why;
  }

  /** Writes the summary as it is to be, and returns what it has written: a later one may count a second more. */
  async end(): Promise<Summary> {
    this.#state = "finished";
    return this.#write();
  }

  #left(): number {
    return this.#options.seconds - (performance.now() - this.#begin) / 1000;
  }

  async #note(result: StepResult, isSaid = false): Promise<StepResult> {
    this.#results.push(result);
    if (!isSaid) this.#options.say(lineOf(result));
    await this.#write();
    return result;
  }

  async #write(): Promise<Summary> {
    const { summary } = this;
    const { out } = this.#options;
    await writeFileAtomic(path.join(out, "summary.json"), `${JSON.stringify(summary, null, 2)}\n`);
    await writeFileAtomic(path.join(out, "summary.txt"), summaryText(summary));
    return summary;
  }
}

const fine = (outcome: Outcome) => outcome === "passed" || outcome === "skipped";

export function summaryText({ state, passed, noGpu, running, budgetSeconds, seconds, ...rest }: Summary): string {
  const { about, problems, steps } = rest;
  const bad = steps.filter(({ outcome }) => !fine(outcome)).map(({ step, outcome }) => `${step} (${outcome})`);
  const failures = [...problems, ...bad];
  const verdict =
    state === "unfinished"
      ? `UNFINISHED${running === null ? "" : `, it was at ${running}`}`
      : noGpu !== null
        ? `NO GPU${failures.length > 0 ? `, and FAILED: ${failures.join("; ")}` : ""}`
        : passed
          ? "ALL PASSED"
          : `FAILED: ${failures.join("; ")}`;
  return `${[
    ...about,
    ...problems.map((problem) => `problem: ${problem}`),
    ...steps.map(lineOf),
    ...(noGpu === null ? [] : [`There is no GPU here that flowturbo can use, so nothing was verified. ${noGpu}`]),
    `${verdict} (${seconds} s of ${budgetSeconds} s)`,
  ].join("\n")}\n`;
}

const lineOf = ({ step, outcome, seconds, detail }: StepResult) =>
  `${outcome.padEnd(11)} ${step.padEnd(20)} ${`${seconds.toFixed(1)} s`.padStart(8)}  ${detail}`.trimEnd();

export function oneLine(text: string, characters = 400): string {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > characters ? `${line.slice(0, characters)} …` : line;
}

/** The last line that says something. */
export function lastLine(text: string): string {
  return oneLine(text.trim().split("\n").at(-1) ?? "");
}

async function judgeByCode({ code, output }: Ended): Promise<Verdict> {
  return { passed: code === 0, detail: lastLine(output) || (code === 0 ? "" : endOf(code)) };
}

export function endOf(code: number | null): string {
  return code === null ? "the process was killed" : `it ended with ${code}`;
}

/** @throws Error if it cannot be started */
async function runWithin(
  limit: number,
  { file, args, env }: ReturnType<Step["command"]>,
  log: string,
  signal: AbortSignal,
): Promise<Ended> {
  const child = spawn("timeout", ["-k", String(graceSeconds), String(limit), file, ...args], {
    env: { ...process.env, ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const written = createWriteStream(log);
  // A log that cannot be written is no reason to end.
  written.on("error", () => undefined);
  let [stdout, output] = ["", ""];
  for (const [stream, isStdout] of [
    [child.stdout, true],
    [child.stderr, false],
  ] as const)
    stream.setEncoding("utf8").on("data", (text: string) => {
      written.write(text);
      output = (output + text).slice(-keptCharacters);
      if (isStdout) stdout = (stdout + text).slice(-keptCharacters);
    });
  // It passes the signal on to all that the step has started.
  const stop = () => child.kill("SIGTERM");
  signal.addEventListener("abort", stop, { once: true });
  try {
    const closed = new Promise<void>((resolve) => child.once("close", () => resolve()));
    const code = await new Promise<number | null>((resolve, reject) => {
      child.once("error", reject);
      child.once("exit", resolve);
    });
    // What the step has left behind is in the group that `timeout` has made, and may keep the pipes open.
    try {
      process.kill(-child.pid!, "SIGKILL");
    } catch {
      // Nothing.
    }
    await closed;
    return { code, stdout, output };
  } finally {
    signal.removeEventListener("abort", stop);
    written.end();
    await finished(written).catch(() => undefined);
  }
}
