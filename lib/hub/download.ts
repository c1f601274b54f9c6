/**
 * One file's contents, into blobs/. What has arrived is kept under the name of the contents with `.incomplete`, as
 * huggingface_hub does, so that a later call goes on from there; it gets its own name when size and hash are as the listing says. Bytes are
 * written at their own places, not appended, so that two writers of one file write the same.
 */

import { createHash, type Hash } from "node:crypto";
import { type FileHandle, open, rename, rm } from "node:fs/promises";
import { type ModelCache, sizeOf } from "./cache.js";
import type { HubClient, HubFile } from "./client.js";
import { withLock } from "./lock.js";
import { TransientError } from "./retry.js";

const readAtOnce = 2 ** 20;

/**
 * @param onBytes called with the bytes that are there, as they arrive
 * @returns whether this call downloaded it: another process may have
 * @throws TransientError when no try is left; HubError; the file system's error; `signal.reason` after an abort
 */
export async function downloadBlob(
  client: HubClient,
  cache: ModelCache,
  commit: string,
  file: HubFile,
  signal: AbortSignal | undefined,
  onBytes: (bytes: number) => void,
): Promise<boolean> {
  const blob = cache.blob(file.digest);
  const isThere = async () => (await sizeOf(blob)) === file.size;
  if (await isThere()) return false;
  const waiting = async () => {
    // What the other one has.
    onBytes(Math.max(0, await sizeOf(`${blob}.incomplete`)));
    return isThere();
  };
  const downloaded = await withLock(cache.lock(file.digest), signal, waiting, async () => {
    if (await isThere()) return false;
    const incomplete = `${blob}.incomplete`;
    const partial = await Partial.open(incomplete, file, signal);
    try {
      onBytes(partial.offset);
      await client.retrying(() => fill(client, commit, partial, onBytes));
      await partial.handle.sync();
    } catch (error) {
      if (partial.offset === 0) await rm(incomplete, { force: true });
      throw error;
    } finally {
      await partial.handle.close();
    }
    await rename(incomplete, blob);
    return true;
  });
  return downloaded ?? false;
}

/** A file under way: the handle, how much of it is there, and the hash of that. */
class Partial {
  offset = 0;
  /** How often all of it was there, and was not what the hash says. */
  timesWrong = 0;
  #hash: Hash;

  private constructor(
    readonly handle: FileHandle,
    readonly file: HubFile,
  ) {
    this.#hash = startHash(file);
  }

  /** Goes on with what is there. */
  static async open(path: string, file: HubFile, signal: AbortSignal | undefined): Promise<Partial> {
    const size = await sizeOf(path);
    if (size > file.size) await rm(path, { force: true });
    // Neither cut nor appended to.
    const handle = await open(path, size >= 0 && size <= file.size ? "r+" : "w+");
    const partial = new Partial(handle, file);
    try {
      const buffer = Buffer.allocUnsafe(readAtOnce);
      for (;;) {
        const { bytesRead } = await handle.read(buffer, 0, readAtOnce, partial.offset);
        if (bytesRead === 0) return partial;
        signal?.throwIfAborted();
        partial.#hash.update(buffer.subarray(0, bytesRead));
        partial.offset += bytesRead;
      }
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  async add(bytes: Uint8Array): Promise<void> {
    for (let written = 0; written < bytes.length; )
      written += (await this.handle.write(bytes, written, bytes.length - written, this.offset + written)).bytesWritten;
    this.#hash.update(bytes);
    this.offset += bytes.length;
  }

  async restart(): Promise<void> {
    await this.handle.truncate(0);
    this.offset = 0;
    this.#hash = startHash(this.file);
  }

  /** Whether all of it is there, and right. */
  isWhole(): boolean {
    return this.offset === this.file.size && this.#hash.copy().digest("hex") === this.file.digest;
  }
}

function startHash({ digest, size }: HubFile): Hash {
  return digest.length === 64 ? createHash("sha256") : createHash("sha1").update(`blob ${size}\0`);
}

/** One try. */
async function fill(
  client: HubClient,
  commit: string,
  partial: Partial,
  onBytes: (bytes: number) => void,
): Promise<void> {
  const { file } = partial;
  const begin = partial.offset;
  const path = file.path;
  if (begin === file.size) {
    if (partial.isWhole()) return;
    await partial.restart();
  }
  const resumed = partial.offset > 0;
  try {
    await client.openFile({ path, commit }, partial.offset, async (response, alive) => {
      // A server may send all of it, or another part than was asked for.
      const from =
        response.status === 206 ? Number(response.headers.get("content-range")?.match(/^bytes (\d+)-/)?.[1]) : 0;
      if (from !== partial.offset) await partial.restart();
      if (from !== partial.offset) throw new TransientError(`${path} came from the wrong byte on`);
      for await (const bytes of response.body ?? []) {
        alive();
        if (partial.offset + bytes.length > file.size) throw await wrong("more bytes");
        await partial.add(bytes);
        onBytes(partial.offset);
      }
    });
  } catch (error) {
    if (!(error instanceof TransientError) || error.reason === "damaged") throw error;
    const { message, reason, retryAfterMs, cause } = error;
    throw new TransientError(message, reason, retryAfterMs, partial.offset > begin, { cause });
  }
  if (partial.offset < file.size)
    throw new TransientError(
      `the connection ended after ${partial.offset} of ${file.size} bytes of ${path}`,
      "unreachable",
      null,
      partial.offset > begin,
    );
  if (!partial.isWhole()) throw await wrong("other bytes");

  async function wrong(what: string): Promise<TransientError> {
    await partial.restart();
    onBytes(0);
    // What was there before may be to blame, and not the server: begun anew at once. A wait without end is for nobody.
    const wait = partial.timesWrong++ < 2 ? (resumed ? 0 : null) : Number.POSITIVE_INFINITY;
    return new TransientError(`${what} came for ${path} than its hash says`, "damaged", wait);
  }
}
