/**
 * Folders of the cache whose content this process will run: engines, and links to libraries. Whoever may write there can make it
 * run any code.
 */

import { lstat, stat } from "node:fs/promises";
import { CacheError } from "../errors.js";

/**
 * Refuses a folder of the cache into which another user could put code.
 * @param strict whether the folder must be closed to others altogether
 * @throws CacheError with the remedy; the file system's error
 */
export async function checkFolder(folder: string, strict: boolean): Promise<void> {
  const refuse = (what: string, remedy: string) => {
    throw new CacheError(folder, `The cache folder ${folder} ${what}; native code is not loaded from it. ${remedy}`);
  };
  const stats = await lstat(folder);
  const user = process.getuid?.() ?? 0;
  if (strict && stats.isSymbolicLink()) refuse("is a symbolic link", "Name the folder itself.");
  // The base may be a link that the user made, to a larger disk for instance; what it points at is then checked.
  const target = stats.isSymbolicLink() ? await stat(folder) : stats;
  if (!target.isDirectory()) refuse("is not a folder", "Name another one.");
  if (target.uid !== user && (strict || target.uid !== 0))
    refuse(`belongs to another user (${target.uid})`, "Name a folder of your own.");
  const forbidden = strict ? 0o077 : 0o022;
  // In a folder with the sticky bit, as /tmp is, others cannot replace what is ours.
  if (target.mode & forbidden && (strict || !(target.mode & 0o1000)))
    refuse(`is open to other users (mode ${(target.mode & 0o777).toString(8)})`, `Run \`chmod 700 ${folder}\`.`);
}
