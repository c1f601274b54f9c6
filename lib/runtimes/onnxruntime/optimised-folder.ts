/** The folder of optimised graphs in a cache: what is there, and how it is cleared. Nothing here loads ONNX Runtime. */

import { readdir, rm, stat } from "node:fs/promises";
import path from "node:path";

/** Absolute. */
export const optimisedFolder = (cache: string): string => path.resolve(cache, "graphs");

/** A file of an optimised graph, or what an interrupted process left of one. */
interface OptimisedFile {
  readonly file: string;
  readonly bytes: number;
  /** When it was last used, in milliseconds since 1970. */
  readonly used: number;
}

/** @param folder as `optimisedFolder` gives it; one that is not there is empty */
export async function listOptimised(folder: string): Promise<OptimisedFile[]> {
  const names = await readdir(folder).catch((): string[] => []);
  const found = names
    .filter((name) => /^[0-9a-f]{32}\.onnx(\.[0-9a-f]+\.tmp)?$/.test(name))
    .map(async (name) => {
      const file = path.join(folder, name);
      const about = await stat(file).catch(() => null);
      return about && { file, bytes: about.size, used: about.mtimeMs };
    });
  return (await Promise.all(found)).filter((each) => each !== null);
}

/** Removes them. @returns how many there were, and their bytes */
export async function clearOptimised(folder: string): Promise<{ readonly files: number; readonly bytes: number }> {
  const found = await listOptimised(folder);
  for (const { file } of found) await rm(file, { force: true });
  return { files: found.length, bytes: found.reduce((sum, { bytes }) => sum + bytes, 0) };
}

/** Removes those that have not been used for longest, until the others take no more than so many bytes. */
export async function limitOptimised(folder: string, most: number): Promise<void> {
  const files = await listOptimised(folder);
  let bytes = files.reduce((sum, each) => sum + each.bytes, 0);
  for (const each of files.sort((a, b) => a.used - b.used)) {
    if (bytes <= most) return;
    await rm(each.file, { force: true });
    bytes -= each.bytes;
  }
}
