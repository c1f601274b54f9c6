/** The findings as one JSON object, and the same for people. It is complete at every moment: what is not done is said. */

import { gigabytes } from "../lib/common/memory.js";
import type { Origin } from "./bundle.js";
import type { Captured, Difference, Finding } from "./check.js";
import type { PictureFinding } from "./pictures.js";

export interface BuiltEngine {
  readonly graph: string;
  readonly profiles: number;
  readonly bytes: number;
  readonly seconds: number;
  readonly cached: boolean;
  readonly error?: string;
}

export interface Machine {
  readonly gpu: string;
  readonly sm: string;
  readonly memoryBytes: number;
  readonly driver: string;
  readonly runtime: string;
  readonly library: string;
}

export interface LifecycleCheck {
  readonly check: string;
  readonly passed: boolean;
  readonly detail: string;
}

/** Something that was not run, and why. */
export interface Skipped {
  readonly name: string;
  readonly reason: string;
}

export interface Report {
  /** "unfinished" until the last check is done: a report of a run that was killed says how far it came. */
  readonly state: "unfinished" | "finished";
  /** Whether it is finished, nothing failed and nothing was skipped. */
  readonly passed: boolean;
  /** What ran when this was written; null for nothing. */
  readonly running: string | null;
  /** Null until the device was opened. */
  readonly machine: Machine | null;
  readonly origin: Origin;
  /** Timed runs of each case, at most. */
  readonly rounds: number;
  /** Whether only the small set was run, and the builder's optimisation level if it was named. */
  readonly quick: boolean;
  readonly level: number | null;
  /** How many there are to be. */
  readonly planned: { readonly engines: number; readonly cases: number };
  readonly engines: readonly BuiltEngine[];
  readonly findings: readonly Finding[];
  readonly lifecycle: readonly LifecycleCheck[];
  readonly pictures: readonly PictureFinding[];
  readonly skipped: readonly Skipped[];
  /** What went wrong outside of a case: a process that ended, a device that could not be opened. */
  readonly problems: readonly string[];
}

/** Whether all that was done is as it should be. */
export function isSound({ planned, engines, findings, lifecycle, pictures, skipped, problems }: Report): boolean {
  return (
    engines.length === planned.engines &&
    findings.length === planned.cases &&
    problems.length === 0 &&
    skipped.length === 0 &&
    engines.every(({ error }) => error === undefined) &&
    [...findings, ...lifecycle, ...pictures].every(({ passed }) => passed)
  );
}

const mark = (good: boolean) => (good ? "ok" : "**failed**");
const ms = (value: number) => (Number.isFinite(value) ? value.toFixed(2) : "-");
const error = (value: number) => value.toExponential(1);
const worstOf = (differences: readonly Difference[], which: "relative" | "worst") =>
  differences.reduce((most, { [which]: value }) => Math.max(most, value), 0);
const rows = (header: readonly string[], lines: readonly (readonly string[])[]) =>
  [header, header.map(() => "---"), ...lines].map((cells) => `| ${cells.join(" | ")} |`).join("\n");
const errors = ({ differences, bar }: Pick<Finding, "differences" | "bar">) =>
  differences.length === 0
    ? ["-", error(bar.relative), "-", error(bar.worst)]
    : [
        ...[error(worstOf(differences, "relative")), error(bar.relative)],
        ...[error(worstOf(differences, "worst")), error(bar.worst)],
      ];
const replays = (captured: Captured | undefined) =>
  captured ? `${ms(captured.total)} ms, ${captured.replayed} of ${captured.runs} replayed` : "-";

/** Why a case failed, in a line. */
export function reasonsOf({ differences, bar, problems }: Pick<Finding, "differences" | "bar" | "problems">): string {
  const off = differences.flatMap(({ result, relative, worst }) => [
    ...(relative <= bar.relative ? [] : [`${result} ${error(relative)} (bar ${error(bar.relative)})`]),
    ...(worst <= bar.worst ? [] : [`${result} worst value ${error(worst)} (bar ${error(bar.worst)})`]),
  ]);
  return [...problems, ...off].join("; ");
}

function titleOf({ state, passed, running }: Report): string {
  if (state === "unfinished") return `UNFINISHED${running === null ? "" : `, it was at ${running}`}`;
  return passed ? "passed" : "FAILED";
}

export function markdown(report: Report): string {
  const { machine, origin, rounds, quick, level, planned, engines, findings, lifecycle, pictures, skipped } = report;
  const singles = findings.filter(({ kind }) => kind !== "sampler");
  const samplers = findings.filter(({ kind }) => kind === "sampler");
  const failures = [
    ...report.problems,
    ...engines.flatMap(({ graph, error: why }) => (why === undefined ? [] : [`the engine of ${graph}: ${why}`])),
    ...[...findings, ...pictures].flatMap((each) => (each.passed ? [] : [`${each.name}: ${reasonsOf(each)}`])),
    ...lifecycle.flatMap(({ check, passed, detail }) => (passed ? [] : [`${check}: ${detail}`])),
  ];
  const list = (items: readonly string[]) => items.map((item) => `- ${item}`).join("\n");
  return `${[
    `# verify:gpu: ${titleOf(report)}`,
    machine === null
      ? "No device was opened."
      : `${machine.gpu}, SM ${machine.sm}, ${gigabytes(machine.memoryBytes)} GB; driver for CUDA ${machine.driver}; ${machine.runtime} ${machine.library}.`,
    `Checkpoint ${origin.checkpoint}; reference: ${origin.reference}, ${origin.created}, flowturbo ${origin.flowturbo}. "error" is the relative L2 error against it, "worst" the largest single difference as a part of the largest value; times are medians of at most ${rounds} runs, of launches by CUDA events.`,
    `${engines.length} of ${planned.engines} engines, ${findings.length} of ${planned.cases} cases${quick ? " (the small set, --quick)" : ""}${level === null ? "" : `; engines of optimisation level ${level}, whose times mean little`}.`,
    ...(failures.length > 0 ? ["## What failed", list(failures)] : []),
    ...(skipped.length > 0
      ? ["## What was not run", list(skipped.map(({ name, reason }) => `${name}: ${reason}`))]
      : []),
    "## Engines",
    rows(
      ["graph", "profiles", "GB", "seconds", ""],
      engines.map(({ graph, profiles, bytes, seconds, cached, error: why }) => [
        ...[graph, String(profiles), gigabytes(bytes), cached ? "cached" : seconds.toFixed(1)],
        why === undefined ? "ok" : "**failed**",
      ]),
    ),
    "## One launch",
    rows(
      ["case", "error", "bar", "worst", "bar", "ms", ""],
      singles.map((finding) => [
        ...[finding.name, ...errors(finding)],
        finding.launches.map(({ milliseconds }) => ms(milliseconds)).join(", "),
        mark(finding.passed),
      ]),
    ),
    "## Samplers",
    rows(
      ["case", "error", "bar", "worst", "bar", "ms of each launch", "ms in all", "as one CUDA graph", ""],
      samplers.map((finding) => [
        ...[finding.name, ...errors(finding)],
        finding.launches.map(({ milliseconds }) => ms(milliseconds)).join(", "),
        ...[ms(finding.total), replays(finding.captured), mark(finding.passed)],
      ]),
    ),
    "## Pictures, as the product draws them",
    rows(
      ["request", "error", "bar", "worst", "bar", "ms", ""],
      pictures.map((finding) => [finding.name, ...errors(finding), ms(finding.total), mark(finding.passed)]),
    ),
    "## Lifetimes",
    rows(
      ["check", "", "detail"],
      lifecycle.map(({ check, passed: good, detail }) => [check, mark(good), detail]),
    ),
  ].join("\n\n")}\n`;
}
