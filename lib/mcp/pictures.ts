/** Pictures that a client names: the path of a file of this machine, a data: URL, or base64. */

import { readFile, stat } from "node:fs/promises";
import { OptionError } from "../errors.js";

/** Bytes of a picture's file. */
const largest = 64 * 2 ** 20;

/** How files of pictures begin: PNG, JPEG, WebP, GIF, TIFF. What is base64 of none of them is taken for a path. */
const beginnings = ["89504e47", "ffd8ff", "52494646", "47494638", "49492a00", "4d4d002a"];

/**
 * @param option the field, for messages
 * @throws OptionError for what is neither, and for a file that cannot be read
 */
export async function readPicture(option: string, text: string): Promise<Uint8Array> {
  const [, data] = text.match(/^data:image\/[\w.+-]+;base64,(.*)$/s) ?? [];
  const encoded = data ?? text;
  if (/^[A-Za-z0-9+/\s]+={0,2}\s*$/.test(encoded)) {
    const bytes = Buffer.from(encoded, "base64");
    if (beginnings.some((beginning) => bytes.subarray(0, 4).toString("hex").startsWith(beginning))) return bytes;
  }
  if (text.startsWith("data:"))
    throw new OptionError(option, `Expected a data: URL of a picture in base64 for ${option}.`);
  if (/^https?:/i.test(text))
    throw new OptionError(
      option,
      `Expected a file's path or base64 for ${option} but received an address. Nothing is downloaded; give the path of a local file.`,
    );
  try {
    const file = await stat(text);
    if (!file.isFile()) throw new Error("it is no file");
    if (file.size > largest) throw new Error(`it has more than ${largest / 2 ** 20} MiB`);
    return await readFile(text);
  } catch (cause) {
    const shown = JSON.stringify(text.slice(0, 200));
    throw new OptionError(
      option,
      `The picture ${shown} for ${option} cannot be read: ${(cause as Error).message}. Give the absolute path of a file, or base64.`,
      { cause },
    );
  }
}
