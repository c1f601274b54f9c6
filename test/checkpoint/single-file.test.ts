/**
 * Checkpoints in one file: every weight is that of the same model's folder, to the byte; configurations are those of the public models;
 * and what is no such file is named for what it is. The files of the fixtures are diffusers' conversions of their folders.
 */

import { closeSync, openSync, readFileSync, readSync, truncateSync } from "node:fs";
import { cp, mkdir, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import {
  checkpointShapes,
  clipShapes,
  type Shapes,
  sd3Medium,
  sd35Large,
  sd35Medium,
  type TransformerShape,
  t5Shapes,
  transformerShapes,
  vaeShapes,
  writeSparse,
} from "../../bench/single-file-checkpoint.js";
import {
  type Checkpoint,
  calibratedSchedulesOf,
  calibrationFile,
  checkpointName,
  fingerprintOf,
  openCheckpoint,
} from "../../lib/checkpoint/index.js";
import {
  openClipTokenizer,
  openPackedTokenizer,
  openT5Tokenizer,
  usualBounds,
} from "../../lib/checkpoint/tokenizers.js";
import type { StoredTensor } from "../../lib/common/tensor.js";
import { CheckpointError } from "../../lib/errors.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { copyModel, editJson, fixture, temporaryFolder } from "./folders.js";
import { readHeader, readSafetensors, type StoredFile, writeHeader, writeSafetensors } from "./safetensors-file.js";

const parts = ["transformer", "vae", "textEncoder", "textEncoder2", "textEncoder3"] as const;
const single = (name: "sd3" | "medium") => fixture(name, "single/full.safetensors");
const base = (name: "sd3" | "medium") => fixture(name, "model");

const bytesOf = ({ file, offset, length }: StoredTensor) => {
  const bytes = Buffer.alloc(length);
  const descriptor = openSync(file, "r");
  readSync(descriptor, bytes, 0, length, offset);
  closeSync(descriptor);
  return bytes;
};

/** A file of a fixture with its tensors renamed; undefined leaves one out. */
async function renamed(name: "sd3" | "medium", rename: (key: string) => string | undefined): Promise<string> {
  const tensors: StoredFile = {};
  for (const [key, tensor] of Object.entries(readSafetensors(single(name)))) {
    const to = rename(key);
    if (to !== undefined) tensors[to] = tensor;
  }
  const file = join(await temporaryFolder(), "model.safetensors");
  writeSafetensors(file, tensors);
  return file;
}

const withoutPrefix = (prefix: string) => (key: string) =>
  key.startsWith("model.diffusion_model.") ? prefix + key.slice("model.diffusion_model.".length) : undefined;

async function expectError(file: string, message: RegExp, options?: { base?: string; variant?: string }) {
  const error = await openCheckpoint(file, options)
    .then((checkpoint) => void new GraphLibrary(checkpoint).essential)
    .catch((e) => e);
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.message).toMatch(message);
  expect(error.message).not.toMatch(/from_single_file/);
}

/** Both have the same weights: names, shapes, types and bytes, but for the halves that one has the other way round. */
function expectSameWeights(file: Checkpoint, folder: Checkpoint, names: readonly (typeof parts)[number][] = parts) {
  for (const part of names) {
    const [own, expected] = [file[part], folder[part]];
    expect(own?.config).toEqual(expected?.config);
    if (!own || !expected) continue;
    const { reversedHalves } = own.weights;
    for (const name of expected.weights.names) {
      const tensor = expected.weights.find(name)!;
      const found = own.weights.find(name);
      expect(found, name).toMatchObject({ name, dtype: tensor.dtype, shape: tensor.shape });
      let bytes = bytesOf(found!);
      if (reversedHalves?.has(name.replace(/\.(weight|bias)$/, ""))) {
        const half = bytes.length / 2;
        bytes = Buffer.concat([bytes.subarray(half), bytes.subarray(0, half)]);
      }
      expect(bytes.equals(bytesOf(tensor)), name).toBe(true);
    }
    expect([...own.weights.names].sort()).toEqual([...expected.weights.names].sort());
    expect(own.weights.bytesByDType).toEqual(expected.weights.bytesByDType);
  }
}

describe("the weights of the folder", () => {
  test.each(["sd3", "medium"] as const)("%s, whole", async (name) => {
    const [file, folder] = [await openCheckpoint(single(name), { base: base(name) }), await openCheckpoint(base(name))];
    expectSameWeights(file, folder);
    expect(file).toMatchObject({ folder: single(name), schedulesFile: null, refiner: null });
    expect(file.scheduler).toEqual(folder.scheduler);
    expect(file.transformer.weights.reversedHalves).toEqual(
      new Set(["norm_out.linear", "transformer_blocks.2.norm1_context.linear"]),
    );
  });

  test.each(["", "diffusion_model.", "model.diffusion_model."])('a transformer alone behind "%s"', async (prefix) => {
    const file = await renamed("sd3", withoutPrefix(prefix));
    const folder = await openCheckpoint(base("sd3"));
    const opened = await openCheckpoint(file, { base: base("sd3") });
    expectSameWeights(opened, folder);
    expect(opened.vae.weights.files).toEqual(folder.vae.weights.files);
  });

  test("a transformer alone in diffusers' names, as one file", async () => {
    const folder = await openCheckpoint(base("medium"));
    const { file } = folder.transformer.weights.files[0]!;
    const opened = await openCheckpoint(file, { base: base("medium") });
    expectSameWeights(opened, folder);
    expect(opened.transformer.weights.reversedHalves).toEqual(new Set());
  });

  test("graphs of text encoders and VAE have the fingerprints of the folder's; the transformer's has another", async () => {
    const [file, folder] = [
      new GraphLibrary(await openCheckpoint(single("medium"), { base: base("medium") })),
      new GraphLibrary(await openCheckpoint(base("medium"))),
    ];
    for (const name of ["clip_l", "clip_g", "t5", "vae_decoder", "vae_encoder"])
      expect(file.get(name).fingerprint, name).toBe(folder.get(name).fingerprint);
    expect(file.get("predict").fingerprint).not.toBe(folder.get("predict").fingerprint);
    expect(file.files).toHaveLength(1);
  });

  test("schedules of a file are kept in the cache, whose name changes with the file", async () => {
    const cache = await temporaryFolder();
    const opened = await openCheckpoint(single("sd3"), { base: base("sd3") });
    const place = await calibrationFile(opened, cache);
    expect(place).toBe(join(cache, "schedules", `${await fingerprintOf(opened)}.json`));
    expect(await calibratedSchedulesOf(opened, cache)).toEqual([]);
    const other = await openCheckpoint(single("medium"), { base: base("medium") });
    expect(await calibrationFile(other, cache)).not.toBe(place);
  });

  test("tensors of no known part are named, since the base's are drawn with instead", async () => {
    const names = { "first_stage_model.": "vae.", "text_encoders.clip_l.logit_scale": "logit_scale" };
    const file = await renamed("medium", (key) =>
      Object.entries(names).reduce((name, [from, to]) => name.replace(from, to), key),
    );
    const { warnings } = await openCheckpoint(file, { base: base("medium") });
    expect(warnings).toEqual([
      expect.stringMatching(/^\d+ of the tensors in .*model\.safetensors .* such as "vae\..*", and are not read\./),
    ]);
    expect((await openCheckpoint(single("medium"), { base: base("medium") })).warnings).toEqual([]);
  });

  test("a base whose transformer has no weights, only its configuration", async () => {
    const folder = await copyModel("sd3");
    await rm(join(folder, "transformer/diffusion_pytorch_model.safetensors"));
    expectSameWeights(await openCheckpoint(single("sd3"), { base: folder }), await openCheckpoint(base("sd3")));
  });
});

/** Files with the shapes of public models; nothing is read of their data. */
async function sparse(shapes: Shapes): Promise<string> {
  const file = join(await temporaryFolder(), "sd3.5_medium.safetensors");
  await writeSparse(file, shapes);
  return file;
}

/** The config.json of the public folders, as far as shapes and constants say them. */
const published = (
  { layers, width, dual, qkNorm, positions }: TransformerShape,
  heads: number,
): Checkpoint["transformer"]["config"] => ({
  ...{ sampleSize: 128, patchSize: 2, inChannels: 16, outChannels: 16, numLayers: layers },
  ...{ attentionHeadDim: 64, numAttentionHeads: heads, captionProjectionDim: width, posEmbedMaxSize: positions },
  ...{ jointAttentionDim: 4096, pooledProjectionDim: 2048, qkNorm: qkNorm ? "rms_norm" : null },
  dualAttentionLayers: Array.from({ length: dual }, (_, layer) => layer),
});

describe("without a base", () => {
  test.each([
    ["SD3-medium", sd3Medium, 24],
    ["SD3.5-medium", sd35Medium, 24],
    ["SD3.5-large", sd35Large, 38],
  ] as const)("%s: configurations of the published folder, and every graph", async (_, transformer, heads) => {
    const opened = await openCheckpoint(
      await sparse(checkpointShapes(transformer, { t5: transformer === sd35Medium })),
    );
    expect(opened.transformer.config).toEqual(published(transformer, heads));
    const clip = {
      vocabSize: 49408,
      numHiddenLayers: 12,
      maxPositionEmbeddings: 77,
      layerNormEps: 1e-5,
      eosTokenId: 2,
    };
    expect(opened.textEncoder!.config).toEqual({
      ...{ ...clip, hiddenSize: 768, intermediateSize: 3072, projectionDim: 768, numAttentionHeads: 12 },
      hiddenAct: "quick_gelu",
    });
    expect(opened.textEncoder2!.config).toEqual({
      ...{ ...clip, hiddenSize: 1280, intermediateSize: 5120, projectionDim: 1280, numAttentionHeads: 20 },
      ...{ numHiddenLayers: 32, hiddenAct: "gelu" },
    });
    if (transformer === sd35Medium)
      expect(opened.textEncoder3!.config).toEqual({
        ...{ vocabSize: 32128, dModel: 4096, dKv: 64, dFf: 10240, numLayers: 24, numHeads: 64 },
        ...{ relativeAttentionNumBuckets: 32, relativeAttentionMaxDistance: 128, layerNormEpsilon: 1e-6 },
        ...{ activation: "gelu_new", gated: true },
      });
    else expect(opened.textEncoder3).toBeNull();
    expect(opened.vae.config).toEqual({
      ...{
        kind: "kl",
        inChannels: 3,
        outChannels: 3,
        latentChannels: 16,
        blockOutChannels: [128, 256, 512, 512],
        layersPerBlock: 2,
      },
      ...{ normNumGroups: 32, scalingFactor: 1.5305, shiftFactor: 0.0609, sampleSize: 1024, factor: 8 },
      ...{ useQuantConv: false, usePostQuantConv: false, midBlockAddAttention: true },
    });
    expect(opened.scheduler).toMatchObject({ shift: 3, numTrainTimesteps: 1000, dynamic: null, spacing: null });
    expect([opened.tokenizer!.vocabSize, opened.tokenizer2!.vocabSize]).toEqual([49408, 49408]);
    // Every weight is there with the shape that the configuration implies.
    const graphs = new GraphLibrary(opened);
    expect(graphs.essential.length).toBeGreaterThan(3);
    graphs.get("vae_encoder");
  });

  test("names the file without its ending", () => {
    expect(checkpointName("/models/sd3.5_medium.safetensors")).toBe("sd3.5_medium");
    expect(checkpointName("/hub/models--a--b/snapshots/0123/sd3.5_large.safetensors")).toBe("sd3.5_large");
  });
});

describe("refuses", () => {
  test("a transformer without the other parts", async () => {
    const file = await renamed("sd3", withoutPrefix(""));
    await expectError(file, /holds a transformer without a VAE and text encoders.*as base \(--base <folder>\)/);
    await expectError(await sparse(transformerShapes(sd35Large)), /without a VAE and text encoders/);
  });

  test("a model that is none of the public ones, without a base", async () => {
    await expectError(single("sd3"), /none of the public models: .*Pass the folder .* as base \(--base <folder>\)/);
    const odd = {
      ...checkpointShapes(sd3Medium),
      "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.weight": [600, 768],
    };
    await expectError(await sparse(odd), /vocab_size is 600, but its tokenizer has ids up to 49407. Pass the folder/);
  });

  test("a base of another model, that is a file, is nowhere or lacks the parts", async () => {
    await expectError(
      single("medium"),
      /sd3\/model\/transformer\/config\.json: .* but the shapes in .*full\.safetensors say/,
      {
        base: base("sd3"),
      },
    );
    const folder = await copyModel("sd3");
    for (const [part, key, value] of [
      ["transformer", "num_layers", 4],
      ["transformer", "pos_embed_max_size", 25],
      ["text_encoder", "num_hidden_layers", 4],
      ["vae", "layers_per_block", 2],
    ] as const) {
      const changed = await copyModel("sd3");
      await editJson(join(changed, part, "config.json"), (json) => Object.assign(json, { [key]: value }));
      await expectError(single("sd3"), new RegExp(`${part}/config\\.json: ${key} is ${value}, but the shapes`), {
        base: changed,
      });
    }
    await expectError(single("sd3"), /is not a folder/, { base: single("sd3") });
    await expectError(
      single("sd3"),
      /\/nowhere does not exist\. A base is a folder in the diffusers layout, or owner\/name/,
      {
        base: "/nowhere",
      },
    );
    await editJson(join(folder, "model_index.json"), (json) =>
      Object.assign(json, { text_encoder: null, tokenizer: null, text_encoder_2: null, tokenizer_2: null }),
    );
    await expectError(await renamed("sd3", withoutPrefix("")), /without text encoders.*has none/, { base: folder });
  });

  test("a base for a folder, and a variant of a file", async () => {
    await expectError(base("sd3"), /is not one file, and only such a model has a base/, { base: base("sd3") });
    await expectError("nowhere.safetensors", /nowhere\.safetensors does not exist/, { base: base("sd3") });
    await expectError(single("sd3"), /has no variants/, { variant: "fp16" });
    const variant = { base: base("sd3"), variant: "bf16" };
    await expectError(single("sd3"), /No part of .*\/sd3\/model has the variant "bf16"/, variant);
  });

  test("a tensor that is missing, of another shape or type, by its name in the file", async () => {
    const name = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight";
    const shapes = checkpointShapes({ ...sd3Medium, layers: 2 });
    const { [name]: _, ...without } = shapes;
    await expectError(
      await sparse(without),
      /has no tensor "model\.diffusion_model\.joint_blocks\.1\.x_block\.attn\.qkv\.weight"/,
    );
    await expectError(
      await sparse({ ...shapes, [name]: [4607, 1536] }),
      /qkv\.weight" holds the rows of 3 layers.*4607 is no multiple of 3/,
    );
    await expectError(
      await sparse({ ...shapes, [name]: [1536, 4608] }),
      /Expected shape \[1536, 1536\] .*joint_blocks\.1\.x_block\.attn\.qkv\.weight.* but found \[512, 4608\]/,
    );
    const file = join(await temporaryFolder(), "x.safetensors");
    await writeSparse(file, shapes, { [name]: "I16" });
    await expectError(file, /qkv\.weight" has dtype I16/);
    truncateSync(file, 1e6);
    await expectError(file, /outside the file/);
  });

  test("CLIP-L's projection under a damaged name: only a file that lacks it has the identity", async () => {
    const name = "text_encoders.clip_l.transformer.text_projection.weight";
    const { [name]: projection, ...without } = checkpointShapes({ ...sd3Medium, layers: 2 });
    expect((await openCheckpoint(await sparse(without))).warnings).toEqual([]);
    await expectError(
      await sparse({ ...without, [name.replace(".weight", "7weight")]: projection! }),
      /text_encoders\.clip_l\.transformer\.text_projection\.weight" is missing/,
    );
  });

  test("a base that is a file, or a name of the hub", async () => {
    for (const other of [single("sd3"), "stabilityai/stable-diffusion-3-medium-diffusers"])
      await expectError(single("sd3"), /(is not a folder|does not exist)\..*owner\/name of such a model/, {
        base: other,
      });
    await expectError(
      join(await temporaryFolder(), "none.safetensors"),
      /The folder or file .*none\.safetensors does not/,
    );
  });

  test("quantisations by their names, whatever lengths stand beside the weights of three layers", async () => {
    const qkv = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv";
    const tensors = readSafetensors(single("medium"));
    const write = async (change: StoredFile) => {
      const file = join(await temporaryFolder(), "model.safetensors");
      writeSafetensors(file, { ...tensors, ...change });
      return file;
    };
    const bytes = (shape: number[], dtype = "U8") => ({
      dtype,
      shape,
      bytes: Buffer.alloc(
        shape.reduce((a, b) => a * b, 1),
        1,
      ),
    });
    const nf4 = { [`${qkv}.weight`]: bytes([1537, 1]), [`${qkv}.weight.quant_map`]: bytes([16]) };
    await expectError(await write(nf4), /quantised by bitsandbytes in 4 bits/, { base: base("medium") });
    // Tensors are called what the file calls them.
    const plain = { [`${qkv}.weight`]: { ...bytes(tensors[`${qkv}.weight`]!.shape, "F8_E4M3") } };
    const zero = { ...plain, [`${qkv}.scale_weight`]: { dtype: "F32", shape: [], bytes: Buffer.alloc(4) } };
    await expectError(await write(plain), /1\.x_block\.attn\.qkv\.weight" \(F8_E4M3\) are the same/, {
      base: base("medium"),
    });
    await expectError(await write(zero), /"model\.diffusion_model\..*qkv\.scale_weight" of .*qkv\.weight" is zero/, {
      base: base("medium"),
    });
    const int8 = { [`${qkv}.weight`]: bytes(tensors[`${qkv}.weight`]!.shape, "I8") };
    await expectError(await write(int8), /1\.x_block\.attn\.qkv\.weight" \(I8\) has no scale/, {
      base: base("medium"),
    });

    const format = Buffer.from('{"format":  "float8_e4m3fn"}');
    const [rows, columns] = tensors[`${qkv}.weight`]!.shape as [number, number];
    const weight = { dtype: "F8_E4M3", shape: [rows, columns], bytes: Buffer.alloc(rows * columns, "values") };
    const scale = { dtype: "F32", shape: [], bytes: Buffer.from(new Float32Array([0.5]).buffer) };
    const file = await write({
      [`${qkv}.weight`]: weight,
      [`${qkv}.weight_scale`]: scale,
      [`${qkv}.comfy_quant`]: { dtype: "U8", shape: [format.length], bytes: format },
    });
    const opened = await openCheckpoint(file, { base: base("medium") });
    expect(opened.transformer.weights.find("transformer_blocks.1.attn.to_k.weight")).toMatchObject({
      ...{ dtype: "F8_E4M3", shape: [rows / 3, columns], length: (rows / 3) * columns },
      scale: { tensor: { shape: [] } },
    });

    // The same is said in the file's metadata, of layers by their names in the file.
    const saying = async (quantisation: string) => {
      const plain = await write({ [`${qkv}.weight`]: weight, [`${qkv}.weight_scale`]: scale });
      const { header, data } = readHeader(plain);
      writeHeader(plain, { __metadata__: { _quantization_metadata: quantisation }, ...header }, data);
      return plain;
    };
    const layers = (description: object) => JSON.stringify({ format_version: "1.0", layers: { [qkv]: description } });
    const read = await openCheckpoint(await saying(layers({ format: "float8_e4m3fn" })), { base: base("medium") });
    expect(read.transformer.weights.find("transformer_blocks.1.attn.to_k.weight")).toMatchObject({ dtype: "F8_E4M3" });
    const rotated = await saying(layers({ format: "int8_tensorwise", convrot: true }));
    await expectError(
      rotated,
      /by ComfyUI as \{"format":"int8_tensorwise","convrot":true\} \("model\..*qkv\.weight"\), which cannot be read/,
      { base: base("medium") },
    );
    await expectError(await saying("{"), /_quantization_metadata is not JSON/, { base: base("medium") });
  });

  const f = (...names: string[]): Shapes => Object.fromEntries(names.map((name) => [name, [2, 2]]));
  const alone = (prefix: string, shapes: Shapes) =>
    Object.fromEntries(Object.entries(shapes).map(([name, shape]) => [prefix + name, shape]));
  test.each<[string, Shapes, RegExp]>([
    [
      "a LoRA of diffusers",
      f("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"),
      /is a LoRA, .* as one of loras \(--lora <file>\)/,
    ],
    ["a LoRA of PEFT without a prefix", f("transformer_blocks.0.attn.to_q.lora_A.default.weight"), /is a LoRA/],
    ["a LoRA of kohya", f("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"), /is a LoRA, which/],
    ["a LoRA of OneTrainer", f("lora_transformer_transformer_blocks_0_attn_to_out_0.lora_up.weight"), /is a LoRA/],
    ["LyCORIS, LoHa", f("lycoris_transformer_blocks_0_attn_to_q.hada_w1_a"), /LyCORIS/],
    ["a difference of weights", f("diffusion_model.joint_blocks.0.x_block.attn.qkv.diff"), /LyCORIS or another form/],
    ["LyCORIS, LoKr", f("lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1"), /LyCORIS/],
    [
      "a ControlNet of diffusers",
      f("transformer_blocks.0.attn.to_q.weight", "controlnet_blocks.0.weight"),
      /is a ControlNet/,
    ],
    [
      "a VAE in diffusers' names",
      f("decoder.conv_in.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),
      /is a VAE alone/,
    ],
    ["a VAE in Stability's names", vaeShapes(), /is a VAE alone/],
    [
      "a transformer behind another prefix",
      {
        ...alone("first_stage_model.", vaeShapes()),
        ...f("model.diffusion_model.module.joint_blocks.0.x_block.a.weight"),
      },
      /something else before the names of its transformer's tensors.*"diffusion_model\." or nothing/,
    ],
    [
      "a transformer of diffusers behind another prefix",
      f("transformer.transformer_blocks.0.norm1_context.linear.weight"),
      /something else before the names/,
    ],
    ["a VAE with its prefix", alone("first_stage_model.", vaeShapes()), /is a VAE alone/],
    ["t5xxl", t5Shapes(1), /is a text encoder alone/],
    ["clip_l", clipShapes(768, 1), /is a text encoder alone/],
    [
      "SDXL",
      f("model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.0.x.weight"),
      /is a checkpoint of SDXL/,
    ],
    [
      "SDXL's UNet",
      f("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.label_emb.0.0.weight"),
      /of SDXL/,
    ],
    [
      "SD 1.5",
      f("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.x.weight"),
      /Stable Diffusion 1 or 2/,
    ],
    ["Flux", f("double_blocks.0.img_attn.qkv.weight"), /of Flux/],
    [
      "Flux in diffusers' names",
      f("transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.0.attn.to_q.weight"),
      /of Flux/,
    ],
    ["PixArt", f("transformer_blocks.0.attn1.to_q.weight", "adaln_single.linear.weight"), /of another model/],
    ["Qwen-Image", f("transformer_blocks.0.img_mod.1.weight", "txt_in.weight"), /of another model/],
    [
      "SDXL's UNet in diffusers' names",
      f("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "add_embedding.linear_1.weight"),
      /of SDXL/,
    ],
    ["an embedding", f("clip_l", "clip_g"), /textual inversion/],
    [
      "another model",
      f("layers.0.mlp.weight"),
      /is no checkpoint of Stable Diffusion 3 or 3\.5: it has tensors such as "layers\.0/,
    ],
    ["nothing", {}, /it has no tensors/],
  ])("%s", async (_, shapes, message) => {
    const folder = await temporaryFolder();
    const file = join(folder, "pytorch_weights.safetensors");
    await writeSparse(file, shapes);
    await expectError(file, message);
    await expectError(folder, message);
  });

  test.each<[string, Buffer, RegExp]>([
    ["GGUF", Buffer.from("GGUF\x03\0\0\0\x05\0\0\0"), /is a GGUF file.*Only \.safetensors files are read/],
    [".ckpt", Buffer.from("PK\x03\x04\x14\0\0\0\x08\x08xxxx"), /is a ZIP archive, as are files of PyTorch/],
    ["a pickle", Buffer.from("\x80\x02}q\x01(X\x05", "latin1"), /is a pickle of Python/],
    ["an empty file", Buffer.alloc(0), /too short/],
    [
      "a page",
      Buffer.from("<!DOCTYPE html>\n<html>"),
      /is not a \.safetensors file but text, which begins with "<!DOCTYPE html> <html>"\..*licence/,
    ],
    ["what a server says", Buffer.from("Entry not found"), /text, which begins with "Entry not found"/],
    ["bytes of no known format", Buffer.alloc(64, 200), /its header does not begin with "\{"/],
  ])("%s", async (_, bytes, message) => {
    const file = join(await temporaryFolder(), "model.safetensors");
    await writeFile(file, bytes);
    await expectError(file, message);
  });

  test("a shard, alone and in a folder of shards", async () => {
    const folder = await temporaryFolder();
    const names = Object.entries(transformerShapes({ ...sd3Medium, layers: 2 }));
    for (const [number, part] of [names.slice(0, 9), names.slice(9)].entries())
      await writeSparse(join(folder, `model-0000${number + 1}-of-00002.safetensors`), Object.fromEntries(part));
    for (const file of ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
      await expectError(join(folder, file), /is one of 2 files.*Pass the folder of the whole model/);
    await expectError(folder, /00001-of-00002\.safetensors is one of 2 files/);
    const whole = join(folder, "model-00001-of-00001.safetensors");
    await writeSparse(whole, Object.fromEntries(names));
    await expectError(whole, /holds a transformer without a VAE and text encoders/);
  });

  test("a model's JSON file", async () => {
    await expectError(join(base("sd3"), "model_index.json"), /is a file beside .* Pass the model's folder\.$/);
  });

  test("the folder of one part: names the model's folder", async () => {
    for (const part of ["transformer", "vae", "text_encoder"])
      await expectError(join(base("sd3"), part), /is the folder of one part of a model\. Pass .*\/sd3\/model\.$/);
  });

  test("text encoders under other names, which are named", async () => {
    const shapes = { ...transformerShapes(sd3Medium), ...alone("clip_l.", clipShapes(768, 1)) };
    await expectError(await sparse(shapes), /and text encoders.* such as "clip_l\..*, and are not read.* as base/);
  });

  test("a folder with a checkpoint in one file and no model_index.json: names the file", async () => {
    const folder = await temporaryFolder();
    await cp(single("sd3"), join(folder, "sd3.safetensors"));
    await writeSparse(join(folder, "a_lora.safetensors"), f("x.lora_A.weight"));
    await expectError(folder, /holds a checkpoint in one file: pass that file, .*\/sd3\.safetensors\./);
    await mkdir(join(folder, "empty"));
    await expectError(join(folder, "empty"), /is not a checkpoint: it has no model_index\.json/);
  });
});

/** A tokenizer of the package as its files say it. */
function openFolderOf(name: string) {
  const folder = (each: string) => join(import.meta.dirname, "../../models/tokenizers", each);
  return name === "tokenizer_3"
    ? openT5Tokenizer(folder(name))
    : openClipTokenizer(folder(name), usualBounds, folder("tokenizer"));
}

test("tokenizers of the package give the ids of transformers'", async () => {
  const file = join(import.meta.dirname, "real_token_ids.json");
  const { texts, length, ...expected } = JSON.parse(readFileSync(file, "utf8"));
  for (const name of ["tokenizer", "tokenizer_2", "tokenizer_3"] as const) {
    const tokenizer = openPackedTokenizer(name);
    const read = await openFolderOf(name);
    expect(tokenizer).toMatchObject({ maxLength: read.maxLength, vocabSize: read.vocabSize });
    for (const [index, text] of texts.entries()) {
      const { ids } = await tokenizer.encode(text, length);
      const own: number[] = expected[name][index];
      const padded = [...own, ...new Array(length - own.length).fill(own.at(-1))];
      expect([...ids].map(Number), `${name}: ${text}`).toEqual(padded);
    }
  }
});
