/**
 * Runs cases and compares what comes out with the reference. The measure is the relative L2 error of each result,
 * ‖actual − expected‖ / ‖expected‖, which a few outliers among a million values do not decide; the largest single
 * difference is reported beside it.
 */

import type { Tensor } from "../lib/common/tensor.js";
import type { Program } from "../lib/program/program.js";
import type { Runtime } from "../lib/runtimes/runtime.js";
import type { Case } from "./cases.js";

export type Compute = "float32" | "float16" | "bfloat16";

/**
 * Bars for one launch, by the type that the engine computes in; the reference computes in float32. float32 allows for
 * TF32, which TensorRT uses by default and which has 10 bits of mantissa. Set from the types' precision, not measured.
 */
export const engineBars: Record<Compute, number> = { float32: 5e-3, float16: 1e-2, bfloat16: 5e-2 };

/** A schedule feeds each step with the errors of those before. */
const scheduleFactor = 4;

export function barOf(example: Case, compute: (graph: string) => Compute): number {
  const bars = graphsOf(example.program).map((graph) => engineBars[compute(graph)]);
  return Math.max(...bars) * (example.kind === "sampler" ? scheduleFactor : 1);
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
  readonly bar: number;
  readonly passed: boolean;
  readonly differences: readonly Difference[];
  /** Median milliseconds of each launch, by the device's own clock. */
  readonly launches: readonly { readonly graph: string; readonly name: string; readonly milliseconds: number }[];
  /** Median milliseconds of a whole run, from call to result. */
  readonly total: number;
  /** Whether the CUDA graph of it gives the same bits, and its median run; absent if it was not captured. */
  readonly captured?: { readonly same: boolean; readonly total: number };
  readonly error?: string;
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

export interface CheckOptions {
  readonly bar: number;
  /** Timed runs after the compared one. */
  readonly rounds: number;
  /** The same device with captured programs. */
  readonly capturing?: Runtime | undefined;
}

/** Never rejects: what goes wrong is in the finding. */
export async function checkCase(
  runtime: Runtime,
  { name, kind, program }: Case,
  expected: Record<string, Tensor>,
  { bar, rounds, capturing }: CheckOptions,
): Promise<Finding> {
  const launches = program.instructions.filter((instruction) => instruction.op === "launch");
  const times: number[][] = launches.map(() => []);
  const totals: number[] = [];
  const finding = { name, kind, bar };
  try {
    const actual = await runtime.run(program);
    const differences = compare(actual, expected);
    for (let round = 0; round < rounds; round++) {
      const start = performance.now();
      await runtime.run(program, { onLaunch: ({ index, milliseconds }) => times[index]!.push(milliseconds) });
      totals.push(performance.now() - start);
    }
    const captured =
      capturing && kind === "sampler" ? await checkCaptured(capturing, program, actual, rounds) : undefined;
    const passed = differences.every(({ relative }) => relative <= bar) && captured?.same !== false;
    return {
      ...{ ...finding, passed, differences, total: median(totals) },
      launches: launches.map(({ graph, label }, index) => ({
        ...{ graph, name: label.name, milliseconds: median(times[index]!) },
      })),
      ...(captured && { captured }),
    };
  } catch (error) {
    return {
      ...{ ...finding, passed: false, differences: [], launches: [], total: Number.NaN },
      error: error instanceof Error ? `${error.name}: ${error.message}` : String(error),
    };
  }
}

/** The first run records, the later ones replay. */
async function checkCaptured(runtime: Runtime, program: Program, plain: Record<string, Tensor>, rounds: number) {
  await runtime.run(program);
  const totals: number[] = [];
  let same = true;
  for (let round = 0; round < Math.max(1, rounds); round++) {
    const start = performance.now();
    const replayed = await runtime.run(program);
    totals.push(performance.now() - start);
    same &&= compare(replayed, plain).every(({ worst }) => worst === 0);
  }
  return { same, total: median(totals) };
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
