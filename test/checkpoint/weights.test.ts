/**
 * One file, shards, variants in every spelling, and a Hugging Face cache's links: the same tensors in each. And an index
 * that must not be believed: names that leave the folder, shards that are missing or hold something else.
 */

import { copyFile, mkdir, open, readdir, readFile, realpath, rename, rm, symlink, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { beforeEach, describe, expect, test } from "vitest";
import { openWeights, readSafetensorsHeader } from "../../lib/checkpoint/index.js";
import { CheckpointError } from "../../lib/errors.js";
import { editJson, fixture, temporaryFolder } from "./folders.js";

const original = fixture("medium", "model/transformer/diffusion_pytorch_model.safetensors");
const base = "diffusion_pytorch_model";
let folder: string;
beforeEach(async () => {
  folder = await temporaryFolder();
});

/** Splits the original's tensors over files of the given names, and writes an index. */
async function split(shards: string[], index: string): Promise<void> {
  const header = [...(await readSafetensorsHeader(original)).values()];
  const bytes = await readFile(original);
  const weightMap: Record<string, string> = {};
  for (const [k, shard] of shards.entries()) {
    const entries = header.filter((_, i) => i % shards.length === k);
    const json: Record<string, unknown> = { __metadata__: { format: "pt" } };
    let end = 0;
    for (const { name, dtype, shape, length } of entries) {
      json[name] = { dtype, shape, data_offsets: [end, end + length] };
      end += length;
      weightMap[name] = shard;
    }
    const text = Buffer.from(JSON.stringify(json));
    const start = Buffer.alloc(8);
    start.writeBigUInt64LE(BigInt(text.length));
    const data = entries.map(({ offset, length }) => bytes.subarray(offset, offset + length));
    await writeFile(join(folder, shard), Buffer.concat([start, text, ...data]));
  }
  await writeFile(join(folder, index), JSON.stringify({ metadata: {}, weight_map: weightMap }));
}

/** Every tensor is found, with the bytes it has in the original. */
async function expectSameTensors(variant?: string): Promise<void> {
  const weights = await openWeights(folder, base, { variant });
  const header = await readSafetensorsHeader(original);
  expect([...weights.names].sort()).toEqual([...header.keys()].sort());
  const bytes = await readFile(original);
  const opened = new Map<string, Buffer>();
  for (const entry of header.values()) {
    const stored = weights.find(entry.name)!;
    expect(stored).toMatchObject({ name: entry.name, dtype: "BF16", shape: entry.shape, length: entry.length });
    if (!opened.has(stored.file)) opened.set(stored.file, await readFile(stored.file));
    const here = opened.get(stored.file)!.subarray(stored.offset, stored.offset + stored.length);
    expect(here.equals(bytes.subarray(entry.offset, entry.offset + entry.length))).toBe(true);
  }
}

async function expectError(message: RegExp, variant?: string): Promise<void> {
  const error = await openWeights(folder, base, { variant }).catch((e) => e);
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.message).toMatch(message);
}

const shardNames = (stem: string) => [1, 2, 3].map((i) => `${stem}-0000${i}-of-00003.safetensors`);

describe("layouts", () => {
  test("one file", async () => {
    await copyFile(original, join(folder, `${base}.safetensors`));
    await expectSameTensors();
    const weights = await openWeights(folder, base);
    expect(weights).toMatchObject({ origin: folder, variant: null, variantsFound: [] });
    expect(weights.files.map(({ file }) => file)).toEqual([await realpath(join(folder, `${base}.safetensors`))]);
    expect(weights.find("no.such.tensor")).toBeUndefined();
    expect(weights.find("__proto__")).toBeUndefined();
  });

  test("shards", async () => {
    await split(shardNames(base), `${base}.safetensors.index.json`);
    await expectSameTensors();
    expect((await openWeights(folder, base)).files).toHaveLength(3);
  });

  test("a variant in one file", async () => {
    await copyFile(original, join(folder, `${base}.fp16.safetensors`));
    await expectSameTensors("fp16");
    expect(await openWeights(folder, base, { variant: "fp16" })).toMatchObject({ variant: "fp16" });
  });

  for (const [index, stem] of [
    [`${base}.safetensors.index.fp16.json`, `${base}.fp16`],
    [`${base}.fp16.safetensors.index.json`, `${base}.fp16`],
    [`${base}.safetensors.fp16.index.json`, base],
  ] as const)
    test(`a variant in shards, ${index}`, async () => {
      await split(shardNames(stem), index);
      await expectSameTensors("fp16");
      await expectError(/variant "fp16": pass variant "fp16"/);
    });

  test("plain and variant side by side: each when asked for; the plain one where the variant is missing", async () => {
    await copyFile(original, join(folder, `${base}.safetensors`));
    await split(shardNames(`${base}.fp16`), `${base}.safetensors.index.fp16.json`);
    expect(await openWeights(folder, base)).toMatchObject({ variant: null, variantsFound: ["fp16"] });
    expect((await openWeights(folder, base, { variant: "fp16" })).files).toHaveLength(3);
    expect((await openWeights(folder, base, { variant: "bf16" })).variant).toBeNull();
  });

  test("links into a cache's blobs resolve to the blobs", async () => {
    const stage = folder;
    await split(shardNames(base), `${base}.safetensors.index.json`);
    const repository = await temporaryFolder();
    folder = join(repository, "snapshots", "abc", "transformer");
    await mkdir(folder, { recursive: true });
    await mkdir(join(repository, "blobs"));
    for (const [i, name] of (await readdir(stage)).entries()) {
      await rename(join(stage, name), join(repository, "blobs", `hash${i}`));
      await symlink(`../../../blobs/hash${i}`, join(folder, name));
    }
    await expectSameTensors();
    const blobs = await realpath(join(repository, "blobs"));
    for (const { file } of (await openWeights(folder, base)).files) expect(dirname(file)).toBe(blobs);
  });
});

describe("errors", () => {
  test("no folder, a file instead, an empty folder", async () => {
    await expectError(/has no weights: expected diffusion_pytorch_model\.safetensors/);
    const parent = folder;
    folder = join(parent, "missing");
    await expectError(/does not exist/);
    await writeFile(folder, "");
    await expectError(/is not a folder/);
  });

  for (const name of [`${base}.bin`, `${base}.pt`, "model.ckpt"])
    test(`only ${name}`, async () => {
      await writeFile(join(folder, name), "");
      await expectError(/Convert the checkpoint to safetensors/);
    });

  test("only files of other formats", async () => {
    await writeFile(join(folder, "model.gguf"), "");
    await expectError(/holds "model\.gguf", which cannot be read\. Download its \.safetensors files/);
  });

  test("another variant only", async () => {
    await copyFile(original, join(folder, `${base}.fp16.safetensors`));
    await expectError(/neither the variant "bf16".*but the variant "fp16"/, "bf16");
  });

  test("a link without a target", async () => {
    await symlink("../../blobs/none", join(folder, `${base}.safetensors`));
    await expectError(/symbolic link.*missing/);
  });

  const index = `${base}.safetensors.index.json`;
  for (const name of [
    "../x.safetensors",
    "/etc/x.safetensors",
    "sub/x.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    "..",
    ".",
    "",
    "a/../x.safetensors",
  ])
    test(`an index that names ${JSON.stringify(name)}`, async () => {
      await split(shardNames(base), index);
      await editJson(join(folder, index), (json) => {
        json.weight_map["pos_embed.pos_embed"] = name;
      });
      await expectError(/leaves its folder/);
    });

  test("an index of other files, damaged, or of another shape", async () => {
    await writeFile(join(folder, index), '{"weight_map":{"a":"pytorch_model.bin"}}');
    await expectError(/not a \.safetensors file/);
    await writeFile(join(folder, index), "{");
    await expectError(/index\.json is not JSON/);
    await writeFile(join(folder, index), '{"weight_map":[]}');
    await expectError(/not an index/);
  });

  test("a shard that is missing, cut off, or lacks a tensor", async () => {
    await split(shardNames(base), index);
    await editJson(join(folder, index), (json) => {
      json.weight_map["no.such.tensor"] = shardNames(base)[1];
    });
    await expectError(/00002-of-00003\.safetensors lacks the tensor "no\.such\.tensor"/);
    const shard = join(folder, shardNames(base)[1]!);
    const handle = await open(shard, "r+");
    await handle.truncate(5000);
    await handle.close();
    await expectError(/00002-of-00003/);
    await rm(shard);
    await expectError(/00002-of-00003\.safetensors is missing/);
  });

  test("an unsupported dtype, only when the tensor is asked for", async () => {
    const text = '{"ids":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}';
    const start = Buffer.alloc(8);
    start.writeBigUInt64LE(BigInt(text.length));
    await writeFile(join(folder, `${base}.safetensors`), Buffer.concat([start, Buffer.from(text), Buffer.alloc(8)]));
    const weights = await openWeights(folder, base);
    expect(() => weights.find("ids")).toThrow(/model\.safetensors: the tensor "ids" has dtype I64/);
  });

  test("an abort rejects with its reason", async () => {
    const reason = new Error("enough");
    await copyFile(original, join(folder, `${base}.safetensors`));
    await expect(openWeights(folder, base, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  });
});
