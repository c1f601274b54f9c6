/**
 * Collects the registers, constants and instructions of a program. What recurs in every plan is here: constants that
 * hold one value for each row, pairs of registers that take turns, and launches over a few rows at a time.
 */

import { elementCount, float32, type Tensor } from "../common/tensor.js";
import type { Constant, Instruction, LaunchLabel, Program, Register } from "./program.js";

/** A graph whose rows are independent, launched over some of them at a time. */
export interface RowLaunch {
  readonly graph: string;
  readonly rows: number;
  /** At most this many rows in one launch. */
  readonly limit: number;
  /** See `Sharing`. */
  readonly size: string;
  readonly deferrable?: boolean;
  /** Operands with `rows` rows. */
  readonly inputs: Readonly<Record<string, string>>;
  /** Inputs that hold one number for each row. */
  readonly perRow?: Readonly<Record<string, number>>;
  /** The graph's output, the register that collects it, and the shape of one row. */
  readonly output: { readonly name: string; readonly register: string; readonly rowShape: readonly number[] };
  readonly label: LaunchLabel;
  /** Whether each launch reports its output. */
  readonly reported?: boolean;
}

/** Pictures of a size that go through the autoencoder at once, where so many pixels may. */
export function rowsAtOnce(pixels: number, width: number, height: number): number {
  return Math.max(1, Math.floor(pixels / (width * height)));
}

export class ProgramBuilder {
  readonly constants: Record<string, Constant> = {};
  readonly instructions: Instruction[] = [];
  readonly #registers: Record<string, Register> = {};

  /** Names a register; naming it again with the same shape is the same register. */
  register(name: string, shape: readonly number[]): string {
    const known = this.#registers[name];
    if (known && known.shape.join() !== shape.join())
      throw new RangeError(`The register ${name} cannot be both [${known.shape}] and [${shape}].`);
    this.#registers[name] = { dtype: "float32", shape };
    return name;
  }

  value(name: string, tensor: Tensor): string {
    this.constants[name] = { kind: "value", tensor };
    return name;
  }

  /** A constant of `rows` equal numbers. Equal ones are one. */
  perRow(number: number, rows: number): string {
    const name = `rows(${number}) x ${rows}`;
    return name in this.constants ? name : this.fill(name, [rows], number);
  }

  fill(name: string, shape: readonly number[], number: number): string {
    return this.value(name, float32(shape, new Float32Array(elementCount(shape)).fill(number)));
  }

  /**
   * Launches a graph over all rows, a few at a time where its activations would be too large: rows are copied out to a
   * smaller register and back.
   * @returns the register that holds all rows of the output
   */
  byRows(launch: RowLaunch): string {
    const { rows, output } = launch;
    const all = this.register(output.register, [rows, ...output.rowShape]);
    for (let row = 0; row < rows; row += launch.limit) {
      const count = Math.min(launch.limit, rows - row);
      const whole = count === rows;
      const inputs: Record<string, string> = {};
      for (const [input, operand] of Object.entries(launch.inputs)) {
        const part = whole
          ? operand
          : this.register(`${operand} x ${count}`, [count, ...this.#shape(operand).slice(1)]);
        if (!whole) this.#copy(operand, row, part, 0, count);
        inputs[input] = part;
      }
      for (const [input, number] of Object.entries(launch.perRow ?? {})) inputs[input] = this.perRow(number, count);
      const to = whole ? all : this.register(`${output.register} x ${count}`, [count, ...output.rowShape]);
      const last = row + count === rows;
      this.instructions.push({
        op: "launch",
        graph: launch.graph,
        inputs,
        outputs: { [output.name]: to },
        mustBeFinite: [to],
        ...(launch.reported && { reported: [to] }),
        sharing: { size: launch.size, maxRows: launch.limit, ...(launch.deferrable && { deferrable: true }) },
        label: whole
          ? { ...launch.label, last }
          : { ...launch.label, name: `${launch.label.name}, picture ${row + 1} of ${rows}`, last },
      });
      if (!whole) this.#copy(to, 0, all, row, count);
    }
    return all;
  }

  build(results: readonly string[]): Program {
    return { registers: this.#registers, constants: this.constants, instructions: this.instructions, results };
  }

  #copy(from: string, fromRow: number, to: string, toRow: number, rows: number): void {
    this.instructions.push({ op: "copy", from, fromRow, to, toRow, rows });
  }

  #shape(operand: string): readonly number[] {
    const constant = this.constants[operand];
    if (!constant) return this.#registers[operand]!.shape;
    return constant.kind === "value" ? constant.tensor.shape : constant.shape;
  }
}

/** Two registers that take turns, since nothing is written in place; `at` is the one that holds the present value. */
export class Pair {
  constructor(
    readonly builder: ProgramBuilder,
    readonly name: string,
    readonly shape: readonly number[],
    /** A constant or register that holds the first value. */
    public at: string,
  ) {}

  /** The register to write next; making it the present one is up to the caller. */
  next(): string {
    return this.builder.register(this.at === `${this.name}_a` ? `${this.name}_b` : `${this.name}_a`, this.shape);
  }
}
