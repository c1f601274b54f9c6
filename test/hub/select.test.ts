/**
 * Which files are downloaded: the same that are read. Each layout is downloaded as chosen and opened, so that the choice
 * and the reader cannot differ.
 */

import { mkdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { describe, expect, test } from "vitest";
import { openWeights } from "../../lib/checkpoint/index.js";
import { SelectionError, select, shardsOf } from "../../lib/hub/select.js";
import { temporaryFolder } from "../checkpoint/folders.js";

const parts = ["transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"];
const tokenizers = ["tokenizer", "tokenizer_2", "tokenizer_3"];
const index = Object.fromEntries([...parts, ...tokenizers].map((part) => [part, ["library", "Class"]]));

/** As the repository of SD3 medium has them, with what else repositories have. */
const medium = [
  ...[
    "model_index.json",
    "README.md",
    "LICENSE",
    ".gitattributes",
    "sd3_medium.safetensors",
    "schedules.json",
    "demo.png",
  ],
  ...["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"],
  ...["transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bin"],
  ...["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "vae/model.onnx", "vae/flax_model.msgpack"],
  ...["scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json"],
  ...["text_encoder", "text_encoder_2"].flatMap((part) => [
    ...[
      `${part}/config.json`,
      `${part}/model.safetensors`,
      `${part}/model.fp16.safetensors`,
      `${part}/pytorch_model.bin`,
    ],
  ]),
  ...["text_encoder_3/config.json", "text_encoder_3/model.safetensors.index.json"],
  ...["text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model-00002-of-00002.safetensors"],
  ...["text_encoder_3/model.safetensors.index.fp16.json", "text_encoder_3/model.fp16-00001-of-00001.safetensors"],
  ...["tokenizer", "tokenizer_2"].flatMap((part) => [
    ...[`${part}/vocab.json`, `${part}/merges.txt`, `${part}/tokenizer_config.json`, `${part}/special_tokens_map.json`],
  ]),
  ...["tokenizer_3/tokenizer.json", "tokenizer_3/spiece.model", "tokenizer_3/tokenizer_config.json"],
];

const chosen = (files: string[], wanted = {}, json: unknown = index) => select(new Set(files), json, wanted);

describe("a repository with everything in it", () => {
  test("gives the plain weights, and the index of shards where there is no single file", () => {
    const { files, indexes } = chosen(medium);
    const without = /fp16|\.bin$|onnx|msgpack|README|LICENSE|\.git|sd3_medium|demo|feature_extractor|-0000/;
    expect([...files].sort()).toEqual(medium.filter((file) => !without.test(file)).sort());
    expect(indexes).toEqual(["text_encoder_3/model.safetensors.index.json"]);
  });

  test("gives a variant where a part has it, and the plain file where not, as diffusers does", () => {
    const { files, indexes } = chosen(medium, { variant: "fp16" });
    const weights = files.filter((file) => /\.safetensors/.test(file));
    expect(weights.sort()).toEqual([
      "text_encoder/model.fp16.safetensors",
      "text_encoder_2/model.fp16.safetensors",
      "text_encoder_3/model.safetensors.index.fp16.json",
      "transformer/diffusion_pytorch_model.fp16.safetensors",
      "vae/diffusion_pytorch_model.safetensors",
    ]);
    expect(indexes).toEqual(["text_encoder_3/model.safetensors.index.fp16.json"]);
  });

  test("gives nothing of T5 if it is left out, or null in model_index.json", () => {
    const isT5 = (file: string) => file.includes("_3/");
    expect(chosen(medium).files.filter(isT5).length).toBe(5);
    for (const { files, indexes } of [
      chosen(medium, { textEncoder3: false }),
      chosen(medium, {}, { ...index, text_encoder_3: [null, null], tokenizer_3: [null, null] }),
    ]) {
      expect(files.filter(isT5)).toEqual([]);
      expect(indexes).toEqual([]);
      expect(files.length).toBe(chosen(medium).files.length - 5);
    }
  });
});

describe("what is missing is named", () => {
  const refused = (files: string[], wanted = {}) => {
    try {
      chosen(files, wanted);
    } catch (error) {
      expect(error).toBeInstanceOf(SelectionError);
      return (error as Error).message;
    }
    throw new Error("It was not refused.");
  };

  test.each([
    ["a folder", medium.filter((file) => !file.startsWith("vae/")), {}, "lacks the folder vae"],
    [
      "weights in this form",
      medium.filter((file) => !/^transformer.*safetensors$/.test(file)),
      {},
      "no weights for transformer in .safetensors files, only in other forms",
    ],
    [
      "plain weights",
      medium.filter((file) => !file.endsWith("transformer/diffusion_pytorch_model.safetensors")),
      {},
      'no weights for transformer in .safetensors files; variants found: "fp16"',
    ],
    ["T5", medium.filter((file) => !file.startsWith("text_encoder_3/")), {}, "(--no-t5) leaves T5 out"],
    ["a variant", medium, { variant: "bf16" }, 'no part with the variant "bf16"; variants found: "fp16"'],
    ["any variant", medium.filter((file) => !file.includes("fp16")), { variant: "bf16" }, "it has no variants"],
  ] as const)("%s", (_, files, wanted, message) => expect(refused([...files], wanted)).toContain(message));

  test("shards that are not there, in another folder, or no weights", () => {
    const paths = new Set(["t/a.json", "t/1.safetensors", "u/1.safetensors", "t/1.bin"]);
    expect(shardsOf(paths, "t/a.json", { weight_map: { x: "1.safetensors", y: "1.safetensors" } })).toEqual([
      "t/1.safetensors",
    ]);
    for (const shard of ["2.safetensors", "../u/1.safetensors", "1.bin", 7])
      expect(() => shardsOf(paths, "t/a.json", { weight_map: { x: shard } })).toThrow(`t/${shard}`);
    for (const json of [null, {}, { weight_map: {} }, { weight_map: 3 }])
      expect(() => shardsOf(paths, "t/a.json", json)).toThrow("no index of shards");
  });
});

/** A file of weights with one tensor. */
function oneTensor(name: string): Buffer {
  const header = Buffer.from(JSON.stringify({ [name]: { dtype: "F32", shape: [1], data_offsets: [0, 4] } }));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(header.length));
  return Buffer.concat([length, header, Buffer.alloc(4)]);
}

describe("what is chosen is what is read", () => {
  const singles = ["", ".fp16"];
  const spellings = ["safetensors.index.fp16.json", "fp16.safetensors.index.json", "safetensors.fp16.index.json"];
  const shard = (base: string, variant: string) => `${base}${variant}-00001-of-00001.safetensors`;
  const layouts: [string, (base: string) => string[]][] = [
    ["a single file", (base) => [`${base}.safetensors`]],
    ["both precisions", (base) => singles.map((variant) => `${base}${variant}.safetensors`)],
    ["shards", (base) => [`${base}.safetensors.index.json`]],
    ["a single file beside shards", (base) => [`${base}.safetensors`, `${base}.safetensors.index.json`]],
    ...spellings.map((spelling): [string, (base: string) => string[]] => [
      `the variant's index as ${spelling}`,
      (base) => [`${base}.safetensors`, `${base}.${spelling}`],
    ]),
  ];
  for (const [part, base] of [
    ["transformer", "diffusion_pytorch_model"],
    ["text_encoder", "model"],
  ] as const)
    for (const [layout, names] of layouts)
      for (const variant of [undefined, "fp16"])
        test(`${layout} of ${part}, ${variant ?? "plain"}`, async () => {
          const folder = path.join(await temporaryFolder(), part);
          await mkdir(folder, { recursive: true });
          const files = new Map<string, Buffer>();
          for (const name of names(base)) {
            const shardName = shard(base, name.includes("fp16") ? ".fp16" : "");
            if (!name.endsWith(".json")) files.set(name, oneTensor("x"));
            else {
              files.set(shardName, oneTensor("x"));
              files.set(name, Buffer.from(JSON.stringify({ weight_map: { x: shardName } })));
            }
          }
          for (const [name, data] of files) await writeFile(path.join(folder, name), data);
          const other = part === "transformer" ? "vae/diffusion_pytorch_model" : "vae/diffusion_pytorch_model";
          // Some part has the variant in any case, so that it is not refused.
          const paths = new Set([
            "model_index.json",
            ...[...files.keys()].map((name) => `${part}/${name}`),
            `${other}.safetensors`,
            `${other}.fp16.safetensors`,
          ]);
          const { files: taken, indexes } = select(paths, { [part]: ["l", "c"], vae: ["l", "c"] }, { variant });
          const weights = taken.filter((file) => file.startsWith(part) && file.endsWith(".safetensors"));
          for (const index of indexes)
            weights.push(...shardsOf(paths, index, JSON.parse(files.get(path.basename(index))!.toString())));
          const read = await openWeights(folder, base, { variant });
          expect(weights.map((file) => path.basename(file))).toEqual(read.files.map(({ file }) => path.basename(file)));
        });
});
