/** Files of a checkpoint as text and JSON: whatever is wrong with one is a CheckpointError that says what to do. */

import { constants } from "node:fs";
import { readFile, stat } from "node:fs/promises";
import { CheckpointError } from "../errors.js";

/** To open a file for reading. A pipe in its place, which nobody may ever write to, is not waited for. Windows has no such flag. */
export const toRead = constants.O_RDONLY | (constants.O_NONBLOCK ?? 0);

/** An object of a JSON file, unchecked. */
export type JsonObject = Record<string, unknown>;

export function isRecord(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/**
 * A file's text, without a byte order mark: some editors of Windows put one before it.
 * @throws CheckpointError if the file is missing, cannot be read or is in UTF-16
 */
export async function readText(file: string): Promise<string> {
  const bytes = await readFile(file, { flag: toRead }).catch((cause: NodeJS.ErrnoException) => {
    if (cause.code === "ENOENT")
      throw new CheckpointError(file, `${file} is missing. Download the checkpoint's remaining files.`, { cause });
    throw new CheckpointError(file, `Cannot read ${file}: ${cause.message}.`, { cause });
  });
  // What `>` of PowerShell 5 writes; as UTF-8 it would be said to be damaged.
  if (/^(fffe|feff)/.test(bytes.toString("hex", 0, 2)))
    throw new CheckpointError(file, `${file} is encoded in UTF-16. Save it in UTF-8.`);
  return bytes.toString("utf8").replace(/^\ufeff/, "");
}

const downloadAgain = "Download the file again.";

/**
 * @param remedy said of a file that is not whole
 * @throws CheckpointError if the file is missing, cannot be read, is not JSON or holds something else than an object
 */
export async function readJsonObject(file: string, remedy = downloadAgain): Promise<JsonObject> {
  const text = await readText(file);
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    const { message } = cause as Error;
    throw new CheckpointError(file, `${file} is not JSON (${message}). ${remedy}`, { cause });
  }
  if (isRecord(json)) return json;
  throw new CheckpointError(file, `${file} does not hold a JSON object. ${remedy}`);
}

/** @throws CheckpointError for a file that is there and cannot be used. @returns undefined without the file */
export async function readOptionalJson(file: string, remedy?: string): Promise<JsonObject | undefined> {
  return (await exists(file)) ? readJsonObject(file, remedy) : undefined;
}

export async function exists(path: string): Promise<boolean> {
  return (await stat(path).catch(() => null)) !== null;
}

export async function isFile(path: string): Promise<boolean> {
  return (await stat(path).catch(() => null))?.isFile() ?? false;
}

export async function isFolder(path: string): Promise<boolean> {
  return (await stat(path).catch(() => null))?.isDirectory() ?? false;
}
