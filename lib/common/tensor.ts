/**
 * Tensors as this package sees them: values in memory (shape + dtype + data) and values that stay in a file. Weights
 * are always the second kind, so that no part of the package needs to hold them.
 */

/** Element types of values in memory, in ONNX's spelling. */
export type DType = "float32" | "int64";

/** Element types of tensors in .safetensors files that this package can compute with. */
export type StoredDType = ComputedDType | "F8_E4M3" | "F8_E5M2" | "I8";

/** Those of them that networks are computed in. */
export type ComputedDType = "F32" | "F16" | "BF16";

/** 32-bit floating point values in memory. */
export interface FloatTensor {
  /** Element type. */
  readonly dtype: "float32";
  /** Dimensions, outermost first; empty for a scalar. */
  readonly shape: readonly number[];
  /** Row-major values, as many as the product of the dimensions. */
  readonly data: Float32Array;
}

/** 64-bit integers in memory. */
export interface IntTensor {
  /** Element type. */
  readonly dtype: "int64";
  /** Dimensions, outermost first; empty for a scalar. */
  readonly shape: readonly number[];
  /** Row-major values, as many as the product of the dimensions. */
  readonly data: BigInt64Array;
}

/** Row-major values in memory. */
export type Tensor = FloatTensor | IntTensor;

/** A row-major tensor inside a file: `length` bytes at `offset`. `file` is an absolute path without symbolic links. */
export interface StoredTensor {
  readonly name: string;
  readonly dtype: StoredDType;
  readonly shape: readonly number[];
  readonly file: string;
  readonly offset: number;
  readonly length: number;
  /** What the stored values are multiplied by: see {@link StoredScale}. Absent where they are the weight's values. */
  readonly scale?: StoredScale | undefined;
}

/**
 * The scale of a quantised tensor, whose values are stored · scale · factor. The scale is [] or [1] for the whole tensor,
 * [rows] for each of its rows, the first axis, or [rows, blocks] for each block of a row, where the weight was quantised at load.
 */
export interface StoredScale {
  readonly tensor: StoredTensor;
  readonly factor: number;
}

/**
 * The weight W of a linear layer in 8 bits, for products of integers: W[o, i] = codes[i, o] · scales[o] / smooth[i], rounded. All of it was
 * made of the checkpoint's own as the model was loaded.
 */
export interface Int8Linear {
  /** int8 [in, out]: the transpose of the weight. */
  readonly codes: StoredTensor;
  /** float32 [out]. */
  readonly scales: StoredTensor;
  /** float32 [in]: what inputs are multiplied by before they are quantised; absent for 1. */
  readonly smooth?: StoredTensor | undefined;
}

/**
 * How a linear layer is computed in a trial of 8 bits, before its weight is quantised: `compared`, in float32, with what the products of 8 bits
 * would be off by as outputs of the graph; or in float32 from values that are rounded as those products round them.
 */
export type Rounding = "compared" | { /** As `Int8Linear.smooth`; null for 1. */ readonly smooth: Float32Array | null };

/** Where a network finds its weights: by the names that the checkpoint uses. */
export interface WeightSource {
  /** For error messages: the folder or file the weights come from. */
  readonly origin: string;
  /** @returns the tensor, or undefined where the checkpoint has none of that name. */
  find(name: string): StoredTensor | undefined;
  /** The weight of a linear layer, by its name without ".weight", where it is multiplied in 8 bits. `find` has it as it is stored. */
  int8?(layer: string): Int8Linear | undefined;
  /** How a linear layer is computed in a trial, by its name without ".weight"; undefined for as ever. */
  rounding?(layer: string): Rounding | undefined;
  /** Linear layers whose halves of rows are stored the other way round: (shift, scale) where diffusers has (scale, shift). */
  readonly reversedHalves?: ReadonlySet<string>;
  /** Linear layers that are left out since they are the identity. */
  readonly identities?: ReadonlySet<string>;
  /** What a tensor is called where it is stored, for error messages; absent where the names are the same. */
  storedName?(name: string): string;
}

export const bytesPerElement: Record<StoredDType, number> = {
  F32: 4,
  F16: 2,
  BF16: 2,
  F8_E4M3: 1,
  F8_E5M2: 1,
  I8: 1,
};

/** Whether values of the type take 8 bits: no runtime computes networks in it. */
export function is8Bit(dtype: StoredDType): dtype is Exclude<StoredDType, ComputedDType> {
  return bytesPerElement[dtype] === 1;
}

/** Number of elements of a shape (1 for a scalar). */
export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, dimension) => product * dimension, 1);
}

/** @throws RangeError if data and shape disagree: a defect of the caller, never of a user's input. */
export function float32(shape: readonly number[], data: Float32Array): FloatTensor {
  if (elementCount(shape) !== data.length)
    throw new RangeError(
      `A float32 tensor of shape [${shape}] needs ${elementCount(shape)} values; got ${data.length}.`,
    );
  return { dtype: "float32", shape, data };
}

/** @throws RangeError if data and shape disagree. */
export function int64(shape: readonly number[], data: BigInt64Array): IntTensor {
  if (elementCount(shape) !== data.length)
    throw new RangeError(
      `An int64 tensor of shape [${shape}] needs ${elementCount(shape)} values; got ${data.length}.`,
    );
  return { dtype: "int64", shape, data };
}
