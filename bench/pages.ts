/** The benchmarks by name, the pages that each of them writes, and the page that lists those (bench/results/README.md). */

import { existsSync, readFileSync } from "node:fs";
import path from "node:path";

export interface Benchmark {
  readonly name: string;
  readonly about: string;
  /** Pages that it writes, by name, each with a title where its own heading does not tell it apart; default: one of its own name. */
  readonly pages?: readonly (readonly [name: string, title?: string])[];
  /** Its arguments where only minutes are given; without, it runs when it is asked for, or in full. */
  readonly brief?: readonly string[];
}

/** In the order of the page. */
export const benchmarks: readonly Benchmark[] = [
  {
    ...{ name: "peers", about: "against OpenVINO, stable-diffusion.cpp, torch and onnxruntime-node" },
    brief: ["--quick"],
  },
  {
    ...{ name: "scaling", about: "time and memory against steps, batch, size, layers", brief: ["--rounds", "1"] },
    pages: [["scaling"], ["scaling-threads", "Threads under quotas and beside busy neighbours"]],
  },
  { name: "trials", about: "what was tried to make a step cheaper", brief: ["--rounds", "3", "--only", "shapes"] },
  { name: "gpu", about: "on a GPU", brief: [] },
  { name: "webgpu", about: "graphs on a WebGPU adapter" },
  { name: "overhead", about: "the pipeline against bare session runs" },
  { name: "event-loop", about: "delay of the event loop" },
  { name: "cold-start", about: "from process start to PNG, by part" },
  { name: "memory", about: "peak memory on the CPU by size and weights, and the slope" },
  { name: "t5", about: "T5's weights in int8 against 16 bits: memory, time, error" },
  { name: "int8", about: "weights in int8: what steps are off by, with ordinary and with heavy-tailed activations" },
  { name: "loras", about: "LoRAs that requests name: a step with rank 16 against one without, and merged" },
  { name: "checkpoints", about: "disk, memory and time of the public checkpoints, by their shapes" },
  { name: "single-file", about: "a checkpoint in one file: memory of a load, time to refuse a wrong tensor" },
  {
    ...{ name: "operation", about: "a server process under load, hang-ups, kills and a quota" },
    pages: [["operation", "A service in operation (load, retries, hang-ups, kills, memory, a quota)"]],
  },
  { name: "serve", about: "the server over HTTP: requests per second, overload, hang-ups, memory" },
  { name: "fleet", about: "a fleet of processes: throughput, time added, Redis, chaos", brief: ["--quick"] },
  { name: "fleet-simulation", about: "a fleet in virtual time: promises, Redis, gateways" },
  { name: "concurrency", about: "many callers at once" },
  { name: "executor", about: "the native executor, a launch at a time" },
  { name: "seam", about: "seams of inpainting" },
  { name: "stages", about: "one stage against two" },
  {
    ...{ name: "quality", about: "quality against cost, every sampler" },
    pages: [
      ["quality", "Quality against cost, at 64 px and guidance 2"],
      ["quality-guidance-4.5", "Quality against cost, at 64 px and guidance 4.5"],
      ["quality-128", "Quality against cost, at 128 px and guidance 2"],
      ["quality-128-guidance-4.5", "Quality against cost, at 128 px and guidance 4.5"],
    ],
  },
  { name: "quality-int8", about: "quality with weights in int8 against float32" },
  { name: "transfer", about: "calibrated schedules at other sizes and guidance scales" },
  { name: "build", about: "engines at full width" },
];

/** The page that lists those of a folder. What has not been measured has no page, and is left out. */
export function measurements(folder: string): string {
  const pageOf = (name: string) => path.join(folder, `${name}.md`);
  const heading = (name: string) => readFileSync(pageOf(name), "utf8").split("\n")[0]!.replace(/^#\s*/, "");
  const pages = benchmarks
    .flatMap(({ name, pages }): NonNullable<Benchmark["pages"]> => pages ?? [[name]])
    .filter(([name]) => existsSync(pageOf(name)));
  return [
    "# Measurements",
    "",
    "Each page and each plot says the machine, the versions and the commit. The machines are shared and noisy: ratios of runs that were taken in",
    "turn mean something, milliseconds little. `npm run bench` measures again, the first pages in brief; `npm run bench:<name>` measures one at full length.",
    "",
    ...pages.map(
      ([name, title]) => `- ${title ?? heading(name)}: [${name}.md](${name}.md), [${name}.json](${name}.json)`,
    ),
    "",
  ].join("\n");
}
