/**
 * The cache's layout, which Python's huggingface_hub made and other programs share:
 *
 *     models--owner--name/refs/main                     the commit of a branch, a tag or a pull request
 *     models--owner--name/blobs/<sha256 or git hash>    contents
 *     models--owner--name/snapshots/<commit>/<path>     links into blobs/
 *
 * Whatever is there under its name is whole: contents, links and refs are put in place by renaming.
 */

import { randomBytes } from "node:crypto";
import { copyFile, mkdir, readdir, readFile, rename, rm, stat, symlink } from "node:fs/promises";
import path from "node:path";
import { writeFileAtomic } from "../common/files.js";
import type { HubName } from "./name.js";

const commitForm = /^[0-9a-f]{40}$/;

/** The part of the cache that holds one model. */
export class ModelCache {
  readonly folder: string;
  readonly #locks: string;

  constructor(cache: string, { repository }: Pick<HubName, "repository">) {
    const name = `models--${repository.replace("/", "--")}`;
    this.folder = path.join(cache, name);
    // Beside the locks of huggingface_hub, which a process holds as long as it has them open; Node cannot.
    this.#locks = path.join(cache, ".locks", name);
  }

  snapshot(commit: string): string {
    return path.join(this.folder, "snapshots", commit);
  }

  blob(digest: string): string {
    return path.join(this.folder, "blobs", digest);
  }

  lock(digest: string): string {
    return path.join(this.#locks, `${digest}.owner`);
  }

  async makeFolders(): Promise<void> {
    // huggingface_hub takes a model without snapshots/ for damaged.
    for (const folder of ["blobs", "snapshots"]) await mkdir(path.join(this.folder, folder), { recursive: true });
    await mkdir(this.#locks, { recursive: true });
  }

  /** The commit that a revision was when it was last downloaded; null if it never was. */
  async commitOf(revision: string): Promise<string | null> {
    if (commitForm.test(revision)) return revision;
    const commit = (await readFile(this.#ref(revision), "utf8").catch(() => "")).trim();
    return commitForm.test(commit) ? commit : null;
  }

  /** Notes the commit of a revision. A cache that cannot be written keeps what it has. */
  async keepRef(revision: string, commit: string): Promise<void> {
    if (revision === commit || (await this.commitOf(revision)) === commit) return;
    const file = this.#ref(revision);
    await mkdir(path.dirname(file), { recursive: true });
    await writeFileAtomic(file, commit);
  }

  /** Paths of a snapshot's files, of those whose contents are there. */
  async filesOf(commit: string): Promise<Set<string>> {
    const root = this.snapshot(commit);
    const names = await readdir(root, { recursive: true }).catch((): string[] => []);
    const found = await Promise.all(
      names.map(async (name) => ((await sizeOf(path.join(root, name))) < 0 ? [] : [name])),
    );
    return new Set(found.flat().map((name) => name.split(path.sep).join("/")));
  }

  /** Whether the snapshot has a file of this size. */
  async has(commit: string, file: string, size: number): Promise<boolean> {
    return (await sizeOf(path.join(this.snapshot(commit), file))) === size;
  }

  /**
   * Puts a file into a snapshot, as a link to its contents.
   * @param isNew whether the contents were downloaded for it, so that no other snapshot can need them
   */
  async addToSnapshot(commit: string, file: string, digest: string, isNew: boolean): Promise<void> {
    const pointer = path.join(this.snapshot(commit), file);
    const blob = this.blob(digest);
    await mkdir(path.dirname(pointer), { recursive: true });
    const temporary = `${pointer}.${randomBytes(6).toString("hex")}.tmp`;
    try {
      await symlink(path.relative(path.dirname(pointer), blob), temporary);
    } catch (error) {
      // Windows allows links to administrators and developers only: the file itself stands there then, as in huggingface_hub.
      if (!["EPERM", "EACCES", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "UNKNOWN"].includes(codeOf(error))) throw error;
      if (isNew) return rename(blob, pointer);
      await copyFile(blob, temporary);
    }
    await rename(temporary, pointer).catch(async (error) => {
      await rm(temporary, { force: true });
      throw error;
    });
  }

  #ref(revision: string): string {
    return path.join(this.folder, "refs", revision);
  }
}

/** Bytes of a file, following links; -1 without one. */
export async function sizeOf(file: string): Promise<number> {
  return stat(file).then(
    (found) => (found.isFile() ? found.size : -1),
    () => -1,
  );
}

export function codeOf(error: unknown): string {
  return String((error as NodeJS.ErrnoException | null)?.code ?? "");
}
