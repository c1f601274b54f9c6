/**
 * onnxruntime-node installs its binaries for every platform, which are two thirds of an installation. Here those of other
 * platforms are found and removed. What lies beside the binaries of this platform stays, whatever it is, and nothing
 * outside the package's folder bin/ is touched: symbolic links are not followed.
 */

import { constants, type Dirent } from "node:fs";
import { access, lstat, readdir, realpath, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { packagePath } from "../../common/package.js";
import { type Platform, platformText } from "../../common/platform.js";
import { InstallationError } from "../../errors.js";
import { whyUnsupported } from "./binaries.js";

/** How the name of what Node loads begins; a folder without it is no installation. */
const binding = "onnxruntime_binding.";

/** What can be removed. */
export interface Prunable {
  /** Folder of onnxruntime-node, without symbolic links. */
  readonly folder: string;
  /** Folders and files to remove, relative to it. */
  readonly paths: readonly string[];
  readonly bytes: number;
  /** Of `bytes`, those of files that have other hard links, as in pnpm's store: their space is not freed. */
  readonly linkedBytes: number;
}

/** Folder of the onnxruntime-node that this package loads. @throws InstallationError if there is none */
export async function onnxRuntimeFolder(): Promise<string> {
  try {
    const manifest = createRequire(packagePath("package.json")).resolve("onnxruntime-node/package.json");
    return await realpath(path.dirname(manifest));
  } catch (cause) {
    throw refusal(
      "onnxruntime-node is not installed, so that there is nothing to remove.",
      "Run `npm install`.",
      cause,
    );
  }
}

/**
 * The binaries in a folder of onnxruntime-node that are not for that platform.
 * @throws InstallationError if it has none for that platform, or if others share the folder; the file system's errors
 */
export async function findPrunable(folder: string, platform: Platform): Promise<Prunable> {
  const unsupported = whyUnsupported(platform);
  if (unsupported) throw refusal(unsupported.reason, unsupported.remedy);
  // Every project of the user has this folder, which pnpm's global virtual store keeps beside the store's files.
  if (/[\\/]store[\\/]v\d+[\\/]links[\\/]/.test(folder))
    throw refusal(
      `${folder} is shared by all projects (pnpm's global virtual store).`,
      "Install with enableGlobalVirtualStore: false in pnpm-workspace.yaml, then prune.",
    );
  const paths: string[] = [];
  let hasOwn = false;
  // bin/napi-v6/<os>/<cpu>
  for (const version of await foldersIn(folder, "bin"))
    for (const system of await entriesOf(folder, "bin", version))
      if (system.name !== platform.os) paths.push(path.join("bin", version, system.name));
      else if (system.isDirectory())
        for (const processor of await entriesOf(folder, "bin", version, system.name))
          if (processor.name !== platform.cpu) paths.push(path.join("bin", version, system.name, processor.name));
          else
            hasOwn ||= await readdir(path.join(folder, "bin", version, system.name, processor.name)).then(
              (names) => names.some((name) => name.startsWith(binding)),
              () => false,
            );
  if (!hasOwn)
    throw refusal(
      `${folder} has no binaries for ${platformText(platform)}; without the others nothing would be left.`,
      "Remove that folder and run `npm install` on this machine.",
    );
  const sizes = await Promise.all(paths.map((name) => sizeOf(path.join(folder, name))));
  const sum = (key: "bytes" | "linkedBytes") => sizes.reduce((total, size) => total + size[key], 0);
  return { folder, paths, bytes: sum("bytes"), linkedBytes: sum("linkedBytes") };
}

/**
 * @param remove for tests
 * @throws InstallationError, before anything is removed, if a folder may not be written; after a part was removed, if another
 *   cannot be: it can be run again
 */
export async function prune({ folder, paths }: Prunable, remove: typeof rm = rm): Promise<void> {
  const all = await Promise.all(paths.map((name) => foldersWithin(path.join(folder, name))));
  for (const each of new Set([...paths.map((name) => path.dirname(path.join(folder, name))), ...all.flat()]))
    await access(each, constants.W_OK).catch((cause) => {
      throw refusal(
        `${each} cannot be written (${cause.code}).`,
        "Run it as the user that installed, where the installation is made: in a Dockerfile, behind `npm install`.",
        cause,
      );
    });
  for (const name of paths) {
    const file = path.join(folder, name);
    await remove(file, { recursive: true, force: true }).catch((cause) => {
      throw refusal(
        `${file} cannot be removed (${cause.code}); others may have been. The binaries of this platform are there.`,
        "Run it again where nothing uses those files.",
        cause,
      );
    });
  }
}

function refusal(reason: string, remedy: string, cause?: unknown): InstallationError {
  return new InstallationError("onnxruntime-node", reason, remedy, { cause });
}

/** Folders and links in a folder that is one itself, and no link to another; none where there is no such folder. */
async function entriesOf(...parts: string[]): Promise<Dirent[]> {
  const folder = path.join(...parts);
  const found = await lstat(folder).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") throw error;
    return null;
  });
  if (found && !found.isDirectory())
    throw refusal(`${folder} is no folder but a link.`, "Install onnxruntime-node again; links are not followed.");
  return found ? (await readdir(folder, { withFileTypes: true })).filter((entry) => !entry.isFile()) : [];
}

async function foldersIn(...parts: string[]): Promise<string[]> {
  return (await entriesOf(...parts)).filter((entry) => entry.isDirectory()).map(({ name }) => name);
}

/** The folder itself and all below it; none for a file or link. */
async function foldersWithin(file: string): Promise<string[]> {
  if (!(await lstat(file)).isDirectory()) return [];
  const below = await Promise.all((await foldersIn(file)).map((name) => foldersWithin(path.join(file, name))));
  return [file, ...below.flat()];
}

async function sizeOf(file: string): Promise<{ bytes: number; linkedBytes: number }> {
  const found = await lstat(file);
  if (!found.isDirectory()) return { bytes: found.size, linkedBytes: found.nlink > 1 ? found.size : 0 };
  const sizes = await Promise.all((await readdir(file)).map((name) => sizeOf(path.join(file, name))));
  return sizes.reduce(
    (sum, { bytes, linkedBytes }) => ({ bytes: sum.bytes + bytes, linkedBytes: sum.linkedBytes + linkedBytes }),
    { bytes: 0, linkedBytes: 0 },
  );
}
