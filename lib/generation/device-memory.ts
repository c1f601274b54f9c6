/**
 * What a checkpoint takes on a GPU, estimated before anything is built: the engines of one program are there together,
 * and each holds its weights in the type that they are stored in. Scratch memory is needed besides; the runtime knows it
 * once the engines are loaded, and refuses then, with numbers, what this could not see.
 */

import { gigabytes } from "../common/memory.js";
import { MemoryError } from "../errors.js";
import type { GraphLibrary } from "../networks/library.js";

/** Bytes of weights that a picture's two programs need on the device: encoding texts, drawing. */
export function deviceMemoryNeeded(graphs: GraphLibrary): { readonly encode: number; readonly draw: number } {
  const needed = { encode: 0, draw: 0 };
  for (const { graph, role } of graphs.essential)
    for (const { length } of graph.externals.values()) needed[role === "text" ? "encode" : "draw"] += length;
  return needed;
}

/** @throws MemoryError with both numbers if a program's engines cannot be on the device together */
export function checkDeviceMemory(
  graphs: GraphLibrary,
  { name, memoryBytes: available }: { readonly name: string; readonly memoryBytes: number },
): void {
  const { encode, draw } = deviceMemoryNeeded(graphs);
  const needed = Math.max(encode, draw);
  if (needed <= available) return;
  const what = encode > draw ? "text encoders" : "networks that draw";
  throw new MemoryError(
    `The ${what} of this model take ${gigabytes(needed)} GB of GPU memory for their weights alone, but ${name} has ${gigabytes(available)} GB. ` +
      "Use a smaller checkpoint, a larger GPU, or the CPU.",
    needed,
    available,
  );
}
