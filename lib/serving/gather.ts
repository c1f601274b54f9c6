/**
 * A planned submission → the program that a workspace runs. Each row of each job has registers of its own; a shared launch
 * copies them into registers of the batch, and its outputs back. A launch of one row works on the row's own registers. What
 * a row needs from its first launch to its last (noise, text, positions) is uploaded when it is first used, and shared by all
 * rows that were given the same values; numbers that change from launch to launch (σ, coefficients) are part of the
 * submission.
 */

import { elementCount, type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import {
  type Constant,
  type CopyRows,
  type Instruction,
  type Launch,
  type Program,
  type Register,
  shapeOf,
} from "../program/program.js";
import { type GraphShapes, type Identities, isPerRow, type RowProgram } from "./rows.js";
import type { PlannedLaunch, PlannedRow, Submission } from "./scheduler.js";

/** Constants of up to this many values are part of each submission, instead of being uploaded once and copied. */
const inlineValues = 16;

/** A row under way, and the prefix of its registers in the workspace. */
export interface Lane {
  readonly name: string;
  readonly row: RowProgram;
}

export interface Gathered {
  readonly program: Program;
  /** Names to free when the submission has run. */
  readonly temporaries: readonly string[];
  /** Identities of the constants that it uploads. */
  readonly uploads: readonly string[];
  /** Takes a row's values out of what a launch of the submission has reported; by the names in the row's program. */
  reported(launch: number, index: number, values: Readonly<Record<string, Tensor>>): Record<string, Tensor>;
  /** Takes a row's results out of those of the submission that holds its last launch. */
  results(lane: Lane, values: Readonly<Record<string, Tensor>>): Record<string, Tensor>;
}

interface Upload {
  readonly name: string;
  readonly users: Set<string>;
}

export class Gatherer {
  readonly #shapes: (graph: string) => GraphShapes;
  readonly #identities: Identities;
  readonly #uploads = new Map<string, Upload>();
  #names = 0;

  constructor(shapes: (graph: string) => GraphShapes, identities: Identities) {
    this.#shapes = shapes;
    this.#identities = identities;
  }

  /** Constants that are uploaded now. */
  get uploads(): number {
    return this.#uploads.size;
  }

  gather(submission: Submission, laneOf: (row: PlannedRow) => Lane): Gathered {
    const assembly = new Assembly(submission.id, this.#shapes, (lane, constant) => this.#use(lane, constant));
    const last: Lane[] = [];
    for (const launch of submission.launches) {
      const lanes = launch.rows.map(laneOf);
      assembly.launch(launch, lanes);
      for (const [row, { last: isLast }] of launch.rows.entries()) if (isLast) last.push(lanes[row]!);
    }
    return assembly.build(last);
  }

  /** Forgets a row that is over. @returns names to free: its registers, and constants that no other row uses */
  release(lane: Lane): string[] {
    const names = Object.keys(lane.row.program.registers).map((name) => ownName(lane, name));
    for (const [identity, { name, users }] of this.#uploads)
      if (users.delete(lane.name) && users.size === 0) {
        this.#uploads.delete(identity);
        names.push(name);
      }
    return names;
  }

  /**
   * Forgets constants whose upload may have failed: rows that need them upload them again.
   * @returns names to free
   */
  forget(identities: readonly string[]): string[] {
    const names: string[] = [];
    for (const identity of identities) {
      const upload = this.#uploads.get(identity);
      if (upload) names.push(upload.name);
      this.#uploads.delete(identity);
    }
    return names;
  }

  /** Whether a row that is not over needs a constant. */
  isUsed(identity: string): boolean {
    return this.#uploads.has(identity);
  }

  /** Forgets everything: the workspace is gone. */
  reset(): void {
    this.#uploads.clear();
  }

  #use(lane: Lane, constant: Constant): { name: string; identity: string; isNew: boolean } {
    const identity = this.#identities.of(constant);
    const known = this.#uploads.get(identity);
    if (known) {
      known.users.add(lane.name);
      return { name: known.name, identity, isNew: false };
    }
    const name = `constant ${this.#names++}`;
    this.#uploads.set(identity, { name, users: new Set([lane.name]) });
    return { name, identity, isNew: true };
  }
}

function ownName(lane: Lane, register: string): string {
  return `${lane.name}/${register}`;
}

type Use = (lane: Lane, constant: Constant) => { name: string; identity: string; isNew: boolean };

class Assembly {
  readonly #submission: number;
  readonly #shapes: (graph: string) => GraphShapes;
  readonly #use: Use;
  readonly #registers: Record<string, Register> = {};
  readonly #constants: Record<string, Constant> = {};
  readonly #instructions: Instruction[] = [];
  readonly #temporaries: string[] = [];
  readonly #uploads: string[] = [];
  /** What launches of one row read: names by the operands of the row's program. */
  readonly #inputs = new Map<Lane, Map<string, string>>();
  /** For each launch of the submission: the launches of its rows, and its batch. */
  readonly #launches: { readonly of: readonly Launch[]; readonly batch: number; readonly shared: Launch }[] = [];

  constructor(submission: number, shapes: (graph: string) => GraphShapes, use: Use) {
    this.#submission = submission;
    this.#shapes = shapes;
    this.#use = use;
  }

  launch({ batch, rows }: PlannedLaunch, lanes: readonly Lane[]): void {
    const of = rows.map(({ launch }, index) => lanes[index]!.row.launches[launch]!);
    const shared = batch === 1 ? this.#alone(of[0]!, lanes[0]!) : this.#shared(of, lanes, batch);
    this.#launches.push({ of, batch, shared });
  }

  build(last: readonly Lane[]): Gathered {
    const results = last.flatMap((lane) => lane.row.program.results.map((name) => this.#own(lane, name)));
    const launches = this.#launches;
    return {
      program: {
        registers: this.#registers,
        constants: this.#constants,
        instructions: this.#instructions,
        results,
      },
      temporaries: this.#temporaries,
      uploads: this.#uploads,
      reported(launch, index, values) {
        const { of, batch, shared } = launches[launch]!;
        const own: Record<string, Tensor> = {};
        for (const [output, name] of Object.entries(of[index]!.outputs))
          if (of[index]!.reported?.includes(name)) own[name] = rowsOf(values[shared.outputs[output]!]!, index, batch);
        return own;
      },
      results: (lane, values) =>
        Object.fromEntries(lane.row.program.results.map((name) => [name, values[ownName(lane, name)]!])),
    };
  }

  /** A launch of one row, on the row's own registers. */
  #alone({ graph, inputs, outputs, mustBeFinite, reported, label }: Launch, lane: Lane): Launch {
    const own = (register: string) => this.#own(lane, register);
    const launch: Launch = {
      op: "launch",
      graph,
      inputs: renamed(inputs, (operand) => this.#input(lane, operand)),
      outputs: renamed(outputs, own),
      ...(mustBeFinite && { mustBeFinite: mustBeFinite.map(own) }),
      ...(reported && { reported: reported.map(own) }),
      label,
    };
    this.#instructions.push(launch);
    return launch;
  }

  /** A launch over a batch, whose outputs are then copied to the rows' registers. */
  #shared(of: readonly Launch[], lanes: readonly Lane[], batch: number): Launch {
    const [first] = of as [Launch];
    const { graph } = first;
    const shapes = this.#shapes(graph);
    const prefix = `submission ${this.#submission}.${this.#launches.length}`;
    const inputs: Record<string, string> = {};
    for (const input of Object.keys(first.inputs)) {
      const operands = of.map(({ inputs }) => inputs[input]!);
      inputs[input] = isPerRow(shapes.inputs.get(input))
        ? this.#gather(`${prefix}.${input}`, lanes, operands, batch)
        : // The same for all rows, but each of them uses it.
          lanes.map((lane, index) => this.#operand(lane, operands[index]!).name)[0]!;
    }
    const outputs: Record<string, string> = {};
    const scattered: CopyRows[] = [];
    for (const output of Object.keys(first.outputs)) {
      const registers = of.map(({ outputs }) => outputs[output]!);
      const { dtype, shape } = lanes[0]!.row.program.registers[registers[0]!]!;
      const [group, ...rest] = shape as [number, ...number[]];
      const from = this.#temporary(`${prefix}.${output}`, { dtype, shape: [group * batch, ...rest] });
      outputs[output] = from;
      for (const [index, lane] of lanes.entries()) {
        const to = this.#own(lane, registers[index]!);
        for (let part = 0; part < group; part++)
          scattered.push({ op: "copy", from, fromRow: part * batch + index, to, toRow: part, rows: 1 });
      }
    }
    const named = (what: "mustBeFinite" | "reported") => {
      const names = new Set(
        of.flatMap((launch) =>
          Object.entries(launch.outputs).flatMap(([output, name]) => (launch[what]?.includes(name) ? [output] : [])),
        ),
      );
      return names.size === 0 ? {} : { [what]: [...names].map((output) => outputs[output]!) };
    };
    const launch: Launch = {
      op: "launch",
      graph,
      inputs,
      outputs,
      ...named("mustBeFinite"),
      ...named("reported"),
      label: of.length === 1 ? first.label : { kind: first.label.kind, name: `${of.length} rows of "${graph}"` },
    };
    this.#instructions.push(launch, ...scattered);
    return launch;
  }

  /** The operand of a shared launch that holds a row, or a group of rows, of each lane. */
  #gather(name: string, lanes: readonly Lane[], operands: readonly string[], batch: number): string {
    const constants = lanes.map(({ row }, index) => row.program.constants[operands[index]!]);
    const small = constants.map((constant) => inlined(constant));
    if (small.every((tensor) => tensor !== null)) return this.#inline(name, interleaved(small, batch));
    const from = lanes.map((lane, index) => this.#operand(lane, operands[index]!));
    const { dtype, shape } = from[0]!;
    const [group, ...rest] = shape as [number, ...number[]];
    const to = this.#temporary(name, { dtype, shape: [group * batch, ...rest] });
    for (let part = 0; part < group; part++)
      for (let row = 0; row < batch; row++) {
        // Padding repeats the first row: values that a network can work on.
        const source = from[row] ?? from[0]!;
        if (source.shape.join() !== shape.join())
          throw new RangeError(`Rows of [${shape}] and of [${source.shape}] cannot share a launch.`);
        const copy = { from: source.name, fromRow: part, to, toRow: part * batch + row, rows: 1 };
        this.#instructions.push({ op: "copy", ...copy });
      }
    return to;
  }

  /** A row's operand under its name in the workspace, or in the submission: the launches of a row share its constants. */
  #input(lane: Lane, operand: string): string {
    const names = this.#inputs.get(lane) ?? new Map<string, string>();
    this.#inputs.set(lane, names);
    const known = names.get(operand);
    if (known !== undefined) return known;
    const small = inlined(lane.row.program.constants[operand]);
    const name = small
      ? this.#inline(`submission ${this.#submission}.${ownName(lane, operand)}`, small)
      : this.#operand(lane, operand).name;
    names.set(operand, name);
    return name;
  }

  /** A constant of the submission. */
  #inline(name: string, tensor: FloatTensor): string {
    this.#constants[name] = { kind: "value", tensor };
    this.#temporaries.push(name);
    return name;
  }

  /** A lane's operand under its name in the workspace. */
  #operand(lane: Lane, operand: string): { name: string } & Register {
    const constant = lane.row.program.constants[operand];
    if (!constant) {
      const { dtype, shape } = lane.row.program.registers[operand]!;
      return { name: ownName(lane, operand), dtype, shape };
    }
    const { name, identity, isNew } = this.#use(lane, constant);
    if (isNew) {
      this.#constants[name] = constant;
      this.#uploads.push(identity);
    }
    return { name, ...shapeOf(constant) };
  }

  #own(lane: Lane, register: string): string {
    const name = ownName(lane, register);
    this.#registers[name] = lane.row.program.registers[register]!;
    return name;
  }

  #temporary(name: string, register: Register): string {
    this.#registers[name] = register;
    this.#temporaries.push(name);
    return name;
  }
}

/** One row of each tensor after the other, group by group; the rest of the batch repeats the first. */
function interleaved(tensors: readonly FloatTensor[], batch: number): FloatTensor {
  const { shape } = tensors[0]!;
  const [group, ...rest] = shape as [number, ...number[]];
  const row = elementCount(rest);
  const values = new Float32Array(group * batch * row);
  for (let part = 0; part < group; part++)
    for (let index = 0; index < batch; index++) {
      const { data } = tensors[index] ?? tensors[0]!;
      values.set(data.subarray(part * row, (part + 1) * row), (part * batch + index) * row);
    }
  return float32([group * batch, ...rest], values);
}

/** The values of a constant that is small enough to be part of each submission. */
function inlined(constant: Constant | undefined): FloatTensor | null {
  if (constant?.kind !== "value" || constant.tensor.dtype !== "float32") return null;
  return constant.tensor.data.length <= inlineValues ? constant.tensor : null;
}

/** The rows of one lane in a batched value: a row, or one of each half. */
function rowsOf(tensor: Tensor, index: number, batch: number): Tensor {
  const [rows, ...rest] = tensor.shape as [number, ...number[]];
  const group = rows / batch;
  const row = elementCount(rest);
  const shape = [group, ...rest];
  const copy = <T extends Float32Array | BigInt64Array>(data: T, into: T): T => {
    for (let part = 0; part < group; part++) {
      const from = (part * batch + index) * row;
      into.set(data.subarray(from, from + row) as never, part * row);
    }
    return into;
  };
  return tensor.dtype === "float32"
    ? { dtype: "float32", shape, data: copy(tensor.data, new Float32Array(group * row)) }
    : { dtype: "int64", shape, data: copy(tensor.data, new BigInt64Array(group * row)) };
}

function renamed(names: Readonly<Record<string, string>>, rename: (name: string) => string): Record<string, string> {
  const result: Record<string, string> = {};
  for (const [key, name] of Object.entries(names)) result[key] = rename(name);
  return result;
}
