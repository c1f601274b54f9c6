/**
 * `npm run verify:gpu [-- <checkpoint> options]`: everything about the GPU that a machine without one cannot show. Builds
 * every engine of a checkpoint, compares each with ONNX Runtime on the same inputs, runs schedules end to end, times
 * launches with CUDA events, and writes a report in Markdown and JSON. Ends with 0 if all passed, 1 if something failed,
 * 2 for wrong arguments, 3 where there is no GPU.
 *
 *   <checkpoint>            a folder in the diffusers layout; default: the embedded model
 *   --runtime NAME          tensorrt or tensorrt-rtx; default: the first that can be used
 *   --tensorrt-dir FOLDER   where its libraries are
 *   --cache FOLDER          of engines
 *   --sizes 64x64,128x128   default: the model's native size, and one and a half times that
 *   --batches 1,2           default: 1,2
 *   --rounds N              timed runs of each case; default: 20
 *   --out FOLDER            for report.md and report.json; default: verify-report
 *   --bundle FOLDER         also write graphs, weights, inputs and ONNX Runtime's results there. Needs no GPU
 *   --check FOLDER          verify against such a bundle: needs no checkpoint, no network and no ONNX Runtime
 *   --driver                only the executor, on a real driver without TensorRT: see driver.ts
 *   --case-timeout S        with --driver: seconds that a check may take; default: 60
 */

import { mkdir, readFile, writeFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";
import { openCheckpoint } from "../lib/checkpoint/index.js";
import { gigabytes } from "../lib/common/memory.js";
import type { Tensor } from "../lib/common/tensor.js";
import { OptionError } from "../lib/errors.js";
import { embeddedModel } from "../lib/flowturbo.js";
import { GraphLibrary } from "../lib/networks/library.js";
import type { Program } from "../lib/program/program.js";
import type { ProfileShapes } from "../lib/runtimes/builder.js";
import { OnnxRuntime } from "../lib/runtimes/onnxruntime/onnxruntime.js";
import type { Runtime } from "../lib/runtimes/runtime.js";
import { smOf, smText } from "../lib/runtimes/tensorrt/addon.js";
import { EngineCompiler } from "../lib/runtimes/tensorrt/compile.js";
import { type TensorRtKind, tensorRtKinds } from "../lib/runtimes/tensorrt/flavours.js";
import { diagnosis, examineTensorRt } from "../lib/runtimes/tensorrt/libraries.js";
import { openTensorRt } from "../lib/runtimes/tensorrt/open.js";
import { tensorRtEmitOptions } from "../lib/runtimes/tensorrt/row.js";
import { type Bundle, type Origin, type Referenced, readBundle, writeBundle } from "./bundle.js";
import { casesOf, type Size } from "./cases.js";
import { barOf, checkCase, compare, graphsOf } from "./check.js";
import { verifyDriver } from "./driver.js";
import { type BuiltEngine, markdown, type Report } from "./report.js";

const root = path.resolve(import.meta.dirname, "..");
const say = (line: string) => process.stderr.write(`${line}\n`);

const { values: flags, positionals } = parsed();

process.exitCode = await main().catch((error: unknown) => {
  say(error instanceof Error ? error.message : String(error));
  return error instanceof OptionError ? 2 : 1;
});

function parsed() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        runtime: { type: "string" },
        "tensorrt-dir": { type: "string" },
        cache: { type: "string" },
        sizes: { type: "string" },
        batches: { type: "string", default: "1,2" },
        rounds: { type: "string", default: "20" },
        out: { type: "string", default: "verify-report" },
        bundle: { type: "string" },
        check: { type: "string" },
        driver: { type: "boolean", default: false },
        "case-timeout": { type: "string", default: "60" },
      },
    });
  } catch (error) {
    say((error as Error).message);
    process.exit(2);
  }
}

async function main(): Promise<number> {
  if (flags.driver) {
    const limitSeconds = Number(flags["case-timeout"]);
    if (positionals.length > 0) return wrong("--driver takes no checkpoint.");
    if (!(limitSeconds > 0)) return wrong(`--case-timeout is a number of seconds, not ${flags["case-timeout"]}.`);
    return verifyDriver({ folder: flags["tensorrt-dir"], out: flags.out, limitSeconds });
  }

  const kinds = flags.runtime === undefined ? tensorRtKinds : tensorRtKinds.filter((kind) => kind === flags.runtime);
  const rounds = Number(flags.rounds);
  if (kinds.length === 0) return wrong(`--runtime is ${tensorRtKinds.join(" or ")}, not ${flags.runtime}.`);
  if (!Number.isInteger(rounds) || rounds < 1) return wrong(`--rounds is a whole number, not ${flags.rounds}.`);
  if (flags.check !== undefined && (flags.bundle !== undefined || positionals.length > 0))
    return wrong("--check takes everything from the bundle; leave out the checkpoint and --bundle.");
  if (positionals.length > 1) return wrong(`Give one checkpoint, not ${positionals.length}.`);

  // 1. The GPU. Without one all that is left to do is a bundle.
  const reports = [];
  for (const kind of kinds) {
    const report = await examineTensorRt(kind, { folder: flags["tensorrt-dir"], gpuFirst: true });
    reports.push(report);
    if (report.problems.length === 0) break;
  }
  const usable = reports.find(({ problems }) => problems.length === 0);
  if (!usable && flags.bundle === undefined) return noGpu(reports);

  // 2. The cases with their reference.
  const bundle = flags.check === undefined ? await reference() : await readBundle(flags.check);
  if (typeof bundle === "number") return bundle;
  if (flags.bundle !== undefined) {
    const { bytes } = await writeBundle(flags.bundle, bundle.origin, bundle.graphs, bundle.compute, bundle.cases);
    say(`${flags.bundle}: ${bundle.cases.length} cases, ${bundle.graphs.size} graphs, ${gigabytes(bytes)} GB.`);
    say("Check it on another machine with `npm run verify:gpu -- --check <folder>`.");
  }
  if (!usable) return noGpu(reports);

  // 3. The verification.
  const report = await verify(bundle, usable.kind, rounds);
  await mkdir(flags.out, { recursive: true });
  await writeFile(path.join(flags.out, "report.json"), `${JSON.stringify(report, null, 2)}\n`);
  await writeFile(path.join(flags.out, "report.md"), markdown(report));
  process.stdout.write(markdown(report));
  say(`Written to ${path.join(flags.out, "report.md")} and report.json.`);
  return report.passed ? 0 : 1;
}

function wrong(message: string): number {
  say(message);
  return 2;
}

function noGpu(reports: readonly Awaited<ReturnType<typeof examineTensorRt>>[]): number {
  say("Nothing was verified: there is no GPU here that TensorRT could be run on.");
  for (const report of reports) say(diagnosis(report, "running"));
  return 3;
}

/** Cases of a checkpoint, with what ONNX Runtime makes of them in float32. */
async function reference(): Promise<Bundle | number> {
  const folder = positionals[0] ?? embeddedModel;
  const checkpoint = await openCheckpoint(folder);
  const { vae, transformer } = checkpoint;
  const native = transformer.config.sampleSize * vae.config.factor;
  const sizes = sizesOf(flags.sizes ?? `${native}x${native},${native}x${largerThan(native, vae.config.factor)}`);
  const batches = flags.batches.split(",").map(Number);
  if (!sizes) return wrong(`--sizes are such as 1024x1024,832x1216, not ${flags.sizes}.`);
  if (!batches.every((batch) => Number.isInteger(batch) && batch > 0)) return wrong("--batches are such as 1,2,4.");

  const graphs = new GraphLibrary(checkpoint);
  const host = new URL("file:///");
  host.pathname = path.join(root, "dist/onnxruntime-host.js");
  const runtime = new OnnxRuntime({ weights: "lazy", host });
  try {
    const { version } = await runtime.start();
    const run = (program: Program) => {
      for (const name of graphsOf(program)) if (!runtime.has(name)) runtime.add(graphs.get(name));
      return runtime.run(program);
    };
    const examples = await casesOf(graphs, { sizes, batches }, run);
    const cases: Referenced[] = [];
    for (const [index, example] of examples.entries()) {
      say(`reference ${index + 1} of ${examples.length}: ${example.name}`);
      cases.push({ example, expected: await run(example.program) });
    }
    const origin: Origin = {
      checkpoint: folder === embeddedModel ? "models/shapes (embedded)" : path.resolve(folder),
      flowturbo: (JSON.parse(await readFile(path.join(root, "package.json"), "utf8")) as { version: string }).version,
      reference: `ONNX Runtime ${version} on the CPU, float32`,
      created: new Date().toISOString(),
    };
    const compiled = new GraphLibrary(checkpoint, tensorRtEmitOptions());
    const names = new Set(examples.flatMap(({ program }) => graphsOf(program)));
    return {
      ...{ origin, cases, files: compiled.files },
      graphs: new Map([...names].map((name) => [name, compiled.get(name)])),
      compute: (graph) => compiled.optionsOf(graph).compute,
    };
  } finally {
    await runtime.dispose();
  }
}

function sizesOf(text: string): Size[] | null {
  const sizes = text.split(",").map((size) => size.match(/^(\d+)x(\d+)$/));
  return sizes.every((size) => size !== null)
    ? sizes.map((size) => ({ width: Number(size[1]), height: Number(size[2]) }))
    : null;
}

/** One and a half times a side, in whole patches. */
function largerThan(side: number, factor: number): number {
  return Math.floor((1.5 * side) / (2 * factor)) * 2 * factor;
}

async function verify(bundle: Bundle, kind: TensorRtKind, rounds: number): Promise<Report> {
  const options = { kind, folder: flags["tensorrt-dir"], cache: flags.cache };
  const { files, graphs } = bundle;

  // 1. Every engine, with the profiles that the cases need.
  const compiler = await EngineCompiler.open(options);
  const engines: BuiltEngine[] = [];
  for (const [name, graph] of graphs) {
    const profiles = profilesOf(bundle.cases, name);
    say(`engine ${engines.length + 1} of ${graphs.size}: ${name}, ${profiles.length} profiles`);
    try {
      const { bytes, seconds, cached } = await compiler.find({ graph, profiles }, { files });
      engines.push({ graph: name, profiles: profiles.length, bytes, seconds, cached });
    } catch (error) {
      const why = (error as Error).message;
      engines.push({ graph: name, profiles: profiles.length, bytes: 0, seconds: 0, cached: false, error: why });
    }
  }

  // 2. Every case, launch by launch and as one CUDA graph.
  const settings = { tensorrtFolder: options.folder, cache: options.cache };
  const { runtime, device } = await openTensorRt(kind, settings, files);
  const { runtime: capturing } = await openTensorRt(kind, { ...settings, capture: true }, files);
  try {
    for (const graph of graphs.values()) for (const each of [runtime, capturing]) each.add(graph);
    const findings = [];
    for (const [index, { example, expected }] of bundle.cases.entries()) {
      const bar = barOf(example, bundle.compute);
      const finding = await checkCase(runtime, example, expected, { bar, rounds, capturing });
      say(`case ${index + 1} of ${bundle.cases.length}: ${example.name}: ${finding.passed ? "ok" : "FAILED"}`);
      findings.push(finding);
    }

    // 3. What a run leaves behind.
    const lifecycle = await checkLifetimes(runtime, bundle.cases);
    const examined = await examineTensorRt(kind, { folder: flags["tensorrt-dir"] });
    const driver = examined.cuda!.driverVersion;
    const passed =
      engines.every(({ error }) => error === undefined) &&
      [...findings, ...lifecycle].every(({ passed: good }) => good);
    return {
      passed,
      machine: {
        ...{ gpu: device.name, sm: smText(smOf(device)), memoryBytes: device.memoryBytes, runtime: kind },
        driver: `${Math.floor(driver / 1000)}.${Math.floor((driver % 1000) / 10)}`,
        library: compiler.library.version.join("."),
      },
      ...{ origin: bundle.origin, rounds, engines, findings, lifecycle },
    };
  } finally {
    await Promise.all([runtime.dispose(), capturing.dispose()]);
  }
}

/** Each set of input shapes that a graph is launched with. */
function profilesOf(cases: readonly Referenced[], graph: string): ProfileShapes[] {
  const profiles = new Map<string, ProfileShapes>();
  for (const { example } of cases)
    for (const instruction of example.program.instructions) {
      if (instruction.op !== "launch" || instruction.graph !== graph) continue;
      const { constants, registers } = example.program;
      const shapes = Object.fromEntries(
        Object.entries(instruction.inputs).map(([input, name]) => {
          const constant = constants[name];
          return [input, constant?.kind === "value" ? constant.tensor.shape : registers[name]!.shape];
        }),
      );
      profiles.set(JSON.stringify(shapes), shapes);
    }
  return [...profiles.values()];
}

/** An abort in the middle, the same bits again, and memory that does not grow. */
async function checkLifetimes(
  runtime: Runtime & { statistics(): { readonly deviceBytes: number; readonly pinnedBytes: number } | null },
  cases: readonly Referenced[],
): Promise<Report["lifecycle"]> {
  const longest = cases
    .map(({ example }) => example)
    .filter(({ kind }) => kind === "sampler")
    .sort((a, b) => b.program.instructions.length - a.program.instructions.length)[0];
  if (!longest) return [];
  const checks: Report["lifecycle"][number][] = [];
  const note = async (check: string, body: () => Promise<{ passed: boolean; detail: string }>) => {
    const result = await body().catch((error: Error) => ({ passed: false, detail: `${error.name}: ${error.message}` }));
    checks.push({ check, ...result });
  };
  const { program } = longest;
  await note("the same bits in every run", async () => {
    const first = await runtime.run(program);
    let same = true;
    for (let run = 0; run < 5; run++) same &&= identical(await runtime.run(program), first);
    return { passed: same, detail: `6 runs of ${longest.name}` };
  });
  await note("an abort stops between launches, and the next run is whole", async () => {
    const before = await runtime.run(program);
    const controller = new AbortController();
    const reason = new Error("stopped by verify:gpu");
    const start = performance.now();
    const error = await runtime
      .run(program, { signal: controller.signal, onLaunch: () => controller.abort(reason) })
      .catch((caught: unknown) => caught);
    const took = performance.now() - start;
    const same = identical(await runtime.run(program), before);
    return { passed: error === reason && same, detail: `it rejected after ${took.toFixed(1)} ms` };
  });
  await note("200 runs do not take more memory", async () => {
    const bytes = () => (runtime.statistics()?.deviceBytes ?? 0) + (runtime.statistics()?.pinnedBytes ?? 0);
    await runtime.run(program);
    const before = bytes();
    for (let run = 0; run < 200; run++) await runtime.run(program);
    return { passed: bytes() <= before * 1.5, detail: `${before} bytes before, ${bytes()} after` };
  });
  return checks;
}

function identical(actual: Record<string, Tensor>, expected: Record<string, Tensor>): boolean {
  return compare(actual, expected).every(({ worst }) => worst === 0);
}
