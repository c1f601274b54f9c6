/**
 * Cost tables on disk: one file for each model, runtime and machine, in the cache folder, beside the engines. Times are
 * not secret and not code: a file that cannot be read is as good as none, and the last writer of an entry wins.
 *
 *   $XDG_CACHE_HOME/flowturbo/costs/<key>.json
 */

import { createHash, randomBytes } from "node:crypto";
import { readFile, rename, rm, writeFile } from "node:fs/promises";
import os from "node:os";
import path from "node:path";
import { z } from "zod";
import { makeFolders } from "../common/files.js";
import type { CostEntry } from "./costs.js";

const fileSchema = z.object({
  format: z.literal(1),
  key: z.string(),
  entries: z.array(
    z.object({
      graph: z.string(),
      batch: z.int().min(1),
      size: z.string(),
      milliseconds: z.number().gt(0),
      low: z.number().gt(0),
      high: z.number().gt(0),
      runs: z.int().min(1),
    }),
  ),
});

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
  return createHash("sha256")
    .update(JSON.stringify({ format: 1, model, runtime, machine }))
    .digest("hex");
}

export class CostStore {
  readonly file: string;
  readonly key: string;
  #writing: Promise<void> = Promise.resolve();

  /** @param folder of all of this package's caches; default: `$XDG_CACHE_HOME/flowturbo` or `~/.cache/flowturbo` */
  constructor(key: string, folder: string = cacheFolder()) {
    this.key = key;
    this.file = path.join(path.resolve(folder), "costs", `${key.slice(0, 32)}.json`);
  }

  /** The stored entries; none if there is no file, or it is damaged or another's. */
  async read(): Promise<CostEntry[]> {
    try {
      const { key, entries } = fileSchema.parse(JSON.parse(await readFile(this.file, "utf8")));
      return key === this.key ? entries : [];
    } catch {
      return [];
    }
  }

  /**
   * Adds entries to those on disk, or replaces them. The file appears whole or not at all.
   * @param about for people who look into the file
   * @throws the file system's error
   */
  write(entries: readonly CostEntry[], about: Readonly<Record<string, unknown>>): Promise<void> {
    const write = async () => {
      const merged = new Map<string, CostEntry>();
      for (const entry of [...(await this.read()), ...entries])
        merged.set(JSON.stringify([entry.graph, entry.size, entry.batch]), entry);
      await makeFolders(path.dirname(this.file), [], 0o700);
      const temporary = `${this.file}.${randomBytes(6).toString("hex")}.tmp`;
      const content = { format: 1, key: this.key, ...about, entries: [...merged.values()] };
      try {
        await writeFile(temporary, `${JSON.stringify(content, null, 2)}\n`, { flag: "wx", mode: 0o600 });
        await rename(temporary, this.file);
      } catch (error) {
        await rm(temporary, { force: true });
        throw error;
      }
    };
    const written = this.#writing.then(write);
    this.#writing = written.catch(() => undefined);
    return written;
  }
}

function cacheFolder(): string {
  const base = process.env.XDG_CACHE_HOME;
  // The specification says to ignore a relative path.
  return path.join(base && path.isAbsolute(base) ? base : path.join(os.homedir(), ".cache"), "flowturbo");
}
