/**
 * A lock between processes, so that no file is downloaded by two of them. It is a file that its owner touches; the lock
 * of a process that is gone is taken over. It only saves bandwidth: should two owners meet (clocks that differ, a file system
 * without exclusive creation), both write the same bytes to the same places, and the hash is checked before a file is used.
 */

import { randomBytes } from "node:crypto";
import { link, readFile, rename, rm, stat, utimes, writeFile } from "node:fs/promises";
import os from "node:os";
import { codeOf } from "./cache.js";
import { pause } from "./retry.js";

const touchEveryMs = 5_000;
const staleAfterMs = 30_000;
const pollMs = 100;

/**
 * Does the work while no other process or call has the lock.
 * @param waiting called again and again while another one has it; true ends the waiting, without the work
 * @returns null if the waiting was ended. @throws `signal.reason` after an abort
 */
export async function withLock<T>(
  file: string,
  signal: AbortSignal | undefined,
  waiting: () => Promise<boolean>,
  work: () => Promise<T>,
): Promise<T | null> {
  const owner = JSON.stringify({ host: os.hostname(), pid: process.pid, id: randomBytes(8).toString("hex") });
  while (!(await create(file, owner))) {
    if (await waiting()) return null;
    const found = await read(file);
    if (found?.isStale) await takeAway(file, found.owner);
    else await pause(pollMs, signal);
  }
  const touch = setInterval(() => {
    const now = new Date();
    utimes(file, now, now).catch(() => undefined);
  }, touchEveryMs).unref();
  try {
    return await work();
  } finally {
    clearInterval(touch);
    if ((await read(file))?.owner === owner) await rm(file, { force: true });
  }
}

async function create(file: string, owner: string): Promise<boolean> {
  return writeFile(file, owner, { flag: "wx" }).then(
    () => true,
    (error) => {
      if (codeOf(error) !== "EEXIST") throw error;
      return false;
    },
  );
}

/** Null for a lock that has been released. */
async function read(file: string): Promise<{ owner: string; isStale: boolean } | null> {
  try {
    const [owner, { mtimeMs }] = await Promise.all([readFile(file, "utf8"), stat(file)]);
    return { owner, isStale: Date.now() - mtimeMs > staleAfterMs || isGone(owner) };
  } catch {
    return null;
  }
}

/** Whether the owner is a process of this machine that has ended. */
function isGone(owner: string): boolean {
  try {
    const { host, pid } = JSON.parse(owner);
    if (host !== os.hostname()) return false;
    process.kill(pid, 0);
    return false;
  } catch (error) {
    return codeOf(error) === "ESRCH";
  }
}

/** Two processes may find the same lock stale: one that took away the other's new lock puts it back. */
async function takeAway(file: string, owner: string): Promise<void> {
  const aside = `${file}.${randomBytes(6).toString("hex")}`;
  try {
    await rename(file, aside);
  } catch {
    return;
  }
  if ((await readFile(aside, "utf8")) !== owner) await link(aside, file).catch(() => undefined);
  await rm(aside, { force: true });
}
