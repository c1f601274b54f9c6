/**
 * A program as it is sent between the processes. Each typed array costs microseconds on the channel, however short it is,
 * and a run has tens of constants of one number: the short ones go as one array.
 */

import { elementCount, float32 } from "../../common/tensor.js";
import type { Constant, Program } from "../../program/program.js";

/** Constants of up to this many values are short. */
const shortValues = 64;

export interface PackedProgram extends Program {
  /** Short float32 constants, which `constants` lacks: their names, shapes, and values one after another. */
  readonly short: {
    readonly names: readonly string[];
    readonly shapes: readonly (readonly number[])[];
    readonly values: Float32Array;
  };
}

export function pack(program: Program): PackedProgram {
  const constants: Record<string, Constant> = {};
  const names: string[] = [];
  const shapes: (readonly number[])[] = [];
  const numbers: number[] = [];
  for (const [name, constant] of Object.entries(program.constants)) {
    if (
      constant.kind === "value" &&
      constant.tensor.dtype === "float32" &&
      constant.tensor.data.length <= shortValues
    ) {
      names.push(name);
      shapes.push(constant.tensor.shape);
      numbers.push(...constant.tensor.data);
    } else constants[name] = constant;
  }
  return { ...program, constants, short: { names, shapes, values: Float32Array.from(numbers) } };
}

export function unpack({ short: { names, shapes, values }, ...program }: PackedProgram): Program {
  const constants = { ...program.constants };
  let offset = 0;
  for (const [index, name] of names.entries()) {
    const shape = shapes[index]!;
    const data = values.subarray(offset, offset + elementCount(shape));
    constants[name] = { kind: "value", tensor: float32(shape, data) };
    offset += data.length;
  }
  return { ...program, constants };
}
