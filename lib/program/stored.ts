/**
 * Reads stored constants (a crop of the position table) from the checkpoint. Only the rows asked for are read, since
 * the table of SD3.5-medium is 453 MB while a crop is a few; the last few are kept, since a service draws the same few
 * sizes again and again.
 */

import { open } from "node:fs/promises";
import { LruCache } from "../common/lru-cache.js";
import { bytesPerElement, type Tensor } from "../common/tensor.js";
import { widen } from "../common/widen.js";
import { RuntimeError } from "../errors.js";
import type { Constant, StoredConstant } from "./program.js";

/** Values of constants: those in memory as they are, those in files read, with a small cache. */
export class ConstantReader {
  readonly #kept = new LruCache<Float32Array>(4);

  /** @throws RuntimeError naming the constant, if it cannot be read in full or is a slot */
  async tensor(name: string, constant: Constant): Promise<Tensor> {
    if (constant.kind === "value") return constant.tensor;
    if (constant.kind === "slot") throw new RuntimeError(`The slot "${name}" has no value.`);
    try {
      return { dtype: "float32", shape: constant.shape, data: await this.read(constant) };
    } catch (cause) {
      const message = `The constant "${name}" (tensor ${constant.source.name}) cannot be read: ${(cause as Error).message}`;
      throw new RuntimeError(message, { cause });
    }
  }

  /** @throws Error (of the file system, or naming the file) if the rows cannot be read in full */
  async read(constant: StoredConstant): Promise<Float32Array> {
    const { source, firstElement, rowElements, strideElements, rows } = constant;
    const key = JSON.stringify([
      source.file,
      source.offset,
      source.dtype,
      firstElement,
      rowElements,
      strideElements,
      rows,
    ]);
    return this.#kept.get(key) ?? this.#kept.set(key, await readRows(constant));
  }
}

async function readRows(constant: StoredConstant): Promise<Float32Array> {
  const { source, firstElement, rowElements, strideElements, rows } = constant;
  const size = bytesPerElement[source.dtype];
  const values = new Float32Array(rows * rowElements);
  const file = await open(source.file, "r");
  try {
    const bytes = new Uint8Array(rowElements * size);
    for (let row = 0; row < rows; row++) {
      const start = source.offset + (firstElement + row * strideElements) * size;
      for (let filled = 0; filled < bytes.length; ) {
        const { bytesRead } = await file.read(bytes, filled, bytes.length - filled, start + filled);
        if (bytesRead === 0) throw new Error(`${source.file} ends inside the tensor ${source.name}.`);
        filled += bytesRead;
      }
      widen(bytes, source.dtype, values.subarray(row * rowElements, (row + 1) * rowElements));
    }
  } finally {
    await file.close();
  }
  return values;
}
