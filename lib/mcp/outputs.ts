/** Where a client may have pictures written: inside one folder, whatever it asks for, and over no file that is there. */

import { lstat, mkdir, realpath } from "node:fs/promises";
import path from "node:path";
import { makeFolders, writeFileAtomic } from "../common/files.js";
import { OptionError, OutputError } from "../errors.js";
import { formatOf } from "../generation/image.js";
import type { ImageFormat } from "../model.js";

export class OutputFolder {
  readonly #root: string;

  private constructor(root: string) {
    this.#root = root;
  }

  /** Makes the folder if there is none. @throws OutputError if that cannot be done */
  static async open(folder: string): Promise<OutputFolder> {
    try {
      await mkdir(folder, { recursive: true });
      return new OutputFolder(await realpath(folder));
    } catch (cause) {
      throw new OutputError(folder, `The folder ${folder} cannot be used: ${(cause as Error).message}.`, { cause });
    }
  }

  /**
   * A place inside the folder: a file, by the ending of its name, or a folder, in which files are named by their seeds.
   * @throws OptionError for a place outside, or another ending
   */
  place(wanted: string, preferred: ImageFormat): { readonly pattern: string; readonly format: ImageFormat } {
    const endings: Record<ImageFormat, string> = { png: "png", jpeg: "jpg", webp: "webp" };
    const isFolder = /[\\/]$/.test(wanted) || path.extname(wanted) === "";
    const file = isFolder ? path.join(wanted, `flowturbo-{seed}.${endings[preferred]}`) : wanted;
    const pattern = path.resolve(this.#root, file);
    if (!this.#isInside(pattern) || wanted.includes("\0"))
      throw new OptionError(
        "save_to",
        `Expected a file or folder inside the folder of pictures for save_to but received ${JSON.stringify(wanted.slice(0, 200))}. Give a relative path, such as "cat.png".`,
      );
    return { pattern, format: formatOf(pattern) };
  }

  /**
   * Writes a picture for each seed; several get their seeds or numbers into their names.
   * @returns the files
   * @throws OutputError for a file that is there already, that lies outside through a link, or that cannot be written
   */
  async write(
    pattern: string,
    pictures: readonly Uint8Array[],
    seeds: readonly (number | string)[],
  ): Promise<string[]> {
    const { dir, name, ext } = path.parse(pattern);
    const full = pictures.length > 1 && !name.includes("{seed}") ? `${name}-{index}` : name;
    const files = pictures.map((_, index) =>
      path.join(dir, `${full.replaceAll("{seed}", String(seeds[index])).replaceAll("{index}", String(index))}${ext}`),
    );
    for (const file of files) if (await isThere(file)) throw this.#refused(file, "there is such a file already");
    try {
      await this.#checkLinks(dir);
      await makeFolders(dir);
      for (const [index, file] of files.entries()) await writeFileAtomic(file, pictures[index]!);
    } catch (cause) {
      if (cause instanceof OutputError) throw cause;
      throw new OutputError(dir, `The pictures cannot be written to ${dir}: ${(cause as Error).message}`, { cause });
    }
    return files;
  }

  #isInside(file: string): boolean {
    const way = path.relative(this.#root, file);
    return way !== ".." && !way.startsWith(`..${path.sep}`) && !path.isAbsolute(way);
  }

  /** Of the folders on the way those that exist may be links to elsewhere. */
  async #checkLinks(folder: string): Promise<void> {
    let existing = folder;
    while (!(await isThere(existing))) existing = path.dirname(existing);
    if (!this.#isInside(await realpath(existing)))
      throw this.#refused(folder, "a link leads out of the folder of pictures");
  }

  #refused(file: string, reason: string): OutputError {
    return new OutputError(
      file,
      `The picture cannot be written to ${file}: ${reason}. Choose another name for save_to.`,
    );
  }
}

function isThere(file: string): Promise<boolean> {
  return lstat(file).then(
    () => true,
    () => false,
  );
}
