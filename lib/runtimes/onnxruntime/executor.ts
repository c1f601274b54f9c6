/**
 * Runs programs on ONNX Runtime, inside the child process. Registers stay ONNX Runtime's own tensors from one launch
 * to the next; only row copies touch their values in JavaScript. `session.run` blocks this thread, so between
 * launches the event loop gets a turn: that is when an abort or a preemption arrives.
 */

import { setImmediate } from "node:timers/promises";
import type * as ort from "onnxruntime-node";
import { elementCount, type Tensor } from "../../common/tensor.js";
import type { CopyRows, Launch, Program, Register } from "../../program/program.js";
import { ConstantReader } from "../../program/stored.js";
import { allFinite } from "../../program/validate.js";
import type { Failure, FinishedLaunch, HostSettings, SentGraph } from "./protocol.js";

/** A run that ended for a reason that the parent turns into one of its errors. */
export class RunFailure extends Error {
  readonly failure: Failure;
  constructor(failure: Failure) {
    super("message" in failure ? failure.message : failure.kind);
    this.failure = failure;
  }
}

/** What a run reports, and looks at before each launch. */
export interface RunHooks {
  /** Called before each launch, with its index. */
  launching?(index: number): void;
  /** The next launch waits for what it returns. */
  launched(report: FinishedLaunch): void | Promise<void>;
  /** What has been asked of it so far. */
  readonly asked: ReadonlySet<"abort" | "preempt">;
}

export class Executor {
  readonly #ort: typeof ort;
  readonly #settings: HostSettings;
  readonly #graphs = new Map<string, SentGraph>();
  readonly #sessions = new Map<string, ort.InferenceSession>();
  readonly #constants = new ConstantReader();
  readonly #workspaces = new Map<number, Map<string, ort.Tensor>>();

  constructor(library: typeof ort, settings: HostSettings) {
    this.#ort = library;
    this.#settings = settings;
  }

  add(graph: SentGraph): void {
    this.#graphs.set(graph.name, graph);
    this.#sessions.delete(graph.name);
  }

  async unload(names: readonly string[]): Promise<void> {
    for (const name of names) {
      const session = this.#sessions.get(name);
      this.#sessions.delete(name);
      await session?.release();
    }
  }

  /**
   * @param workspace where the program finds values of earlier programs and leaves its own
   * @throws RunFailure
   */
  async run(
    program: Program,
    { launching, launched, asked }: RunHooks,
    workspace?: number,
  ): Promise<Record<string, Tensor>> {
    const values = (workspace !== undefined && this.#workspaces.get(workspace)) || new Map<string, ort.Tensor>();
    if (workspace !== undefined) this.#workspaces.set(workspace, values);
    if (asked.has("abort")) throw new RunFailure({ kind: "aborted" });
    for (const [name, constant] of Object.entries(program.constants))
      values.set(name, this.#tensor(await this.#constants.tensor(name, constant)));
    let launches = 0;
    for (const instruction of program.instructions) {
      if (instruction.op === "copy") {
        this.#copy(program, instruction, values);
        continue;
      }
      await setImmediate();
      if (asked.has("abort")) throw new RunFailure({ kind: "aborted" });
      if (asked.has("preempt")) {
        const written = program.results.filter((name) => values.has(name));
        throw new RunFailure({ kind: "preempted", launches, results: read(program, written, values) });
      }
      launching?.(launches);
      const start = performance.now();
      await this.#launch(program, instruction, values);
      const milliseconds = performance.now() - start;
      await launched({ index: launches++, milliseconds, values: read(program, instruction.reported ?? [], values) });
    }
    return read(program, program.results, values);
  }

  free(workspace: number, names: readonly string[] | "all"): void {
    if (names === "all") this.#workspaces.delete(workspace);
    else for (const name of names) this.#workspaces.get(workspace)?.delete(name);
  }

  async #launch(program: Program, launch: Launch, values: Map<string, ort.Tensor>): Promise<void> {
    const where = `The graph "${launch.graph}" (${launch.label.name})`;
    const session = await this.#session(launch.graph, where);
    const feeds: Record<string, ort.Tensor> = {};
    for (const [input, name] of Object.entries(launch.inputs)) feeds[input] = present(values, name, where);
    const fetches = Object.keys(launch.outputs);
    const results = await session.run(feeds, fetches).catch((error) => {
      throw failure(`${where} failed: ${messageOf(error)}`);
    });
    for (const [output, name] of Object.entries(launch.outputs)) {
      const value = results[output]!;
      const { dtype, shape } = program.registers[name]!;
      const given = `${value.type} [${value.dims}]`;
      const wanted = `${dtype} [${shape}]`;
      if (given !== wanted)
        throw failure(`${where} gave ${given} as "${output}", but the register "${name}" is ${wanted}.`);
      values.set(name, value);
    }
    for (const name of launch.mustBeFinite ?? [])
      if (!allFinite(values.get(name)!.data as Float32Array))
        throw new RunFailure({
          kind: "not-finite",
          where: launch.label.name,
          message: `"${name}" holds NaN or an infinity after ${launch.label.name} (graph "${launch.graph}").`,
        });
  }

  #copy(program: Program, copy: CopyRows, values: Map<string, ort.Tensor>): void {
    const from = present(values, copy.from, `The copy of rows to "${copy.to}"`);
    const register = program.registers[copy.to]!;
    let to = values.get(copy.to);
    if (!to) {
      to = this.#tensor(zeros(register));
      values.set(copy.to, to);
    }
    const row = elementCount(register.shape.slice(1));
    const rows = (from.data as Float32Array).subarray(copy.fromRow * row, (copy.fromRow + copy.rows) * row);
    (to.data as Float32Array).set(rows, copy.toRow * row);
  }

  async #session(name: string, where: string): Promise<ort.InferenceSession> {
    const known = this.#sessions.get(name);
    if (known) return known;
    const graph = this.#graphs.get(name)!;
    try {
      const session = await this.#ort.InferenceSession.create(graph.bytes, sessionOptions(graph.root, this.#settings));
      this.#sessions.set(name, session);
      return session;
    } catch (error) {
      throw failure(`${where} cannot be compiled: ${messageOf(error)}`);
    }
  }

  #tensor({ dtype, shape, data }: Tensor): ort.Tensor {
    return dtype === "float32" ? new this.#ort.Tensor(dtype, data, shape) : new this.#ort.Tensor(dtype, data, shape);
  }
}

/** @param root the folder that the locations of external weights are relative to */
export function sessionOptions(root: string, { threads, weights }: HostSettings): ort.InferenceSession.SessionOptions {
  return {
    executionProviders: ["cpu"],
    executionMode: "sequential",
    ...(threads === undefined ? {} : { intraOpNumThreads: threads }),
    interOpNumThreads: 1,
    // Memory patterns reserve one block for all values of a run and keep it for every size seen: a third of a gigabyte more
    // for 1 GB of lazy weights, while steps take 0.96 to 1.03 of their time.
    enableMemPattern: false,
    // Errors only: warnings would go to a stream that is not read.
    logSeverityLevel: 3,
    extra: {
      session: {
        model_external_initializers_file_folder_path: root,
        // Each session has threads of its own. Those that spun on after its run would take the cores from the next graph:
        // a decoder on two cores takes 26 ms behind a predictor that spins and 16 behind one that does not.
        force_spinning_stop: "1",
        // Between two operators threads wait by spinning, by default for long. On a core that other programs want, too, that
        // time is the thread's next turn: with one busy program a core, steps on two cores took 1.4 to 2.2 times as long as on
        // one thread, and 0.7 to 1.4 times with this limit. Without any spinning small steps take up to 1.25 times as long
        // where the cores are free (bench:trials). Results do not change.
        intra_op: { spin_duration_us: "20" },
      },
      // The casts behind 16-bit weights would be folded into float32 copies of them.
      ...(weights === "lazy" ? { optimization: { disable_specified_optimizers: "ConstantFolding" } } : {}),
    },
  };
}

/** A value, which a program that was checked can only lack where an earlier submission to the workspace failed. */
function present(values: ReadonlyMap<string, ort.Tensor>, name: string, where: string): ort.Tensor {
  const value = values.get(name);
  if (value) return value;
  throw failure(`${where} reads "${name}", which has no value, since an earlier submission failed.`);
}

function read(program: Program, names: readonly string[], values: Map<string, ort.Tensor>): Record<string, Tensor> {
  const tensors: Record<string, Tensor> = {};
  for (const name of names) {
    const { dtype, shape } = program.registers[name]!;
    tensors[name] = { dtype, shape, data: values.get(name)!.data } as Tensor;
  }
  return tensors;
}

function zeros({ dtype, shape }: Register): Tensor {
  const length = elementCount(shape);
  return dtype === "float32"
    ? { dtype, shape, data: new Float32Array(length) }
    : { dtype, shape, data: new BigInt64Array(length) };
}

function failure(message: string): RunFailure {
  return new RunFailure({ kind: "runtime", message });
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
