/**
 * A program as it is sent between the processes. Each typed array costs microseconds on the channel, however short it is,
 * and a run has tens of constants of one number: the short ones go as plain numbers. Long ones, the matrices of adapters, go in parts
 * ahead of the program: one message of 500 MB takes 5 s, as each process holds it whole several times, and 16 MB at a time 1.5 s.
 */

import { float32 } from "../../common/tensor.js";
import type { Constant, Program } from "../../program/program.js";

/** Constants of up to this many values are short. */
const shortValues = 64;
/** Those of more are long, and so many values are a part: 16 MB. */
const partValues = 2 ** 22;

export interface PackedProgram extends Program {
  /** Short float32 constants, which `constants` lacks, as plain numbers. */
  readonly short: readonly (readonly [name: string, shape: readonly number[], ...values: number[]])[];
  /** Long float32 constants, which `constants` lacks: their values are sent before. */
  readonly long: readonly (readonly [name: string, shape: readonly number[]])[];
}

/** A part of a long constant. */
export interface ConstantPart {
  readonly name: string;
  /** Values of the whole constant. */
  readonly length: number;
  /** Index of the part's first value. */
  readonly at: number;
  readonly values: Float32Array;
}

/** The parts of a program's long constants, in order. */
export function* partsOf(program: Program, size = partValues): Generator<ConstantPart> {
  for (const [name, constant] of Object.entries(program.constants)) {
    const tensor = constant.kind === "value" ? constant.tensor : null;
    if (tensor?.dtype !== "float32" || tensor.data.length <= size) continue;
    const { data } = tensor;
    for (let at = 0; at < data.length; at += size)
      yield { name, length: data.length, at, values: data.subarray(at, at + size) };
  }
}

/** Long constants as their parts arrive. */
export class JoinedParts {
  readonly values = new Map<string, Float32Array>();

  add({ name, length, at, values }: ConstantPart): void {
    const whole = this.values.get(name) ?? new Float32Array(length);
    this.values.set(name, whole);
    whole.set(values, at);
  }
}

export function pack(program: Program, size = partValues): PackedProgram {
  const constants: Record<string, Constant> = {};
  const short: [string, readonly number[], ...number[]][] = [];
  const long: [string, readonly number[]][] = [];
  for (const [name, constant] of Object.entries(program.constants)) {
    const tensor = constant.kind === "value" ? constant.tensor : null;
    if (tensor?.dtype === "float32" && tensor.data.length <= shortValues)
      short.push([name, tensor.shape, ...tensor.data]);
    else if (tensor?.dtype === "float32" && tensor.data.length > size) long.push([name, tensor.shape]);
    else constants[name] = constant;
  }
  return { ...program, constants, short, long };
}

/** @param joined the long constants */
export function unpack({ short, long, ...program }: PackedProgram, joined = new JoinedParts()): Program {
  const constants = { ...program.constants };
  for (const [name, shape, ...values] of short)
    constants[name] = { kind: "value", tensor: float32(shape, Float32Array.from(values)) };
  for (const [name, shape] of long)
    constants[name] = { kind: "value", tensor: float32(shape, joined.values.get(name)!) };
  return { ...program, constants };
}
