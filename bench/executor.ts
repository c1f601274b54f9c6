/**
 * What the native executor costs by itself, on the simulated device: its threads' processor time for each launch
 * (the simulated driver's calls included), and whether a JavaScript event loop that is blocked for 200 ms delays a
 * launch. The program is one of a scheduler's shape: steps with all operands of the real ones, a copy of rows and a
 * finite check after each. Bars: under 20 µs a launch; no launch later than 20 ms behind the one before while the event
 * loop is blocked (a launch takes 1 ms there). Needs a compiler, no GPU.
 *
 *   npm run bench:executor
 */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { setImmediate } from "node:timers/promises";
import { float32 } from "../lib/common/tensor.js";
import type { Program } from "../lib/program/program.js";
import { type TensorRtKind, tensorRtKinds } from "../lib/runtimes/tensorrt/flavours.js";
import { type ClosedForm, closedForms } from "../test/runtimes/models.js";
import { samplingForms } from "../test/support/sampling.js";
import { SimulatedEngines, simulated, simulatedRuntime } from "../test/support/simulated.js";
import { format, machineLine, report, type Spread, spread, table } from "./support.js";

const bars = { microsecondsPerLaunch: 20, blockedGapMilliseconds: 20 };
const launches = 1000;
const rounds = 15;
const blockedFor = 200;

if (!simulated) throw new Error("There is no simulated device: run `npm run build:native -- --simulated`.");

/** Steps on two pictures with guidance, double-buffered, each followed by a copy of one row. */
function steps(count: number): Program {
  const latent = [2, 4, 8, 8];
  const pair = [4, 4, 8, 8];
  const fill = (shape: readonly number[], value: number) => {
    const size = shape.reduce((product, length) => product * length, 1);
    return { kind: "value", tensor: float32(shape, new Float32Array(size).fill(value)) } as const;
  };
  const perRow = fill([2], 0);
  return {
    registers: {
      ...{ x0: { dtype: "float32", shape: latent }, x1: { dtype: "float32", shape: latent } },
      ...{ v0: { dtype: "float32", shape: pair }, v1: { dtype: "float32", shape: pair } },
      kept: { dtype: "float32", shape: latent },
    },
    constants: {
      ...{ noise: fill(latent, 0.5), zeros: fill(pair, 0), context: fill([4, 5, 6], 0.1), pooled: fill([4, 7], 0.1) },
      ...{ positions: fill([1, 16, 3], 0.1), sigma: fill([2], 0.001), none: perRow, guidance: fill([2], 1) },
    },
    instructions: Array.from({ length: count }, (_, index) => [
      {
        op: "launch" as const,
        graph: "predict",
        inputs: {
          ...{ x: index === 0 ? "noise" : `x${index % 2}`, velocity: index === 0 ? "zeros" : `v${index % 2}` },
          ...{ context: "context", pooled: "pooled", position_embedding: "positions", sigma: "sigma" },
          ...{ a_in: "none", a_old: "none", a_new: "none", guidance: "guidance" },
        },
        outputs: { x_next: `x${(index + 1) % 2}`, velocity_next: `v${(index + 1) % 2}` },
        mustBeFinite: [`x${(index + 1) % 2}`],
        label: { kind: "step" as const, name: `step ${index + 1}` },
      },
      { op: "copy" as const, from: `x${(index + 1) % 2}`, fromRow: 0, to: "kept", toRow: 1, rows: 1 },
    ]).flat(),
    results: ["kept"],
  };
}

interface Result {
  readonly microsecondsPerLaunch: Spread;
  readonly blockedGapMilliseconds: Spread;
  readonly freeGapMilliseconds: Spread;
}

async function measure(kind: TensorRtKind): Promise<Result> {
  const folder = mkdtempSync(path.join(tmpdir(), "flowturbo-bench-"));
  const form = (microseconds: number): ClosedForm => ({ ...samplingForms(true).predict!, microseconds });
  const open = (microseconds: number) => {
    const graph = { name: "predict", bytes: new Uint8Array(), externals: new Map(), fingerprint: "predict" };
    closedForms.set(graph, form(microseconds));
    const runtime = simulatedRuntime(kind, new SimulatedEngines(folder));
    runtime.add(graph);
    return runtime;
  };
  try {
    // 1. The executor's own time.
    const own: number[] = [];
    {
      await using runtime = open(0);
      const program = steps(launches);
      await runtime.run(program);
      for (let round = 0; round < rounds; round++) {
        const before = runtime.statistics()!;
        await runtime.run(program);
        const after = runtime.statistics()!;
        own.push(((after.busySeconds - before.busySeconds) / (after.launches - before.launches)) * 1e6);
      }
    }

    // 2. Launches of 1 ms, with the event loop free and blocked.
    const gaps = { free: [] as number[], blocked: [] as number[] };
    {
      await using runtime = open(1000);
      const program = steps(300);
      await runtime.run(program);
      for (let round = 0; round < rounds; round++)
        for (const mode of ["free", "blocked"] as const) {
          simulated.reset();
          const running = runtime.run(program);
          while (simulated.counts().kernels < 20) await setImmediate();
          const start = simulated.counts().kernels;
          const until = performance.now() + blockedFor;
          if (mode === "blocked") while (performance.now() < until);
          else while (performance.now() < until) await setImmediate();
          const end = simulated.counts().kernels;
          await running;
          const times = simulated.kernelTimes().slice(start - 1, end);
          gaps[mode].push(Math.max(...times.slice(1).map((time, index) => (time - times[index]!) * 1000)));
        }
    }
    return {
      microsecondsPerLaunch: spread(own),
      blockedGapMilliseconds: spread(gaps.blocked),
      freeGapMilliseconds: spread(gaps.free),
    };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const results: Partial<Record<TensorRtKind, Result>> = {};
let passed = true;
for (const kind of tensorRtKinds) {
  const result = await measure(kind);
  results[kind] = result;
  console.log(`${kind}: ${format(result.microsecondsPerLaunch)} µs of the executor's own time a launch (bar: 20)`);
  console.log(
    `${kind}: longest gap between launches of 1 ms: ${format(result.blockedGapMilliseconds)} ms with the event loop blocked for ${blockedFor} ms (bar: 20), ${format(result.freeGapMilliseconds)} ms with it free`,
  );
  passed &&=
    result.microsecondsPerLaunch.median < bars.microsecondsPerLaunch &&
    result.blockedGapMilliseconds.median < bars.blockedGapMilliseconds;
}
const page = [
  "# The native executor, a launch at a time",
  "",
  `On the simulated device, ${launches} launches a run, ${rounds} rounds: processor time of the executor's two threads for a launch, and the longest gap between launches of 1 ms while the event loop is blocked for ${blockedFor} ms. Bars: ${bars.microsecondsPerLaunch} µs, ${bars.blockedGapMilliseconds} ms. \`npm run bench:executor\`.`,
  "",
  table([
    ["addon", "µs a launch", "longest gap, event loop blocked, ms", "the same, free, ms"],
    ...Object.entries(results).map(([kind, result]) => [
      kind,
      ...[result.microsecondsPerLaunch, result.blockedGapMilliseconds, result.freeGapMilliseconds].map((value) =>
        format(value),
      ),
    ]),
  ]),
  "",
  machineLine(),
];
await report("executor", { device: "simulated", launches, rounds, blockedFor, bars, passed, results }, page.join("\n"));
process.exitCode = passed ? 0 : 1;
