/**
 * Where pictures go: file names from a pattern, and the check, before any work, that they can be written.
 */

import { randomBytes } from "node:crypto";
import { rmdir, stat, unlink, writeFile } from "node:fs/promises";
import path from "node:path";
import { makeFolders } from "../common/files.js";
import type { Seed } from "../common/seed.js";
import { OptionError, OutputError } from "../errors.js";
import { formatOf } from "../generation/image.js";

/**
 * One file name for each picture. `{seed}` and `{index}` (from 0) are replaced; several pictures that these do not tell apart, since
 * there is neither or seeds are alike, get `-{index}` before the extension.
 * @param seeds null for a picture whose noise was given: `{seed}` is then "noise"
 * @throws OptionError for an unknown extension or placeholder
 */
export function outputFiles(pattern: string, seeds: readonly (Seed | null)[]): string[] {
  formatOf(pattern);
  const unknown = pattern.match(/\{(?!seed\}|index\})[^{}/\\]*\}/);
  if (unknown) throw new OptionError("out", `Expected {seed} or {index} in --out but received "${unknown[0]}".`);
  let full = pattern;
  const areDistinct = new Set(seeds).size === seeds.length;
  if (!pattern.includes("{index}") && !(pattern.includes("{seed}") && areDistinct) && seeds.length > 1) {
    const { dir, name, ext } = path.parse(pattern);
    full = path.join(dir, `${name}-{index}${ext}`);
  }
  return seeds.map((seed, index) =>
    full.replaceAll("{seed}", String(seed ?? "noise")).replaceAll("{index}", String(index)),
  );
}

/**
 * Creates the folders of `files` where needed and proves that they can be written to.
 * @returns a function that removes the folders that it created, if they are still empty: for when the work fails
 * @throws OutputError that names the file and the reason
 */
export async function prepareOutputs(files: readonly string[]): Promise<() => Promise<void>> {
  const created: string[] = [];
  let at = "";
  const undo = async () => {
    for (const folder of created.splice(0).reverse()) await rmdir(folder).catch(() => undefined);
  };
  try {
    for (const folder of new Set(files.map((file) => path.dirname(path.resolve(file))))) {
      at = folder;
      await makeFolders(folder, created);
      const probe = path.join(folder, `.flowturbo-${randomBytes(6).toString("hex")}.tmp`);
      await writeFile(probe, "", { flag: "wx" });
      await unlink(probe);
    }
    for (const file of files) {
      const existing = await stat(file).catch(() => null);
      if (existing?.isDirectory()) throw new OutputError(file, `Cannot write ${file}: it is a folder.`);
    }
  } catch (cause) {
    await undo();
    if (cause instanceof OutputError) throw cause;
    // The system's message goes on to name the temporary file, which the user does not know.
    const [reason] = (cause as Error).message.split(", ");
    throw new OutputError(
      at,
      `Cannot write to the folder ${at}: ${reason}. Nothing was drawn. Choose another folder, or make this one writable.`,
      { cause },
    );
  }
  return undo;
}
