/**
 * Runs of a checkpoint's networks in which the results matter and no picture is drawn: in float32, with layers compared with what they would
 * be in 8 bits, with rounded layers, and in 8 bits. One network is in memory at a time, with its weights as they are stored.
 */

import type { Checkpoint, ControlNet, LayerComparison } from "../checkpoint/index.js";
import { onAbort } from "../common/abort.js";
import type { Logger } from "../common/logger.js";
import { seedsFrom } from "../common/seed.js";
import { type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import { comparisonOutput, controlChannels, type GraphKey, graphName, networks } from "../networks/index.js";
import { GraphLibrary } from "../networks/library.js";
import { type OnnxGraph, shapeWith } from "../onnx/index.js";
import { ProgramBuilder } from "../program/builder.js";
import type { Program, Register } from "../program/program.js";
import { openRuntime } from "../runtimes/index.js";
import type { OpenedRuntime } from "../runtimes/runtime.js";
import { noiseOf } from "./latents.js";
import type { LatentShape } from "./programs.js";
import { controlPositionsOf, positionCrop } from "./templates.js";
import type { Condition } from "./text.js";

interface TrialOptions {
  readonly threads?: number | undefined;
  readonly watchdogMs?: number | undefined;
  readonly signal?: AbortSignal | undefined;
  readonly logger?: Logger | undefined;
}

/** Results of programs, in order, and of the layers that were compared what they are off by, over all of them. */
export interface Trial {
  readonly results: readonly Record<string, Tensor>[];
  readonly comparisons: ReadonlyMap<string, LayerComparison>;
}

export class Trials {
  readonly #opened: OpenedRuntime;
  readonly #signal: AbortSignal | undefined;

  private constructor(opened: OpenedRuntime, signal: AbortSignal | undefined) {
    this.#opened = opened;
    this.#signal = signal;
  }

  /** @throws as ONNX Runtime's start; `signal.reason` after an abort */
  static async open({ signal, ...settings }: TrialOptions): Promise<Trials> {
    signal?.throwIfAborted();
    // No load runs these graphs again.
    const runs = { ...settings, weights: "lazy", capture: false, keepsGraphs: false } as const;
    return new Trials(await openRuntime("onnxruntime", runs, { files: [], bytesOf16Bit: () => 0 }, () => {}), signal);
  }

  /** Runs programs that launch one graph, with the weights that the checkpoint has for it. */
  async run(checkpoint: Checkpoint, name: string, programs: readonly Program[]): Promise<Trial> {
    const { runtime, emitOptions } = this.#opened;
    const graph = new GraphLibrary(checkpoint, emitOptions).get(name);
    const signal = this.#signal;
    runtime.add(graph);
    // A launch may take minutes.
    const unfollow = onAbort(signal, () => runtime.giveUp?.("was no longer wanted"));
    const sums = new Comparisons();
    try {
      const results: Record<string, Tensor>[] = [];
      for (const program of programs)
        results.push(sums.taken(await runtime.run(withComparisons(program, graph), { signal })));
      await runtime.unload?.([graph.name]);
      return { results, comparisons: sums.all };
    } finally {
      unfollow();
      signal?.throwIfAborted();
    }
  }

  async dispose(): Promise<void> {
    await this.#opened.runtime.dispose();
  }
}

/** The program with the outputs of compared layers as results, too. */
function withComparisons(program: Program, graph: OnnxGraph): Program {
  const outputs = [...graph.outputs].filter(([output]) => comparisonOutput(output));
  if (outputs.length === 0) return program;
  const registers = outputs.map(([name, shape]): [string, Register] => [
    name,
    { dtype: "float32", shape: shapeWith(shape, {}) },
  ]);
  const names = outputs.map(([name]) => name);
  const added = Object.fromEntries(names.map((name) => [name, name]));
  return {
    ...program,
    registers: { ...program.registers, ...Object.fromEntries(registers) },
    instructions: program.instructions.map((each) =>
      each.op === "launch" ? { ...each, outputs: { ...each.outputs, ...added } } : each,
    ),
    results: [...program.results, ...names],
  };
}

/** What layers are off by, over several launches. */
class Comparisons {
  readonly #errors = new Map<string, Float64Array>();
  readonly #smooth = new Map<string, Float32Array>();

  /** Takes a launch's comparisons. @returns its other results */
  taken(results: Record<string, Tensor>): Record<string, Tensor> {
    const others: Record<string, Tensor> = {};
    for (const [name, tensor] of Object.entries(results)) {
      const output = comparisonOutput(name);
      if (!output) others[name] = tensor;
      else if (output.holds === "errors") this.#add(output.layer, (tensor as FloatTensor).data);
      else this.#join(output.layer, (tensor as FloatTensor).data);
    }
    return others;
  }

  get all(): Map<string, LayerComparison> {
    return new Map(
      [...this.#errors].map(([layer, sums]) => {
        const [plain, smoothed, square] = sums as unknown as [number, number, number];
        const [one, other] = [ratio(plain, square), ratio(smoothed, square)];
        return [layer, { plain: one, smoothed: other, smooth: this.#smooth.get(layer)! }];
      }),
    );
  }

  #add(layer: string, sums: Float32Array): void {
    const before = this.#errors.get(layer);
    this.#errors.set(
      layer,
      Float64Array.from(sums, (value, i) => value + (before?.[i] ?? 0)),
    );
  }

  /** Of each channel that of the launch where it is largest. */
  #join(layer: string, smooth: Float32Array): void {
    const before = this.#smooth.get(layer);
    this.#smooth.set(layer, before ? smooth.map((value, i) => Math.min(value, before[i]!)) : smooth.slice());
  }
}

/** Root of a sum of squares as a part of another's: 1, all of it, for what is no number. */
function ratio(difference: number, square: number): number {
  if (difference === 0) return 0;
  const part = Math.sqrt(difference / square);
  return Number.isFinite(part) ? part : 1;
}

/** What each row of each result is off by: root mean square of the difference, as a part of the expected values'. */
export function errorsOf(
  results: readonly Record<string, Tensor>[],
  expected: readonly Record<string, Tensor>[],
): number[] {
  return expected.flatMap((each, index) =>
    Object.entries(each).flatMap(([name, tensor]) => {
      const [right, found] = [tensor as FloatTensor, results[index]![name] as FloatTensor];
      const rows = right.shape[0]!;
      const size = right.data.length / rows;
      return Array.from({ length: rows }, (_, row) => {
        const [from, to] = [row * size, (row + 1) * size];
        return rowError(found.data.subarray(from, to), right.data.subarray(from, to));
      });
    }),
  );
}

function rowError(found: Float32Array, right: Float32Array): number {
  let [difference, square] = [0, 0];
  for (let i = 0; i < right.length; i++) {
    difference += (found[i]! - right[i]!) ** 2;
    square += right[i]! ** 2;
  }
  return ratio(difference, square);
}

/** Rows of one launch of a step network. */
export interface StepRows {
  /** A noise level for each row. */
  readonly sigmas: readonly number[];
  /** Of its noise. */
  readonly seed: number;
  /** [rows, T, joint] and [rows, pooled] */
  readonly condition: Condition;
}

/** Patches of a side: enough for attention among many tokens, at a tenth of the cost of a whole picture. */
const patches = 16;

/**
 * The program that evaluates a step network, without guidance: its result is "velocity_next", [rows, C, h, w].
 * @param key of the graph: `predict`, also with a ControlNet, or `refine`
 * @param velocity of the predictor, for a network that reads one; default: zeros
 */
export async function stepProgram(
  checkpoint: Checkpoint,
  key: GraphKey,
  { sigmas, seed, condition }: StepRows,
  velocity: Tensor | null = null,
): Promise<Program> {
  const controlNet = key.controls === undefined ? null : checkpoint.controlNets.get(key.controls)!;
  const rows = sigmas.length;
  const shape = latentShape(checkpoint, controlNet, rows);
  const [, , height, width] = shape;
  const controlShape = [rows, controlNet ? controlChannels(controlNet.config) : 0, height, width];
  const [noise, control] = (await noiseOf(seedsFrom(seed, rows), [shape, controlShape])) as [FloatTensor, FloatTensor];
  const size = noise.data.length / rows;
  // A picture's latents are as large as noise: of what lies between them the squares add up.
  const x = noise.data.map((value, i) => {
    const sigma = sigmas[Math.floor(i / size)]!;
    return value * Math.hypot(sigma, 1 - sigma);
  });
  const builder = new ProgramBuilder();
  const part = checkpoint[networks[key.network]!.part as "transformer" | "refiner"]!;
  builder.constants.positions = positionCrop(part, shape);
  const controlPositions = controlNet && controlPositionsOf(checkpoint, controlNet.id, shape);
  if (controlPositions) builder.constants.control_positions = controlPositions;
  const zero = builder.perRow(0, rows);
  builder.launch({
    graph: graphName(key),
    inputs: {
      x: builder.value("x", float32(shape, x)),
      velocity: builder.value("velocity", velocity ?? float32(shape, new Float32Array(x.length))),
      context: builder.value("context", condition.context),
      pooled: builder.value("pooled", condition.pooled),
      position_embedding: "positions",
      sigma: builder.value("sigma", float32([rows], Float32Array.from(sigmas))),
      ...{ a_in: zero, a_old: zero, a_new: zero },
      ...(controlNet && { control_1: builder.value("control", control), control_1_scale: builder.perRow(1, rows) }),
      ...(controlPositions && { control_1_positions: "control_positions" }),
    },
    outputs: { x_next: builder.register("x_next", shape), velocity_next: builder.register("velocity_next", shape) },
    mustBeFinite: ["velocity_next"],
    label: { kind: "step", name: "trial of int8" },
  });
  return builder.build(["velocity_next"]);
}

/** Of a size that transformer, refiner and the ControlNet have positions for. */
function latentShape({ transformer, refiner }: Checkpoint, controlNet: ControlNet | null, rows: number): LatentShape {
  const { patchSize, outChannels, sampleSize } = transformer.config;
  const tables = [transformer, refiner, controlNet].flatMap((part) => part ?? []);
  const most = tables.flatMap(
    ({ config: { patchSize, posEmbedMaxSize } }) => patchSize * (posEmbedMaxSize ?? Infinity),
  );
  const side = Math.min(patches * patchSize, sampleSize, ...most);
  return [rows, outChannels, side, side];
}
