/**
 * `npm run verify:gpu [-- <checkpoint> options]`: everything about the GPU that a machine without one cannot show. Builds
 * every engine of a checkpoint, compares each with ONNX Runtime on the same inputs, runs schedules end to end and as CUDA
 * graphs, draws pictures as the product does, times launches with CUDA events, and keeps a report in Markdown and JSON
 * that is written after each step. Ends with 0 if all passed, 1 if something failed or could not be run, 2 for wrong
 * arguments, 3 where there is no GPU.
 *
 *   <checkpoint>            a folder in the diffusers layout; default: the embedded model
 *   --runtime NAME          tensorrt or tensorrt-rtx; default: the first that can be used
 *   --tensorrt-dir FOLDER   where its libraries are
 *   --cache FOLDER          of engines; with --level, default: one in the folder of the report
 *   --sizes 64x64,128x128   default: the model's native size, and one and a half times that
 *   --batches 1,2           default: 1,2
 *   --quick                 a third of the cases: every graph once, and every kind of program
 *   --level N               builder optimisation level, 0 to 5: lower builds sooner and runs slower; default: the library's
 *   --memory GB             that builds may take; default: what is available
 *   --rounds N              timed runs of each case, at most; default: 20, and 3 with --quick
 *   --case-timeout S        seconds that a case, or a check of --driver, may take; default: 60
 *   --out FOLDER            for report.md and report.json; default: verify-report
 *   --bundle FOLDER         also write checkpoint, graphs, inputs and ONNX Runtime's results there. Needs no GPU
 *   --check FOLDER          verify against such a bundle: needs no checkpoint, no network and no ONNX Runtime
 *   --driver                only the executor, on a real driver without TensorRT: see driver.ts
 */

import { mkdtemp, rm } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { openCheckpoint } from "../lib/checkpoint/index.js";
import { gigabytes } from "../lib/common/memory.js";
import { packagePath, packageVersion } from "../lib/common/package.js";
import { messageOf } from "../lib/common/text.js";
import { OptionError } from "../lib/errors.js";
import { embeddedModel } from "../lib/flowturbo.js";
import { GraphLibrary } from "../lib/networks/library.js";
import type { Program } from "../lib/program/program.js";
import { OnnxRuntime } from "../lib/runtimes/onnxruntime/onnxruntime.js";
import { type TensorRtKind, tensorRtKinds } from "../lib/runtimes/tensorrt/flavours.js";
import { diagnosis, examineTensorRt } from "../lib/runtimes/tensorrt/libraries.js";
import { tensorRtEmitOptions } from "../lib/runtimes/tensorrt/row.js";
import { type Contents, clearBundle, type Origin, type Referenced, readOrigin, writeBundle } from "./bundle.js";
import { casesOf, type Size } from "./cases.js";
import { graphsOf } from "./check.js";
import { verifyDriver } from "./driver.js";
import { pictureRequests, referencePictures } from "./pictures.js";
import { markdown } from "./report.js";
import { supervise } from "./supervisor.js";
import { type Assignment, type Message, work } from "./worker.js";

const say = (line: string) => process.stderr.write(`${line}\n`);

class Stopped extends Error {
  constructor(
    signal: string,
    readonly exitCode: number,
  ) {
    super(`Stopped by ${signal}; the report says how far it came.`);
  }
}

if (process.argv[2] === "--worker" && process.send) beWorker();
else
  process.exitCode = await main().catch((error: unknown) => {
    say(messageOf(error));
    return error instanceof Stopped ? error.exitCode : error instanceof OptionError ? 2 : 1;
  });

/** This process is the one that touches the GPU: see worker.ts. */
function beWorker(): void {
  // Nobody is left to read what it finds.
  process.once("disconnect", () => process.kill(process.pid, "SIGKILL"));
  const send = (message: Message) => new Promise<void>((resolve) => process.send!(message, () => resolve()));
  process.once("message", async (assignment: Assignment) => {
    await work(assignment, send).catch((error: Error) =>
      send({ type: "failed", why: `${error.name}: ${error.message}` }),
    );
    process.removeAllListeners("disconnect");
    process.disconnect();
  });
}

interface Flags {
  readonly checkpoint: string | undefined;
  readonly kinds: readonly TensorRtKind[];
  readonly folder: string | undefined;
  readonly cache: string | undefined;
  readonly sizes: readonly Size[] | undefined;
  readonly batches: readonly number[];
  readonly quick: boolean;
  readonly level: number | undefined;
  readonly memory: number | undefined;
  readonly rounds: number;
  readonly caseTimeoutMs: number;
  readonly out: string;
  readonly bundle: string | undefined;
  readonly check: string | undefined;
  readonly driver: boolean;
}

/** @throws OptionError */
function flagsOf(): Flags {
  const wrong = (message: string) => new OptionError("flags", message);
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse();
  } catch (error) {
    throw wrong((error as Error).message);
  }
  const { values: flags, positionals } = parsed;
  const number = (name: keyof typeof flags, fallback: number, least: number, most: number, whole: boolean) => {
    const text = flags[name];
    const value = text === undefined ? fallback : Number(text);
    if (text === "" || !(value >= least && value <= most) || (whole && !Number.isInteger(value)))
      throw wrong(`--${name} is a ${whole ? "whole " : ""}number from ${least} to ${most}, not ${text}.`);
    return value;
  };
  const kinds = flags.runtime === undefined ? tensorRtKinds : tensorRtKinds.filter((kind) => kind === flags.runtime);
  if (kinds.length === 0) throw wrong(`--runtime is ${tensorRtKinds.join(" or ")}, not ${flags.runtime}.`);
  if (flags.check !== undefined && (flags.bundle !== undefined || positionals.length > 0))
    throw wrong("--check takes everything from the bundle; leave out the checkpoint and --bundle.");
  if (flags.driver && positionals.length > 0) throw wrong("--driver takes no checkpoint.");
  if (positionals.length > 1) throw wrong(`Give one checkpoint, not ${positionals.length}.`);
  const sizes = flags.sizes?.split(",").map((size) => size.match(/^(\d+)x(\d+)$/));
  if (sizes?.some((size) => size === null)) throw wrong(`--sizes are such as 1024x1024,832x1216, not ${flags.sizes}.`);
  const batches = flags.batches.split(",").map(Number);
  if (!batches.every((batch) => Number.isInteger(batch) && batch > 0)) throw wrong("--batches are such as 1,2,4.");
  const level = flags.level === undefined ? undefined : number("level", 0, 0, 5, true);
  return {
    ...{ checkpoint: positionals[0], kinds, folder: flags["tensorrt-dir"], batches, level },
    ...{ quick: flags.quick, out: flags.out, bundle: flags.bundle, check: flags.check },
    driver: flags.driver,
    // Engines of another level are not left where a model would find them.
    cache: flags.cache ?? (level === undefined ? undefined : path.join(flags.out, `level-${level}`)),
    sizes: sizes?.map((size) => ({ width: Number(size![1]), height: Number(size![2]) })),
    memory: flags.memory === undefined ? undefined : number("memory", 0, 0.1, 100_000, false) * 1e9,
    rounds: number("rounds", flags.quick ? 3 : 20, 1, 10_000, true),
    caseTimeoutMs: number("case-timeout", 60, 0.1, 100_000, false) * 1000,
  };
}

function parse() {
  return parseArgs({
    allowPositionals: true,
    options: {
      runtime: { type: "string" },
      "tensorrt-dir": { type: "string" },
      cache: { type: "string" },
      sizes: { type: "string" },
      batches: { type: "string", default: "1,2" },
      quick: { type: "boolean", default: false },
      level: { type: "string" },
      memory: { type: "string" },
      rounds: { type: "string" },
      "case-timeout": { type: "string" },
      out: { type: "string", default: "verify-report" },
      bundle: { type: "string" },
      check: { type: "string" },
      driver: { type: "boolean", default: false },
    },
  });
}

async function main(): Promise<number> {
  const flags = flagsOf();
  if (flags.driver)
    return verifyDriver({ folder: flags.folder, out: flags.out, limitSeconds: flags.caseTimeoutMs / 1000 });

  // 1. The GPU. Without one all that is left to do is a bundle.
  const reports = [];
  for (const kind of flags.kinds) {
    const report = await examineTensorRt(kind, { folder: flags.folder, gpuFirst: true });
    reports.push(report);
    if (report.problems.length === 0) break;
  }
  const usable = reports.find(({ problems }) => problems.length === 0);
  if (!usable && flags.bundle === undefined) return noGpu(reports);

  // 2. The cases with their reference, in a folder: the process that verifies reads it.
  if (flags.bundle !== undefined) await clearBundle(flags.bundle);
  const temporary =
    flags.check === undefined && flags.bundle === undefined
      ? await mkdtemp(path.join(os.tmpdir(), "flowturbo-verify-"))
      : null;
  try {
    const bundle = flags.check ?? flags.bundle ?? temporary!;
    if (flags.check === undefined) {
      const contents = await reference(flags);
      const { bytes } = await writeBundle(bundle, contents);
      if (flags.bundle !== undefined) {
        say(`${bundle}: ${contents.cases.length} cases, ${contents.graphs.size} graphs, ${gigabytes(bytes)} GB.`);
        say("Check it on another machine with `npm run verify:gpu -- --check <folder>`.");
      }
    }
    if (!usable) return noGpu(reports);

    // 3. The verification.
    const { rounds, quick, level, memory, folder, cache, caseTimeoutMs, out } = flags;
    const stop = new AbortController();
    for (const [signal, code] of [
      ["SIGINT", 130],
      ["SIGTERM", 143],
    ] as const)
      process.once(signal, () => {
        stop.abort(new Stopped(signal, code));
      });
    const report = await supervise(
      { bundle, verified: flags.check === undefined, kind: usable.kind, folder, cache, rounds, quick, level, memory },
      {
        ...{ origin: await readOrigin(bundle), out, caseTimeoutMs, script: process.argv[1]!, signal: stop.signal, say },
      },
    );
    process.stdout.write(markdown(report));
    say(`Written to ${path.join(out, "report.md")} and report.json.`);
    return report.passed ? 0 : 1;
  } finally {
    if (temporary !== null) await rm(temporary, { recursive: true, force: true });
  }
}

function noGpu(reports: readonly Awaited<ReturnType<typeof examineTensorRt>>[]): number {
  say("Nothing was verified: there is no GPU here that TensorRT could be run on.");
  for (const report of reports) say(diagnosis(report, "running"));
  return 3;
}

/** Cases of a checkpoint, with what ONNX Runtime makes of them in float32. */
async function reference({
  checkpoint: folder = embeddedModel,
  batches,
  quick,
  bundle,
  ...flags
}: Flags): Promise<Contents> {
  const checkpoint = await openCheckpoint(folder);
  const { vae, transformer } = checkpoint;
  const native = transformer.config.sampleSize * vae.config.factor;
  const larger = largerThan(native, vae.config.factor);
  const sizes = flags.sizes ?? [
    { width: native, height: native },
    { width: native, height: larger },
  ];
  const requests = pictureRequests(checkpoint, sizes).filter((request) => !quick || request.quick);

  // 1. Single programs.
  const graphs = new GraphLibrary(checkpoint);
  const runtime = new OnnxRuntime({ weights: "lazy", host: pathToFileURL(packagePath("dist/onnxruntime-host.js")) });
  const cases: Referenced[] = [];
  let version: string;
  try {
    ({ version } = await runtime.start());
    const run = (program: Program) => {
      for (const name of graphsOf(program)) if (!runtime.has(name)) runtime.add(graphs.get(name));
      return runtime.run(program);
    };
    const examples = (await casesOf(graphs, { sizes, batches }, run)).filter((example) => !quick || example.quick);
    for (const example of examples) {
      say(`reference ${cases.length + 1} of ${examples.length}: ${example.name}`);
      cases.push({ example, expected: await run(example.program) });
    }
  } finally {
    await runtime.dispose();
  }

  // 2. Pictures. One runtime at a time: the model may be as large as the memory.
  const pictures = { requests: await referencePictures(folder, requests, say), batches: [...new Set(batches)] };
  const origin: Origin = {
    checkpoint: folder === embeddedModel ? "models/shapes (embedded)" : path.resolve(folder),
    flowturbo: packageVersion(),
    reference: `ONNX Runtime ${version} on the CPU, float32`,
    created: new Date().toISOString(),
  };
  const compiled = new GraphLibrary(checkpoint, tensorRtEmitOptions());
  const names = new Set(cases.flatMap(({ example }) => graphsOf(example.program)));
  return {
    ...{ origin, cases, pictures, model: checkpoint.folder, copy: bundle !== undefined },
    graphs: new Map([...names].map((name) => [name, compiled.get(name)])),
    compute: (graph) => compiled.optionsOf(graph).compute,
  };
}

/** One and a half times a side, in whole patches. */
function largerThan(side: number, factor: number): number {
  return Math.floor((1.5 * side) / (2 * factor)) * 2 * factor;
}
