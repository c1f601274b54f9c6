/**
 * The part of `verify:gpu` that touches the GPU, in a process of its own: a native call that hangs or crashes cannot be
 * undone in the process that made it. It checks everything of a bundle that has not been checked, and says before
 * each step what it begins, so that the process that watches it knows what to blame (supervisor.ts).
 */

import { openCheckpoint } from "../lib/checkpoint/index.js";
import { GraphLibrary } from "../lib/networks/library.js";
import { type ProfileShapes, profileKey } from "../lib/runtimes/builder.js";
import { smOf, smText } from "../lib/runtimes/tensorrt/addon.js";
import { EngineCompiler } from "../lib/runtimes/tensorrt/compile.js";
import type { TensorRtKind } from "../lib/runtimes/tensorrt/flavours.js";
import { examineTensorRt } from "../lib/runtimes/tensorrt/libraries.js";
import { openTensorRt } from "../lib/runtimes/tensorrt/open.js";
import type { TensorRtRuntime } from "../lib/runtimes/tensorrt/runtime.js";
import { type Bundle, readBundle } from "./bundle.js";
import type { Case } from "./cases.js";
import { type Bar, barOf, checkCase, type Finding, graphsOf, identical } from "./check.js";
import { checkPictures, type PictureFinding, pictureProfiles, pictureSets } from "./pictures.js";
import type { BuiltEngine, LifecycleCheck, Machine, Skipped } from "./report.js";

/** What to verify, and what has been verified by a process before this one. */
export interface Assignment {
  readonly bundle: string;
  /** Whether the bundle's files are known to be sound. */
  readonly verified: boolean;
  readonly kind: TensorRtKind;
  readonly folder: string | undefined;
  readonly cache: string | undefined;
  readonly rounds: number;
  readonly quick: boolean;
  readonly level: number | undefined;
  readonly memory: number | undefined;
  /** Names of steps that are done, or were the end of a process. */
  readonly done: readonly string[];
  /** Graphs without an engine, and why: they are not built again. */
  readonly failed: Readonly<Record<string, string>>;
}

/** Where it is noted that a step was the end of the process. */
export type Blame =
  | { readonly engine: Omit<BuiltEngine, "error"> }
  | { readonly finding: Pick<Finding, "name" | "kind" | "bar"> }
  | { readonly check: string }
  | { readonly pictures: string; readonly bar: Bar }
  /** Nothing in particular. */
  | { readonly none: true };

/** What it says. */
export type Message =
  | { readonly type: "plan"; readonly engines: number; readonly cases: number; readonly steps: readonly string[] }
  | { readonly type: "machine"; readonly machine: Machine }
  /** `limited`: the time limit of a case holds for it. Builds may take minutes, and are the library's own business. */
  | { readonly type: "begin"; readonly step: string; readonly limited: boolean; readonly blame: Blame }
  | { readonly type: "engine"; readonly engine: BuiltEngine }
  | { readonly type: "finding"; readonly finding: Finding }
  | { readonly type: "lifecycle"; readonly check: LifecycleCheck }
  | { readonly type: "pictures"; readonly findings: readonly PictureFinding[] }
  | { readonly type: "skipped"; readonly skipped: Skipped }
  /** The device is lost: the rest has to be done by another process. */
  | { readonly type: "lost"; readonly why: string }
  /** What keeps it from verifying anything. */
  | { readonly type: "failed"; readonly why: string }
  | { readonly type: "end" };

/** @param send resolves when the message is on its way */
export async function work(assignment: Assignment, send: (message: Message) => Promise<void>): Promise<void> {
  const { kind, folder, cache, rounds, quick, level, memory } = assignment;
  const done = new Set(assignment.done);
  const bundle = await readBundle(assignment.bundle, !assignment.verified);
  const cases = bundle.cases.filter(({ example }) => !quick || example.quick);
  const pictured =
    bundle.pictures && bundle.model !== null
      ? pictureProfiles(new GraphLibrary(await openCheckpoint(bundle.model)), bundle.pictures, quick)
      : [];
  const profiles = profilesOf(cases, pictured);
  const failed = new Map(Object.entries(assignment.failed));
  const longest = cases
    .map(({ example }) => example)
    .filter(({ kind: what }) => what === "sampler")
    .sort((a, b) => b.program.instructions.length - a.program.instructions.length)[0];
  const drawsPictures = bundle.pictures !== null && bundle.model !== null;
  const steps = [
    ...[...profiles.keys()].map(engineStep),
    ...cases.map(({ example }) => example.name),
    ...(longest ? lifetimeNames : []),
    ...(drawsPictures ? pictureSets(bundle.pictures!, quick).map(({ name }) => pictureStep(name)) : []),
  ];
  await send({ type: "plan", engines: profiles.size, cases: cases.length, steps });
  const begin = (step: string, blame: Blame, limited = true) => send({ type: "begin", step, limited, blame });

  // 1. Every engine, with the profiles that the cases and the pictures need.
  const compiler = await EngineCompiler.open({ kind, folder, cache, memory, level });
  for (const [graph, shapes] of profiles) {
    if (done.has(engineStep(graph))) continue;
    const none = { graph, profiles: shapes.size, bytes: 0, seconds: 0, cached: false };
    await begin(engineStep(graph), { engine: none }, false);
    const request = { graph: bundle.graphs.get(graph)!, profiles: [...shapes.values()] };
    let engine: BuiltEngine;
    try {
      const { bytes, seconds, cached } = await compiler.find(request, { files: bundle.files });
      engine = { graph, profiles: shapes.size, bytes, seconds, cached };
    } catch (error) {
      const why = (error as Error).message;
      engine = { ...none, error: why };
      failed.set(graph, why);
    }
    await send({ type: "engine", engine });
  }
  const lacking = (graphs: readonly string[]) => {
    const missing = graphs.filter((graph) => failed.has(graph));
    return missing.length === 0 ? null : `there is no engine of ${missing.join(" and of ")}`;
  };

  // 2. The device, launch by launch and with whole programs as one CUDA graph.
  await begin("opening the device", { none: true });
  let reason: string | null = null;
  const settings = { tensorrtFolder: folder, cache };
  const { runtime, device } = await openTensorRt(kind, settings, bundle.files);
  const { runtime: capturing } = await openTensorRt(
    kind,
    {
      ...{ ...settings, capture: true },
      logger: {
        warn: (words) => {
          reason = words;
        },
      },
    },
    bundle.files,
  );
  const replays = () => runtime.statistics()?.replays ?? 0;
  try {
    const { cuda } = await examineTensorRt(kind, { folder });
    const driver = cuda!.driverVersion;
    await send({
      type: "machine",
      machine: {
        ...{ gpu: device.name, sm: smText(smOf(device)), memoryBytes: device.memoryBytes, runtime: kind },
        driver: `${Math.floor(driver / 1000)}.${Math.floor((driver % 1000) / 10)}`,
        library: compiler.version,
      },
    });
    for (const graph of bundle.graphs.values()) for (const each of [runtime, capturing]) each.add(graph);

    // 3. Every case.
    for (const { example, expected } of cases) {
      const { name, kind: what, program } = example;
      if (done.has(name)) continue;
      const lacks = lacking(graphsOf(program));
      if (lacks !== null) {
        await send({ type: "skipped", skipped: { name, reason: lacks } });
        continue;
      }
      const bar = barOf(what, graphsOf(program).map(bundle.compute));
      await begin(name, { finding: { name, kind: what, bar } });
      const options = { bar, rounds, capturing: { runtime: capturing, replays, reason: () => reason } };
      const finding = await checkCase(runtime, example, expected, options);
      await send({ type: "finding", finding });
      const loss = finding.problems.find(isLoss);
      if (loss !== undefined) return await send({ type: "lost", why: loss });
    }

    // 4. What a run leaves behind.
    for (const [index, check] of longest ? lifetimeNames.entries() : []) {
      if (done.has(check)) continue;
      const lacks = lacking(graphsOf(longest!.program));
      if (lacks !== null) {
        await send({ type: "skipped", skipped: { name: check, reason: lacks } });
        continue;
      }
      await begin(check, { check });
      const body = lifetimes(runtime, longest!)[index]!;
      const failure = (error: Error) => ({ passed: false, detail: `${error.name}: ${error.message}` });
      const result = await body().catch(failure);
      await send({ type: "lifecycle", check: { check, ...result } });
      if (isLoss(result.detail)) return await send({ type: "lost", why: result.detail });
    }
  } finally {
    await Promise.all([runtime.dispose(), capturing.dispose()]);
  }

  // 5. Pictures, as the product draws them. Its own engines are those in the cache.
  const { runtime: counter } = await openTensorRt(kind, settings, bundle.files);
  try {
    for (const set of drawsPictures ? pictureSets(bundle.pictures!, quick) : []) {
      const step = pictureStep(set.name);
      if (done.has(step)) continue;
      const lacks = lacking([...new Set(pictured.map(({ graph }) => graph))]);
      if (lacks !== null) {
        await send({ type: "skipped", skipped: { name: step, reason: lacks } });
        continue;
      }
      const bar = barOf("sampler", [...bundle.graphs.keys()].map(bundle.compute));
      await begin(step, { pictures: step, bar });
      const findings = await checkPictures(bundle.model!, bundle.pictures!, set, {
        ...{ kind, folder, cache, bar, quick, replays: () => counter.statistics()?.replays ?? 0 },
      });
      await send({ type: "pictures", findings });
      const loss = findings.flatMap(({ problems }) => problems).find(isLoss);
      if (loss !== undefined) return await send({ type: "lost", why: loss });
    }
  } finally {
    await counter.dispose();
  }
  await send({ type: "end" });
}

const engineStep = (graph: string) => `the engine of ${graph}`;
const pictureStep = (set: string) => `pictures ${set}`;

/** Errors are in findings as texts that begin with their names. */
function isLoss(problem: string): boolean {
  return problem.startsWith("DeviceLostError");
}

/** Each set of input shapes that a graph is launched with, by cases and by pictures. */
function profilesOf(cases: Bundle["cases"], pictured: ReturnType<typeof pictureProfiles>) {
  const profiles = new Map<string, Map<string, ProfileShapes>>();
  const add = (graph: string, shapes: ProfileShapes) => {
    const known = profiles.get(graph) ?? new Map<string, ProfileShapes>();
    profiles.set(graph, known.set(profileKey(shapes), shapes));
  };
  for (const { example } of cases)
    for (const instruction of example.program.instructions) {
      if (instruction.op !== "launch") continue;
      const { constants, registers } = example.program;
      const shapes = Object.entries(instruction.inputs).map(([input, name]) => {
        const constant = constants[name];
        return [input, constant?.kind === "value" ? constant.tensor.shape : registers[name]!.shape] as const;
      });
      add(instruction.graph, Object.fromEntries(shapes));
    }
  for (const { graph, inputs } of pictured) add(graph, inputs);
  return profiles;
}

const lifetimeNames = [
  "the same bits in every run",
  "an abort stops between launches, and the next run is whole",
  "many runs do not take more memory",
] as const;

/** What the names above say, in that order. */
function lifetimes(
  runtime: TensorRtRuntime,
  { name, program }: Case,
): readonly (() => Promise<Omit<LifecycleCheck, "check">>)[] {
  return [
    async () => {
      const first = await runtime.run(program);
      let same = true;
      for (let run = 0; run < 5; run++) same &&= identical(await runtime.run(program), first);
      return { passed: same, detail: `6 runs of ${name}` };
    },
    async () => {
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
    },
    async () => {
      const bytes = () => (runtime.statistics()?.deviceBytes ?? 0) + (runtime.statistics()?.pinnedBytes ?? 0);
      await runtime.run(program);
      const before = bytes();
      let runs = 0;
      for (const begin = performance.now(); runs < 200 && performance.now() - begin < 20_000; runs++)
        await runtime.run(program);
      return { passed: bytes() <= before * 1.5, detail: `${before} bytes before, ${bytes()} after ${runs} runs` };
    },
  ];
}
