/**
 * A folder through which onnxruntime-node's library and a provider from elsewhere are loaded. ONNX Runtime looks for the
 * files of a provider in the folder of its own library only, and nothing may be copied into node_modules. So a folder in the
 * cache has symbolic links to both; a process that opens the library by its link finds the provider beside it.
 */

import { createHash, randomBytes } from "node:crypto";
import { mkdir, readlink, realpath, rename, rm, symlink } from "node:fs/promises";
import path from "node:path";
import { defaultCacheFolder, makeFolders } from "../../common/files.js";
import { CacheError } from "../../errors.js";
import { checkFolder } from "../closed-folder.js";
import { providerFiles, runtimeFile } from "./cuda-provider.js";

/** What is linked to. */
export interface ProviderFolders {
  /** With the provider's files. */
  readonly folder: string;
  /** With onnxruntime-node's library. */
  readonly runtimeFolder: string;
}

/**
 * Makes the folder, or finds it made. Its name is a digest of what it links to, so that installations of several versions
 * share a cache without disturbing each other.
 * @param found folders of both, as findCudaProvider gives them
 * @param cache folder of the caches
 * @returns the folder that `openThrough` takes: where the provider is beside onnxruntime-node's library already, that one
 * @throws CacheError if it cannot be made, or if another user could change it
 */
export async function loadFolder(found: ProviderFolders, cache: string = defaultCacheFolder()): Promise<string> {
  const parent = path.join(path.resolve(cache), "onnxruntime");
  try {
    return await linkFolder(found, parent);
  } catch (cause) {
    if (cause instanceof CacheError) throw cause;
    const message = `Cannot link ONNX Runtime's CUDA provider in ${parent}: ${(cause as Error).message}. Give a folder that can be written as cache.`;
    throw new CacheError(parent, message, { cause });
  }
}

async function linkFolder(found: ProviderFolders, parent: string): Promise<string> {
  const [provider, runtime] = [await realpath(found.folder), await realpath(found.runtimeFolder)];
  if (provider === runtime) return runtime;
  const targets: Record<string, string> = { [runtimeFile]: path.join(runtime, runtimeFile) };
  for (const name of providerFiles) targets[name] = await realpath(path.join(provider, name));
  await makeFolders(parent, [], 0o700);
  await checkFolder(path.dirname(parent), false);
  await checkFolder(parent, true);
  const digest = createHash("sha256").update(JSON.stringify(targets)).digest("hex").slice(0, 16);
  const folder = path.join(parent, digest);
  if (await linksTo(folder, targets)) return folder;
  const temporary = `${folder}.${randomBytes(6).toString("hex")}.tmp`;
  try {
    await mkdir(temporary);
    for (const [name, target] of Object.entries(targets)) await symlink(target, path.join(temporary, name));
    await replace(temporary, folder, targets);
  } finally {
    await rm(temporary, { recursive: true, force: true });
  }
  return folder;
}

/** Gives the new folder its name; one of that name with other links is moved out of the way first. */
async function replace(made: string, folder: string, targets: Readonly<Record<string, string>>): Promise<void> {
  for (let attempt = 0; ; attempt++) {
    try {
      return await rename(made, folder);
    } catch (error) {
      // Another process may have made it since, or be mending it, too.
      if (await linksTo(folder, targets)) return;
      const isThere = ["ENOTEMPTY", "EEXIST", "ENOTDIR"].includes((error as NodeJS.ErrnoException).code ?? "");
      if (!isThere || attempt === 5) throw error;
      const aside = `${folder}.${randomBytes(6).toString("hex")}.tmp`;
      await rename(folder, aside).catch(() => undefined);
      await rm(aside, { recursive: true, force: true });
    }
  }
}

async function linksTo(folder: string, targets: Readonly<Record<string, string>>): Promise<boolean> {
  const links = Object.entries(targets).map(async ([name, target]) => {
    return (await readlink(path.join(folder, name)).catch(() => null)) === target;
  });
  return (await Promise.all(links)).every(Boolean);
}
