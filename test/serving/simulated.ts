/**
 * A runtime for tests: an interpreter of programs whose "networks" are closed forms, computed row by row, so that a row's
 * values can depend on other rows only if rows were mixed up. It can be told to fail.
 */

import { setImmediate } from "node:timers/promises";
import { elementCount, float32, type Tensor } from "../../lib/common/tensor.js";
import { DeviceLostError, RuntimeDiedError, RuntimeError } from "../../lib/errors.js";
import { graphName, keysOf } from "../../lib/networks/index.js";
import type { Launch, Program } from "../../lib/program/program.js";
import { type Operand, validateProgram } from "../../lib/program/validate.js";
import {
  type Capabilities,
  type CompilableGraph,
  Preempted,
  type RunOptions,
  type Runtime,
  type SubmissionOptions,
  type Workspace,
} from "../../lib/runtimes/runtime.js";
import type { GraphShapes } from "../../lib/serving/rows.js";

const step = {
  inputs: {
    x: "rows",
    velocity: "network_rows",
    context: "network_rows",
    pooled: "network_rows",
    position_embedding: 1,
    sigma: "rows",
    a_in: "rows",
    a_old: "rows",
    a_new: "rows",
    guidance: "rows",
  },
  outputs: { x_next: "rows", velocity_next: "network_rows" },
};
const networks: Record<string, { inputs: Record<string, string | number>; outputs: Record<string, string> }> = {
  predict: step,
  refine: step,
  combine: {
    inputs: {
      ...{ x: "rows", velocity: "network_rows", first: "rows", second: "rows", guidance: "rows" },
      ...Object.fromEntries(
        ["x", "first", "second"].flatMap((output) =>
          ["velocity", "first", "second"].map((term) => [`${output}_${term}`, "rows"] as const),
        ),
      ),
    },
    outputs: { x_next: "rows", first_next: "rows", second_next: "rows" },
  },
  extrapolate: {
    inputs: { velocity: "network_rows", before: "network_rows", weight: "rows" },
    outputs: { velocity_next: "network_rows" },
  },
  upscale: { inputs: { latents: "rows", noise: "rows", sigma: "rows" }, outputs: { x: "rows" } },
  upscale_latents: {
    inputs: { latents: "rows", noise: "rows", sigma: "rows", scale: "rows", vertical: 8, horizontal: 8, weights: 4 },
    outputs: { x: "rows" },
  },
  scale_noise: { inputs: { latents: 1, noise: "rows", sigma: "rows" }, outputs: { x: "rows" } },
  inpaint_blend: {
    inputs: { x: "rows", velocity: "network_rows", latents: 1, noise: "rows", mask: 1, sigma: "rows" },
    outputs: { x_next: "rows", velocity_next: "network_rows" },
  },
  preview: {
    inputs: { x: "rows", velocity: "network_rows", sigma: "rows", guidance: "rows", map: 3, bias: 3 },
    outputs: { latents: "rows", image: "rows" },
  },
  vae_decoder: { inputs: { latents: "rows" }, outputs: { image: "rows" } },
};

/** Where a network comes with guidance, both: the names differ, so that rows of both never share a launch. */
const graphs = Object.fromEntries(
  Object.entries(networks).flatMap(([network, graph]) => {
    const { guidance: _, ...inputs } = graph.inputs;
    return keysOf(network, { guidance: [true, false] }).map((key) => {
      return [graphName(key), key.guidance ? graph : { ...graph, inputs }];
    });
  }),
);

/** Names of the simulated graphs. */
export const graphNames = Object.keys(graphs);

/** Shapes of the simulated graphs. */
export function shapesOf(name: string): GraphShapes {
  const { inputs, outputs } = graphs[name]!;
  const shapes = (operands: Record<string, string | number>) =>
    new Map(Object.entries(operands).map(([operand, first]) => [operand, [first]]));
  return { inputs: shapes(inputs), outputs: shapes(outputs) };
}

function batchOf({ graph, inputs: names }: Launch, inputs: Record<string, Tensor>): number {
  const { inputs: kinds } = graphs[graph]!;
  return inputs[Object.keys(names).find((input) => kinds[input] === "rows")!]!.shape[0]!;
}

/** The values of one launch: every output element depends on all that the row reads, and on nothing else. */
function compute(launch: Launch, inputs: Record<string, Tensor>, program: Program): Record<string, Tensor> {
  const { inputs: kinds, outputs: made } = graphs[launch.graph]!;
  const batch = batchOf(launch, inputs);
  const outputs: Record<string, Tensor> = {};
  for (const [output, name] of Object.entries(launch.outputs)) {
    const { shape } = program.registers[name]!;
    const row = elementCount(shape.slice(1));
    const values = new Float32Array(elementCount(shape));
    const groups = made[output] === "rows" ? 1 : shape[0]! / batch;
    for (let index = 0; index < batch; index++) {
      let seed = launch.graph.length;
      for (const [input, tensor] of Object.entries(inputs)) {
        const size = elementCount(tensor.shape.slice(1));
        const data = tensor.data as Float32Array;
        const rows = kinds[input] === "rows" ? [index] : typeof kinds[input] === "number" ? [...Array(tensor.shape[0]).keys()] : [...Array(tensor.shape[0]! / batch).keys()].map((part) => part * batch + index); // biome-ignore format: one line
        for (const [part, at] of rows.entries())
          for (let element = 0; element < size; element++)
            seed = Math.fround(Math.sin(3.7 * seed + data[at * size + element]! * (1 + part + input.length / 10)));
      }
      for (let part = 0; part < groups; part++)
        for (let element = 0; element < row; element++)
          values[(part * batch + index) * row + element] = Math.sin(5 * seed + 3 * part + element);
    }
    outputs[name] = float32(shape, values);
  }
  return outputs;
}

/** Runs a program on values that stay. */
class Interpreter {
  readonly values = new Map<string, Tensor>();

  begin(program: Program): void {
    for (const [name, constant] of Object.entries(program.constants))
      this.values.set(
        name,
        constant.kind === "value"
          ? constant.tensor
          : float32(
              constant.shape,
              new Float32Array(elementCount(constant.shape)).fill(
                constant.kind === "stored" ? constant.firstElement : Number.NaN,
              ),
            ),
      );
  }

  /** Rows of the latest launch. */
  batch = 0;

  run(program: Program, at: number): Launch | null {
    const instruction = program.instructions[at]!;
    const present = (name: string) => {
      const value = this.values.get(name);
      if (!value) throw new RuntimeError(`"${name}" has no value.`);
      return value;
    };
    if (instruction.op === "launch") {
      const inputs = Object.fromEntries(
        Object.entries(instruction.inputs).map(([input, name]) => [input, present(name)]),
      );
      this.batch = batchOf(instruction, inputs);
      for (const [name, value] of Object.entries(compute(instruction, inputs, program))) this.values.set(name, value);
      return instruction;
    }
    const { from, fromRow, to, toRow, rows } = instruction;
    const { shape } = program.registers[to]!;
    const row = elementCount(shape.slice(1));
    const before = this.values.get(to)?.data as Float32Array | undefined;
    const data = before ? before.slice() : new Float32Array(elementCount(shape));
    data.set((present(from).data as Float32Array).subarray(fromRow * row, (fromRow + rows) * row), toRow * row);
    this.values.set(to, float32(shape, data));
    return null;
  }

  results(program: Program): Record<string, Tensor> {
    return Object.fromEntries(program.results.map((name) => [name, this.values.get(name)!]));
  }
}

/** What a program gives alone. */
export function alone(program: Program): Record<string, Tensor> {
  const interpreter = new Interpreter();
  interpreter.begin(program);
  for (const at of program.instructions.keys()) interpreter.run(program, at);
  return interpreter.results(program);
}

/**
 * "ok", or how a launch fails: by itself, with everything that the runtime holds, by a kill that was not its fault, or never, until it is given up;
 * with the GPU, for good ("gone") or with the process that used it ("reset").
 */
export type Fate = "ok" | "fails" | "dies" | "killed" | "hangs" | "gone" | "reset";

export class SimulatedRuntime implements Runtime {
  readonly name = "onnxruntime";
  readonly capabilities: Capabilities;
  /** Decides about each launch. */
  fate: (launch: Launch) => Fate = () => "ok";
  /** Values that workspaces hold now. */
  readonly workspaces = new Set<Interpreter>();
  /** What a launch takes, on a clock of the test's own. */
  cost: (launch: Launch, batch: number) => number = () => 1;
  launches = 0;
  /** Submissions that wait or run, and the most there ever were. */
  submissions = 0;
  mostSubmissions = 0;
  /** Submissions that were preempted. */
  preemptions = 0;
  /** What everything fails with since it was lost for good. */
  gone: DeviceLostError | null = null;
  #turn: Promise<unknown> = Promise.resolve();
  readonly #lose = new Set<() => void>();
  #hanging: (() => void)[] = [];

  constructor({ preemption = true }: { preemption?: boolean | undefined } = {}) {
    this.capabilities = { preemption, capture: true, anyShape: true };
  }

  add(_graph: CompilableGraph): void {}

  has(name: string): boolean {
    return name in graphs;
  }

  async run(program: Program, { onLaunch }: RunOptions = {}): Promise<Record<string, Tensor>> {
    const interpreter = new Interpreter();
    interpreter.begin(program);
    let index = 0;
    for (const at of program.instructions.keys()) {
      const launch = interpreter.run(program, at);
      if (!launch) continue;
      const milliseconds = this.cost(launch, interpreter.batch);
      onLaunch?.({ launch, index: index++, milliseconds, values: {} });
    }
    return interpreter.results(program);
  }

  open(): Workspace {
    if (this.gone) throw this.gone;
    const interpreter = new Interpreter();
    const kept = new Map<string, Operand>();
    let lost = false;
    const lose = () => {
      lost = true;
      this.workspaces.delete(interpreter);
      this.#lose.delete(lose);
    };
    this.workspaces.add(interpreter);
    this.#lose.add(lose);
    const died = (duringWork = false) =>
      new RuntimeDiedError("The simulated process died.", null, "SIGKILL", duringWork);
    const work = async (program: Program, { signal, preempt, onBegin, onLaunch }: SubmissionOptions) => {
      if (this.gone) throw this.gone;
      if (lost) throw died();
      signal?.throwIfAborted();
      onBegin?.();
      interpreter.begin(program);
      let index = 0;
      for (const at of program.instructions.keys()) {
        await setImmediate();
        signal?.throwIfAborted();
        const instruction = program.instructions[at]!;
        if (this.capabilities.preemption && preempt?.aborted && instruction.op === "launch") {
          this.preemptions++;
          const written = program.results.filter((name) => interpreter.values.has(name));
          throw new Preempted(index, interpreter.results({ ...program, results: written }));
        }
        const fate = instruction.op === "launch" ? this.fate(instruction) : "ok";
        if (fate === "hangs") await new Promise<void>((resolve) => this.#hanging.push(resolve));
        if (fate === "hangs" || fate === "killed") {
          lose();
          throw died(fate !== "killed");
        }
        if (fate === "reset") {
          this.kill();
          throw new DeviceLostError("The simulated GPU is lost.", { permanent: false });
        }
        if (fate === "gone") {
          for (const each of [...this.#lose]) each();
          this.gone = new DeviceLostError("The simulated GPU is lost.");
          throw this.gone;
        }
        if (fate === "fails") throw new RuntimeError(`The launch of "${(instruction as Launch).graph}" failed.`);
        const launch = interpreter.run(program, at);
        if (!launch) continue;
        this.launches++;
        const values = Object.fromEntries((launch.reported ?? []).map((name) => [name, interpreter.values.get(name)!]));
        onLaunch?.({ launch, index: index++, milliseconds: this.cost(launch, interpreter.batch), values });
      }
      return interpreter.results(program);
    };
    return {
      get lost() {
        return lost;
      },
      submit: async (program, options = {}) => {
        if (lost) throw new RuntimeError("This workspace is gone.");
        for (const [name, operand] of validateProgram(program, (name) => this.has(name), kept)) kept.set(name, operand);
        this.mostSubmissions = Math.max(this.mostSubmissions, ++this.submissions);
        const done = this.#turn.then(() => work(program, options));
        this.#turn = done.catch(() => undefined);
        try {
          return await done;
        } finally {
          this.submissions--;
        }
      },
      free: (names) => {
        for (const name of names) kept.delete(name);
        this.#turn = this.#turn.then(() => {
          for (const name of names) interpreter.values.delete(name);
        });
      },
      close: lose,
    };
  }

  /** Why launches that hang were given up. */
  readonly givenUp: string[] = [];
  giveUp(why: string): void {
    this.givenUp.push(why);
    for (const resolve of this.#hanging.splice(0)) resolve();
  }

  /** Everything that it holds is gone, as when its process is killed between two submissions. */
  kill(): void {
    for (const lose of [...this.#lose]) lose();
  }

  async dispose(): Promise<void> {
    await this.#turn;
  }

  /** Resolves when everything that was submitted has been done. */
  async settled(): Promise<void> {
    await this.#turn;
  }
}
