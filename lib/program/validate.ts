/**
 * Checks a program before a runtime runs it. An error in it (a register read before it is written, rows out of range)
 * would otherwise show as a wrong picture, or as an error of a library that does not have the names.
 */

import { bytesPerElement, elementCount } from "../common/tensor.js";
import { RuntimeError } from "../errors.js";
import { type Constant, type CopyRows, type Launch, type Program, type Register, shapeOf } from "./program.js";

const arrays = { float32: Float32Array, int64: BigInt64Array } as const;

/** What an operand is, and whether instructions may write it. */
export interface Operand extends Register {
  readonly constant: boolean;
}

/** What earlier submissions to a workspace have left, by name. */
export type Kept = ReadonlyMap<string, Operand>;

/**
 * @param hasGraph whether the runtime knows a graph of that name
 * @param kept what the program may read besides its own operands
 * @returns what it leaves for later submissions
 * @throws RuntimeError naming the instruction and the operand that is wrong
 */
export function validateProgram(
  program: Program,
  hasGraph: (name: string) => boolean,
  kept: Kept = new Map(),
): Map<string, Operand> {
  for (const [name, constant] of Object.entries(program.constants)) {
    if (Object.hasOwn(program.registers, name)) fail(`"${name}" is both a register and a constant`);
    if (kept.has(name)) fail(`"${name}" is there already, from an earlier submission`);
    checkConstant(name, constant);
  }
  for (const [name, { dtype, shape }] of Object.entries(program.registers)) {
    if (!(dtype in arrays)) fail(`the register "${name}" is of the type ${dtype}, not float32 or int64`);
    if (!shape.every(isSize)) fail(`the register "${name}" has the shape [${shape}]`);
    const known = kept.get(name);
    if (!known) continue;
    if (known.constant) fail(`"${name}" is a register here and a constant of an earlier submission`);
    if (known.dtype !== dtype || known.shape.join() !== shape.join())
      fail(
        `the register "${name}" is ${dtype} [${shape}] here and ${known.dtype} [${known.shape}] in an earlier submission`,
      );
  }
  const written = new Set<string>();
  for (const [name, operand] of kept) if (!operand.constant) written.add(name);
  const scope = { program, kept, written };
  for (const instruction of program.instructions)
    if (instruction.op === "launch") checkLaunch(scope, instruction, hasGraph);
    else checkCopy(scope, instruction);
  for (const name of program.results)
    if (!written.has(name) || !Object.hasOwn(program.registers, name))
      fail(`the result "${name}" is no register that an instruction writes`);

  const left = new Map<string, Operand>();
  for (const [name, constant] of Object.entries(program.constants))
    left.set(name, { ...shapeOf(constant), constant: true });
  for (const name of written)
    if (Object.hasOwn(program.registers, name)) left.set(name, { ...program.registers[name]!, constant: false });
  return left;
}

interface Scope {
  readonly program: Program;
  readonly kept: Kept;
  readonly written: Set<string>;
}

function checkLaunch(scope: Scope, launch: Launch, hasGraph: (name: string) => boolean): void {
  const { program, written } = scope;
  const where = `the launch of "${launch.graph}" (${launch.label.name})`;
  if (!hasGraph(launch.graph)) fail(`${where}: there is no graph of that name`);
  const inputs = Object.values(launch.inputs);
  for (const name of inputs) checkReadable(scope, name, where);
  const outputs = Object.values(launch.outputs);
  for (const name of outputs) {
    register(program, name, where);
    if (inputs.includes(name)) fail(`${where}: "${name}" is both an input and an output`);
  }
  if (new Set(outputs).size < outputs.length) fail(`${where}: two outputs go to one register`);
  for (const name of launch.mustBeFinite ?? []) {
    if (!outputs.includes(name)) fail(`${where}: "${name}" must be finite but is none of its outputs`);
    if (register(program, name, where).dtype !== "float32")
      fail(`${where}: "${name}" must be finite but is not float32`);
  }
  for (const name of launch.reported ?? [])
    if (!outputs.includes(name)) fail(`${where}: "${name}" is to be reported but is none of its outputs`);
  for (const name of outputs) written.add(name);
}

function checkCopy(scope: Scope, copy: CopyRows): void {
  const { program, written } = scope;
  const where = `the copy of rows from "${copy.from}" to "${copy.to}"`;
  const from = checkReadable(scope, copy.from, where);
  const to = register(program, copy.to, where);
  if (copy.from === copy.to) fail(`${where}: a register cannot be copied to itself`);
  if (from.dtype !== to.dtype) fail(`${where}: one is ${from.dtype}, the other ${to.dtype}`);
  if (rowElements(from.shape) !== rowElements(to.shape))
    fail(`${where}: a row of [${from.shape}] is not as long as one of [${to.shape}]`);
  if (!Number.isInteger(copy.rows) || copy.rows < 1) fail(`${where}: ${copy.rows} is no number of rows`);
  checkRows(where, copy.from, copy.fromRow, copy.rows, from.shape);
  checkRows(where, copy.to, copy.toRow, copy.rows, to.shape);
  written.add(copy.to);
}

function checkRows(where: string, name: string, first: number, rows: number, shape: readonly number[]): void {
  if (shape.length === 0) fail(`${where}: "${name}" is a scalar and has no rows`);
  if (!Number.isInteger(first) || first < 0 || first + rows > shape[0]!)
    fail(`${where}: rows ${first} to ${first + rows - 1} are outside "${name}" [${shape}]`);
}

/** Whether a number can be a dimension, or an index. */
function isSize(size: number): boolean {
  return Number.isSafeInteger(size) && size >= 0;
}

/** Elements of one row: a slice along the first dimension. */
function rowElements(shape: readonly number[]): number {
  return elementCount(shape.slice(1));
}

function checkReadable({ program, kept, written }: Scope, name: string, where: string): Register {
  const constant = own(program.constants, name);
  if (constant) return shapeOf(constant);
  const earlier = kept.get(name);
  if (earlier) return earlier;
  const operand = register(program, name, where);
  if (!written.has(name)) fail(`${where}: the register "${name}" is read before anything is written to it`);
  return operand;
}

function register(program: Program, name: string, where: string): Register {
  return own(program.registers, name) ?? fail(`${where}: there is no register "${name}"`);
}

function checkConstant(name: string, constant: Constant): void {
  if (constant.kind === "slot") fail(`the slot "${name}" has no value; bind it first`);
  if (constant.kind === "value") {
    const { dtype, shape, data } = constant.tensor;
    if (!(dtype in arrays)) fail(`the constant "${name}" is of the type ${dtype}, not float32 or int64`);
    if (!(data instanceof arrays[dtype]))
      fail(`the constant "${name}" of the type ${dtype} has its values in no ${arrays[dtype].name}`);
    if (!shape.every(isSize)) fail(`the constant "${name}" has the shape [${shape}]`);
    if (elementCount(shape) !== data.length)
      fail(`the constant "${name}" has ${data.length} values for its shape [${shape}]`);
    if (dtype === "float32" && !allFinite(data)) fail(`the constant "${name}" holds NaN or an infinity`);
    return;
  }
  const { source, shape, firstElement, rowElements, strideElements, rows } = constant;
  if (![firstElement, rowElements, strideElements, rows, ...shape].every(isSize))
    fail(`the constant "${name}" takes rows of ${source.name} that are none`);
  const elements = elementCount(source.shape);
  if (elementCount(shape) !== rows * rowElements)
    fail(`the constant "${name}" has ${rows} rows of ${rowElements} elements for its shape [${shape}]`);
  if (firstElement + (rows - 1) * strideElements + rowElements > elements)
    fail(`the constant "${name}" reads outside the tensor ${source.name} [${source.shape}]`);
  if (elements * bytesPerElement[source.dtype] !== source.length)
    fail(`the tensor ${source.name} [${source.shape}] of type ${source.dtype} does not have ${source.length} bytes`);
}

/** Whether there is no NaN and no infinity among the values. */
export function allFinite(values: Float32Array): boolean {
  // One multiply and add for each value and no branch: 0 times NaN or an infinity is NaN, and NaN stays.
  let sum = 0;
  for (let index = 0; index < values.length; index++) sum += values[index]! * 0;
  return sum === 0;
}

/** A property of the object itself: operands may have names such as "constructor". */
function own<T>(record: Readonly<Record<string, T>>, name: string): T | undefined {
  return Object.hasOwn(record, name) ? record[name] : undefined;
}

function fail(message: string): never {
  throw new RuntimeError(`This program cannot run: ${message}.`);
}
