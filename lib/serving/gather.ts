/**
 * A submission → the program that a workspace runs. Each row of each job has registers of its own; a shared launch
 * copies them into registers of the batch, and its outputs back. A launch of one row works on the row's own registers. What
 * a row needs from its first launch to its last (noise, text, positions) is uploaded when it is first used, and shared by
 * all rows that were given the same values; numbers that change from launch to launch (σ, coefficients) are part of the
 * submission. What later rows will want again (the matrices of adapters) stays when its last row is over, up to a number of bytes.
 */

import { elementCount, type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import type { Constant, CopyRows, Instruction, Launch, Program, Register } from "../program/program.js";
import { type GraphShapes, identityOf, isPerRow, operandOf, type RowProgram } from "./rows.js";
import type { AssignedLaunch, AssignedRow, Submission } from "./scheduler.js";

/** Constants of up to this many values are part of each submission, instead of being uploaded once and copied. */
const inlineValues = 16;

/** Bytes of constants that are kept for later rows: some eight adapters of rank 16 for SD3.5-medium. */
const keptBytes = 2 ** 30;

/** A row under way, and the prefix of its registers in the workspace. */
export interface Lane {
  readonly name: string;
  readonly row: RowProgram;
}

/** A constant that is uploaded now: its name in the workspace, and the names of the lanes that need it. */
interface Upload {
  readonly name: string;
  readonly users: Set<string>;
  /** Bytes of one that stays when nobody needs it any more; 0 for others. */
  readonly kept: number;
}

export class Gatherer {
  readonly shapes: (graph: string) => GraphShapes;
  /** By the identities of constants; of those that are kept, what has not been used for longest comes first. */
  readonly #uploads = new Map<string, Upload>();
  readonly #keptBytes: number;
  #names = 0;

  /** @param kept bytes of constants that stay when no row needs them; the least recently used are freed first */
  constructor(shapes: (graph: string) => GraphShapes, kept = keptBytes) {
    this.shapes = shapes;
    this.#keptBytes = kept;
  }

  /** Constants that rows under way need. */
  get uploads(): number {
    return [...this.#uploads.values()].filter(({ users }) => users.size > 0).length;
  }

  gather(submission: Submission, laneOf: (row: AssignedRow) => Lane): Gathered {
    const gathered = new Gathered(submission.id, this);
    for (const launch of submission.launches) gathered.launch(launch, launch.rows.map(laneOf));
    return gathered;
  }

  /** Forgets rows that are over. @returns names to free: their registers, and constants that no other row uses and that are not kept */
  release(lanes: readonly Lane[]): string[] {
    const names = lanes.flatMap((lane) => Object.keys(lane.row.program.registers).map((name) => ownName(lane, name)));
    const over = new Set(lanes.map(({ name }) => name));
    for (const { users } of this.#uploads.values()) for (const user of users) if (over.has(user)) users.delete(user);
    return [...names, ...this.#dropUnused(this.#keptBytes)];
  }

  /** Forgets what is kept for later rows. @returns names to free */
  dropKept(): string[] {
    return this.#dropUnused(0);
  }

  /** @param left bytes of unused constants that may stay */
  #dropUnused(left: number): string[] {
    const names: string[] = [];
    let bytes = 0;
    // The latest first.
    for (const [identity, { name, users, kept }] of [...this.#uploads].reverse()) {
      if (users.size > 0) continue;
      if (kept > 0 && bytes + kept <= left) {
        bytes += kept;
        continue;
      }
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
    return identities.flatMap((identity) => {
      const upload = this.#uploads.get(identity);
      this.#uploads.delete(identity);
      return upload ? [upload.name] : [];
    });
  }

  /** Whether a row that is not over needs a constant. */
  isUsed(identity: string): boolean {
    return (this.#uploads.get(identity)?.users.size ?? 0) > 0;
  }

  /** Forgets everything: the workspace is gone. */
  reset(): void {
    this.#uploads.clear();
  }

  /** A constant that a row needs: its name in the workspace, and whether it is still to be uploaded. */
  use(lane: Lane, constant: Constant) {
    const identity = identityOf(constant);
    const known = this.#uploads.get(identity);
    const kept = constant.kind === "value" && constant.keep ? constant.tensor.data.byteLength : 0;
    const upload = known ?? { name: `constant ${this.#names++}`, users: new Set<string>(), kept };
    // The latest is the last.
    if (upload.kept > 0) this.#uploads.delete(identity);
    if (!known || upload.kept > 0) this.#uploads.set(identity, upload);
    upload.users.add(lane.name);
    return { name: upload.name, identity, isNew: !known };
  }
}

/** The program of a submission, written launch by launch; afterwards it finds the values of each row in what is reported. */
export class Gathered {
  readonly program = {
    registers: {} as Record<string, Register>,
    constants: {} as Record<string, Constant>,
    instructions: [] as Instruction[],
    results: [] as string[],
  } satisfies Program;
  /** Names to free when the submission has run. */
  readonly temporaries: string[] = [];
  /** Identities of the constants that it uploads. */
  readonly uploads: string[] = [];
  readonly #submission: number;
  readonly #gatherer: Gatherer;
  /** Operands of batches that are made of constants alone: launches of the same rows share them. */
  readonly #batches = new Map<string, string>();
  /** What launches of one row read: names by the operands of the row's program. */
  readonly #inputs = new Map<Lane, Map<string, string>>();
  /** For each launch of the submission: the launches of its rows, and its batch. */
  readonly #launches: { readonly of: readonly Launch[]; readonly batch: number; readonly shared: Launch }[] = [];

  constructor(submission: number, gatherer: Gatherer) {
    this.#submission = submission;
    this.#gatherer = gatherer;
  }

  /** Adds a launch: of one row on the row's own registers, of a batch with copies from its rows and to them. */
  launch({ batch, rows }: AssignedLaunch, lanes: readonly Lane[]): void {
    const [lane] = lanes as [Lane];
    const of = rows.map(({ launch }, index) => lanes[index]!.row.launches[launch]!);
    const [first] = of as [Launch];
    const { graph, label } = first;
    const dimensions = this.#gatherer.shapes(graph).inputs;
    const prefix = `submission ${this.#submission}.${this.#launches.length}`;
    const inputs = mapped(first.inputs, (operand, input) => {
      if (batch === 1) return this.#input(lane, operand);
      const operands = of.map(({ inputs }) => inputs[input]!);
      if (isPerRow(dimensions.get(input))) return this.#gather(`${prefix}.${input}`, lanes, operands, batch);
      // The same for all rows, but each of them uses it.
      return lanes.map((lane, index) => this.#operand(lane, operands[index]!))[0]!;
    });
    const scattered: CopyRows[] = [];
    const outputs = mapped(first.outputs, (register, output) => {
      if (batch === 1) return this.#own(lane, register);
      const { dtype, shape } = lane.row.program.registers[register]!;
      const [group, ...rest] = shape as [number, ...number[]];
      const from = this.#temporary(`${prefix}.${output}`, { dtype, shape: [group * batch, ...rest] });
      for (const [index, lane] of lanes.entries()) {
        const to = this.#own(lane, of[index]!.outputs[output]!);
        for (let part = 0; part < group; part++)
          scattered.push({ op: "copy", from, fromRow: part * batch + index, to, toRow: part, rows: 1 });
      }
      return from;
    });
    /** Outputs that some row's launch lists. */
    const listed = (list: "mustBeFinite" | "reported") => {
      const names = Object.keys(outputs).filter((name) => of.some((one) => one[list]?.includes(one.outputs[name]!)));
      return names.length > 0 && { [list]: names.map((name) => outputs[name]!) };
    };
    const shared: Launch = {
      ...{ op: "launch", graph, inputs, outputs, ...listed("mustBeFinite"), ...listed("reported") },
      label: of.length === 1 ? label : { kind: label.kind, name: `${of.length} rows of "${graph}"` },
    };
    this.program.instructions.push(shared, ...scattered);
    this.#launches.push({ of, batch, shared });
    for (const [index, { last }] of rows.entries())
      if (last)
        for (const name of lanes[index]!.row.program.results) this.program.results.push(this.#own(lanes[index]!, name));
  }

  /** Takes a row's values out of what a launch of the submission has reported; by the names in the row's program. */
  reported(launch: number, index: number, values: Readonly<Record<string, Tensor>>): Record<string, Tensor> {
    const { of, batch, shared } = this.#launches[launch]!;
    const { outputs, reported } = of[index]!;
    const own: Record<string, Tensor> = {};
    for (const [output, name] of Object.entries(outputs))
      if (reported?.includes(name)) own[name] = rowsOf(values[shared.outputs[output]!]!, index, batch);
    return own;
  }

  /** The operand of a shared launch that holds a row, or a group of rows, of each lane. */
  #gather(name: string, lanes: readonly Lane[], operands: readonly string[], batch: number): string {
    const small = lanes.map(({ row }, index) => inlined(row.program.constants[operands[index]!]));
    if (small.every((tensor) => tensor !== null)) return this.#inline(name, interleaved(small, batch));
    const { dtype, shape } = operandOf(lanes[0]!.row.program, operands[0]!);
    const from = lanes.map((lane, index) => {
      const own = operandOf(lane.row.program, operands[index]!).shape;
      if (own.join() !== shape.join())
        throw new RangeError(`Rows of [${shape}] and of [${own}] cannot share a launch.`);
      return this.#operand(lane, operands[index]!);
    });
    const [group, ...rest] = shape as [number, ...number[]];
    const areConstants = lanes.every(({ row }, index) => Object.hasOwn(row.program.constants, operands[index]!));
    const key = areConstants ? JSON.stringify([from, batch]) : null;
    const known = key === null ? undefined : this.#batches.get(key);
    if (known !== undefined) return known;
    const to = this.#temporary(name, { dtype, shape: [group * batch, ...rest] });
    if (key !== null) this.#batches.set(key, to);
    for (let part = 0; part < group; part++)
      for (let row = 0; row < batch; row++) {
        // Padding repeats the first row: values that a network can work on.
        const copy = { from: from[row] ?? from[0]!, fromRow: part, to, toRow: part * batch + row, rows: 1 };
        this.program.instructions.push({ op: "copy", ...copy });
      }
    return to;
  }

  /** An operand of a launch of one row: the launches of a row in a submission share its small constants. */
  #input(lane: Lane, operand: string): string {
    const names = this.#inputs.get(lane) ?? new Map<string, string>();
    this.#inputs.set(lane, names);
    let name = names.get(operand);
    if (name === undefined) {
      const small = inlined(lane.row.program.constants[operand]);
      const own = ownName(lane, operand);
      name = small ? this.#inline(`submission ${this.#submission}.${own}`, small) : this.#operand(lane, operand);
      names.set(operand, name);
    }
    return name;
  }

  /** A constant of the submission. */
  #inline(name: string, tensor: FloatTensor): string {
    this.program.constants[name] = { kind: "value", tensor };
    this.temporaries.push(name);
    return name;
  }

  /** A lane's operand: its name in the workspace. */
  #operand(lane: Lane, operand: string): string {
    const constant = lane.row.program.constants[operand];
    if (!constant) return ownName(lane, operand);
    const { name, identity, isNew } = this.#gatherer.use(lane, constant);
    if (isNew) {
      this.program.constants[name] = constant;
      this.uploads.push(identity);
    }
    return name;
  }

  #own(lane: Lane, register: string): string {
    const name = ownName(lane, register);
    this.program.registers[name] = lane.row.program.registers[register]!;
    return name;
  }

  #temporary(name: string, register: Register): string {
    this.program.registers[name] = register;
    this.temporaries.push(name);
    return name;
  }
}

/** A row's results out of those of the submission that holds its last launch. */
export function resultsOf(lane: Lane, values: Readonly<Record<string, Tensor>>): Record<string, Tensor> {
  return Object.fromEntries(lane.row.program.results.map((name) => [name, values[ownName(lane, name)]!]));
}

function ownName(lane: Lane, register: string): string {
  return `${lane.name}/${register}`;
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
  const data = tensor.data.slice(0, group * row);
  for (let part = 0; part < group; part++) {
    const from = (part * batch + index) * row;
    data.set(tensor.data.subarray(from, from + row) as never, part * row);
  }
  return { dtype: tensor.dtype, shape: [group, ...rest], data } as Tensor;
}

function mapped(
  names: Readonly<Record<string, string>>,
  map: (name: string, key: string) => string,
): Record<string, string> {
  const result: Record<string, string> = {};
  for (const [key, name] of Object.entries(names)) result[key] = map(name, key);
  return result;
}
