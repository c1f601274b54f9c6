/**
 * Has a bundle verified by a process of its own (worker.ts), and keeps the report: after each step, as a whole file that
 * replaces the one before. A step that ends the process, or takes longer than it may, has failed; another process does the
 * rest, a few times at most.
 */

import { type ChildProcess, fork } from "node:child_process";
import { mkdir } from "node:fs/promises";
import path from "node:path";
import { writeFileAtomic } from "../lib/common/files.js";
import type { Origin } from "./bundle.js";
import { isSound, markdown, type Report, reasonsOf } from "./report.js";
import type { Assignment, Blame, Message } from "./worker.js";

/** Processes that may be replaced. */
const replacements = 3;

/** A process that has said that it is done has so many milliseconds to end by itself. */
const endingMs = 10_000;

export interface SupervisorOptions {
  readonly origin: Origin;
  /** Folder for report.md and report.json. */
  readonly out: string;
  /** Milliseconds that a case may take. */
  readonly caseTimeoutMs: number;
  /** The script that is to be the worker, with the flag `--worker`. */
  readonly script: string;
  readonly signal: AbortSignal;
  say(line: string): void;
}

/** @throws `signal.reason`; the report is then unfinished */
export async function supervise(
  assignment: Omit<Assignment, "done" | "failed">,
  options: SupervisorOptions,
): Promise<Report> {
  const { rounds, quick, level = null } = assignment;
  const report = new Keeper(options.out, {
    ...{
      state: "unfinished",
      passed: false,
      running: null,
      machine: null,
      origin: options.origin,
      rounds,
      quick,
      level,
    },
    ...{ planned: { engines: 0, cases: 0 }, engines: [], findings: [], lifecycle: [], pictures: [], skipped: [] },
    problems: [],
  });
  await report.change({});
  const done: string[] = [];
  const failed: Record<string, string> = {};
  let steps: readonly string[] = [];
  for (let replaced = 0; ; replaced++) {
    // What was read once is sound.
    const verified = assignment.verified || replaced > 0;
    const ended = await runWorker(
      { ...assignment, verified, done, failed },
      { ...options, report, done, failed },
      (planned) => {
        steps = planned;
      },
    );
    if (ended.complete) break;
    const left = steps.filter((step) => !done.includes(step));
    if (ended.hopeless || replaced === replacements) {
      const reason = ended.hopeless ? ended.why : `${replaced + 1} processes have ended before it`;
      await report.change({ skipped: [...report.now.skipped, ...left.map((name) => ({ name, reason }))] });
      break;
    }
    if (left.length === 0) break;
    options.say(`${ended.why}; another process does the rest.`);
  }
  return report.finish();
}

/** The report, and the files that show it. */
class Keeper {
  now: Report;
  readonly #out: string;
  #written: Promise<void> = Promise.resolve();

  constructor(out: string, report: Report) {
    this.#out = out;
    this.now = report;
  }

  change(changes: Partial<Report>): Promise<void> {
    this.now = { ...this.now, ...changes };
    const report = this.now;
    this.#written = this.#written.then(async () => {
      await mkdir(this.#out, { recursive: true });
      await writeFileAtomic(path.join(this.#out, "report.json"), `${JSON.stringify(report, null, 2)}\n`);
      await writeFileAtomic(path.join(this.#out, "report.md"), markdown(report));
    });
    return this.#written;
  }

  async finish(): Promise<Report> {
    await this.change({ state: "finished", running: null, passed: isSound(this.now) });
    return this.now;
  }
}

/** How a process ended: with everything done, or why not, and whether another one could do better. */
interface Ended {
  readonly complete: boolean;
  readonly hopeless: boolean;
  readonly why: string;
}

interface Step {
  readonly name: string;
  readonly blame: Blame;
}

interface Supervision extends SupervisorOptions {
  readonly report: Keeper;
  readonly done: string[];
  readonly failed: Record<string, string>;
}

async function runWorker(
  assignment: Assignment,
  supervision: Supervision,
  onPlan: (steps: readonly string[]) => void,
): Promise<Ended> {
  const { report, script, signal, caseTimeoutMs, say } = supervision;
  signal.throwIfAborted();
  const doneBefore = supervision.done.length;
  // What a library prints must not get into the report on standard output.
  const child = fork(script, ["--worker"], { serialization: "advanced", stdio: ["ignore", 2, 2, "ipc"] });
  const kill = () => child.kill("SIGKILL");
  signal.addEventListener("abort", kill, { once: true });
  let step = null as Step | null;
  let timer: NodeJS.Timeout | undefined;
  let timedOut = false;
  let ended = null as Ended | null;
  let progress = Promise.resolve();
  let failure: unknown = null;
  const arm = (milliseconds: number) => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      timedOut = true;
      kill();
    }, milliseconds);
  };
  const finished = (name: string) => {
    supervision.done.push(name);
    step = null;
  };
  const receive = async (message: Message) => {
    // Also between two steps: closing a device may hang as well. Builds and reading a bundle take their time.
    const isUnlimited = message.type === "plan" || (message.type === "begin" && !message.limited);
    if (isUnlimited) clearTimeout(timer);
    else arm(["end", "lost", "failed"].includes(message.type) ? endingMs : caseTimeoutMs);
    const { now } = report;
    switch (message.type) {
      case "plan":
        onPlan(message.steps);
        return report.change({ planned: { engines: message.engines, cases: message.cases } });
      case "machine":
        finished("opening the device");
        return report.change({ machine: message.machine });
      case "begin":
        step = { name: message.step, blame: message.blame };
        if (!message.limited) say(`${message.step} …`);
        return report.change({ running: message.step });
      case "engine": {
        const { graph, error } = message.engine;
        if (error !== undefined) supervision.failed[graph] = error;
        finished(`the engine of ${graph}`);
        if (error !== undefined) say(`the engine of ${graph}: FAILED: ${error}`);
        return report.change({ engines: [...now.engines, message.engine] });
      }
      case "finding": {
        const { finding } = message;
        finished(finding.name);
        say(`${finding.name}: ${finding.passed ? "ok" : `FAILED: ${reasonsOf(finding)}`}`);
        return report.change({ findings: [...now.findings, finding] });
      }
      case "lifecycle":
        finished(message.check.check);
        say(`${message.check.check}: ${message.check.passed ? "ok" : `FAILED: ${message.check.detail}`}`);
        return report.change({ lifecycle: [...now.lifecycle, message.check] });
      case "pictures":
        if (step) finished(step.name);
        for (const finding of message.findings)
          say(`${finding.name}: ${finding.passed ? "ok" : `FAILED: ${reasonsOf(finding)}`}`);
        return report.change({ pictures: [...now.pictures, ...message.findings] });
      case "skipped":
        finished(message.skipped.name);
        say(`${message.skipped.name}: not run, ${message.skipped.reason}`);
        return report.change({ skipped: [...now.skipped, message.skipped] });
      case "lost":
        // It has failed already, where it was noticed.
        ended = { complete: false, hopeless: false, why: "the device was lost" };
        return;
      case "failed":
        step = null;
        ended = { complete: false, hopeless: true, why: message.why };
        return report.change({ problems: [...now.problems, message.why] });
      case "end":
        ended = { complete: true, hopeless: false, why: "" };
    }
  };
  child.on("message", (message) => {
    progress = progress
      .then(() => receive(message as Message))
      .catch((error) => {
        // The report cannot be written.
        failure ??= error;
        kill();
      });
  });
  child.send(assignment);
  const how = await new Promise<string>((resolve) => {
    child.once("error", (error) => resolve(`the process could not be started: ${error.message}`));
    child.once("close", (code, killed) =>
      resolve(code === 0 ? "" : `the process ended (${killed ?? `exit code ${code}`})`),
    );
  });
  // Messages may still be under way when the process has gone.
  await settled(child);
  await progress;
  clearTimeout(timer);
  signal.removeEventListener("abort", kill);
  signal.throwIfAborted();
  if (failure !== null) throw failure;
  if (ended !== null) {
    const late = timedOut ? "the process did not end by itself when all was done" : `${how} when all was done`;
    if (ended.complete && (timedOut || how !== "")) await report.change({ problems: [...report.now.problems, late] });
    return ended;
  }
  const why = timedOut ? `timed out after ${caseTimeoutMs / 1000} s` : how || "the process ended too early";
  const { name, blame }: Step = step ?? { name: "the process", blame: { none: true } };
  await report.change(blamed(report.now, blame, name, why));
  if ("engine" in blame) supervision.failed[blame.engine.graph] = why;
  // One that has done nothing would be followed by others that do nothing.
  const hopeless = "none" in blame && supervision.done.length === doneBefore;
  supervision.done.push(name);
  say(`${name}: FAILED: ${why}`);
  return { complete: false, hopeless, why: `${name}: ${why}` };
}

/** All messages that have been received are handed over by then. */
function settled(child: ChildProcess): Promise<void> {
  return new Promise((resolve) => {
    if (!child.connected) setImmediate(resolve);
    else child.once("disconnect", () => setImmediate(resolve));
  });
}

function blamed(report: Report, blame: Blame, step: string, why: string): Partial<Report> {
  if ("engine" in blame) return { engines: [...report.engines, { ...blame.engine, error: why }] };
  if ("check" in blame) return { lifecycle: [...report.lifecycle, { check: blame.check, passed: false, detail: why }] };
  const failure = { passed: false, differences: [], total: Number.NaN, problems: [why] };
  if ("finding" in blame)
    return { findings: [...report.findings, { ...blame.finding, ...failure, launches: [], rounds: 0 }] };
  if ("pictures" in blame)
    return { pictures: [...report.pictures, { name: blame.pictures, bar: blame.bar, ...failure }] };
  return { problems: [...report.problems, `${step}: ${why}`] };
}
