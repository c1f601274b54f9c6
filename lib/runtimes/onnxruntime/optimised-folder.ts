/** The folder of optimised graphs in a cache: what is there, and how it is cleared. Nothing here loads ONNX Runtime. */

import path from "node:path";
import { type CachedFile, filesNamed, removeFiles } from "../../common/files.js";

/** Absolute. */
export const optimisedFolder = (cache: string): string => path.resolve(cache, "graphs");

/** Optimised graphs, and what interrupted processes left of some. @param folder as `optimisedFolder` gives it */
export function listOptimised(folder: string): Promise<CachedFile[]> {
  return filesNamed(folder, /^[0-9a-f]{32}\.onnx(\.[0-9a-f]+\.tmp)?$/);
}

/** Removes them. @returns how many there were, and their bytes */
export async function clearOptimised(folder: string): Promise<{ readonly files: number; readonly bytes: number }> {
  return removeFiles(await listOptimised(folder));
}

/** Removes those that have not been used for longest, until the others take no more than so many bytes. */
export async function limitOptimised(folder: string, most: number): Promise<void> {
  const files = await listOptimised(folder);
  let bytes = files.reduce((sum, each) => sum + each.bytes, 0);
  for (const each of files.sort((a, b) => a.used - b.used)) {
    if (bytes <= most) return;
    bytes -= (await removeFiles([each])).bytes;
  }
}
