/**
 * Runs programs on ONNX Runtime, inside the child process. Registers stay ONNX Runtime's own tensors from one launch
 * to the next, in this process's memory or on a device (see values.ts). `session.run` blocks this thread, so between
 * launches the event loop gets a turn: that is when an abort or a preemption arrives.
 */

import { setImmediate } from "node:timers/promises";
import type * as ort from "onnxruntime-node";
import type { Tensor } from "../../common/tensor.js";
import { messageOf } from "../../common/text.js";
import type { CopyRows, Launch, Program } from "../../program/program.js";
import { ConstantReader } from "../../program/stored.js";
import { gpuFailure } from "./gpu-failures.js";
import { hasInt8Products, int8ProductsOverflow } from "./int8-probe.js";
import { OptimisedGraphs } from "./optimised.js";
import type { Asked, Failure, FinishedLaunch, HostSettings, SentGraph } from "./protocol.js";
import { sessionOptions } from "./sessions.js";
import { HostValues, type Values } from "./values.js";
import { WebGpuValues } from "./webgpu-values.js";

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
  readonly asked: ReadonlySet<Asked>;
}

type Digests = Readonly<Record<string, string>>;

export class Executor {
  readonly #ort: typeof ort;
  readonly #settings: HostSettings;
  /** By digest, as the sessions are. */
  readonly #graphs = new Map<string, SentGraph>();
  readonly #sessions = new Map<string, ort.InferenceSession>();
  readonly #constants = new ConstantReader();
  readonly #workspaces = new Map<number, Map<string, ort.Tensor>>();
  readonly #values: Values;
  readonly #optimised: OptimisedGraphs | null;
  /** Asked once a process, when the first graph needs it. */
  #overflow: Promise<boolean> | null = null;

  constructor(library: typeof ort, settings: HostSettings) {
    this.#ort = library;
    this.#settings = settings;
    this.#optimised = settings.optimised === undefined ? null : new OptimisedGraphs(library, settings.optimised);
    this.#values = settings.provider === "webgpu" ? new WebGpuValues(library) : new HostValues(library);
  }

  add(graph: SentGraph): void {
    this.#graphs.set(graph.digest, graph);
  }

  /** Compiles a graph that is still there, ahead of its first launch; what fails is told then. */
  async prepare(digest: string): Promise<void> {
    if (this.#graphs.has(digest)) await this.#session(digest, "A graph").catch(() => undefined);
  }

  async unload(digests: readonly string[]): Promise<void> {
    for (const digest of digests) {
      const session = this.#sessions.get(digest);
      this.#sessions.delete(digest);
      this.#graphs.delete(digest);
      await session?.release();
    }
  }

  /**
   * @param digests of the program's graphs by name
   * @param workspace where the program finds values of earlier programs and leaves its own
   * @throws RunFailure
   */
  async run(program: Program, digests: Digests, hooks: RunHooks, workspace?: number): Promise<Record<string, Tensor>> {
    if (workspace === undefined) {
      const own = new Map<string, ort.Tensor>();
      try {
        return await this.#run(program, digests, hooks, own);
      } finally {
        for (const value of own.values()) this.#values.free(value);
      }
    }
    const kept = this.#workspaces.get(workspace) ?? new Map<string, ort.Tensor>();
    this.#workspaces.set(workspace, kept);
    return this.#run(program, digests, hooks, kept);
  }

  async #run(
    program: Program,
    digests: Digests,
    { launching, launched, asked }: RunHooks,
    values: Map<string, ort.Tensor>,
  ): Promise<Record<string, Tensor>> {
    if (asked.has("abort")) throw new RunFailure({ kind: "aborted" });
    for (const [name, constant] of Object.entries(program.constants)) {
      const tensor = await this.#constants.tensor(name, constant);
      this.#set(
        values,
        name,
        await this.#explaining(`The upload of "${name}" failed`, () => this.#values.upload(tensor)),
      );
    }
    let launches = 0;
    for (const [index, instruction] of program.instructions.entries()) {
      if (instruction.op === "copy") {
        // Copies to one register that follow each other are done at once, with the first of them.
        const { to } = instruction;
        if (isCopyTo(program.instructions[index - 1], to)) continue;
        const copies = [instruction];
        for (let next = index + 1; ; next++) {
          const following = program.instructions[next];
          if (!isCopyTo(following, to)) break;
          copies.push(following);
        }
        await this.#copy(program, to, copies, values);
        continue;
      }
      await setImmediate();
      if (asked.has("abort")) throw new RunFailure({ kind: "aborted" });
      if (asked.has("preempt") || (asked.has("yield") && launches > 0)) {
        const written = program.results.filter((name) => values.has(name));
        throw new RunFailure({ kind: "preempted", launches, results: await this.#read(program, written, values) });
      }
      launching?.(launches);
      const start = performance.now();
      await this.#launch(program, instruction, digests[instruction.graph]!, values);
      const milliseconds = performance.now() - start;
      const reported = await this.#read(program, instruction.reported ?? [], values);
      await launched({ index: launches++, milliseconds, values: reported });
    }
    return this.#read(program, program.results, values);
  }

  free(workspace: number, names: readonly string[] | "all"): void {
    const values = this.#workspaces.get(workspace);
    for (const name of names === "all" ? [...(values?.keys() ?? [])] : names) {
      const value = values?.get(name);
      if (value) this.#values.free(value);
      values?.delete(name);
    }
    if (names === "all") this.#workspaces.delete(workspace);
  }

  async #launch(program: Program, launch: Launch, digest: string, values: Map<string, ort.Tensor>): Promise<void> {
    const where = `The graph "${launch.graph}" (${launch.label.name})`;
    const session = await this.#session(digest, where);
    const feeds: Record<string, ort.Tensor> = {};
    for (const [input, name] of Object.entries(launch.inputs)) feeds[input] = present(values, name, where);
    const fetches = Object.keys(launch.outputs);
    await this.#explaining(`${where} failed`, async () => {
      const results = await session.run(feeds, fetches);
      for (const [output, name] of Object.entries(launch.outputs)) {
        const value = results[output]!;
        const { dtype, shape } = program.registers[name]!;
        const given = `${value.type} [${value.dims}]`;
        const wanted = `${dtype} [${shape}]`;
        if (given !== wanted)
          throw failure(`${where} gave ${given} as "${output}", but the register "${name}" is ${wanted}.`);
        this.#set(values, name, value);
      }
      const { mustBeFinite = [] } = launch;
      if (mustBeFinite.length === 0) await this.#values.settle(values.get(Object.values(launch.outputs)[0]!)!);
      for (const name of mustBeFinite)
        if (!(await this.#values.isFinite(values.get(name)!)))
          throw new RunFailure({
            kind: "not-finite",
            where: launch.label.name,
            message: `"${name}" holds NaN or an infinity after ${launch.label.name} (graph "${launch.graph}").`,
          });
    });
  }

  async #copy(
    program: Program,
    to: string,
    copies: readonly CopyRows[],
    values: Map<string, ort.Tensor>,
  ): Promise<void> {
    const where = `The copy of rows to "${to}"`;
    const from = copies.map((copy) => ({ ...copy, from: present(values, copy.from, where) }));
    const register = program.registers[to]!;
    values.set(
      to,
      await this.#explaining(`${where} failed`, () => this.#values.replaceRows(values.get(to), register, from)),
    );
  }

  /** Gives a name a value, in place of the one that it had. */
  #set(values: Map<string, ort.Tensor>, name: string, value: ort.Tensor): void {
    const old = values.get(name);
    values.set(name, value);
    if (old && old !== value) this.#values.free(old);
  }

  async #read(
    program: Program,
    names: readonly string[],
    values: ReadonlyMap<string, ort.Tensor>,
  ): Promise<Record<string, Tensor>> {
    const tensors: Record<string, Tensor> = {};
    for (const name of names) {
      const { dtype, shape } = program.registers[name]!;
      const download = () => this.#values.download(values.get(name)!);
      tensors[name] = {
        dtype,
        shape,
        data: await this.#explaining(`The download of "${name}" failed`, download),
      } as Tensor;
    }
    return tensors;
  }

  /** @param what completes the message of what fails */
  async #explaining<T>(what: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      if (error instanceof RunFailure) throw error;
      const message = messageOf(error);
      const { provider = "cpu" } = this.#settings;
      const onDevice = provider === "cpu" ? null : gpuFailure(what, message);
      throw onDevice ? new RunFailure(onDevice) : failure(`${what}: ${message}`);
    }
  }

  async #session(digest: string, where: string): Promise<ort.InferenceSession> {
    const known = this.#sessions.get(digest);
    if (known) return known;
    const graph = this.#graphs.get(digest)!;
    const widening = graph.widening ?? this.#settings.weights;
    const session = await this.#explaining(`${where} cannot be compiled`, async () => {
      const unsigned = hasInt8Products(graph.bytes) && (await this.#overflows());
      const options = sessionOptions({ ...graph, widening, unsigned }, this.#settings);
      // A graph with weights that were widened, or made unsigned, has them in its file, and is read in the time that optimising takes.
      const isKept = widening === "lazy" && !unsigned && graph.mayBeKept;
      if (isKept && this.#optimised) return this.#optimised.session(graph, options);
      return this.#ort.InferenceSession.create(graph.bytes, options);
    });
    this.#sessions.set(digest, session);
    return session;
  }

  /** Whether products of 8-bit integers overflow here. */
  #overflows(): Promise<boolean> {
    this.#overflow ??= int8ProductsOverflow(this.#ort);
    return this.#overflow;
  }
}

function isCopyTo(instruction: Program["instructions"][number] | undefined, to: string): instruction is CopyRows {
  return instruction?.op === "copy" && instruction.to === to;
}

/** A value, which a program that was checked can only lack where an earlier submission to the workspace failed. */
function present(values: ReadonlyMap<string, ort.Tensor>, name: string, where: string): ort.Tensor {
  const value = values.get(name);
  if (value) return value;
  throw failure(`${where} reads "${name}", which has no value, since an earlier submission failed.`);
}

function failure(message: string): RunFailure {
  return new RunFailure({ kind: "runtime", message });
}
