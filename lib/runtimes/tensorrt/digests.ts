/**
 * SHA-256 of weight files, by content: an engine holds its weights, so a cache that went by names could answer with the
 * engine of other weights. Reading many gigabytes at every start would cost seconds, so digests are remembered for as
 * long as the operating system says that a file is the very same: device, inode, size, times of change of content and
 * of status, the last of which no program can set at will.
 */

import { createHash } from "node:crypto";
import { type FileHandle, open, readFile } from "node:fs/promises";
import path from "node:path";
import { following, SharedTask } from "../../common/abort.js";
import { type FileVersion, writeFileAtomic } from "../../common/files.js";
import { CheckpointError } from "../../errors.js";

/** "device:inode:size:mtime:ctime", times in nanoseconds; the addon makes the same string (native/core/files.cpp). */
export async function fileIdentity(handle: FileHandle): Promise<string> {
  const { dev, ino, size, mtimeNs, ctimeNs } = await handle.stat({ bigint: true });
  return [dev, ino, size, mtimeNs, ctimeNs].join(":");
}

export interface FileDigest {
  readonly identity: string;
  readonly sha256: string;
}

/** A file that changed within this time of being read may change again within one tick of its clock. */
const settledNanoseconds = 2_000_000_000n;

interface ReadOptions {
  readonly signal?: AbortSignal | undefined;
  /** Called with the bytes read so far. */
  readonly onBytes?: ((bytes: number) => void) | undefined;
}

/** A file that is being read, shared by all that ask for it meanwhile. */
interface Reading {
  readonly task: SharedTask<FileDigest>;
  readonly listeners: Set<(bytes: number) => void>;
}

export class DigestMemory {
  readonly #folder: string;
  readonly #underWay = new Map<string, Reading>();

  /** @param folder a folder that only this user can write to */
  constructor(folder: string) {
    this.#folder = folder;
  }

  /**
   * @param version what the file is expected to be
   * @throws CheckpointError if the file is missing or has changed since the checkpoint was opened; `signal.reason`
   */
  async digest(version: FileVersion, { signal, onBytes = () => {} }: ReadOptions = {}): Promise<FileDigest> {
    signal?.throwIfAborted();
    const key = JSON.stringify(version);
    let reading = this.#underWay.get(key);
    if (!reading || reading.task.abandoned) {
      reading = this.#read(key, version);
      this.#underWay.set(key, reading);
    }
    const { task, listeners } = reading;
    // A listener that throws ends its own call: others wait for the same file.
    const { controller, unfollow } = following(signal);
    const listener = (bytes: number) => {
      try {
        onBytes(bytes);
      } catch (error) {
        listeners.delete(listener);
        controller.abort(error);
      }
    };
    listeners.add(listener);
    return task.join(controller.signal).finally(() => {
      listeners.delete(listener);
      unfollow();
    });
  }

  #read(key: string, version: FileVersion): Reading {
    const listeners: Reading["listeners"] = new Set();
    const onBytes = (bytes: number) => {
      for (const listener of listeners) listener(bytes);
    };
    const task = new SharedTask((signal) =>
      this.#digest(version, { signal, onBytes }).finally(() => {
        if (this.#underWay.get(key)?.task === task) this.#underWay.delete(key);
      }),
    );
    return { task, listeners };
  }

  async #digest(version: FileVersion, { signal, onBytes }: ReadOptions): Promise<FileDigest> {
    const { file } = version;
    const changed = () =>
      new CheckpointError(file, `${file} has changed since the model was opened. Load the model again.`);
    await using handle = await open(file, "r").catch((cause: Error) => {
      const message = `Cannot read the weights: ${cause.message}. Is the file still there?`;
      throw new CheckpointError(file, message, { cause });
    });
    const stats = await handle.stat();
    if (stats.size !== version.size || stats.mtimeMs !== version.mtimeMs) throw changed();
    const identity = await fileIdentity(handle);
    const known = await this.#known(identity);
    if (known) return { identity, sha256: known };

    const sha256 = await hashFile(handle, { signal, onBytes });
    if ((await fileIdentity(handle)) !== identity) throw changed();
    const { ctimeNs } = await handle.stat({ bigint: true });
    if (BigInt(Date.now()) * 1_000_000n - ctimeNs > settledNanoseconds) await this.#remember({ identity, sha256 });
    return { identity, sha256 };
  }

  /** One file for each digest: processes that remember at the same time do not touch each other's. */
  #fileOf(identity: string): string {
    const name = createHash("sha256").update(identity).digest("hex").slice(0, 32);
    return path.join(this.#folder, `digest-${name}.json`);
  }

  async #known(identity: string): Promise<string | null> {
    try {
      const kept = JSON.parse(await readFile(this.#fileOf(identity), "utf8")) as Partial<FileDigest>;
      return kept.identity === identity && /^[0-9a-f]{64}$/.test(kept.sha256 ?? "") ? kept.sha256! : null;
    } catch {
      return null;
    }
  }

  /** A digest that cannot be written costs time, not correctness. */
  async #remember(digest: FileDigest): Promise<void> {
    await writeFileAtomic(this.#fileOf(digest.identity), JSON.stringify(digest), { mode: 0o600 }).catch(
      () => undefined,
    );
  }
}

/** SHA-256 of all of a file, in hexadecimal. @throws `signal.reason` after an abort */
export async function hashFile(handle: FileHandle, options: ReadOptions = {}): Promise<string> {
  const hash = createHash("sha256");
  const buffer = Buffer.allocUnsafe(4 * 2 ** 20);
  let position = 0;
  for (;;) {
    options.signal?.throwIfAborted();
    const { bytesRead } = await handle.read(buffer, 0, buffer.length, position);
    if (bytesRead === 0) return hash.digest("hex");
    hash.update(buffer.subarray(0, bytesRead));
    position += bytesRead;
    options.onBytes?.(position);
  }
}
