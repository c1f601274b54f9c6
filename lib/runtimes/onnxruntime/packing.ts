/**
 * A program as it is sent between the processes. Each typed array costs microseconds on the channel, however short it is,
 * and a run has tens of constants of one number: the short ones go as plain numbers.
 */

import { float32 } from "../../common/tensor.js";
import type { Constant, Program } from "../../program/program.js";

/** Constants of up to this many values are short. */
const shortValues = 64;

export interface PackedProgram extends Program {
  /** Short float32 constants, which `constants` lacks, as plain numbers. */
  readonly short: readonly (readonly [name: string, shape: readonly number[], ...values: number[]])[];
}

export function pack(program: Program): PackedProgram {
  const constants: Record<string, Constant> = {};
  const short: [string, readonly number[], ...number[]][] = [];
  for (const [name, constant] of Object.entries(program.constants)) {
    const tensor = constant.kind === "value" ? constant.tensor : null;
    if (tensor?.dtype === "float32" && tensor.data.length <= shortValues)
      short.push([name, tensor.shape, ...tensor.data]);
    else constants[name] = constant;
  }
  return { ...program, constants, short };
}

export function unpack({ short, ...program }: PackedProgram): Program {
  const constants = { ...program.constants };
  for (const [name, shape, ...values] of short)
    constants[name] = { kind: "value", tensor: float32(shape, Float32Array.from(values)) };
  return { ...program, constants };
}
