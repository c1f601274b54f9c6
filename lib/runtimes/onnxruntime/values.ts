/**
 * Where the values of programs are between launches. Here: in the memory of the process, for the CPU, and for CUDA, whose
 * results onnxruntime-node always brings to the host.
 */

import type * as ort from "onnxruntime-node";
import { elementCount, type Tensor } from "../../common/tensor.js";
import type { Register } from "../../program/program.js";
import { allFinite } from "../../program/validate.js";

/** Rows of a value that replace others. */
export interface CopiedRows {
  readonly from: ort.Tensor;
  readonly fromRow: number;
  readonly toRow: number;
  readonly rows: number;
}

export interface Values {
  /** A value that launches can read. */
  upload(tensor: Tensor): Promise<ort.Tensor>;
  /** What a value holds. */
  download(value: ort.Tensor): Promise<ort.Tensor["data"]>;
  /**
   * A register's value with some of its rows replaced, one after the other.
   * @param old what it held; undefined for zeros. It may be changed, and is not used any more
   */
  replaceRows(old: ort.Tensor | undefined, register: Register, copies: readonly CopiedRows[]): Promise<ort.Tensor>;
  /** Waits until a float32 value is there, and says whether it holds finite numbers only. */
  isFinite(value: ort.Tensor): Promise<boolean>;
  /** Waits until a value is there. */
  settle(value: ort.Tensor): Promise<void>;
  /** Gives up a value's memory. */
  free(value: ort.Tensor): void;
}

export class HostValues implements Values {
  readonly #ort: typeof ort;

  constructor(library: typeof ort) {
    this.#ort = library;
  }

  async upload(tensor: Tensor): Promise<ort.Tensor> {
    return tensorOf(this.#ort, tensor);
  }

  async download(value: ort.Tensor): Promise<ort.Tensor["data"]> {
    return value.data;
  }

  async replaceRows(
    old: ort.Tensor | undefined,
    register: Register,
    copies: readonly CopiedRows[],
  ): Promise<ort.Tensor> {
    const to = old ?? tensorOf(this.#ort, zeros(register));
    const row = elementCount(register.shape.slice(1));
    for (const { from, fromRow, toRow, rows } of copies)
      (to.data as Float32Array).set(
        (from.data as Float32Array).subarray(fromRow * row, (fromRow + rows) * row),
        toRow * row,
      );
    return to;
  }

  async isFinite(value: ort.Tensor): Promise<boolean> {
    return allFinite(value.data as Float32Array);
  }

  async settle(): Promise<void> {}

  free(): void {}
}

export function tensorOf(library: typeof ort, { dtype, shape, data }: Tensor): ort.Tensor {
  return dtype === "float32" ? new library.Tensor(dtype, data, shape) : new library.Tensor(dtype, data, shape);
}

export function zeros({ dtype, shape }: Register): Tensor {
  const length = elementCount(shape);
  return dtype === "float32"
    ? { dtype, shape, data: new Float32Array(length) }
    : { dtype, shape, data: new BigInt64Array(length) };
}
