/**
 * What run.sh starts on the machine with the GPU when `npm run pack:gpu` has been unpacked there: every check of the pack
 * within a budget of time. They are ordered by what is learned for the time: what is quick and has never run comes first,
 * figures last. Ends with 0 if all passed, 1 if something failed or was left out for want of time, 3 where there is no GPU.
 *
 *   --out FOLDER      for summary.txt, summary.json, and logs, pictures and reports of each step
 *   --seconds N       that are left, --budget N of so many in all
 *   --steps NAMES     only these, also where no GPU is found, such as webgpu-embedded,driver (their references are drawn, too)
 *   --problem TEXT    what went wrong before, repeatable
 */

import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { mkdir, readFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";
import { openCheckpoint } from "../lib/checkpoint/index.js";
import { GraphLibrary } from "../lib/networks/library.js";
import type { EmitOptions, EmittedNetwork } from "../lib/onnx/index.js";
import { chosenAdapter } from "../lib/runtimes/onnxruntime/adapters.js";
import { cudaEmitOptions, webGpuEmitOptions } from "../lib/runtimes/onnxruntime/emission.js";
import type { AdapterFinding, GpuFinding } from "../lib/runtimes/runtime.js";
import { barOf } from "./check.js";
import { compareDrawn } from "./drawn.js";
import type { DriverReport } from "./driver.js";
import { type Report, reasonsOf } from "./report.js";
import { type Ended, endOf, lastLine, oneLine, type Step, Steps, summaryText, type Verdict } from "./steps.js";
import { vulkanVariables } from "./vulkan-driver.js";

/** The pack, unpacked: this file is node_modules/flowturbo/verify/machine.js in it. */
const pack = path.resolve(import.meta.dirname, "../../..");
const flowturbo = path.join(pack, "node_modules/flowturbo");
const inPack = (name: string) => (existsSync(path.join(pack, name)) ? path.join(pack, name) : null);
/** For caches and engines: nothing is left in the home folder. */
const scratch = path.join(pack, "scratch");

const pictured = ["a red circle above a blue square", "a green triangle"];

/** What `flowturbo doctor --json` says of it. */
interface Doctor {
  readonly driver: string | null;
  readonly gpus: readonly GpuFinding[];
  readonly adapters: readonly AdapterFinding[] | null;
  readonly runtimes: readonly {
    readonly name: string;
    readonly available: boolean;
    readonly reason: string | null;
  }[];
}

/** What the first step finds out, for those after it. */
interface Found {
  doctor: Doctor | null;
  /** Whether the steps to run were named: software will do then. */
  readonly isNamed: boolean;
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      out: { type: "string", default: "gpu-report" },
      seconds: { type: "string", default: "420" },
      budget: { type: "string", default: "420" },
      steps: { type: "string" },
      problem: { type: "string", multiple: true, default: [] },
    },
  });
  const out = path.resolve(values.out);
  await mkdir(out, { recursive: true });
  const stop = new AbortController();
  let signalCode = 1;
  for (const [signal, code] of [
    ["SIGINT", 130],
    ["SIGTERM", 143],
    ["SIGHUP", 129],
  ] as const)
    process.on(signal, () => {
      signalCode = code;
      stop.abort(new Error(`stopped by ${signal}`));
    });
  // Whoever started this was killed: nothing may stay behind.
  const parent = process.ppid;
  setInterval(() => {
    if (process.ppid !== parent) stop.abort(new Error("run.sh has ended"));
  }, 500).unref();

  Object.assign(process.env, { XDG_CACHE_HOME: path.join(scratch, "cache") }, await libraryVariables());
  const steps = new Steps({
    ...{ out, seconds: Number(values.seconds), budgetSeconds: Number(values.budget), problems: values.problem },
    ...{ signal: stop.signal, say: (line) => process.stdout.write(`${line}\n`) },
  });
  steps.about.push(packText());
  const named = values.steps?.split(",").filter(Boolean);
  const found: Found = { doctor: null, isNamed: named !== undefined };
  const [doctor, ...others] = stepsOf(steps, out, found) as [Step, ...Step[]];
  const unknown = named?.filter((name) => !others.some((step) => step.name === name)) ?? [];
  if (unknown.length > 0) {
    const names = others.map(({ name }) => name).join(", ");
    steps.fail(`STEPS names ${unknown.join(", ")}, which this pack does not have; it has ${names}.`);
    others.length = 0;
  }
  // A picture is nothing without what it is compared with.
  const isWanted = ({ name }: Step) =>
    !named || named.some((each) => each === name || each.replace(/^(webgpu|cuda)-/, "reference-") === name);
  try {
    await steps.run(doctor);
    describe(found, steps.about);
    const none = noGpu(found);
    if (none !== null && !named) steps.withoutGpu(none);
    else for (const step of others) if (isWanted(step)) await steps.run(step);
  } catch (error) {
    if (stop.signal.aborted) {
      process.stdout.write(`\n${summaryText(steps.summary)}`);
      return signalCode;
    }
    steps.fail(`the verification itself failed: ${(error as Error).stack ?? error}`);
  }
  process.stdout.write(`\n${summaryText(await steps.end())}`);
  return steps.exitCode;
}

/** All steps of this pack, in their order. */
function stepsOf(steps: Steps, out: string, found: Found): Step[] {
  const [first, ...models] = modelsOf() as [Model, ...Model[]];
  const pictures = (model: Model) => [
    referenceStep(model, out),
    pictureStep("webgpu", model, steps, out, found),
    pictureStep("cuda", model, steps, out, found),
  ];
  const [verified, ...bundles] = bundleNames();
  return [
    doctorStep(found),
    ...pictures(first),
    driverStep(out, found),
    ...models.flatMap(pictures),
    placementStep("cuda", [first, ...models], found),
    placementStep("webgpu", [first, ...models], found),
    ...(verified ? tensorRtSteps(verified, out, found) : []),
    benchStep(512, 3, 240, out, found),
    ...bundles.flatMap((bundle) => tensorRtSteps(bundle, out, found)),
    benchStep(1024, 2, 300, out, found),
  ];
}

// What there is.

/** What scripts/pack-gpu.mjs says of its pack. */
interface Packed {
  readonly flowturbo: string;
  readonly commit: string;
  readonly node: string;
  readonly groups: readonly string[];
  readonly bundles: readonly string[];
}
const packed = () => JSON.parse(readFileSync(path.join(pack, "pack.json"), "utf8")) as Packed;

function packText(): string {
  const {
    flowturbo: version,
    commit,
    node,
    groups,
    bundles,
  } = JSON.parse(readFileSync(path.join(pack, "pack.json"), "utf8")) as Readonly<Record<string, string>> & {
    readonly groups: readonly string[];
    readonly bundles: readonly string[];
  };
  return `flowturbo ${version} of commit ${commit}: ${groups.join(", ")}; bundles ${bundles.join(", ")}; Node ${node}`;
}

/** Where the loader finds what a bare machine may have in unusual places, or only the pack. */
async function libraryVariables(): Promise<Record<string, string>> {
  const { LD_LIBRARY_PATH, FLOWTURBO_TENSORRT_DIR, FLOWTURBO_ONNXRUNTIME_CUDA_DIR } = process.env;
  const vulkan = await vulkanVariables(LD_LIBRARY_PATH, scratch, inPack("libraries"));
  const given = {
    ...(FLOWTURBO_TENSORRT_DIR ? {} : { FLOWTURBO_TENSORRT_DIR: inPack("tensorrt") }),
    ...(FLOWTURBO_ONNXRUNTIME_CUDA_DIR ? {} : { FLOWTURBO_ONNXRUNTIME_CUDA_DIR: inPack("cuda") }),
  };
  return Object.fromEntries(
    Object.entries({ ...vulkan, ...given }).filter((entry): entry is [string, string] => typeof entry[1] === "string"),
  );
}

function describe({ doctor }: Found, about: string[]): void {
  for (const { name, sm, memoryBytes } of doctor?.gpus ?? [])
    about.push(`GPU: ${name}, SM ${sm}, ${(memoryBytes / 1e9).toFixed(1)} GB; driver for CUDA ${doctor!.driver}`);
  for (const { name, driver, driverVersion, type, float16 } of doctor?.adapters ?? [])
    about.push(
      `graphics adapter: ${name} (${type === "cpu" ? "software" : type}), ${driver ?? "driver"} ${driverVersion}, ${float16 ? "float16" : "no float16"}`,
    );
}

/** Why there is nothing to verify on; null where there is, and where that is not known. */
function noGpu({ doctor }: Found): string | null {
  // Adapters are not known where the addon cannot be loaded. Then the steps say why.
  if (!doctor?.adapters || doctor.gpus.length > 0 || hasAdapter(doctor)) return null;
  const reasons = doctor.runtimes.filter(({ name }) => name === "cuda" || name === "webgpu");
  return reasons.map(({ name, reason }) => `${name}: ${oneLine(reason ?? "no reason was given")}`).join(" ");
}

const hasAdapter = ({ adapters }: Doctor) => (adapters ?? []).some(({ type }) => type !== "cpu");
const reasonOf = ({ doctor }: Found, runtime: string) => {
  const row = doctor?.runtimes.find(({ name }) => name === runtime);
  return row && !row.available ? oneLine(row.reason ?? "it cannot be used") : null;
};
/** Of what needs NVIDIA's driver, on a machine that is known to have none. */
const noDriver = ({ doctor }: Found) => (doctor && doctor.gpus.length === 0 ? "there is no NVIDIA GPU" : null);

/** Why ONNX Runtime has nothing to run on; null where it has, or should have. */
function noDevice(runtime: "webgpu" | "cuda", found: Found): string | null {
  // What came with the pack is meant to work.
  if (runtime === "cuda") return noDriver(found) ?? (inPack("cuda") ? null : reasonOf(found, "cuda"));
  if (found.isNamed || !found.doctor?.adapters || hasAdapter(found.doctor)) return null;
  return `there is no graphics adapter, or only software. ${reasonOf(found, "webgpu") ?? ""}`.trim();
}

const cli = (...args: string[]) => ({
  file: process.execPath,
  args: [path.join(flowturbo, "bin/flowturbo.js"), ...args],
});
const script = (name: string, ...args: string[]) => ({
  file: process.execPath,
  args: [path.join(flowturbo, name), ...args],
});
/** A folder for results, without those of an earlier run. */
function fresh(folder: string): string {
  rmSync(folder, { recursive: true, force: true });
  return folder;
}
const read = async <Value>(...names: string[]) => JSON.parse(await readFile(path.join(...names), "utf8")) as Value;

function doctorStep(found: Found): Step {
  return {
    name: "doctor",
    limit: 60,
    command: () => cli("doctor", "--json"),
    async judge({ stdout, output }) {
      try {
        found.doctor = JSON.parse(stdout) as Doctor;
      } catch {
        return { passed: false, detail: lastLine(output) };
      }
      const can = found.doctor.runtimes.filter(({ available }) => available).map(({ name }) => name);
      // That the CPU is there is what everything is compared with.
      return { passed: can.includes("onnxruntime"), detail: `can be used: ${can.join(", ") || "nothing"}` };
    },
  };
}

// Pictures as the command line draws them.

interface Model {
  readonly name: string;
  readonly folder: string;
}

function bundleNames(): string[] {
  const folder = inPack("bundles");
  const names = folder ? readdirSync(folder) : [];
  return ["embedded", "medium", "large"].filter((name) => names.includes(name));
}

/** The embedded model, and the checkpoints of the other bundles. */
function modelsOf(): Model[] {
  const others = bundleNames().filter((name) => name !== "embedded");
  return [
    { name: "embedded", folder: path.join(flowturbo, "models/shapes") },
    ...others.map((name) => ({ name, folder: path.join(pack, "bundles", name, "model") })),
  ];
}

function draw(runtime: string, { name, folder }: Model, out: string): ReturnType<Step["command"]> {
  const file = path.join(out, `${runtime === "onnxruntime" ? "reference" : runtime}-${name}`);
  const request = ["--model", folder, "--steps", "5", "--seed", "1", "--guidance", "3"];
  const results = ["--save-latents", `${file}.safetensors`, "--out", `${file}-{index}.png`, "--json"];
  return cli("generate", ...pictured, "--runtime", runtime, ...request, ...results);
}

function referenceStep(model: Model, out: string): Step {
  return {
    name: `reference-${model.name}`,
    limit: 60,
    command: () => draw("onnxruntime", model, out),
    judge: async (ended) => drawn(ended, "on the CPU"),
  };
}

function pictureStep(runtime: "webgpu" | "cuda", model: Model, steps: Steps, out: string, found: Found): Step {
  return {
    name: `${runtime}-${model.name}`,
    limit: 90,
    skip() {
      const absent = noDevice(runtime, found);
      if (absent !== null) return absent;
      const reference = steps.resultOf(`reference-${model.name}`);
      return reference?.outcome === "passed" ? null : "there is no reference to compare it with";
    },
    command: () => draw(runtime, model, out),
    async judge(ended) {
      const picture = drawn(ended, "");
      if (!picture.passed) return picture;
      const [actual, expected] = [runtime, "reference"].map((name) =>
        path.join(out, `${name}-${model.name}.safetensors`),
      ) as [string, string];
      const { passed, detail } = await compareDrawn(actual, expected, await barFor(runtime, model, found));
      return { passed, detail: `${detail}, ${picture.detail}` };
    },
  };
}

/** What `flowturbo generate --json` says. */
function drawn({ code, stdout, output }: Ended, where: string): Verdict {
  if (code !== 0) return { passed: false, detail: lastLine(output) || endOf(code) };
  const { blocks, milliseconds, size } = JSON.parse(stdout) as {
    readonly blocks: string;
    readonly size: { readonly width: number; readonly height: number };
    readonly milliseconds: { readonly total: number; readonly steps: readonly number[] };
  };
  const each = milliseconds.steps.map((step) => step.toFixed(0)).join(", ");
  const text = `${pictured.length} pictures ${size.width}x${size.height} ${blocks}${where ? ` ${where}` : ""} in ${milliseconds.total.toFixed(0)} ms, steps ${each}`;
  return { passed: true, detail: text };
}

/** By the type that the least exact network computes in. */
async function barFor(runtime: "webgpu" | "cuda", { folder }: Model, { doctor }: Found) {
  const bfloat16 = (doctor?.gpus ?? []).every(({ sm }) => Number(sm) >= 8);
  const float16 = chosenAdapter(doctor?.adapters ?? [])?.float16 ?? true;
  const options: (network: EmittedNetwork) => EmitOptions =
    runtime === "cuda"
      ? cudaEmitOptions({ attention: true, bfloat16 })
      : webGpuEmitOptions({ attention: true, float16 });
  const graphs = new GraphLibrary(await openCheckpoint(folder), options);
  const names = graphs.essential.map(({ graph }) => graph.name);
  return barOf(
    "sampler",
    names.map((name) => graphs.optionsOf(name).compute),
  );
}

// The executor, placement, TensorRT, figures.

function driverStep(out: string, found: Found): Step {
  return {
    name: "driver",
    limit: 150,
    skip: () => noDriver(found) ?? (inPack("stand-in/formula.ptx") ? null : "the stand-in has no kernel in this pack"),
    command: () =>
      script(
        "verify/gpu.js",
        "--driver",
        "--tensorrt-dir",
        path.join(pack, "stand-in"),
        "--out",
        fresh(path.join(out, "driver")),
      ),
    async judge({ code, output }) {
      const report = await read<DriverReport>(out, "driver", "driver.json").catch(() => null);
      if (!report) return { passed: false, detail: lastLine(output) || endOf(code) };
      const failed = report.checks.filter(({ passed }) => !passed);
      const named = failed.map(({ check, detail }) => `${check}: ${detail}`).join("; ");
      const { length } = report.checks;
      const text =
        failed.length > 0 ? `${failed.length} of ${length} checks failed: ${named}` : `${length} checks passed`;
      return { passed: report.passed, detail: oneLine(report.complete ? text : `not finished; ${text}`) };
    },
  };
}

function placementStep(runtime: "webgpu" | "cuda", models: readonly Model[], found: Found): Step {
  return {
    name: `placement-${runtime}`,
    limit: 90,
    skip: () => noDevice(runtime, found),
    command: () => script("verify/placements.js", runtime, ...models.map(({ folder }) => folder)),
  };
}

/**
 * The archive of TensorRT that a pack takes has the builder's code for any GPU, and none for a single one, which is looked for
 * under another name. So where no engine at all could be built, it is tried under the name for this GPU.
 */
function tensorRtSteps(bundle: string, out: string, found: Found): Step[] {
  const library = inPack("tensorrt");
  const portable = path.join(scratch, "tensorrt-portable");
  let hasBuiltNothing = false;
  const step = (name: string, folder: string | null, skip: () => string | null): Step => ({
    ...{ name, skip },
    limit: 150,
    command() {
      const results = ["--cache", path.join(scratch, name, "engines"), "--out", fresh(path.join(out, name))];
      const where = folder ? ["--tensorrt-dir", folder] : [];
      // A low level, for the time: what is verified is results.
      const bounds = ["--quick", "--level", "1", "--case-timeout", "30"];
      return script("verify/gpu.js", "--check", path.join(pack, "bundles", bundle), ...bounds, ...results, ...where);
    },
    async judge({ code, output }) {
      const report = await read<Report>(out, name, "report.json").catch(() => null);
      if (!report) return { passed: false, detail: lastLine(output) || endOf(code) };
      const { passed, engines, findings, pictures, lifecycle, planned, problems } = report;
      const built = engines.filter(({ error }) => error === undefined);
      hasBuiltNothing = engines.length > 0 && built.length === 0;
      const failures = [
        ...problems,
        ...engines.flatMap(({ graph, error }) => (error === undefined ? [] : [`the engine of ${graph}: ${error}`])),
        ...[...findings, ...pictures].flatMap((each) => (each.passed ? [] : [`${each.name}: ${reasonsOf(each)}`])),
        ...lifecycle.flatMap((each) => (each.passed ? [] : [`${each.check}: ${each.detail}`])),
      ];
      const counts = `${built.length} of ${planned.engines} engines, ${findings.length} of ${planned.cases} cases, ${pictures.length} pictures`;
      return { passed, detail: oneLine([counts, ...failures].join("; ")) };
    },
  });
  const absent = () => {
    if (noDriver(found) !== null || library) return noDriver(found);
    const isHere = reasonOf(found, "tensorrt") === null || reasonOf(found, "tensorrt-rtx") === null;
    return isHere ? null : "TensorRT is neither in this pack nor on this machine";
  };
  const name = `tensorrt-${bundle}`;
  if (!library) return [step(name, null, absent)];
  return [
    step(name, library, absent),
    step(`${name}-portable`, portable, () => {
      if (absent() !== null) return absent();
      const gpu = found.doctor?.gpus[0];
      const isMade = hasBuiltNothing && gpu !== undefined && linkPortable(library, portable, gpu.sm);
      return isMade ? null : "it is only for where no engine could be built, for want of code for this GPU";
    }),
  ];
}

/** @returns whether the folder has links to the libraries, one of them under the name of the resource that is lacking */
function linkPortable(from: string, to: string, sm: string): boolean {
  const names = readdirSync(from);
  const resource = names.find((name) => name.startsWith("libnvinfer_builder_resource_ptx."));
  const lacking = resource?.replace("_ptx.", `_sm${sm.replace(".", "")}.`);
  if (!resource || !lacking || names.includes(lacking)) return false;
  rmSync(to, { recursive: true, force: true });
  mkdirSync(to, { recursive: true });
  for (const name of names) symlinkSync(path.join(from, name), path.join(to, name));
  symlinkSync(path.join(from, resource), path.join(to, lacking));
  return true;
}

function benchStep(side: number, rounds: number, limit: number, out: string, found: Found): Step {
  const results = path.join(out, `bench-${side}`);
  return {
    name: `bench-${side}`,
    limit,
    skip: () => noDriver(found),
    command(seconds) {
      // Some five contenders, of which none may take the time of all.
      const each = Math.max(30, Math.floor(seconds / 3));
      const request = ["--sizes", String(side), "--steps", "28", "--rounds", String(rounds), "--limit", String(each)];
      const env = { FLOWTURBO_BENCH_RESULTS: fresh(results), FLOWTURBO_COMMIT: packed().commit };
      return { ...script("bench/gpu.js", ...request), env };
    },
    async judge({ code, output }) {
      const lines = output
        .split("\n")
        .filter((line) => line.includes(` ${side} px: `) || line.includes(`, ${side} px:`));
      return { passed: code === 0, detail: oneLine(lines.join("; ") || output) || endOf(code) };
    },
  };
}

process.exitCode = await main();
