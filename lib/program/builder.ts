/**
 * Collects the registers, constants and instructions of a program, with what recurs in each: constants that hold one
 * number for each row, and pairs of registers that take turns.
 */

import { float32, type Tensor } from "../common/tensor.js";
import type { Constant, Instruction, Launch, Program, Register } from "./program.js";

export class ProgramBuilder {
  readonly constants: Record<string, Constant> = {};
  readonly #instructions: Instruction[] = [];
  readonly #registers: Record<string, Register> = {};

  /** Names a register; naming it again with the same shape is the same register. */
  register(name: string, shape: readonly number[]): string {
    const known = this.#registers[name];
    if (known && known.shape.join() !== shape.join())
      throw new RangeError(`The register ${name} cannot be both [${known.shape}] and [${shape}].`);
    this.#registers[name] = { dtype: "float32", shape };
    return name;
  }

  value(name: string, tensor: Tensor, keep = false): string {
    this.constants[name] = { kind: "value", tensor, ...(keep && { keep }) };
    return name;
  }

  /** A float32 constant whose values are not known yet. @param keep see ValueConstant */
  slot(name: string, shape: readonly number[], keep = false): string {
    this.constants[name] = { kind: "slot", dtype: "float32", shape, ...(keep && { keep }) };
    return name;
  }

  /** A constant of `rows` equal numbers. Equal ones are one. */
  perRow(number: number, rows: number): string {
    const name = `rows(${number}) x ${rows}`;
    return name in this.constants ? name : this.value(name, float32([rows], new Float32Array(rows).fill(number)));
  }

  launch(launch: Omit<Launch, "op">): void {
    this.#instructions.push({ op: "launch", ...launch });
  }

  build(results: readonly string[]): Program {
    return { registers: this.#registers, constants: this.constants, instructions: this.#instructions, results };
  }
}

/** Two registers that take turns, since nothing is written in place; `at` is the one that holds the present value. */
export class DoubleBuffer {
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
