/**
 * SHA-256 of weight files, by content: an engine holds its weights, so a cache that went by names could answer with the
 * engine of other weights. Reading many gigabytes at every start would cost seconds, so digests are remembered for as
 * long as the operating system says that a file is the very same: device, inode, size, times of change of content and
 * of status, the last of which no program can set at will.
 */

import { createHash } from "node:crypto";
import { type FileHandle, open, readFile, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import type { FileVersion } from "../../common/files.js";
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

export class DigestMemory {
  readonly #file: string;
  #known: Promise<Map<string, string>> | undefined;
  readonly #underWay = new Map<string, Promise<FileDigest>>();

  /** @param folder a folder that only this user can write to */
  constructor(folder: string) {
    this.#file = path.join(folder, "weights.json");
  }

  /**
   * @param version what the file is expected to be
   * @param onBytes called with the bytes read so far
   * @throws CheckpointError if the file is missing or has changed since the checkpoint was opened; `signal.reason`
   */
  digest(
    version: FileVersion,
    options: { signal?: AbortSignal | undefined; onBytes?: ((bytes: number) => void) | undefined } = {},
  ): Promise<FileDigest> {
    // Several graphs of one file ask at the same time. An abort ends all of them: they belong to one call.
    let digest = this.#underWay.get(version.file);
    if (!digest) {
      digest = this.#digest(version, options).finally(() => this.#underWay.delete(version.file));
      this.#underWay.set(version.file, digest);
    }
    return digest;
  }

  async #digest(
    version: FileVersion,
    { signal, onBytes }: { signal?: AbortSignal | undefined; onBytes?: ((bytes: number) => void) | undefined },
  ): Promise<FileDigest> {
    const { file } = version;
    const changed = () =>
      new CheckpointError(file, `${file} has changed since the model was opened. Load the model again.`);
    let handle: FileHandle;
    try {
      handle = await open(file, "r");
    } catch (cause) {
      throw new CheckpointError(
        file,
        `Cannot read the weights: ${(cause as Error).message}. Is the file still there?`,
        {
          cause,
        },
      );
    }
    try {
      const stats = await handle.stat();
      if (stats.size !== version.size || stats.mtimeMs !== version.mtimeMs) throw changed();
      const identity = await fileIdentity(handle);
      const known = (await this.#load()).get(identity);
      if (known) return { identity, sha256: known };

      const sha256 = await hashFile(handle, { signal, onBytes });
      if ((await fileIdentity(handle)) !== identity) throw changed();
      const { ctimeNs } = await handle.stat({ bigint: true });
      if (BigInt(Date.now()) * 1_000_000n - ctimeNs > settledNanoseconds) await this.#remember(identity, sha256);
      return { identity, sha256 };
    } finally {
      await handle.close();
    }
  }

  #load(): Promise<Map<string, string>> {
    this.#known ??= readFile(this.#file, "utf8").then(
      (text) => new Map(Object.entries(JSON.parse(text) as Record<string, string>)),
      () => new Map<string, string>(),
    );
    return this.#known.catch(() => new Map<string, string>());
  }

  /** A memory that cannot be written costs time, not correctness. */
  async #remember(identity: string, sha256: string): Promise<void> {
    const known = await this.#load();
    known.set(identity, sha256);
    const temporary = `${this.#file}.${process.pid}.tmp`;
    try {
      await writeFile(temporary, JSON.stringify(Object.fromEntries(known), null, 1), { mode: 0o600 });
      await rename(temporary, this.#file);
    } catch {
      await rm(temporary, { force: true });
    }
  }
}

/** SHA-256 of a whole file, in hexadecimal. @throws `signal.reason` after an abort */
export async function hashFile(
  handle: FileHandle,
  options: { signal?: AbortSignal | undefined; onBytes?: ((bytes: number) => void) | undefined } = {},
): Promise<string> {
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
