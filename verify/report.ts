/** The findings as one JSON object, and the same for people. */

import { gigabytes } from "../lib/common/memory.js";
import type { Origin } from "./bundle.js";
import type { Finding } from "./check.js";

export interface BuiltEngine {
  readonly graph: string;
  readonly profiles: number;
  readonly bytes: number;
  readonly seconds: number;
  readonly cached: boolean;
  readonly error?: string;
}

export interface Report {
  readonly passed: boolean;
  readonly machine: {
    readonly gpu: string;
    readonly sm: string;
    readonly memoryBytes: number;
    readonly driver: string;
    readonly runtime: string;
    readonly library: string;
  };
  readonly origin: Origin;
  readonly rounds: number;
  readonly engines: readonly BuiltEngine[];
  readonly findings: readonly Finding[];
  readonly lifecycle: readonly { readonly check: string; readonly passed: boolean; readonly detail: string }[];
}

export function markdown({ passed, machine, origin, rounds, engines, findings, lifecycle }: Report): string {
  const mark = (good: boolean) => (good ? "ok" : "**failed**");
  const ms = (value: number) => (Number.isFinite(value) ? value.toFixed(2) : "-");
  const error = (value: number) => value.toExponential(1);
  const rows = (header: readonly string[], lines: readonly (readonly string[])[]) =>
    [header, header.map(() => "---"), ...lines].map((cells) => `| ${cells.join(" | ")} |`).join("\n");
  const worstOf = ({ differences }: Finding) => Math.max(0, ...differences.map(({ relative }) => relative));
  const failures = findings.filter(({ passed }) => !passed);
  const singles = findings.filter(({ kind }) => kind !== "sampler");
  const samplers = findings.filter(({ kind }) => kind === "sampler");
  return `${[
    `# verify:gpu: ${passed ? "passed" : "FAILED"}`,
    `${machine.gpu}, SM ${machine.sm}, ${gigabytes(machine.memoryBytes)} GB; driver for CUDA ${machine.driver}; ${machine.runtime} ${machine.library}.`,
    `Checkpoint ${origin.checkpoint}; reference: ${origin.reference}, ${origin.created}, flowturbo ${origin.flowturbo}. Errors are relative L2 errors against it; times are medians of ${rounds} runs, of launches by CUDA events.`,
    "## Engines",
    rows(
      ["graph", "profiles", "GB", "seconds", ""],
      engines.map(({ graph, profiles, bytes, seconds, cached, error: why }) => [
        graph,
        String(profiles),
        gigabytes(bytes),
        cached ? "cached" : seconds.toFixed(1),
        why ?? "ok",
      ]),
    ),
    "## One launch",
    rows(
      ["case", "error", "bar", "ms", ""],
      singles.map((finding) => [
        finding.name,
        error(worstOf(finding)),
        error(finding.bar),
        finding.launches.map(({ milliseconds }) => ms(milliseconds)).join(", "),
        mark(finding.passed),
      ]),
    ),
    "## Samplers",
    rows(
      ["case", "error", "bar", "ms of each launch", "ms in all", "as one CUDA graph", ""],
      samplers.map((finding) => [
        finding.name,
        error(worstOf(finding)),
        error(finding.bar),
        finding.launches.map(({ milliseconds }) => ms(milliseconds)).join(", "),
        ms(finding.total),
        finding.captured
          ? `${ms(finding.captured.total)}, ${finding.captured.same ? "same bits" : "**other bits**"}`
          : "-",
        mark(finding.passed),
      ]),
    ),
    "## Lifetimes",
    rows(
      ["check", "", "detail"],
      lifecycle.map(({ check, passed: good, detail }) => [check, mark(good), detail]),
    ),
    ...(failures.length > 0
      ? [
          "## What failed",
          failures
            .map(
              ({ name, error: why, differences, bar }) =>
                `- ${name}: ${why ?? differences.map(({ result, relative }) => `${result} ${error(relative)} (bar ${error(bar)})`).join(", ")}`,
            )
            .join("\n"),
        ]
      : []),
  ].join("\n\n")}\n`;
}
