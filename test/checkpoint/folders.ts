/** Checkpoint folders for tests: the fixtures, and copies of them in temporary folders that a test may damage. */

import { cp, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll } from "vitest";

export const fixture = (...path: string[]) => join(fileURLToPath(new URL("../fixtures/", import.meta.url)), ...path);

export const shapes = fileURLToPath(new URL("../../models/shapes", import.meta.url));

const made: string[] = [];
afterAll(() => Promise.all(made.map((folder) => rm(folder, { recursive: true, force: true }))));

export async function temporaryFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "flowturbo-checkpoint-"));
  made.push(folder);
  return folder;
}

/** A copy of a fixture's model folder. */
export async function copyModel(name: "large" | "medium" | "sd3"): Promise<string> {
  const folder = join(await temporaryFolder(), "model");
  await cp(fixture(name, "model"), folder, { recursive: true });
  return folder;
}

// biome-ignore lint/suspicious/noExplicitAny: JSON that a test is about to damage has no type.
export async function editJson(file: string, edit: (json: any) => void): Promise<void> {
  const json = JSON.parse(await readFile(file, "utf8"));
  edit(json);
  await writeFile(file, JSON.stringify(json));
}
