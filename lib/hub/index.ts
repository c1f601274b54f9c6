/**
 * Models of the Hugging Face hub, by name: downloaded into the cache that Python's programs share, as far as they are not
 * there. Knows nothing of what the files hold, except which of them are read.
 */

import { readFile, stat, statfs } from "node:fs/promises";
import path from "node:path";
import { following } from "../common/abort.js";
import type { Logger } from "../common/logger.js";
import { gigabytes } from "../common/memory.js";
import { FlowTurboError, HubError, type HubReason } from "../errors.js";
import { codeOf, ModelCache, sizeOf } from "./cache.js";
import { HubClient, type HubFile, type HubListing } from "./client.js";
import { downloadBlob } from "./download.js";
import { type HubName, nameText, parseHubName } from "./name.js";
import { firstFile, firstFiles, SelectionError, select, selectFile, shardsOf, type Wanted } from "./select.js";
import { type HubSettings, readSettings } from "./settings.js";

export { huggingFaceHub } from "./client.js";
export { type HubName, nameForm, nameText, parseHubName } from "./name.js";

/** A file that is being downloaded. */
export interface FileProgress {
  /** Path within the repository. */
  readonly path: string;
  /** Bytes that are there. */
  readonly done: number;
  readonly total: number;
}

/** Bytes of the files that were not in the cache before. More become known as indexes are read. */
export interface DownloadProgress {
  readonly done: number;
  readonly total: number;
  /** Files under way. */
  readonly files: readonly FileProgress[];
}

export interface HubOptions extends Wanted {
  readonly signal?: AbortSignal | undefined;
  readonly logger?: Logger | undefined;
  readonly onDownload?: ((progress: DownloadProgress) => void) | undefined;
  /** Throws if model_index.json (or what a repository has in its place), whose path it is given, is of what cannot be read: before the rest is downloaded. */
  readonly checkIndex?: ((file: string) => Promise<void>) | undefined;
  /** Default: what the environment says. */
  readonly settings?: HubSettings | undefined;
}

export interface Pulled {
  /** The snapshot's folder; of a name with a file, the path of that. */
  readonly path: string;
  readonly commit: string;
  /** Files of the model, of this precision. */
  readonly files: number;
  /** Their bytes. */
  readonly bytes: number;
  /** Bytes of the files that this call downloaded. */
  readonly downloaded: number;
}

/** Files that are downloaded at a time. */
const filesAtOnce = 4;

/** Progress is told so often, at most. */
const progressEveryMs = 100;

/** Failures of the hub that a copy in the cache makes up for. */
const fallbacks: readonly HubReason[] = ["unreachable", "gated", "unauthorized", "not_found"];

/** Where a model is on this machine. */
export interface Located {
  readonly path: string;
  /** That the hub could not be asked. */
  readonly warnings: readonly string[];
}

/**
 * The path of a model: of the folder or file that is called so, else of a model of the hub by that name, which is downloaded if
 * need be. A text that is neither is returned as it is.
 * Without a connection, or without the right to it, the copy that is in the cache is taken, with a warning.
 * @throws HubError; what `checkIndex` throws; `signal.reason` after an abort
 */
export async function locateModel(text: string, options: HubOptions = {}): Promise<Located> {
  const name = await hubNameOf(text);
  if (!name) return { path: text, warnings: [] };
  const settings = options.settings ?? (await readSettings());
  const cached = await findCached(name, settings, options);
  if (cached instanceof SelectionError) {
    if (settings.offline !== null) throw offlineError(name, settings, options, cached.message);
  } else if (settings.offline !== null || name.revision === cached.commit) return { path: cached.path, warnings: [] };
  const hasCopy = !(cached instanceof SelectionError);
  try {
    // With a copy at hand nobody waits for a hub that is away.
    const { path } = await pull(name, { ...options, settings: hasCopy ? { ...settings, attempts: 2 } : settings });
    return { path, warnings: [] };
  } catch (error) {
    if (!(error instanceof HubError)) throw error;
    if (hasCopy && fallbacks.includes(error.reason)) {
      const warning = `${error.message} The copy in the cache is used: commit ${cached.commit}.`;
      return { path: cached.path, warnings: [warning] };
    }
    if (error.reason !== "not_found") throw error;
    const message = `There is no folder ${path.resolve(text)}, and ${error.message}`;
    throw new HubError(error.repository, error.reason, message, { cause: error });
  }
}

/** The name that a text is; null for the path of something that is there, and for what is no name. */
export async function hubNameOf(text: string): Promise<HubName | null> {
  const isPath = await stat(text).then(
    () => true,
    (error) => !["ENOENT", "ENOTDIR", "EINVAL"].includes(codeOf(error)),
  );
  return isPath ? null : parseHubName(text);
}

/**
 * Downloads what a model needs and the cache lacks.
 * @throws HubError; what `checkIndex` throws; `signal.reason` after an abort
 */
export async function pull(name: HubName, options: HubOptions = {}): Promise<Pulled> {
  const settings = options.settings ?? (await readSettings());
  const { signal, logger } = options;
  signal?.throwIfAborted();
  if (settings.offline !== null) throw offlineError(name, settings, options, null);
  // All files have one signal, which also aborts when one of them fails.
  const { controller, unfollow } = following(signal);
  const client = new HubClient(settings, name, controller.signal);
  const cache = new ModelCache(settings.cache, name);
  try {
    const listing = await client.list();
    const fetching = new Fetching(client, cache, listing, controller, options);
    const { commit } = listing;
    const snapshot = cache.snapshot(commit);
    if (name.file !== null) {
      await fetching.fetch(selectFile(listing.files, name.file));
    } else {
      // 1. What kind of model it is, before anything large. A gated model is refused here.
      const first = firstFile(listing.files, options);
      await fetching.fetch([first]);
      await options.checkIndex?.(path.join(snapshot, first));
      // 2. Configs and indexes; 3. weights, once the indexes have named them.
      const { files, indexes } = select(listing.files, await readJson(snapshot, first), options);
      const small = files.filter((file) => file !== first && !file.endsWith(".safetensors"));
      await fetching.fetch(small);
      const shards = await Promise.all(
        indexes.map(async (index) => shardsOf(listing.files, index, await readJson(snapshot, index))),
      );
      const weights = [...files.filter((file) => file.endsWith(".safetensors")), ...shards.flat()];
      await fetching.fetch(weights, (count, bytes) =>
        logger?.info?.(`Downloading ${nameText(name)}: ${count} files, ${gigabytes(bytes)} GB, into ${snapshot}.`),
      );
    }
    // At last: whoever looks the revision up finds all files of the commit. A cache that lacks nothing need not be writable.
    await cache.keepRef(name.revision, commit).catch((error) => {
      if (fetching.downloaded > 0) throw error;
    });
    const { downloaded, count, bytes } = fetching;
    return { path: path.join(snapshot, name.file ?? ""), commit, files: count, bytes, downloaded };
  } catch (error) {
    signal?.throwIfAborted();
    throw explained(name, settings, client.failure(error));
  } finally {
    unfollow();
  }
}

/** The files of one call. */
class Fetching {
  /** Bytes that this call downloaded. */
  downloaded = 0;
  count = 0;
  bytes = 0;
  /** Bytes of the files that were not there at first, and of what has been finished of them. */
  #total = 0;
  #done = 0;
  readonly #underWay = new Map<HubFile, number>();
  #told = 0;

  constructor(
    private readonly client: HubClient,
    private readonly cache: ModelCache,
    private readonly listing: HubListing,
    private readonly controller: AbortController,
    private readonly options: HubOptions,
  ) {}

  /** @param announce told of how many files are not there */
  async fetch(paths: readonly string[], announce?: (count: number, bytes: number) => void): Promise<void> {
    const { commit } = this.listing;
    const all = paths.map((each) => this.listing.files.get(each)!);
    this.count += all.length;
    for (const { size } of all) this.bytes += size;
    const isThere = await Promise.all(all.map(({ path, size }) => this.cache.has(commit, path, size)));
    // The largest first, so that none of them is left alone at the end.
    const missing = all.filter((_, at) => !isThere[at]).sort((a, b) => b.size - a.size);
    if (missing.length === 0) return;
    await this.cache.makeFolders();
    await this.#checkSpace(missing);
    const bytes = missing.reduce((sum, { size }) => sum + size, 0);
    this.#total += bytes;
    announce?.(missing.length, bytes);
    const queue = missing.values();
    const worker = async () => {
      for (const file of queue) await this.#one(file);
    };
    const workers = Array.from({ length: Math.min(filesAtOnce, missing.length) }, worker);
    let failure: { error: unknown } | null = null;
    await Promise.all(
      workers.map((each) =>
        each.catch((error) => {
          failure ??= { error };
          this.controller.abort(error);
        }),
      ),
    );
    if (failure) throw (failure as { error: unknown }).error;
    this.#tell(true);
  }

  async #one(file: HubFile): Promise<void> {
    const { commit } = this.listing;
    const { signal } = this.controller;
    signal.throwIfAborted();
    const onBytes = (bytes: number) => {
      this.#underWay.set(file, bytes);
      this.#tell(false);
    };
    const isNew = await downloadBlob(this.client, this.cache, commit, file, signal, onBytes);
    try {
      await this.cache.addToSnapshot(commit, file.path, file.digest, isNew);
    } catch (error) {
      // Without links a file of the same contents may have taken them: then they are downloaded again.
      if (isNew || codeOf(error) !== "ENOENT") throw error;
      return this.#one(file);
    }
    if (isNew) this.downloaded += file.size;
    this.#underWay.delete(file);
    this.#done += file.size;
    this.#tell(false);
  }

  #tell(now: boolean): void {
    const { onDownload } = this.options;
    if (!onDownload || (!now && performance.now() - this.#told < progressEveryMs)) return;
    this.#told = performance.now();
    const files = [...this.#underWay].map(([{ path, size: total }, done]) => ({ path, done, total }));
    const done = files.reduce((sum, each) => sum + each.done, this.#done);
    onDownload({ done, total: this.#total, files });
  }

  async #checkSpace(files: readonly HubFile[]): Promise<void> {
    const there = await Promise.all(
      files.map(async ({ digest, size }) => {
        const blob = this.cache.blob(digest);
        return (await sizeOf(blob)) === size ? size : Math.max(0, await sizeOf(`${blob}.incomplete`));
      }),
    );
    const needed = files.reduce((sum, { size }, at) => sum + size - there[at]!, 0);
    // Some file systems tell nothing.
    const { bavail, bsize, blocks } = await statfs(this.cache.folder).catch(() => ({ bavail: 0, bsize: 0, blocks: 0 }));
    if (blocks > 0 && bavail * bsize < needed) throw new NoSpaceError(needed, bavail * bsize);
  }
}

class NoSpaceError extends Error {
  constructor(needed: number, free: number) {
    super(`${gigabytes(needed)} GB are to be downloaded, and ${gigabytes(free)} GB are free`);
  }
}

/** The copy of a revision in the cache; a SelectionError that says what it lacks. */
async function findCached(
  name: HubName,
  settings: HubSettings,
  options: HubOptions,
): Promise<{ path: string; commit: string } | SelectionError> {
  const cache = new ModelCache(settings.cache, name);
  const commit = await cache.commitOf(name.revision);
  if (commit === null) return new SelectionError(`has no revision "${name.revision}" of it`);
  const folder = cache.snapshot(commit);
  const paths = await cache.filesOf(commit);
  try {
    if (name.file !== null) {
      selectFile(paths, name.file);
      return { path: path.join(folder, name.file), commit };
    }
    const firsts = firstFiles(options);
    const first = firsts.find((file) => paths.has(file));
    if (first === undefined) return new SelectionError(`lacks its file ${firsts[0]} at commit ${commit}`);
    const { indexes } = select(paths, await readJson(folder, first), options);
    for (const index of indexes) shardsOf(paths, index, await readJson(folder, index));
    return { path: folder, commit };
  } catch (error) {
    if (error instanceof SelectionError) return error;
    throw error;
  }
}

/** @throws SelectionError for a file that is not JSON */
async function readJson(folder: string, file: string): Promise<unknown> {
  const text = await readFile(path.join(folder, file), "utf8");
  try {
    // A byte order mark is ignored, as in a folder.
    return JSON.parse(text.replace(/^\ufeff/, ""));
  } catch {
    throw new SelectionError(`has in ${file} no JSON`);
  }
}

function offlineError(
  name: HubName,
  { cache, offline }: HubSettings,
  { variant, textEncoder3 }: Wanted,
  lack: string | null,
): HubError {
  const text = nameText(name);
  const flags = `${variant === undefined ? "" : ` --variant ${variant}`}${textEncoder3 === false ? " --no-t5" : ""}`;
  return new HubError(
    name.repository,
    "offline",
    `${text} cannot be downloaded, since ${offline} is set${lack === null ? "" : `, and the cache ${cache} ${lack}`}. Run \`flowturbo pull ${text}${flags}\` without ${offline}.`,
  );
}

/** Every failure as an error that says what to do. */
function explained({ repository }: HubName, { cache }: HubSettings, error: unknown): unknown {
  if (error instanceof SelectionError)
    return new HubError(repository, "layout", `${repository} ${error.message}.`, { cause: error });
  const { code, message } = error as NodeJS.ErrnoException;
  const isFull = error instanceof NoSpaceError || code === "ENOSPC" || code === "EDQUOT";
  if (isFull)
    return new HubError(
      repository,
      "cache",
      `The disk of ${cache} has no room for ${repository}: ${message}. Free some, or set HF_HUB_CACHE to a folder elsewhere. What has been downloaded is kept.`,
      { cause: error },
    );
  if (error instanceof FlowTurboError || (error as NodeJS.ErrnoException).syscall === undefined) return error;
  const remedy = "Set HF_HUB_CACHE to a folder that can be written.";
  return new HubError(repository, "cache", `${repository} cannot be written to ${cache}: ${message}. ${remedy}`, {
    cause: error,
  });
}
