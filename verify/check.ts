/**
 * Runs cases and compares what comes out with the reference. The measure is the relative L2 error of each result,
 * ‖actual − expected‖ / ‖expected‖, which a few outliers among a million values do not decide; the largest single
 * difference has a bar of its own, so that a few wrong values are noticed too.
 */

import { float32, type Tensor } from "../lib/common/tensor.js";
import type { Program } from "../lib/program/program.js";
import type { Runtime } from "../lib/runtimes/runtime.js";
import type { Case } from "./cases.js";

export type Compute = "float32" | "float16" | "bfloat16";

/**
 * By how many unit roundoffs a network's result may be off. Measured: every graph of the embedded model computed in
 * float16 by ONNX Runtime is within 2 of the same in float32 (test/verify). Roundings add up like a random walk along
 * the residual stream, so that SD3.5-large's 38 blocks, for 6 here, give 2.5 times that; the rest is for another order
 * of summation.
 */
const growth = 8;

/**
 * Bars of the L2 error for one launch, by the type that the engine computes in; the reference computes in float32. For the
 * 16-bit types `growth` times the unit roundoff, half the distance of two neighbouring numbers at 1. float32 has a unit
 * roundoff of 6e-8 and kernels that approximate better than that seldom: 2e-4 leaves them room, and none for TF32, whose 10
 * bits of mantissa would give 1e-3. TF32 is off in every engine (native/core/engine_builder.cpp).
 */
export const engineBars: Record<Compute, number> = {
  float32: 2e-4,
  float16: growth * 2 ** -11,
  bfloat16: growth * 2 ** -8,
};

/** A schedule feeds each step with the errors of those before. Measured as above: Heun is off by 5.3 unit roundoffs. */
const scheduleFactor = 2;

/**
 * The bar of the largest single difference, as a part of the largest value, over that of the L2 error. Measured as
 * above: for one launch it is about as large as the L2 error, and small where it is several times that; pictures of whole
 * schedules have edges, where single pixels move by up to 44 unit roundoffs.
 */
const worstFactors = { launch: 2, schedule: 8 } as const;

export interface Bar {
  readonly relative: number;
  readonly worst: number;
}

export function barOf(kind: Case["kind"], computes: readonly Compute[]): Bar {
  const engine = Math.max(...computes.map((compute) => engineBars[compute]));
  if (kind !== "sampler") return { relative: engine, worst: worstFactors.launch * engine };
  const relative = scheduleFactor * engine;
  return { relative, worst: worstFactors.schedule * relative };
}

export interface Difference {
  readonly result: string;
  readonly relative: number;
  /** Largest single difference, as a part of the largest expected value. */
  readonly worst: number;
}

export interface Finding {
  readonly name: string;
  readonly kind: Case["kind"];
  readonly bar: Bar;
  readonly passed: boolean;
  readonly differences: readonly Difference[];
  /** Median milliseconds of each launch, by the device's own clock. */
  readonly launches: readonly { readonly graph: string; readonly name: string; readonly milliseconds: number }[];
  /** Median milliseconds of a whole run, from call to result. */
  readonly total: number;
  /** Timed runs. */
  readonly rounds: number;
  /** Of a sampler: how it fared as one CUDA graph. */
  readonly captured?: Captured;
  /** What is wrong besides differences, a sentence each. */
  readonly problems: readonly string[];
}

export interface Captured {
  /** Runs after the first one, and how many of them the executor replayed. */
  readonly runs: number;
  readonly replayed: number;
  /** Median milliseconds of a run. */
  readonly total: number;
}

export function graphsOf(program: Program): string[] {
  return [
    ...new Set(program.instructions.flatMap((instruction) => (instruction.op === "launch" ? [instruction.graph] : []))),
  ];
}

export function compare(actual: Record<string, Tensor>, expected: Record<string, Tensor>): Difference[] {
  return Object.entries(expected).map(([result, { data, shape }]) => {
    const other = actual[result];
    if (!other || other.shape.join() !== shape.join())
      return { result, relative: Number.POSITIVE_INFINITY, worst: Number.POSITIVE_INFINITY };
    let error = 0;
    let norm = 0;
    let worst = 0;
    let largest = 0;
    for (let index = 0; index < data.length; index++) {
      const value = Number(data[index]);
      const difference = Math.abs(Number(other.data[index]) - value);
      error += difference * difference;
      norm += value * value;
      // A NaN must win, and every comparison with one is false.
      if (!(difference <= worst)) worst = difference;
      largest = Math.max(largest, Math.abs(value));
    }
    const part = (value: number, of: number) => (value === 0 ? 0 : value / of);
    return { result, relative: Math.sqrt(part(error, norm)), worst: part(worst, largest) };
  });
}

/** Whether all differences are within the bar. */
export function isWithin(differences: readonly Difference[], bar: Bar): boolean {
  return differences.every(({ relative, worst }) => relative <= bar.relative && worst <= bar.worst);
}

/** Whether two runs gave the same bits. */
export function identical(actual: Record<string, Tensor>, expected: Record<string, Tensor>): boolean {
  return Object.entries(expected).every(([name, { data }]) => {
    const other = actual[name]?.data;
    if (!other || other.byteLength !== data.byteLength) return false;
    const bytes = (array: typeof data) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);
    return bytes(other).equals(bytes(data));
  });
}

/** A runtime whose programs are captured, and what the executor counts of that. */
export interface Capturing {
  readonly runtime: Runtime;
  /** Submissions that ran as one CUDA graph, since the process began. */
  replays(): number;
  /** Why programs could not be captured, the last time that one could not; null if none. */
  reason(): string | null;
}

export interface CheckOptions {
  readonly bar: Bar;
  /** Timed runs after the compared one; fewer where they would take more than ten seconds. */
  readonly rounds: number;
  /** The same device with captured programs. */
  readonly capturing?: Capturing | undefined;
}

/** Timed runs of a case end after so many milliseconds. */
const timedMs = 10_000;

/** Never rejects: what goes wrong is in the finding. */
export async function checkCase(
  runtime: Runtime,
  { name, kind, program }: Pick<Case, "name" | "kind" | "program">,
  expected: Record<string, Tensor>,
  { bar, rounds, capturing }: CheckOptions,
): Promise<Finding> {
  const launches = program.instructions.filter((instruction) => instruction.op === "launch");
  const times: number[][] = launches.map(() => []);
  const totals: number[] = [];
  const problems: string[] = [];
  let differences: readonly Difference[] = [];
  let captured: Captured | undefined;
  try {
    const actual = await runtime.run(program);
    differences = compare(actual, expected);
    let others = 0;
    await timed(rounds, totals, async () => {
      const again = await runtime.run(program, {
        onLaunch: ({ index, milliseconds }) => times[index]!.push(milliseconds),
      });
      if (!identical(again, actual)) others++;
    });
    if (others > 0) problems.push(`${others} of ${totals.length} further runs gave other bits than the first`);
    if (capturing && kind === "sampler")
      captured = await checkCaptured(capturing, runtime, program, actual, rounds, problems);
  } catch (error) {
    problems.push(error instanceof Error ? `${error.name}: ${error.message}` : String(error));
  }
  return {
    ...{ name, kind, bar, differences, problems, rounds: totals.length, total: median(totals) },
    passed: problems.length === 0 && isWithin(differences, bar),
    launches: launches.map(({ graph, label }, index) => ({
      ...{ graph, name: label.name, milliseconds: median(times[index]!) },
    })),
    ...(captured && { captured }),
  };
}

/**
 * The first run records, the later ones replay: the executor counts those. The last has other inputs than the recorded
 * one: a replay that does nothing leaves the results of the run before, which are right for the same inputs.
 */
async function checkCaptured(
  { runtime, replays, reason }: Capturing,
  plain: Runtime,
  program: Program,
  expected: Record<string, Tensor>,
  rounds: number,
  problems: string[],
): Promise<Captured> {
  const totals: number[] = [];
  let others = 0;
  if (!identical(await runtime.run(program), expected)) others++;
  const before = replays();
  await timed(rounds, totals, async () => {
    if (!identical(await runtime.run(program), expected)) others++;
  });
  const altered = halved(program);
  const changed = await plain.run(altered);
  if (identical(changed, expected)) problems.push("other inputs gave the same results");
  const follows = identical(await runtime.run(altered), changed);
  const [runs, replayed] = [totals.length + 1, replays() - before];
  if (others > 0)
    problems.push(`captured, ${others} of ${totals.length + 1} runs gave other bits than launch by launch`);
  if (!follows) problems.push("captured, a run with other inputs did not give their results");
  if (replayed < runs)
    problems.push(
      `not replayed as one CUDA graph: ${runs - replayed} of ${runs} runs (${reason() ?? "the executor gave no reason"})`,
    );
  return { runs, replayed, total: median(totals) };
}

/** The program with all its numbers halved: sizes, and with them the instructions, are the same. */
function halved(program: Program): Program {
  const constants: Record<string, Program["constants"][string]> = {};
  for (const [name, constant] of Object.entries(program.constants))
    constants[name] =
      constant.kind === "value" && constant.tensor.data instanceof Float32Array
        ? {
            kind: "value",
            tensor: float32(
              constant.tensor.shape,
              constant.tensor.data.map((value) => value / 2),
            ),
          }
        : constant;
  return { ...program, constants };
}

/** At least one run, then up to `rounds` while there is time. */
async function timed(rounds: number, totals: number[], run: () => Promise<void>): Promise<void> {
  const begin = performance.now();
  do {
    const start = performance.now();
    await run();
    totals.push(performance.now() - start);
  } while (totals.length < rounds && performance.now() - begin < timedMs);
}

function median(values: readonly number[]): number {
  if (values.length === 0) return Number.NaN;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
