/**
 * A program's names → places in memory: registers and constants each become one block on the device, uploaded and
 * downloaded at once, and every operand an offset. Here is also the last check before the first launch: an engine knows the
 * names, types and shapes of its tensors, and a program that does not match them is refused by name.
 */

import { type DType, elementCount, type Tensor } from "../../common/tensor.js";
import { RuntimeError } from "../../errors.js";
import type { CopyRows, Launch, Program, Register } from "../../program/program.js";
import type { NativeEngine, NativeInstruction, NativeOperand, NativeSubmission } from "./addon.js";

/** TensorRT wants operands at multiples of this. */
const alignment = 256;

const bytesPerValue: Record<DType, number> = { float32: 4, int64: 8 };

/** An engine in one of its profiles. */
export interface ProfiledEngine {
  readonly engine: NativeEngine;
  readonly profile: number;
  /** Dimensions of all its tensors, in its order. */
  readonly shapes: readonly (readonly number[])[];
}

/** Registers in one block of device memory, or each in one of its own. */
export interface RegisterLayout {
  readonly registers: Readonly<Record<string, Register>>;
  readonly offsets: ReadonlyMap<string, number>;
  readonly bytes: number;
  /** Which block each is in: all in block 0 where this is absent. */
  readonly blocks?: ReadonlyMap<string, number>;
}

/** Each of the registers in a block of its own, numbered from 1. */
export function layOutApart(registers: Readonly<Record<string, Register>>): RegisterLayout {
  const names = Object.keys(registers);
  return {
    ...{ registers, bytes: 0 },
    offsets: new Map(names.map((name) => [name, 0])),
    blocks: new Map(names.map((name, index) => [name, index + 1])),
  };
}

/** @param first registers that are downloaded together, and so lie beside each other */
export function layOutRegisters(
  registers: Readonly<Record<string, Register>>,
  first: readonly string[] = [],
): RegisterLayout {
  const offsets = new Map<string, number>();
  let bytes = 0;
  for (const name of new Set([...first, ...Object.keys(registers)])) {
    offsets.set(name, bytes);
    bytes += aligned(bytesOf(registers[name]!));
  }
  return { registers, offsets, bytes };
}

/**
 * @param constants the values of all constants, stored ones read
 * @param engineOf the engine of a launch, in the profile that fits its inputs
 * @throws RuntimeError naming the launch and the tensor that does not fit its engine
 */
export function layOutSubmission(
  program: Pick<Program, "instructions" | "results">,
  layout: RegisterLayout,
  constants: ReadonlyMap<string, Tensor>,
  engineOf: (launch: Launch) => ProfiledEngine,
  capture: boolean,
): NativeSubmission {
  // 1. The constants that are used, one block. Where registers lie apart, some constants are copied to places of their own.
  const used = new Set(program.instructions.flatMap(operandsOf));
  const keeps: NativeInstruction[] = [];
  const constantOffsets = new Map<string, number>();
  let bytes = 0;
  for (const [name, tensor] of constants) {
    const block = layout.blocks?.get(name);
    if (!used.has(name) && block === undefined) continue;
    constantOffsets.set(name, bytes);
    const from = { constant: true, offset: bytes };
    if (block !== undefined)
      keeps.push({ op: "copy", from, to: { constant: false, offset: 0, block }, bytes: tensor.data.byteLength });
    bytes += aligned(tensor.data.byteLength);
  }
  const block = new Uint8Array(bytes);
  for (const [name, offset] of constantOffsets) {
    const { data } = constants.get(name)!;
    block.set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), offset);
  }

  // 2. The instructions.
  const operand = (name: string): NativeOperand => {
    const constant = constantOffsets.get(name);
    return constant === undefined
      ? { constant: false, offset: layout.offsets.get(name)!, block: layout.blocks?.get(name) ?? 0 }
      : { constant: true, offset: constant };
  };
  const described = (name: string): Register => constants.get(name) ?? layout.registers[name]!;
  const instructions = program.instructions.map((instruction) =>
    instruction.op === "launch"
      ? layOutLaunch(instruction, engineOf(instruction), operand, described)
      : layOutCopy(instruction, operand, described),
  );
  const results = program.results.map((name) => ({
    offset: layout.offsets.get(name)!,
    bytes: bytesOf(layout.registers[name]!),
    block: layout.blocks?.get(name) ?? 0,
  }));
  return { constants: block, instructions: [...keeps, ...instructions], results, capture };
}

function layOutLaunch(
  launch: Launch,
  { engine, profile, shapes }: ProfiledEngine,
  operand: (name: string) => NativeOperand,
  described: (name: string) => Register,
): NativeInstruction {
  const where = `The graph "${launch.graph}" (${launch.label.name})`;
  const tensorOf = new Map<string, number>();
  const operands = engine.tensors.map(({ name: tensor, input, dtype }, index) => {
    const name = (input ? launch.inputs : launch.outputs)[tensor];
    if (name === undefined)
      throw new RuntimeError(
        `${where} failed: its engine has the ${input ? "input" : "output"} "${tensor}", for which the launch names no ${input ? "operand" : "register"}.`,
      );
    const have = described(name);
    const engineHas = `${dtype} [${shapes[index]}]`;
    const programHas = `${have.dtype} [${have.shape}]`;
    if (engineHas !== programHas)
      throw new RuntimeError(
        input
          ? `${where} takes ${engineHas} as "${tensor}", but "${name}" is ${programHas}.`
          : `${where} gave ${engineHas} as "${tensor}", but the register "${name}" is ${programHas}.`,
      );
    if (!input) tensorOf.set(name, index);
    return operand(name);
  });
  const known = new Set(engine.tensors.map(({ name }) => name));
  for (const tensor of [...Object.keys(launch.inputs), ...Object.keys(launch.outputs)])
    if (!known.has(tensor)) throw new RuntimeError(`${where} failed: its engine has no tensor "${tensor}".`);
  const numbers = (names: readonly string[] | undefined) => (names ?? []).map((name) => tensorOf.get(name)!);
  return {
    ...{ op: "launch", engine: engine.id, profile, operands },
    ...{ finite: numbers(launch.mustBeFinite), reported: numbers(launch.reported) },
  };
}

function layOutCopy(
  copy: CopyRows,
  operand: (name: string) => NativeOperand,
  described: (name: string) => Register,
): NativeInstruction {
  const { dtype, shape } = described(copy.to);
  const rowBytes = elementCount(shape.slice(1)) * bytesPerValue[dtype];
  const from = operand(copy.from);
  const to = operand(copy.to);
  return {
    op: "copy",
    from: { ...from, offset: from.offset + copy.fromRow * rowBytes },
    to: { ...to, offset: to.offset + copy.toRow * rowBytes },
    bytes: copy.rows * rowBytes,
  };
}

/** Names that an instruction reads. */
export function operandsOf(instruction: Program["instructions"][number]): string[] {
  return instruction.op === "launch" ? Object.values(instruction.inputs) : [instruction.from];
}

/** Bytes from the device as the tensor that a register holds. */
export function tensorOf({ dtype, shape }: Register, bytes: Uint8Array): Tensor {
  const size = bytesPerValue[dtype];
  const { buffer, byteOffset, byteLength } = bytes.byteOffset % size === 0 ? bytes : bytes.slice();
  return dtype === "float32"
    ? { dtype, shape, data: new Float32Array(buffer, byteOffset, byteLength / size) }
    : { dtype, shape, data: new BigInt64Array(buffer, byteOffset, byteLength / size) };
}

export function bytesOf({ dtype, shape }: Register): number {
  return elementCount(shape) * bytesPerValue[dtype];
}

function aligned(bytes: number): number {
  return Math.ceil(bytes / alignment) * alignment;
}
