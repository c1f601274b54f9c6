/**
 * `flowturbo doctor`: the GPUs and runtimes of this machine, and why one cannot be used; and whether the packages that flowturbo needs
 * can be loaded. It needs none of those itself. Of a model that is named it says what it would take of the memory on the CPU, and of adapters
 * whether they fit a model.
 */

import { availableParallelism, totalmem } from "node:os";
import type { Command } from "commander";
import { huggingFaceTokenizers } from "../checkpoint/index.js";
import { gigabytes } from "../common/memory.js";
import { packageVersion } from "../common/package.js";
import { platformText, thisPlatform } from "../common/platform.js";
import { embeddedModel } from "../flowturbo.js";
import { type AdapterExamination, examineAdapters } from "../generation/examine-adapters.js";
import { examineMemory, type MemoryExamination } from "../generation/examine-memory.js";
import { heldWeights } from "../generation/host-memory.js";
import { sharp } from "../generation/sharp.js";
import { checkOptions, loadSchema } from "../options.js";
import { runtimes } from "../runtimes/index.js";
import type { AdapterFinding, LibraryFolders } from "../runtimes/runtime.js";
import { enginesFolder } from "../runtimes/tensorrt/cache.js";
import { addLoadAdapters, type LoadAdapterFlags, readLoadAdapters } from "./adapters.js";
import { addFlags, addJsonFlag, readFlags } from "./flags.js";
import { print } from "./print.js";

const adaptersSchema = loadSchema.pick({ loras: true, controlNets: true });
const librariesSchema = loadSchema.pick({ tensorrtFolder: true, cudaProviderFolder: true });

export function doctorCommand(command: Command): void {
  command.option(
    "--model <path>",
    "checkpoint whose memory on the CPU is estimated, and that adapters are examined for (default for adapters: the embedded shapes model)",
  );
  addFlags(command, librariesSchema);
  addLoadAdapters(command);
  addJsonFlag(command)
    .description(
      "Say which runtimes and packages were found, and why one is missing; what memory a model would take on the CPU; and whether adapters fit a model.",
    )
    .addHelpText(
      "after",
      `
Examples:
  $ flowturbo doctor
  $ flowturbo doctor --model ./stable-diffusion-3.5-medium
  $ flowturbo doctor --model ./stable-diffusion-3.5-medium --lora style.safetensors --control-net ./controlnet`,
    )
    .action(async ({ json, model, ...flags }: DoctorFlags) => {
      const examined = await examine(checkOptions(librariesSchema, readFlags(librariesSchema, flags), "doctor"));
      const asked = checkOptions(adaptersSchema, readLoadAdapters(flags), "doctor");
      const isAsked = asked.loras !== undefined || asked.controlNets !== undefined;
      const memory = model === undefined ? null : await examineMemory(model);
      const adapters = isAsked ? await examineAdapters(model ?? embeddedModel, asked) : [];
      const report = { ...examined, ...(memory && { memory }), ...(isAsked && { modelAdapters: adapters }) };
      const texts = [render(examined), ...(memory ? renderMemory(memory) : []), ...renderAdapters(adapters)];
      print(json, report, texts.join("\n"));
      const canDraw = examined.runtimes.some(isAvailable) && examined.packages.every(isAvailable);
      if (!canDraw || !adapters.every(({ fits }) => fits)) process.exitCode = 1;
    });
}

interface DoctorFlags extends LoadAdapterFlags {
  json?: boolean;
  model?: string;
}

function renderMemory({ available, sizes, auto, recommended }: MemoryExamination): string[] {
  const lines = [`memory of the model on the CPU, about (${gigabytes(available)} GB are free):`];
  for (const { width, height, weights } of sizes) {
    const modes = heldWeights.map((held) => {
      const { total, fits } = weights[held];
      return `${fits ? "✔" : "✘"} ${held} ${gigabytes(total)} GB`;
    });
    lines.push(`  ${width} x ${height}: ${modes.join(", ")}`);
  }
  if (recommended === null)
    lines.push("      None fits: free memory, use a machine with more, or a smaller checkpoint.");
  else if (recommended === "int8")
    lines.push(
      `      → --weights int8 is the quickest that fits, but its pictures differ a little: --weights auto never takes it, and takes ${auto} here.`,
    );
  else lines.push(`      → --weights ${recommended} is the quickest that fits; --weights auto takes ${auto} here.`);
  return lines;
}

function renderAdapters(adapters: readonly AdapterExamination[]): string[] {
  if (adapters.length === 0) return [];
  return [
    "loras and controlnets:",
    ...adapters.map(
      ({ kind, name, fits, about, reason }) => `  ${fits ? "✔" : "✘"} ${kind} ${name}: ${about ?? reason}`,
    ),
  ];
}

const isAvailable = ({ available }: { readonly available: boolean }) => available;

async function examine(folders: LibraryFolders) {
  const [findings, packages] = await Promise.all([
    Promise.all(Object.values(runtimes).map((row) => row.find(folders))),
    Promise.all([sharp, huggingFaceTokenizers].map((dependency) => dependency.find())),
  ]);
  const hardware = findings.find((finding) => finding.hardware)?.hardware;
  // Those that need many lines come last.
  findings.sort((a, b) => Number("libraries" in a) - Number("libraries" in b));
  return {
    flowturbo: packageVersion(),
    node: process.versions.node,
    platform: platformText(thisPlatform()),
    cores: availableParallelism(),
    memoryBytes: totalmem(),
    embeddedModel,
    driver: hardware?.driver ?? null,
    gpus: hardware?.gpus ?? [],
    adapters: findings.find((finding) => finding.adapters)?.adapters ?? null,
    engineCache: enginesFolder(),
    runtimes: findings.map(({ libraries, hardware, adapters, ...finding }) => ({ ...finding, ...libraries })),
    packages,
  };
}

function render(report: Awaited<ReturnType<typeof examine>>): string {
  const lines = [
    `flowturbo ${report.flowturbo}, Node ${report.node}, ${report.platform}, ${report.cores} cores, ${gigabytes(report.memoryBytes)} GB`,
    `embedded model: ${report.embeddedModel}`,
    `engines: ${report.engineCache}`,
    ...(report.driver ? [`NVIDIA driver: CUDA ${report.driver}`] : []),
    ...report.gpus.map((gpu) => `GPU: ${gpu.name}, ${gigabytes(gpu.memoryBytes)} GB, SM ${gpu.sm}`),
    ...(report.adapters ?? []).map(adapterText),
    "runtimes:",
  ];
  const advised = new Set<string>();
  for (const runtime of report.runtimes) {
    const { name, available, version, problems = [], places = [] } = runtime;
    const builds = runtime.builds ? ", builds engines" : "";
    const reason = problems.length === 0 ? runtime.reason : null;
    lines.push(
      `  ${available ? "✔" : "✘"} ${name}${version ? ` ${version}` : ""}${builds}${reason ? `: ${reason}` : ""}`,
    );
    for (const { cause, remedy } of problems) {
      lines.push(`      ${cause}`, `        → ${advised.has(remedy) ? "as above" : remedy}`);
      advised.add(remedy);
    }
    if (problems.length === 0 && runtime.remedy) lines.push(`      ${runtime.remedy}`);
    for (const { source, place, error } of places)
      lines.push(
        `      ${error === null ? "found" : "tried"} ${source}: ${place}${error === null ? "" : ` (${error})`}`,
      );
  }
  lines.push("packages:");
  for (const { name, available, version, reason, remedy } of report.packages) {
    lines.push(`  ${available ? "✔" : "✘"} ${name}${version ? ` ${version}` : ""}${reason ? `: ${reason}` : ""}`);
    if (remedy) lines.push(`      ${remedy}`);
  }
  return lines.join("\n");
}

/** `graphics adapter: AMD Radeon (AMD, integrated), driver radv Mesa 25.1, Vulkan 1.4.309, 8.00 GB, 6.00 GB free, float16` */
function adapterText(adapter: AdapterFinding): string {
  const { name, vendor, type, driver, driverVersion, apiVersion, memoryBytes, freeBytes, float16 } = adapter;
  return [
    `graphics adapter: ${name} (${vendor}, ${type === "cpu" ? "software" : type})`,
    `driver ${driver ? `${driver} ` : ""}${driverVersion}`,
    `Vulkan ${apiVersion}`,
    `${gigabytes(memoryBytes)} GB`,
    ...(freeBytes === null ? [] : [`${gigabytes(freeBytes)} GB free`]),
    float16 ? "float16" : "no float16",
  ].join(", ");
}
