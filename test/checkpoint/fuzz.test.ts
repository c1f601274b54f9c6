/**
 * Damaged folders: a few changes at random to the files that are read as text (bytes, JSON values, whole files), and the
 * folder opens, or is refused with a CheckpointError that names a file. FUZZ_CASES says how many folders, FUZZ_SEED which:
 * a folder that fails is named by its seed, and FUZZ_CASES=1 FUZZ_SEED=<seed> makes it again.
 */

import { mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { cp, readdir, rename } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { CheckpointError } from "../../lib/errors.js";
import { copyModel, fixture, randomFrom, renameTensors } from "./folders.js";

const cases = Number(process.env.FUZZ_CASES ?? 300);
const firstSeed = Number(process.env.FUZZ_SEED ?? 1);
/** No folder takes a hundredth of it; one that hangs takes forever. */
const slowest = 20_000;

/** A folder with every kind of file, small enough to be opened thousands of times. */
async function makeFolder(): Promise<string> {
  const folder = await copyModel("large");
  const { tokenizers, contents } = JSON.parse(readFileSync(fixture("folders.json"), "utf8"));
  const t5 = tokenizers.find((each: { kind: string; files: object }) => each.kind === "t5");
  for (const [name, key] of Object.entries<string>(t5.files))
    writeFileSync(join(folder, "tokenizer_3", name), JSON.stringify(contents[key]));
  await cp(fixture("medium", "layout", "tokenizer_2"), join(folder, "tokenizer_2"), { recursive: true });
  for (const name of ["vocab.json", "merges.txt", "special_tokens_map.json"]) rmSync(join(folder, "tokenizer_2", name));
  for (const [part, name] of [
    ["transformer", "diffusion_pytorch_model"],
    ["text_encoder_3", "model"],
  ] as const) {
    const file = join(folder, part, `${name}.safetensors`);
    const names = renameTensors(file, (tensor) => tensor);
    const shard = `${name}-00001-of-00001.safetensors`;
    await rename(file, join(folder, part, shard));
    const weightMap = Object.fromEntries(names.map((tensor) => [tensor, shard]));
    writeFileSync(`${file}.index.json`, JSON.stringify({ metadata: { total_size: 1 }, weight_map: weightMap }));
  }
  return folder;
}

type Random = () => number;
type Json = null | boolean | number | string | Json[] | { [key: string]: Json };
const pick = <T>(random: Random, list: readonly T[]): T => list[Math.floor(random() * list.length)]!;

const values: readonly ((random: Random) => Json)[] = [
  () => null,
  (random) => random() < 0.5,
  (random) => pick(random, [0, -1, 1, 0.5, 1e308, -1e-320, 2 ** 31, 2 ** 53, 3.7e9]),
  (random) => pick(random, ["", "a", "../x", "__proto__", "\u0000", "\ud800", "é".repeat(5000), "<|endoftext|>", "4"]),
  () => [],
  () => ({}),
  () => [[[[[[[[]]]]]]]],
  (random) => ({ content: pick(random, ["", "a", " ", "\u2581"]), lstrip: true, normalized: true }),
  (random) => Array.from({ length: 2000 }, () => random()),
];

/** One change somewhere in a JSON value. */
function changed(json: Json, random: Random): Json {
  if (json === null || typeof json !== "object" || random() < 0.08) return pick(random, values)(random);
  const keys = Object.keys(json);
  const record = json as Record<string, Json>;
  if (keys.length === 0 || random() < 0.1) {
    const entry = pick(random, values)(random);
    return Array.isArray(json) ? [...json, entry] : { ...json, [pick(random, ["x", "_class_name", "1"])]: entry };
  }
  const key = pick(random, keys);
  const action = random();
  if (Array.isArray(json)) {
    const at = Number(key);
    if (action < 0.2) return json.filter((_, index) => index !== at);
    if (action < 0.3) return [...json, json[at]!];
    return json.map((value, index) => (index === at ? changed(value, random) : value));
  }
  const { [key]: value, ...others } = record;
  if (action < 0.2) return others;
  if (action < 0.3) return { ...others, [pick(random, [`${key}_`, "weight_map", "vocab"])]: value! };
  if (action < 0.4) return { ...record, [key]: record[pick(random, keys)]! };
  return { ...record, [key]: changed(value!, random) };
}

function changedBytes(bytes: Buffer, random: Random): Buffer {
  const at = Math.floor(random() * bytes.length);
  const some = Math.floor(random() * 40);
  const noise = Buffer.from(Array.from({ length: some }, () => Math.floor(random() * 256)));
  return pick(random, [
    () => bytes.subarray(0, at),
    () => Buffer.concat([bytes.subarray(0, at), noise, bytes.subarray(at)]),
    () => Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + some)]),
    () => Buffer.concat([bytes.subarray(0, at), bytes.subarray(Math.floor(random() * bytes.length))]),
    () => Buffer.concat([Buffer.from("\ufeff"), bytes]),
    () => Buffer.from(bytes.toString("utf8"), "utf16le"),
  ])();
}

/** Changes one file. */
function damage(file: string, all: ReadonlyMap<string, Buffer>, random: Random): void {
  const bytes = all.get(file)!;
  const kind = random();
  rmSync(file, { recursive: true, force: true });
  if (kind < 0.55 && file.endsWith(".json")) {
    let json: Json = JSON.parse(bytes.toString("utf8"));
    for (let times = 1 + Math.floor(random() * 3); times > 0; times--) json = changed(json, random);
    writeFileSync(file, JSON.stringify(json));
  } else if (kind < 0.85) writeFileSync(file, changedBytes(bytes, random));
  else if (kind < 0.89) writeFileSync(file, pick(random, [...all.values()]));
  else if (kind < 0.92) writeFileSync(file, "");
  else if (kind < 0.94) mkdirSync(file);
  else if (kind < 0.96) symlinkSync("nowhere", file);
}

test(`${cases} damaged folders open, or are refused with a file's name`, { timeout: 3_600_000 }, async () => {
  const folder = await makeFolder();
  const names = await readdir(folder, { recursive: true });
  const files = names.filter((name) => /\.(json|txt)$/.test(name)).map((name) => join(folder, name));
  const originals = new Map(files.map((file) => [file, readFileSync(file)]));
  expect(files.length).toBeGreaterThan(18);
  expect((await openCheckpoint(folder)).warnings).toEqual([]);

  const failures: string[] = [];
  const counts = { opened: 0, refused: 0 };
  for (let seed = firstSeed; seed < firstSeed + cases; seed++) {
    const random = randomFrom(seed);
    const touched = new Set(Array.from({ length: 1 + Math.floor(random() * 2) }, () => pick(random, files)));
    for (const file of touched) damage(file, originals, random);
    const start = performance.now();
    const fail = (what: string) => failures.push(`seed ${seed} (${[...touched].join(", ")}): ${what}`);
    try {
      const { tokenizer, tokenizer2, tokenizer3 } = await openCheckpoint(folder);
      counts.opened++;
      for (const each of [tokenizer, tokenizer2, tokenizer3]) {
        const { ids } = (await each?.encode("A red <cat> circle, ☃!", 16)) ?? { ids: [] };
        // The encoder has no rows for others: it would be refused, or read beyond its table.
        if ([...ids].some((id) => id < 0n || id >= BigInt(each!.vocabSize))) fail(`ids ${ids}`);
      }
    } catch (error) {
      counts.refused++;
      if (!(error instanceof CheckpointError)) fail(String((error as Error).stack ?? error));
      else if (!error.path.startsWith(folder) || !error.message.includes(folder))
        fail(`names no file: ${error.message}`);
    }
    if (performance.now() - start > slowest) fail(`took ${performance.now() - start} ms`);
    for (const file of touched) {
      rmSync(file, { recursive: true, force: true });
      writeFileSync(file, originals.get(file)!);
    }
  }
  expect(failures).toEqual([]);
  // Neither everything nor nothing: the changes reach what is checked.
  expect(counts.opened + counts.refused).toBe(cases);
  if (cases >= 100) for (const count of Object.values(counts)) expect(count).toBeGreaterThan(cases / 20);
});
