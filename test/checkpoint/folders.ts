/** Checkpoint folders for tests: the fixtures, and copies of them in temporary folders that a test may damage. */

import { readFileSync, writeFileSync } from "node:fs";
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

/** A .safetensors file of tensors of bytes, each with its own name as its value, padded to 64 bytes. */
export function safetensors(names: readonly string[]): Buffer {
  const length = 64;
  const header: Record<string, unknown> = { __metadata__: { format: "pt" } };
  for (const [place, name] of names.entries())
    header[name] = { dtype: "F32", shape: [length / 4], data_offsets: [place * length, (place + 1) * length] };
  const text = Buffer.from(JSON.stringify(header));
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([start, text, ...names.map((name) => Buffer.from(name.padEnd(length)))]);
}

/** Numbers from 0 to 1, the same ones for a seed (mulberry32). */
export function randomFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A .safetensors file with each tensor under the name that is given for it. @returns the names */
export function renameTensors(file: string, rename: (name: string) => string): string[] {
  const { header, data } = splitSafetensors(file);
  const renamed = Object.entries(header).map(([name, entry]) => [name === "__metadata__" ? name : rename(name), entry]);
  joinSafetensors(file, Object.fromEntries(renamed), data);
  return renamed.map(([name]) => name as string).filter((name) => name !== "__metadata__");
}

/** Multiplies the values of a .safetensors file of float32. */
export function scaleTensors(file: string, by: number): void {
  const { header, data } = splitSafetensors(file);
  for (let at = 0; at < data.length; at += 4) data.writeFloatLE(data.readFloatLE(at) * by, at);
  joinSafetensors(file, header, data);
}

function splitSafetensors(file: string) {
  const bytes = readFileSync(file);
  const length = Number(bytes.readBigUInt64LE());
  return { header: JSON.parse(bytes.toString("utf8", 8, 8 + length)) as object, data: bytes.subarray(8 + length) };
}

function joinSafetensors(file: string, header: object, data: Buffer): void {
  const text = Buffer.from(JSON.stringify(header));
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(file, Buffer.concat([start, text, data]));
}
