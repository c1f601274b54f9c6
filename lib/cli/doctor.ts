/** `flowturbo doctor`: which runtimes this machine has, and why one is missing. */

import { availableParallelism, totalmem } from "node:os";
import { type Command, Option } from "commander";
import { embeddedModel } from "../flowturbo.js";
import { probeOnnxRuntime } from "../runtimes/onnxruntime/onnxruntime.js";
import { tensorRtKinds, versionText } from "../runtimes/tensorrt/addon.js";
import { enginesFolder } from "../runtimes/tensorrt/cache.js";
import {
  examineTensorRt,
  type PlaceTried,
  type Problem,
  smOf,
  smText,
  type TensorRtReport,
} from "../runtimes/tensorrt/libraries.js";
import { packageVersion } from "./version.js";

interface RuntimeFinding {
  readonly name: string;
  /** Whether programs can run on it. */
  readonly available: boolean;
  readonly version: string | null;
  /** Why it is missing, and what to do about it: one remedy for each cause. */
  readonly reason: string | null;
  readonly remedy: string | null;
}

/** The two libraries of NVIDIA in full: each place that was tried, and what prevents building and running engines. */
interface TensorRtFinding extends RuntimeFinding {
  /** Whether engines can be built (flowturbo compile). */
  readonly builds: boolean;
  readonly library: string | null;
  readonly places: readonly PlaceTried[];
  readonly problems: readonly Problem[];
}

interface GpuFinding {
  readonly name: string;
  readonly memoryBytes: number;
  /** Compute capability. */
  readonly sm: string;
}

export function doctorCommand(command: Command): void {
  command
    .description("Say which runtimes were found, and why one is missing.")
    .addOption(new Option("--json", "print one JSON object"))
    .addOption(new Option("--tensorrt-dir <folder>", "look for TensorRT's libraries here first"))
    .action(async (flags: { json?: boolean; tensorrtDir?: string }) => {
      const report = await examine(flags.tensorrtDir);
      process.stdout.write(flags.json ? `${JSON.stringify(report)}\n` : render(report));
      if (!report.runtimes.some((runtime) => runtime.available)) process.exitCode = 1;
    });
}

async function examine(folder: string | undefined) {
  const [onnxruntime, ...tensorrt] = await Promise.all([
    probeOnnxRuntime(),
    ...tensorRtKinds.map((kind) => examineTensorRt(kind, { folder })),
  ]);
  const cuda = tensorrt.find((report) => report.cuda !== null)?.cuda ?? null;
  const runtimes: (RuntimeFinding | TensorRtFinding)[] = [
    {
      name: "onnxruntime",
      available: onnxruntime.available,
      version: onnxruntime.version ?? null,
      reason: onnxruntime.error ?? null,
      remedy: onnxruntime.remedy ?? null,
    },
    ...tensorrt.map(finding),
  ];
  return {
    flowturbo: packageVersion(),
    node: process.versions.node,
    platform: `${process.platform}-${process.arch}`,
    cores: availableParallelism(),
    memoryBytes: totalmem(),
    embeddedModel,
    /** CUDA version that NVIDIA's driver serves, such as 13.0. */
    driver: cuda && `${Math.floor(cuda.driverVersion / 1000)}.${Math.floor((cuda.driverVersion % 1000) / 10)}`,
    gpus: (cuda?.devices ?? []).map(
      (device): GpuFinding => ({ name: device.name, memoryBytes: device.memoryBytes, sm: smText(smOf(device)) }),
    ),
    engineCache: enginesFolder(),
    runtimes,
  };
}

function finding(report: TensorRtReport): TensorRtFinding {
  const { kind, library, problems, places } = report;
  return {
    name: kind,
    available: problems.length === 0,
    version: library && versionText(library.version),
    reason: problems.map(({ cause }) => cause).join(" ") || null,
    remedy: problems.map(({ remedy }) => remedy).join(" ") || null,
    builds: library !== null && (kind === "tensorrt-rtx" || problems.length === 0),
    library: library?.file ?? null,
    places,
    problems,
  };
}

function render(report: Awaited<ReturnType<typeof examine>>): string {
  const gigabytes = (bytes: number) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
  const lines = [
    `flowturbo ${report.flowturbo}, Node ${report.node}, ${report.platform}, ${report.cores} cores, ${gigabytes(report.memoryBytes)}`,
    `embedded model: ${report.embeddedModel}`,
    `engines: ${report.engineCache}`,
    ...(report.driver ? [`NVIDIA driver: CUDA ${report.driver}`] : []),
    ...report.gpus.map((gpu) => `GPU: ${gpu.name}, ${gigabytes(gpu.memoryBytes)}, SM ${gpu.sm}`),
    "runtimes:",
  ];
  const advised = new Set<string>();
  for (const runtime of report.runtimes) {
    const { name, available, version } = runtime;
    const problems = "problems" in runtime ? runtime.problems : [];
    const builds = "builds" in runtime && runtime.builds ? ", builds engines" : "";
    const reason = problems.length === 0 ? runtime.reason : null;
    lines.push(
      `  ${available ? "✔" : "✘"} ${name}${version ? ` ${version}` : ""}${builds}${reason ? `: ${reason}` : ""}`,
    );
    for (const { cause, remedy } of problems) {
      lines.push(`      ${cause}`, `        → ${advised.has(remedy) ? "as above" : remedy}`);
      advised.add(remedy);
    }
    if (problems.length === 0 && runtime.remedy) lines.push(`      ${runtime.remedy}`);
    if ("places" in runtime)
      for (const { source, place, error } of runtime.places)
        lines.push(
          `      ${error === null ? "found" : "tried"} ${source}: ${place}${error === null ? "" : ` (${error})`}`,
        );
  }
  return `${lines.join("\n")}\n`;
}
