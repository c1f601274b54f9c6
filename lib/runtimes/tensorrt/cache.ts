/**
 * Engines on disk. Loading a plan is running native code, so the folder belongs to its user alone and is checked, and
 * a plan is used only after its SHA-256 has been compared with the one kept beside it. A plan appears under its name
 * complete or not at all (written elsewhere, then renamed), two processes that want the same one build it once, and a
 * damaged or foreign one is built again, never loaded. No plan ever comes from the network.
 *
 *   <folder>/engines/predict-<key>.plan   the engine
 *   <folder>/engines/predict-<key>.json   what it is: see `manifestSchema`
 *   <folder>/engines/predict-<key>.lock   only while it is being built
 *   <folder>/engines/predict-<key>.<random>.tmp   a plan under construction
 *   <folder>/engines/timings-<key>.timings   what kernels took in builds for one GPU by one version: no code, and no damage
 *   <folder>/engines/timings-<key>.timings.<pid>.tmp   the same under construction
 */

import { createHash, randomBytes } from "node:crypto";
import { constants } from "node:fs";
import { type FileHandle, lstat, open, readdir, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import * as z from "zod";
import { untilAborted } from "../../common/abort.js";
import { defaultCacheFolder, makeFolders } from "../../common/files.js";
import { CacheError } from "../../errors.js";
import { checkFolder } from "../closed-folder.js";
import type { Addon } from "./addon.js";
import { DigestMemory, hashFile } from "./digests.js";
import { tensorRtKinds } from "./flavours.js";

const manifestSchema = z.strictObject({
  format: z.literal(1),
  key: z.string(),
  /** The key of everything but the profiles: engines that differ in nothing else have it in common. */
  family: z.string(),
  graph: z.string(),
  runtime: z.enum(tensorRtKinds),
  version: z.string(),
  /** SM numbers, or the GPU that the engine was built on. */
  device: z.union([
    z.strictObject({ targets: z.array(z.int()) }),
    z.strictObject({ gpu: z.string(), sm: z.int(), driver: z.int() }),
  ]),
  /** Builder optimisation level, 0 to 5; -1 for the library's default. */
  level: z.int(),
  /** Dimensions of every input, in the order of the engine's profiles. */
  profiles: z.array(z.record(z.string(), z.array(z.int()).readonly())),
  bytes: z.int(),
  sha256: z.string(),
  /** Seconds that the build took. */
  seconds: z.number(),
  created: z.string(),
});

export type Manifest = z.output<typeof manifestSchema>;

/** A plan that was verified. */
export interface CachedEngine {
  readonly plan: string;
  readonly manifest: Manifest;
}

/** What lies in the cache under an engine's name. */
export type CacheItem = {
  readonly name: string;
  /** File of the plan. */
  readonly plan: string;
  /** Bytes of the plan on disk. */
  readonly bytes: number;
} & (
  | { readonly manifest: Manifest; readonly damage: null }
  /** Something that must not be used, and why. */
  | { readonly manifest: Manifest | null; readonly damage: string }
);

/** Where a cache keeps its engines. */
export function enginesFolder(cache: string = defaultCacheFolder()): string {
  return path.join(path.resolve(cache), "engines");
}

/** Name of an engine's files: the graph, for people, and as much of the key as makes it unique. */
function nameOf(graph: string, key: string): string {
  return `${graph}-${key.slice(0, 32)}`;
}

export class EngineCache {
  readonly folder: string;
  readonly digests: DigestMemory;

  private constructor(folder: string) {
    this.folder = folder;
    this.digests = new DigestMemory(folder);
  }

  /**
   * Opens the cache, creating it where needed.
   * @throws CacheError if it is not this user's, open to others, or cannot be written to
   */
  static async open(folder: string = defaultCacheFolder()): Promise<EngineCache> {
    const engines = enginesFolder(folder);
    const cannot = (what: string) => (cause: Error) => {
      const message = `Cannot ${what} the cache of engines ${engines}: ${cause.message}. Make it writable, or name another folder (--cache, or the option cache).`;
      throw new CacheError(engines, message, { cause });
    };
    await makeFolders(engines, [], 0o700).catch(cannot("create"));
    await checkFolder(path.resolve(folder), false);
    await checkFolder(engines, true);
    const probe = path.join(engines, `.probe-${randomBytes(6).toString("hex")}.tmp`);
    await writeFile(probe, "", { flag: "wx", mode: 0o600 }).catch(cannot("write to"));
    await rm(probe, { force: true }).catch(cannot("write to"));
    return new EngineCache(engines);
  }

  /** Opens a cache for reading if there is one. */
  static async openExisting(folder: string = defaultCacheFolder()): Promise<EngineCache | null> {
    const stats = await lstat(enginesFolder(folder)).catch(() => null);
    return stats && EngineCache.open(folder);
  }

  /** Looks for an engine and verifies its plan to the last byte. @throws `signal.reason` after an abort */
  find(graph: string, key: string, signal?: AbortSignal): Promise<CacheItem | null> {
    return this.#examine(nameOf(graph, key), true, signal);
  }

  /** Whether there is a plan, sound or not. */
  async has(graph: string, key: string): Promise<boolean> {
    return (await this.#examine(nameOf(graph, key), false)) !== null;
  }

  /** Waits until no other process or thread builds this engine. @throws `signal.reason`, CacheError */
  async lock(addon: Addon, graph: string, key: string, signal?: AbortSignal): Promise<() => void> {
    const file = this.#path(nameOf(graph, key), "lock");
    for (;;) {
      signal?.throwIfAborted();
      let release: (() => void) | null;
      try {
        release = addon.tryLock(file);
      } catch (cause) {
        const message = `${(cause as Error).message}. The cache of engines needs a file system with locks.`;
        throw new CacheError(file, message, { cause });
      }
      if (release) return release;
      await untilAborted(sleep(100), signal);
    }
  }

  /** The file of what kernels took, for the builds of one library on one device. */
  timings(key: string): string {
    return this.#path(nameOf("timings", key), "timings");
  }

  /** A new name for a plan under construction. To be called under the engine's lock: removes what a killed build left. */
  async temporary(graph: string, key: string): Promise<string> {
    const name = nameOf(graph, key);
    for (const entry of await readdir(this.folder))
      if (entry.startsWith(`${name}.`) && entry.endsWith(".tmp"))
        await rm(path.join(this.folder, entry), { force: true });
    return path.join(this.folder, `${name}.${randomBytes(6).toString("hex")}.tmp`);
  }

  /**
   * Gives a complete plan its name, under the engine's lock.
   * @param manifest without what is read off the plan itself
   */
  async keep(temporary: string, manifest: Omit<Manifest, "format" | "bytes" | "sha256">): Promise<CachedEngine> {
    const name = nameOf(manifest.graph, manifest.key);
    const plan = this.#path(name, "plan");
    const description = `${temporary}.json.tmp`;
    try {
      await using handle = await open(temporary, "r");
      const { size } = await handle.stat();
      const complete: Manifest = { format: 1, ...manifest, bytes: size, sha256: await hashFile(handle) };
      await writeFile(description, `${JSON.stringify(complete, null, 2)}\n`, { flag: "wx", mode: 0o600, flush: true });
      // Without its description a plan is damaged: whatever the moment of a crash, no wrong pair is taken for sound.
      await rm(this.#path(name, "json"), { force: true });
      await rename(temporary, plan);
      await rename(description, this.#path(name, "json"));
      // The new names must be on the disk too.
      await using parent = await open(this.folder, "r");
      await parent.sync();
      return { plan, manifest: complete };
    } catch (cause) {
      await rm(temporary, { force: true });
      await rm(description, { force: true });
      throw new CacheError(plan, `Cannot keep the engine ${plan}: ${(cause as Error).message}.`, { cause });
    }
  }

  /** All engines, or those of a graph, by name. With `verify` every plan is read to the last byte. */
  async list({
    graph,
    verify = false,
    signal,
  }: {
    graph?: string;
    verify?: boolean;
    signal?: AbortSignal;
  } = {}): Promise<CacheItem[]> {
    const items: CacheItem[] = [];
    for (const entry of (await readdir(this.folder)).sort()) {
      const name = entry.match(/^(.+)\.plan$/)?.[1];
      if (name === undefined || (graph !== undefined && !name.startsWith(`${graph}-`))) continue;
      const item = await this.#examine(name, verify, signal);
      if (item) items.push(item);
    }
    return items;
  }

  /** Removes what builders that are gone have left: plans under construction, locks, other temporary files. */
  async sweep(addon: Addon): Promise<void> {
    await this.#remove(
      addon,
      /^.+-[0-9a-f]{32}\.(lock|[0-9a-f]{12}\.tmp.*|timings\.\d+\.tmp)$|^(\.probe-|digest-).*\.tmp$/,
    );
  }

  /**
   * Removes everything but what is being built.
   * @param addon for its locks; null where nothing can be built
   * @returns number of engines and bytes freed
   */
  clear(addon: Addon | null): Promise<{ engines: number; bytes: number }> {
    return this.#remove(addon, /^.+-[0-9a-f]{32}\.(lock|.*(plan|json|tmp|timings))$/);
  }

  async #remove(addon: Addon | null, which: RegExp): Promise<{ engines: number; bytes: number }> {
    let engines = 0;
    let bytes = 0;
    for (const entry of await readdir(this.folder)) {
      if (!which.test(entry)) continue;
      const name = entry.match(/^(.+-[0-9a-f]{32})\./)?.[1];
      const release = name && addon ? addon.tryLock(this.#path(name, "lock")) : () => undefined;
      if (!release) continue;
      const file = path.join(this.folder, entry);
      // Releasing a lock removes it. What has gone meanwhile is no failure; this package makes no folders here.
      const stats = entry.endsWith(".lock") ? null : await lstat(file).catch(() => null);
      if (stats && !stats.isDirectory()) {
        await rm(file, { force: true });
        bytes += stats.size;
        if (entry.endsWith(".plan")) engines++;
      }
      release();
    }
    return { engines, bytes };
  }

  /** @returns null where there is no plan of that name */
  async #examine(name: string, verify: boolean, signal?: AbortSignal): Promise<CacheItem | null> {
    const plan = this.#path(name, "plan");
    const stats = await lstat(plan).catch(() => null);
    if (!stats) return null;
    const item = { name, plan, bytes: stats.size };
    let manifest: Manifest | null = null;
    try {
      manifest = await this.#readManifest(name);
      if (nameOf(manifest.graph, manifest.key) !== name) throw new Damage("its description belongs to another engine");
      if (verify) await this.#verifyPlan(name, manifest, signal);
      return { ...item, manifest, damage: null };
    } catch (error) {
      if (!(error instanceof Damage)) throw error;
      return { ...item, manifest, damage: error.message };
    }
  }

  async #readManifest(name: string): Promise<Manifest> {
    await using handle = await openOwn(this.#path(name, "json"));
    try {
      return manifestSchema.parse(JSON.parse(await handle.readFile("utf8")));
    } catch {
      throw new Damage("its description cannot be read");
    }
  }

  async #verifyPlan(name: string, manifest: Manifest, signal?: AbortSignal): Promise<void> {
    await using handle = await openOwn(this.#path(name, "plan"));
    const { size } = await handle.stat();
    if (size !== manifest.bytes) throw new Damage(`it has ${size} bytes instead of ${manifest.bytes}`);
    if ((await hashFile(handle, { signal })) !== manifest.sha256)
      throw new Damage("its SHA-256 is not the one it was stored with");
  }

  #path(name: string, extension: string): string {
    return path.join(this.folder, `${name}.${extension}`);
  }
}

/** SHA-256 over a description whose keys are in a fixed order. */
export function keyOf(description: unknown): string {
  return createHash("sha256").update(JSON.stringify(description)).digest("hex");
}

class Damage extends Error {}

/** Opens a file that must be a plain one, of this user, writable by nobody else. */
async function openOwn(file: string): Promise<FileHandle> {
  let handle: FileHandle;
  try {
    handle = await open(file, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    if (code === "ELOOP") throw new Damage("it is a symbolic link");
    if (code === "ENOENT") throw new Damage("its description is missing");
    throw new Damage((error as Error).message);
  }
  const stats = await handle.stat();
  const reason = !stats.isFile()
    ? "it is not a plain file"
    : stats.uid !== process.getuid?.()
      ? `it belongs to another user (${stats.uid})`
      : stats.mode & 0o022
        ? "others may write to it"
        : null;
  if (reason === null) return handle;
  await handle.close();
  throw new Damage(reason);
}
