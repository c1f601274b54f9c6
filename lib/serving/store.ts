/**
 * Cost tables on disk: a folder for each model, runtime and machine, in the cache folder, beside the engines.
 *
 *   $XDG_CACHE_HOME/flowturbo/costs/<key>/<milliseconds>-<random>.json
 *
 * Several processes may write at once, without a lock: files never change. A writer merges all files that it can read with
 * its own entries into a new file, and removes exactly those that it has read, so that no entry is lost. The table is the
 * merge of all files, where the latest of several entries for the same launch counts. A process gives an entry a new time
 * only if it has measured it: entries that it read long ago do not replace later ones of other processes.
 *
 * A reset is a moment that every later file carries: entries from before it do not count, whoever writes them.
 */

import { createHash, randomBytes } from "node:crypto";
import { readdir, readFile, rm } from "node:fs/promises";
import path from "node:path";
import * as z from "zod";
import { defaultCacheFolder, makeFolders, writeFileAtomic } from "../common/files.js";
import type { CostEntry } from "./costs.js";

const format = 2;

const fileSchema = z.object({
  format: z.literal(format),
  key: z.string(),
  /** Entries that were measured up to this moment do not count, in milliseconds since 1970. */
  reset: z.number().min(0).default(0),
  entries: z.array(
    z.object({
      graph: z.string(),
      batch: z.int().min(1),
      size: z.string(),
      milliseconds: z.number().gt(0),
      low: z.number().gt(0),
      high: z.number().gt(0),
      runs: z.int().min(1),
      /** When it was measured, in milliseconds since 1970. */
      at: z.number().min(0),
    }),
  ),
});

/** Moments less than these milliseconds apart do not say which of two processes has measured later. */
const sameTime = 1000;

const fileName = /^\d+-[0-9a-f]{12}\.json$/;

/** What costs depend on. */
export interface CostSubject {
  /** Architecture of the networks and element types of their weights: fine-tunes of one model cost the same. */
  readonly model: unknown;
  /** Name, version and settings of the runtime. */
  readonly runtime: unknown;
  /** Processor, and device where there is one. */
  readonly machine: unknown;
}

/** SHA-256 of the subject. */
export function costKey(subject: CostSubject): string {
  const { model, runtime, machine } = subject;
  return createHash("sha256").update(JSON.stringify({ format, model, runtime, machine })).digest("hex");
}

export class CostStore {
  readonly folder: string;
  readonly key: string;
  /** By launch: entries as this store has read or written them. */
  readonly #known = new Map<string, CostEntry>();
  #reset = 0;
  #names: readonly string[] = [];
  #writing: Promise<unknown> = Promise.resolve();

  /** @param cache folder of all of this package's caches */
  constructor(key: string, cache: string = defaultCacheFolder()) {
    this.key = key;
    this.folder = path.join(path.resolve(cache), "costs", key.slice(0, 32));
  }

  /** The stored entries; none if there are no files, or they are damaged or another's. */
  async read(): Promise<CostEntry[]> {
    const { entries } = await this.#load();
    for (const [launch, entry] of entries) this.#known.set(launch, entry);
    return [...entries.values()];
  }

  /** Moment of the latest reset that any process has made, in milliseconds since 1970; 0 if there was none. */
  async lastReset(): Promise<number> {
    const names = await this.#list();
    if (names.some((name) => !this.#names.includes(name))) await this.#load();
    return this.#reset;
  }

  /** Forgets all entries, for every process. @throws the file system's error */
  reset(about: Readonly<Record<string, unknown>>): Promise<void> {
    return this.#inTurn(async () => {
      await makeFolders(this.folder, [], 0o700);
      const { entries, names } = await this.#load();
      // Later than all that it forgets, even if the clock went back.
      this.#reset = [...entries.values()].reduce(
        (latest, { at }) => Math.max(latest, at),
        Math.max(Date.now(), this.#reset + 1),
      );
      this.#known.clear();
      await this.#replace(names, [], about);
    });
  }

  /**
   * Adds entries to those on disk, or replaces them.
   * @param about for people who look into the files
   * @throws the file system's error
   */
  write(entries: readonly CostEntry[], about: Readonly<Record<string, unknown>>): Promise<void> {
    return this.#inTurn(async () => {
      await makeFolders(this.folder, [], 0o700);
      const knownReset = this.#reset;
      const { entries: merged, names } = await this.#load();
      // Of a reset that this process knew before, it has nothing left from before: its clock may be behind.
      const least = this.#reset === knownReset ? knownReset + 1 : 0;
      for (const entry of entries) {
        const launch = launchOf(entry);
        const known = this.#known.get(launch);
        const other = merged.get(launch)?.at ?? 0;
        // Measured at about the same time: the one that is written later counts. Later than what this process knew, even if
        // the clock went back.
        const after = entry.at > other - sameTime ? other : (known?.at ?? 0);
        const at = Math.max(entry.at, after + 1, least);
        const isKnown = known && textOf(known) === textOf(entry) && entry.at <= known.at;
        const own = isKnown ? known : { ...entry, at };
        if (own.at <= this.#reset) continue;
        this.#known.set(launch, own);
        mergeInto(merged, own);
      }
      await this.#replace(names, [...merged.values()], about);
    });
  }

  #inTurn(work: () => Promise<void>): Promise<void> {
    const done = this.#writing.then(work);
    this.#writing = done.catch(() => undefined);
    return done;
  }

  /** Writes a file in place of others. */
  async #replace(names: readonly string[], entries: readonly CostEntry[], about: Readonly<Record<string, unknown>>) {
    const name = `${Date.now()}-${randomBytes(6).toString("hex")}.json`;
    const content = { format, key: this.key, reset: this.#reset, ...about, entries };
    await writeFileAtomic(path.join(this.folder, name), `${JSON.stringify(content, null, 2)}\n`, { mode: 0o600 });
    for (const name of names) await rm(path.join(this.folder, name), { force: true });
    this.#names = [name];
  }

  async #list(): Promise<string[]> {
    const names = await readdir(this.folder).catch(() => []);
    return names.filter((name) => fileName.test(name));
  }

  /** All files that can be read, merged, and their names. */
  async #load() {
    const entries = new Map<string, CostEntry>();
    const names: string[] = [];
    const seen = new Set<string>();
    for (let isComplete = false; !isComplete; ) {
      isComplete = true;
      for (const name of await this.#list()) {
        if (seen.has(name)) continue;
        seen.add(name);
        try {
          const content = fileSchema.parse(JSON.parse(await readFile(path.join(this.folder, name), "utf8")));
          if (content.key !== this.key) continue;
          this.#reset = Math.max(this.#reset, content.reset);
          for (const entry of content.entries) mergeInto(entries, entry);
          names.push(name);
        } catch (error) {
          // A writer has merged it into a file that may not have been listed.
          if ((error as NodeJS.ErrnoException).code === "ENOENT") isComplete = false;
        }
      }
    }
    for (const [launch, { at }] of entries) if (at <= this.#reset) entries.delete(launch);
    this.#names = names;
    return { entries, names };
  }
}

/** Of several entries for a launch the latest counts. Of two from the same moment every process takes the same one. */
function mergeInto(entries: Map<string, CostEntry>, entry: CostEntry): void {
  const launch = launchOf(entry);
  const known = entries.get(launch);
  if (!known || entry.at > known.at || (entry.at === known.at && textOf(entry) > textOf(known)))
    entries.set(launch, entry);
}

function launchOf({ graph, size, batch }: CostEntry): string {
  return JSON.stringify([graph, size, batch]);
}

/** What was measured, without the time of it. */
function textOf({ graph, size, batch, milliseconds, low, high, runs }: CostEntry): string {
  return JSON.stringify([graph, size, batch, milliseconds, low, high, runs]);
}
