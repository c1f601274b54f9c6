/**
 * Where results are kept until they are fetched, and for a while after, by the hash of what was asked: on Redis, or as files in a folder that
 * all processes of the fleet share. Each is written once; who comes second with the same hash changes nothing.
 */

import { randomBytes } from "node:crypto";
import { link, mkdir, open, readdir, readFile, rm, stat, utimes } from "node:fs/promises";
import path from "node:path";
import { OutputError } from "../errors.js";
import type { FleetRedis } from "./redis.js";

export interface ResultStore {
  get(hash: string): Promise<Buffer | null>;
  has(hash: string): Promise<boolean>;
  /** @param briefly whether it is kept only until it is fetched: nobody can ask for the same again */
  put(hash: string, bytes: Buffer, briefly: boolean): Promise<void>;
  /** Removes those that are old, where nothing else does. */
  sweep(): Promise<void>;
}

/** A result that nobody can ask for again is kept so long, in milliseconds: for a gateway that was away. */
const brieflyMs = 120_000;

/** @param folder that all of the fleet share; without one results are in Redis. @throws OutputError if it cannot be made or written */
export async function openResults(redis: FleetRedis, folder: string | undefined, keepMs: number): Promise<ResultStore> {
  return folder === undefined ? new RedisResults(redis, keepMs) : FolderResults.open(folder, keepMs);
}

/** In Redis, which forgets them by itself. */
class RedisResults implements ResultStore {
  readonly #redis: FleetRedis;
  readonly #keepMs: number;

  constructor(redis: FleetRedis, keepMs: number) {
    this.#redis = redis;
    this.#keepMs = keepMs;
  }

  get(hash: string): Promise<Buffer | null> {
    return this.#redis.client.getBuffer(this.#key(hash));
  }

  async has(hash: string): Promise<boolean> {
    return (await this.#redis.client.exists(this.#key(hash))) === 1;
  }

  async put(hash: string, bytes: Buffer, briefly: boolean): Promise<void> {
    const keepMs = briefly ? Math.min(brieflyMs, this.#keepMs) : this.#keepMs;
    await this.#redis.client.set(this.#key(hash), bytes, "PX", keepMs, "NX");
  }

  async sweep(): Promise<void> {}

  #key(hash: string): string {
    return this.#redis.key("result", hash);
  }
}

/** As files of a folder, readable by their owner alone. */
class FolderResults implements ResultStore {
  readonly #folder: string;
  readonly #keepMs: number;

  /** @throws OutputError if the folder cannot be made or written */
  static async open(folder: string, keepMs: number): Promise<FolderResults> {
    const results = new FolderResults(path.resolve(folder), keepMs);
    try {
      await makeFolder(results.#folder);
      await rm(await results.#write(Buffer.alloc(0)));
    } catch (cause) {
      throw new OutputError(
        results.#folder,
        `Results cannot be written into ${results.#folder}: ${(cause as Error).message}. Name a folder that this user may write, on a volume that workers and gateways share.`,
        { cause },
      );
    }
    return results;
  }

  private constructor(folder: string, keepMs: number) {
    this.#folder = folder;
    this.#keepMs = keepMs;
  }

  async get(hash: string): Promise<Buffer | null> {
    return readFile(this.#file(hash)).catch(absent);
  }

  async has(hash: string): Promise<boolean> {
    return (await stat(this.#file(hash)).catch(absent)) !== null;
  }

  async put(hash: string, bytes: Buffer, briefly: boolean): Promise<void> {
    const written = await this.#write(bytes);
    try {
      if (briefly) {
        const at = new Date(Date.now() - Math.max(0, this.#keepMs - brieflyMs));
        await utimes(written, at, at);
      }
      // Unlike a rename it leaves one that is there.
      await link(written, this.#file(hash)).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== "EEXIST") throw error;
      });
    } finally {
      await rm(written, { force: true });
    }
  }

  /** Several processes may do so at the same time. */
  async sweep(): Promise<void> {
    for (const name of await readdir(this.#folder)) {
      if (!/^[0-9a-f]{64}$|\.part$/.test(name)) continue;
      const file = path.join(this.#folder, name);
      const found = await stat(file).catch(absent);
      if (found && Date.now() - found.mtimeMs > this.#keepMs) await rm(file, { force: true });
    }
  }

  #file(hash: string): string {
    return path.join(this.#folder, hash);
  }

  async #write(bytes: Buffer): Promise<string> {
    const file = path.join(this.#folder, `${randomBytes(12).toString("hex")}.part`);
    await using handle = await open(file, "wx", 0o600);
    await handle.writeFile(bytes);
    await handle.sync();
    return file;
  }
}

/** With those above it. Node's own way of doing so does not end where the system says that there is no such place, as in /proc. */
async function makeFolder(folder: string): Promise<void> {
  const make = () =>
    mkdir(folder, { mode: 0o700 }).catch(async (error: NodeJS.ErrnoException) => {
      if (error.code !== "EEXIST" || !(await stat(folder)).isDirectory()) throw error;
    });
  const parent = path.dirname(folder);
  await make().catch(async (error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT" || parent === folder) throw error;
    await makeFolder(parent);
    await make();
  });
}

function absent(error: NodeJS.ErrnoException): null {
  if (error.code !== "ENOENT") throw error;
  return null;
}
