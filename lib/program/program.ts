/**
 * A program: a list of launches of compiled graphs over named tensors. It is all that a runtime needs to know: an
 * Euler run, a two-stage H1P5R3 run and an inpainting run are the same kind of list. Registers are written at most
 * once per launch and never in place (they are double-buffered), constants are uploaded once for the whole program, and
 * every schedule is known by index before the first launch, never decided by data.
 */

import type { DType, StoredTensor, Tensor } from "../common/tensor.js";

/** A named tensor of fixed shape that launches write and read. */
export interface Register {
  readonly dtype: DType;
  readonly shape: readonly number[];
}

/** A value in memory that is uploaded once, before the first launch. */
export interface ValueConstant {
  readonly kind: "value";
  readonly tensor: Tensor;
  /** Whether it is worth keeping where it was uploaded to, for programs that come later with the same array; default: false. Runtimes ignore it. */
  readonly keep?: boolean | undefined;
}

/**
 * A block of rows of a stored tensor, read by the runtime straight from the file and widened to float32: `rows` runs
 * of `rowElements` elements, the first at `firstElement`, each `strideElements` after the one before. A runtime may
 * keep the result between programs (it cannot change while the checkpoint does not).
 */
export interface StoredConstant {
  readonly kind: "stored";
  readonly source: StoredTensor;
  readonly shape: readonly number[];
  readonly firstElement: number;
  readonly rowElements: number;
  readonly strideElements: number;
  readonly rows: number;
}

/** A value that is not known yet: see `bind`. A program that still has one cannot run. */
export interface SlotConstant {
  readonly kind: "slot";
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** Of the value that takes its place: see ValueConstant. */
  readonly keep?: boolean | undefined;
}

export type Constant = ValueConstant | StoredConstant | SlotConstant;

/** What a launch is a part of; runtimes only hand it back in reports. */
export interface LaunchLabel {
  readonly kind: "encode" | "step" | "upscale" | "edit" | "preview" | "decode";
  /** For messages: "block 3 of 10 (P, sigma 0.75 to 0.66)". */
  readonly name: string;
  /** For what belongs to a block: its index, from 0, over all stages. */
  readonly block?: number;
  /** Whether this is the last launch of its block: of its step, or of the known region or the preview that follows. */
  readonly last?: boolean;
}

/** What a scheduler has to know to let rows of several programs share launches. Runtimes ignore it. */
export interface Sharing {
  /** What the graph runs on besides rows, for a table of costs: "64x64", "77 tokens". */
  readonly size: string;
  /** At most this many rows at once; default: any number. */
  readonly maxRows?: number;
  /** Whether such launches may be held back for others to share them: alone they do not fill a device. */
  readonly deferrable?: boolean;
}

/** Run `graph` on the named operands (registers or constants). No output may also be an input. */
export interface Launch {
  readonly op: "launch";
  readonly graph: string;
  readonly inputs: Readonly<Record<string, string>>;
  readonly outputs: Readonly<Record<string, string>>;
  /** Output registers that must hold only finite values; the runtime stops with a NotFiniteError otherwise. */
  readonly mustBeFinite?: readonly string[];
  /** Output registers whose values go with the launch's report, for the caller to look at while the program runs. */
  readonly reported?: readonly string[];
  readonly sharing?: Sharing;
  readonly label: LaunchLabel;
}

/** Copy `rows` rows (slices along the first dimension) between two tensors of equal row size. */
export interface CopyRows {
  readonly op: "copy";
  readonly from: string;
  readonly fromRow: number;
  readonly to: string;
  readonly toRow: number;
  readonly rows: number;
}

export type Instruction = Launch | CopyRows;

export interface Program {
  readonly registers: Readonly<Record<string, Register>>;
  readonly constants: Readonly<Record<string, Constant>>;
  readonly instructions: readonly Instruction[];
  /** Registers handed back when the program has run. */
  readonly results: readonly string[];
}

/** Type and shape of a constant's values. */
export function shapeOf(constant: Constant): Register {
  if (constant.kind === "value") return { dtype: constant.tensor.dtype, shape: constant.tensor.shape };
  return { dtype: constant.kind === "slot" ? constant.dtype : "float32", shape: constant.shape };
}

/**
 * A template with its values: the program in which each of the slots named has become a constant.
 * @throws RangeError for a name that is no slot of the template, or a value of another type or shape
 */
export function bind(template: Program, values: Readonly<Record<string, Tensor>>): Program {
  const constants: Record<string, Constant> = { ...template.constants };
  for (const [name, tensor] of Object.entries(values)) {
    const slot = constants[name];
    if (slot?.kind !== "slot") throw new RangeError(`The template has no slot "${name}".`);
    if (slot.dtype !== tensor.dtype || slot.shape.join() !== tensor.shape.join())
      throw new RangeError(
        `The slot "${name}" is ${slot.dtype} [${slot.shape}], and the value ${tensor.dtype} [${tensor.shape}].`,
      );
    constants[name] = { kind: "value", tensor, ...(slot.keep && { keep: true }) };
  }
  return { ...template, constants };
}
