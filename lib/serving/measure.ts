/**
 * Measures what launches cost: each (graph, size, batch) alone, on operands of the right shapes. The time that dense
 * arithmetic takes does not depend on values, so they are made up, those of slots among them; constants that are the same
 * for all rows (positions, relative positions) are the launch's own.
 */

import { setImmediate } from "node:timers/promises";
import { elementCount, type Tensor } from "../common/tensor.js";
import type { Constant, Program, Register } from "../program/program.js";
import type { LaunchReport, Runtime } from "../runtimes/runtime.js";
import { type CostEntry, entryOf } from "./costs.js";
import { type GraphShapes, isPerRow, type LaunchKind, operandOf } from "./rows.js";

/** Launches of a kind, at a batch. */
export interface Subject extends LaunchKind {
  readonly batch: number;
}

export interface MeasureOptions {
  /** Timed runs of each, after one that is not counted; 0 only warms up. */
  readonly rounds: number;
  readonly signal?: AbortSignal | undefined;
  /** Whether the process may end meanwhile. */
  readonly background?: boolean;
  /** Awaited before each run: for measuring between other work. */
  readonly turn?: () => Promise<void>;
  readonly onProgress?: (done: number, total: number) => void;
}

/** Measuring one subject takes about this long at most: slow launches are run less often. */
const longestMs = 10_000;

/**
 * Runs all subjects in turn, round by round, every other round backwards: a disturbance of the machine then changes the
 * times of all of them alike.
 * @throws what the runtime throws, or `signal.reason`
 */
export async function measure(
  runtime: Runtime,
  subjects: readonly Subject[],
  shapes: (graph: string) => GraphShapes,
  options: MeasureOptions,
): Promise<CostEntry[]> {
  const { rounds, signal, turn, onProgress, background } = options;
  const times = subjects.map((): number[] => []);
  let done = 0;
  for (let round = -1; round < rounds; round++) {
    const order = [...subjects.keys()];
    if (round % 2) order.reverse();
    for (const at of order) {
      onProgress?.(done++, subjects.length * (rounds + 1));
      const spent = times[at]!.reduce((sum, time) => sum + time, 0);
      if (round > 0 && spent + times[at]![0]! > longestMs) continue;
      await turn?.();
      // Other work on the event loop goes between two launches.
      await setImmediate();
      signal?.throwIfAborted();
      const onLaunch = ({ milliseconds }: LaunchReport) => {
        if (round >= 0) times[at]!.push(milliseconds);
      };
      // Made anew each time: the operands of all subjects together may be large.
      const program = programOf(subjects[at]!, shapes(subjects[at]!.graph));
      await runtime.run(program, { signal, background, onLaunch });
    }
  }
  onProgress?.(done, done);
  return subjects.flatMap(({ graph, batch, size }, at) =>
    times[at]!.length > 0 ? [entryOf(graph, batch, size, times[at]!)] : [],
  );
}

/** A program of the one launch, with `batch` rows. */
function programOf({ program, launch, batch }: Subject, shapes: GraphShapes): Program {
  const constants: Record<string, Constant> = {};
  const inputs: Record<string, string> = {};
  for (const [input, operand] of Object.entries(launch.inputs)) {
    const constant = program.constants[operand];
    const { dtype, shape } = operandOf(program, operand);
    const [rows, ...rest] = shape as [number, ...number[]];
    const isShared = !isPerRow(shapes.inputs.get(input));
    inputs[input] = `in ${input}`;
    constants[`in ${input}`] =
      isShared && constant && constant.kind !== "slot"
        ? constant
        : { kind: "value", tensor: madeUp(dtype, [isShared ? rows : rows * batch, ...rest]) };
  }
  const registers: Record<string, Register> = {};
  const outputs: Record<string, string> = {};
  for (const [output, register] of Object.entries(launch.outputs)) {
    const { dtype, shape } = program.registers[register]!;
    const [rows, ...rest] = shape as [number, ...number[]];
    outputs[output] = `out ${output}`;
    registers[`out ${output}`] = { dtype, shape: [rows * batch, ...rest] };
  }
  const { graph, label } = launch;
  return { registers, constants, instructions: [{ op: "launch", graph, inputs, outputs, label }], results: [] };
}

function madeUp(dtype: Register["dtype"], shape: readonly number[]): Tensor {
  const length = elementCount(shape);
  if (dtype === "int64") return { dtype, shape, data: new BigInt64Array(length) };
  // As large as latents are, and no two neighbours equal. Matrices of adapters have millions of values: they repeat the first few.
  const data = new Float32Array(length);
  const first = Math.min(length, 2 ** 14);
  for (let index = 0; index < first; index++) data[index] = Math.sin(index);
  for (let filled = first; filled > 0 && filled < length; filled *= 2) data.copyWithin(filled, 0, filled);
  return { dtype, shape, data };
}
