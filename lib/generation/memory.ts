/**
 * What a checkpoint takes on a GPU, estimated before anything is built: the engines of one program are there together,
 * and each holds its weights in the type that they are stored in. Scratch memory comes on top; the runtime knows it
 * once the engines are loaded, and refuses then, with numbers, what this could not see.
 */

import { gigabytes } from "../common/memory.js";
import { MemoryError } from "../errors.js";
import type { GraphLibrary, GraphName } from "../networks/library.js";

/** Bytes of weights that a picture's two programs need on the device: encoding texts, drawing. */
export function deviceMemoryNeeded(graphs: GraphLibrary): { readonly encode: number; readonly draw: number } {
  const bytes = (name: GraphName) =>
    [...graphs.get(name).externals.values()].reduce((sum, { length }) => sum + length, 0);
  const needed = { encode: 0, draw: 0 };
  for (const name of graphs.essential)
    needed[name === "clip_l" || name === "clip_g" || name === "t5" ? "encode" : "draw"] += bytes(name);
  return needed;
}

/**
 * @param available bytes of memory that the device has
 * @throws MemoryError with both numbers if a program's engines cannot be there together
 */
export function checkDeviceMemory(graphs: GraphLibrary, device: string, available: number): void {
  const { encode, draw } = deviceMemoryNeeded(graphs);
  const needed = Math.max(encode, draw);
  if (needed <= available) return;
  const what = encode > draw ? "text encoders" : "transformer, refiner and autoencoder";
  throw new MemoryError(
    `The ${what} of this model take ${gigabytes(needed)} GB of GPU memory for their weights alone, but ${device} has ${gigabytes(available)} GB. ` +
      "Use a smaller checkpoint, a larger GPU, or the runtime onnxruntime.",
    needed,
    available,
  );
}
