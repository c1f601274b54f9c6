/** Files and folders: the user's cache folder and the files in it, files that appear whole or not at all, folders made level by level. */

import { randomBytes } from "node:crypto";
import { link, mkdir, readdir, rename, rm, stat, writeFile } from "node:fs/promises";
import { homedir } from "node:os";
import path from "node:path";

/** A file as it was when it was first looked at: another size or time of change is another version. */
export interface FileVersion {
  /** Absolute path without symbolic links. */
  readonly file: string;
  readonly size: number;
  readonly mtimeMs: number;
}

/** @param file absolute path without symbolic links */
export async function versionOf(file: string): Promise<FileVersion> {
  const { size, mtimeMs } = await stat(file);
  return { file, size, mtimeMs };
}

/** `$XDG_CACHE_HOME/flowturbo`, or `~/.cache/flowturbo`. */
export function defaultCacheFolder(): string {
  const base = process.env.XDG_CACHE_HOME;
  // The specification says to ignore a relative path.
  return path.join(base && path.isAbsolute(base) ? base : path.join(homedir(), ".cache"), "flowturbo");
}

interface AtomicOptions {
  readonly mode?: number;
  /** Whether its content is on the disk before it has its name, so that no loss of power leaves a file of zeros. Default: false. */
  readonly flush?: boolean;
  /** Whether a file that has come to be there meanwhile is left as it is. Default: it is replaced. */
  readonly isKept?: () => Promise<boolean>;
}

/**
 * Writes a file under a temporary name in its folder, then renames it.
 * @throws the file system's error; nothing is left behind
 */
export async function writeFileAtomic(
  file: string,
  data: string | Uint8Array | Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
  { mode, flush = false, isKept }: AtomicOptions = {},
): Promise<void> {
  const temporary = `${file}.${randomBytes(6).toString("hex")}.tmp`;
  try {
    await writeFile(temporary, data, { flag: "wx", mode, flush });
    // A link fails where there is a file by now, and on file systems without links.
    if (isKept && ((await linked(temporary, file)) || (await isKept()))) await rm(temporary, { force: true });
    else await rename(temporary, file);
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => undefined);
    throw error;
  }
}

const linked = (from: string, to: string) =>
  link(from, to).then(
    () => true,
    () => false,
  );

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

/** A file of a cache. */
export interface CachedFile {
  readonly file: string;
  readonly bytes: number;
  /** When it was last used, in milliseconds since 1970. */
  readonly used: number;
}

/** Files of a folder whose names match, in the order of the names; a folder that is not there has none. */
export async function filesNamed(folder: string, named: RegExp): Promise<CachedFile[]> {
  const names = await readdir(folder).catch((): string[] => []);
  const found = names
    .filter((name) => named.test(name))
    .sort()
    .map(async (name) => {
      const file = path.join(folder, name);
      const about = await stat(file).catch(() => null);
      return about && { file, bytes: about.size, used: about.mtimeMs };
    });
  return (await Promise.all(found)).filter((each) => each !== null);
}

/** Removes files. @returns how many there were, and their bytes */
export async function removeFiles(
  found: readonly CachedFile[],
): Promise<{ readonly files: number; readonly bytes: number }> {
  for (const { file } of found) await rm(file, { force: true });
  return { files: found.length, bytes: found.reduce((sum, { bytes }) => sum + bytes, 0) };
}
