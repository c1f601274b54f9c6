/** Making folders. */

import { mkdir, stat } from "node:fs/promises";
import path from "node:path";

/**
 * Creates a folder and what is missing above it, one level at a time: Node's recursive mkdir never ends where the system
 * refuses without saying why (under /proc).
 * @param created receives the folders that were created, outermost first, also if the work fails half way
 * @throws the file system's error
 */
export async function makeFolders(folder: string, created: string[] = [], mode = 0o777): Promise<void> {
  const missing: string[] = [];
  for (let step = path.resolve(folder); !(await exists(step)); step = path.dirname(step)) missing.unshift(step);
  for (const step of missing) {
    // Another process may be making the same folders.
    const made = await mkdir(step, { mode }).then(
      () => true,
      (error: NodeJS.ErrnoException) => {
        if (error.code !== "EEXIST") throw error;
        return false;
      },
    );
    if (made) created.push(step);
  }
}

async function exists(file: string): Promise<boolean> {
  return stat(file).then(
    () => true,
    (error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT") return false;
      throw error;
    },
  );
}
