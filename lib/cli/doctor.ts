/** `flowturbo doctor`: which runtimes this machine has, and why one is missing. */

import { availableParallelism, totalmem } from "node:os";
import { type Command, Option } from "commander";
import { embeddedModel } from "../pipeline.js";
import { probeOnnxRuntime } from "../runtimes/onnxruntime/onnxruntime.js";
import { packageVersion } from "./version.js";

interface RuntimeFinding {
  readonly name: string;
  readonly available: boolean;
  readonly version: string | null;
  /** Why it is missing, and what to do about it. */
  readonly reason: string | null;
  readonly remedy: string | null;
}

export function doctorCommand(command: Command): void {
  command
    .description("Say which runtimes were found, and why one is missing.")
    .addOption(new Option("--json", "print one JSON object"))
    .action(async (flags: { json?: boolean }) => {
      const report = await examine();
      process.stdout.write(flags.json ? `${JSON.stringify(report)}\n` : render(report));
      if (!report.runtimes.some((runtime) => runtime.available)) process.exitCode = 1;
    });
}

async function examine() {
  const onnxruntime = await probeOnnxRuntime();
  const runtimes: RuntimeFinding[] = [
    {
      name: "onnxruntime",
      available: onnxruntime.available,
      version: onnxruntime.version ?? null,
      reason: onnxruntime.error ?? null,
      remedy: onnxruntime.remedy ?? null,
    },
    ...["tensorrt", "tensorrt-rtx"].map((name) => ({
      name,
      available: false,
      version: null,
      reason: `flowturbo ${packageVersion()} runs on the CPU only; it has no native addon yet.`,
      remedy: null,
    })),
  ];
  return {
    flowturbo: packageVersion(),
    node: process.versions.node,
    platform: `${process.platform}-${process.arch}`,
    cores: availableParallelism(),
    memoryBytes: totalmem(),
    embeddedModel,
    runtimes,
  };
}

function render(report: Awaited<ReturnType<typeof examine>>): string {
  const lines = [
    `flowturbo ${report.flowturbo}, Node ${report.node}, ${report.platform}, ${report.cores} cores, ${(report.memoryBytes / 2 ** 30).toFixed(1)} GiB`,
    `embedded model: ${report.embeddedModel}`,
    "runtimes:",
  ];
  for (const { name, available, version, reason, remedy } of report.runtimes) {
    lines.push(`  ${available ? "✔" : "✘"} ${name}${version ? ` ${version}` : ""}${reason ? `: ${reason}` : ""}`);
    if (remedy) lines.push(`      ${remedy}`);
  }
  return `${lines.join("\n")}\n`;
}
