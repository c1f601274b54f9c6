/**
 * Whole folders: the fixtures and the embedded model open to what their files say, a Hugging Face cache opens like a
 * plain folder, and each way in which a folder can be wrong is a CheckpointError that says which part and what to do.
 */

import { execFileSync } from "node:child_process";
import { chmod, cp, lstat, mkdir, readdir, readFile, rename, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { CheckpointError } from "../../lib/errors.js";
import { requiredEngines } from "../../lib/generation/engines.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { tensorRtEmitOptions } from "../../lib/runtimes/tensorrt/row.js";
import { copyModel, editJson, fixture, shapes, temporaryFolder } from "./folders.js";

async function expectError(folder: string, message: RegExp, variant?: string): Promise<void> {
  const error = await openCheckpoint(folder, { variant }).catch((e) => e);
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.message).toMatch(message);
}

/** A copy of a fixture with some keys of a JSON file changed; undefined removes a key. */
async function damaged(file: string, changes: object, from: "large" | "sd3" = "large"): Promise<string> {
  const model = await copyModel(from);
  await editJson(join(model, file), (json) => Object.assign(json, changes));
  return model;
}

describe("opens", () => {
  test("large: every part", async () => {
    const checkpoint = await openCheckpoint(fixture("large", "model"));
    expect(checkpoint.transformer.config).toEqual({
      sampleSize: 16,
      patchSize: 2,
      inChannels: 16,
      outChannels: 16,
      numLayers: 3,
      attentionHeadDim: 16,
      numAttentionHeads: 4,
      jointAttentionDim: 96,
      captionProjectionDim: 64,
      pooledProjectionDim: 64,
      posEmbedMaxSize: 24,
      dualAttentionLayers: [],
      qkNorm: "rms_norm",
    });
    expect(checkpoint.refiner!.config).toMatchObject({ inChannels: 32, outChannels: 16, numLayers: 1 });
    expect(checkpoint.textEncoder!.config).toEqual({
      vocabSize: 607,
      hiddenSize: 32,
      intermediateSize: 128,
      projectionDim: 24,
      numHiddenLayers: 3,
      numAttentionHeads: 4,
      maxPositionEmbeddings: 77,
      hiddenAct: "quick_gelu",
      layerNormEps: 1e-5,
      eosTokenId: 2,
    });
    expect(checkpoint.textEncoder2!.config).toMatchObject({ hiddenSize: 48, projectionDim: 40, hiddenAct: "gelu" });
    expect(checkpoint.textEncoder3!.config).toEqual({
      vocabSize: 300,
      dModel: 96,
      dKv: 16,
      dFf: 128,
      numLayers: 2,
      numHeads: 4,
      relativeAttentionNumBuckets: 32,
      relativeAttentionMaxDistance: 128,
      layerNormEpsilon: 1e-6,
      activation: "gelu_new",
      gated: true,
    });
    expect(checkpoint.vae.config).toEqual({
      kind: "kl",
      inChannels: 3,
      outChannels: 3,
      latentChannels: 16,
      blockOutChannels: [8, 8, 16, 16],
      layersPerBlock: 1,
      normNumGroups: 4,
      scalingFactor: 1.5305,
      shiftFactor: 0.0609,
      useQuantConv: false,
      usePostQuantConv: false,
      midBlockAddAttention: true,
      sampleSize: 128,
      factor: 8,
    });
    expect(checkpoint.scheduler).toMatchObject({ shift: 3, numTrainTimesteps: 1000, dynamic: null, spacing: null });
    expect(checkpoint.tokenizer!.maxLength).toBe(77);
    expect(checkpoint.tokenizer3!.maxLength).toBe(512);
    expect(checkpoint.vae.weights.find("decoder.conv_in.weight")!.shape).toEqual([16, 16, 3, 3]);
  });

  test("medium: dual attention; sd3: no qk_norm and null parts; shapes: factor 4 and 16 tokens", async () => {
    const medium = await openCheckpoint(fixture("medium", "model"));
    expect(medium.transformer.config).toMatchObject({ dualAttentionLayers: [0, 1], qkNorm: "rms_norm" });
    const sd3 = await openCheckpoint(fixture("sd3", "model"));
    expect(sd3).toMatchObject({ textEncoder3: null, tokenizer3: null, transformer: { config: { qkNorm: null } } });
    const embedded = await openCheckpoint(shapes);
    expect(embedded).toMatchObject({ vae: { config: { factor: 4 } }, scheduler: { shift: 2.5 } });
    expect([embedded.tokenizer!.maxLength, embedded.tokenizer3!.maxLength]).toEqual([16, 16]);
  });

  test("without a refiner; with null instead of [null, null]; with unknown extra parts", async () => {
    const model = await damaged("model_index.json", {
      text_encoder_3: null,
      tokenizer_3: null,
      feature_extractor: ["transformers", "SiglipImageProcessor"],
      safety_checker: ["somewhere", "SomethingNew"],
    });
    await rm(join(model, "refiner"), { recursive: true });
    expect(await openCheckpoint(model)).toMatchObject({ refiner: null, textEncoder3: null });
  });

  test("a Hugging Face cache, also through a link to its snapshot", async () => {
    const repository = await temporaryFolder();
    const snapshot = join(repository, "snapshots", "0123abcd");
    await cp(fixture("large", "model"), snapshot, { recursive: true });
    await mkdir(join(repository, "blobs"));
    let blobs = 0;
    for (const name of await readdir(snapshot, { recursive: true })) {
      if (!(await lstat(join(snapshot, name))).isFile()) continue;
      const blob = `blob${blobs++}`;
      await rename(join(snapshot, name), join(repository, "blobs", blob));
      await symlink(`${name.includes("/") ? "../" : ""}../../blobs/${blob}`, join(snapshot, name));
    }
    const link = join(await temporaryFolder(), "link");
    await symlink(snapshot, link);
    for (const folder of [snapshot, link]) {
      const checkpoint = await openCheckpoint(folder);
      expect(checkpoint.transformer.weights.files[0]!.file).toMatch(/\/blobs\/blob\d+$/);
      expect(checkpoint.folder).toBe(folder);
    }
    await expectError(repository, /Hugging Face cache. Pass one of its snapshots: .*0123abcd/);
  });
});

describe("variants", () => {
  test("some parts have it, others are read without", async () => {
    const model = await copyModel("large");
    const file = (variant: string) => join(model, "transformer", `diffusion_pytorch_model${variant}.safetensors`);
    await rename(file(""), file(".fp16"));
    const checkpoint = await openCheckpoint(model, { variant: "fp16" });
    expect(checkpoint.transformer.weights.variant).toBe("fp16");
    expect(checkpoint.vae.weights.variant).toBeNull();
    await expectError(model, /transformer.*pass variant "fp16"/);
    await expectError(model, /neither the variant "bf16"/, "bf16");
    await cp(file(".fp16"), file(""));
    await expectError(model, /No part .* has the variant "bf16". Variants found: "fp16"/, "bf16");
  });

  test("none has any", () =>
    expectError(fixture("large", "model"), /It has no variants: leave the option away/, "fp16"));
});

describe("folders of other kinds", () => {
  test("missing, a file, empty", async () => {
    const folder = await temporaryFolder();
    await expectError(join(folder, "missing"), /does not exist.*A diffusers folder holds model_index\.json/);
    await expectError(folder, /no model_index\.json. A diffusers folder holds/);
    await writeFile(join(folder, "notes.txt"), "");
    await expectError(join(folder, "notes.txt"), /notes\.txt has 0 bytes: too short for a \.safetensors file/);
    await expectError(join(folder, "notes.txt", "below"), /is not a folder/);
  });

  test("an ONNX folder", async () => {
    const model = await copyModel("large");
    const file = join(model, "transformer", "diffusion_pytorch_model.safetensors");
    await rename(file, join(model, "transformer", "model.onnx"));
    await expectError(model, /is an ONNX folder/);
  });
});

const index = "model_index.json";

describe("model_index.json", () => {
  const cases: [string, object, RegExp][] = [
    ["an unknown pipeline", { _class_name: "FluxPipeline" }, /FluxPipeline.*StableDiffusion3Pipeline/],
    ["a pipeline of SD 1", { _class_name: "StableDiffusionPipeline" }, /StableDiffusionPipeline.*known are/],
    ["no pipeline", { _class_name: undefined }, /_class_name is absent/],
    ["a missing entry", { vae: undefined }, /lacks the part "vae"/],
    [
      "an unknown class",
      { transformer: ["diffusers", "FluxTransformer2DModel"] },
      /"transformer" is of the unknown class "FluxTransformer2DModel"; known for it are SD3Transformer2DModel/,
    ],
    [
      "an unknown scheduler",
      { scheduler: ["diffusers", "DDIMScheduler"] },
      /"scheduler".*DDIMScheduler.*FlowMatchEuler/,
    ],
    ["a class that is no text", { tokenizer: ["transformers", 1] }, /"tokenizer".*unknown class 1/],
    ["the transformer null", { transformer: [null, null] }, /"transformer" is null/],
    ["the vae null", { vae: null }, /"vae" is null/],
    ["the scheduler null", { scheduler: [null, null] }, /"scheduler" is null/],
    ["an encoder without tokenizer", { tokenizer_3: [null, null] }, /"tokenizer_3" is null but "text_encoder_3"/],
    ["a tokenizer without encoder", { text_encoder_2: null }, /"text_encoder_2" is null but "tokenizer_2"/],
  ];
  for (const [what, changes, message] of cases)
    test(what, async () => expectError(await damaged(index, changes), message));

  test("not JSON", async () => {
    const model = await copyModel("sd3");
    await writeFile(join(model, index), "{");
    await expectError(model, /model_index\.json is not JSON/);
    await writeFile(join(model, index), "\ufeff{}", "utf16le");
    await expectError(model, /model_index\.json is encoded in UTF-16\. Save it in UTF-8/);
  });

  test("the other pipelines and schedulers of SD3, with parts of their own", async () => {
    const pipelines = ["Img2Img", "Inpaint", "ControlNet", "ControlNetInpainting", "PAG", "PAGImg2Img", "Modular"];
    for (const pipeline of pipelines.map((kind) => `StableDiffusion3${kind}Pipeline`)) {
      const scheduler = ["diffusers", "FlowMatchHeunDiscreteScheduler"];
      const controlnet = ["diffusers", "SD3ControlNetModel"];
      const model = await damaged(index, { _class_name: pipeline, scheduler, controlnet }, "sd3");
      await writeFile(
        join(model, "scheduler", "scheduler_config.json"),
        '{"_class_name":"FlowMatchHeunDiscreteScheduler","num_train_timesteps":1000,"shift":3.0}',
      );
      expect((await openCheckpoint(model)).scheduler.shift).toBe(3);
    }
  });
});

describe("T5", () => {
  const error = /Download.* To draw without T5, load the model with textEncoder3: false \(--no-t5\)\./;

  test("whose download is not whole is refused, with how to draw without it", async () => {
    const model = await copyModel("large");
    const weights = join(model, "text_encoder_3", "model.safetensors");
    await rename(weights, join(model, "text_encoder_3", "model-00001-of-00002.safetensors"));
    await writeFile(
      join(model, "text_encoder_3", "model.safetensors.index.json"),
      '{"weight_map":{"shared.weight":"model-00001-of-00002.safetensors","a":"model-00002-of-00002.safetensors"}}',
    );
    await expectError(model, /model-00002-of-00002\.safetensors is missing/);
    await expectError(model, error);
    await rm(join(model, "tokenizer_3"), { recursive: true });
    expect(await openCheckpoint(model, { textEncoder3: false })).toMatchObject({
      textEncoder3: null,
      tokenizer3: null,
    });
  });

  test("that the index does not name at all is not missed by those who leave it out", async () => {
    const model = await damaged(index, { text_encoder_3: undefined, tokenizer_3: undefined });
    await expectError(model, /lacks the part "text_encoder_3"/);
    expect(await openCheckpoint(model, { textEncoder3: false })).toMatchObject({ textEncoder3: null, warnings: [] });
  });

  test("left out: no engine is needed for it", async () => {
    for (const textEncoder3 of [true, false]) {
      const graphs = new GraphLibrary(await openCheckpoint(fixture("large", "model"), { textEncoder3 }));
      const required = requiredEngines(graphs, { sizes: [{ width: 64, height: 64 }], batches: [1], guidance: "on" });
      expect(required.map(({ graph }) => graph).includes("t5")).toBe(textEncoder3);
    }
  });
});

// Windows has no such permissions.
test.skipIf(process.platform === "win32")("a T5 that may not be read is refused, and not left out", async () => {
  const folder = await copyModel("large");
  const parts = ["..", ".", ...(await readdir(folder))];
  for (const part of parts) if (!part.endsWith(".json")) await chmod(join(folder, part), 0o755);
  // Loads what is loaded with the first checkpoint.
  await openCheckpoint(folder);
  await chmod(join(folder, "text_encoder_3"), 0);
  const isRoot = process.geteuid!() === 0;
  // Root may read everything.
  if (isRoot) process.seteuid!(65534);
  const error = await openCheckpoint(folder).catch((e) => e);
  if (isRoot) process.seteuid!(0);
  await chmod(join(folder, "text_encoder_3"), 0o755);
  expect(error).toBeInstanceOf(CheckpointError);
  expect(error.message).toMatch(/^Cannot read .*text_encoder_3\/config\.json: EACCES.*--no-t5/);
});

describe("modular_model_index.json", () => {
  const entry = (library: string, name: string, loading: object) => [
    library,
    name,
    { type_hint: [library, name], ...loading },
  ];
  const modular = async (changes: object) => {
    const model = await copyModel("sd3");
    const parts: object = {
      transformer: entry("diffusers", "SD3Transformer2DModel", { repo: "somebody/sd3", subfolder: "transformer" }),
      vae: entry("diffusers", "AutoencoderKL", { subfolder: "vae" }),
      scheduler: entry("diffusers", "FlowMatchEulerDiscreteScheduler", { subfolder: "scheduler" }),
      text_encoder: entry("transformers", "CLIPTextModelWithProjection", { subfolder: "text_encoder" }),
      tokenizer: entry("transformers", "CLIPTokenizer", { subfolder: "tokenizer" }),
      text_encoder_2: entry("transformers", "CLIPTextModelWithProjection", { subfolder: "text_encoder_2" }),
      tokenizer_2: entry("transformers", "CLIPTokenizer", { subfolder: "tokenizer_2" }),
    };
    const json = { _class_name: "StableDiffusion3ModularPipeline", ...parts, ...changes };
    await writeFile(join(model, "modular_model_index.json"), JSON.stringify(json));
    return model;
  };

  test("counts where there is no model_index.json", async () => {
    const model = await modular({ vae: "of another model" });
    expect(await openCheckpoint(model)).toMatchObject({ textEncoder3: null });
    await rm(join(model, index));
    await expectError(model, /modular_model_index\.json: the part "vae" is of the unknown class "of another model"/);
  });

  test("names the scheduler's class, as model_index.json does", async () => {
    const scheduler = entry("diffusers", "FlowMatchHeunDiscreteScheduler", { subfolder: "scheduler" });
    const model = await modular({ scheduler });
    await rm(join(model, index));
    expect((await openCheckpoint(model)).scheduler.className).toBe("FlowMatchHeunDiscreteScheduler");
  });

  for (const [what, changes, message] of [
    ["no vae", { vae: undefined }, /"vae" is null/],
    [
      "a part of another repository",
      { vae: entry("diffusers", "AutoencoderKL", { repo: "a/b", subfolder: "vae_2" }) },
      /vae_2 is missing, though modular_model_index\.json names this part \(of a\/b\)/,
    ],
    ...["../vae", "/vae", "a/../../vae", "..\\vae", "C:vae"].map(
      (subfolder) =>
        [subfolder, { vae: entry("diffusers", "AutoencoderKL", { subfolder }) }, /which leaves the folder/] as const,
    ),
  ] as const)
    test(what, async () => {
      const model = await modular(changes);
      await rm(join(model, index));
      await expectError(model, message);
    });
});

describe("missing parts", () => {
  for (const part of ["transformer", "vae", "scheduler", "text_encoder", "tokenizer_2", "tokenizer_3"])
    test(part, async () => {
      const model = await copyModel("large");
      await rm(join(model, part), { recursive: true });
      await expectError(model, new RegExp(`${part} is missing, though model_index.json names this part`));
    });

  for (const file of ["transformer/config.json", "scheduler/scheduler_config.json", "refiner/config.json"])
    test(file, async () => {
      const model = await copyModel("large");
      await rm(join(model, file));
      await expectError(model, new RegExp(`${file} is missing`));
    });
});

test.skipIf(process.platform === "win32").each([
  ["transformer/diffusion_pytorch_model.safetensors", /is not a file; expected a \.safetensors file/],
  ["vae/config.json", /config\.json is not JSON/],
])("a pipe in place of %s is not waited for", async (file, message) => {
  const model = await copyModel("sd3");
  await rm(join(model, file));
  execFileSync("mkfifo", [join(model, file)]);
  await expectError(model, message);
});

describe("parts that do not fit together", () => {
  const cases: [string, object, RegExp][] = [
    ["vae", { latent_channels: 8 }, /in_channels is 16, but the VAE's latent_channels is 8/],
    ["vae", { out_channels: 4 }, /must be 3 \(RGB\)/],
    ["transformer", { out_channels: 32 }, /out_channels is 32/],
    ["transformer", { joint_attention_dim: 64 }, /less than the CLIP encoders' hidden_size together \(80\)/],
    ["transformer", { pooled_projection_dim: 65 }, /pooled_projection_dim is 65.*together is 64/],
    ["transformer", { joint_attention_dim: 128 }, /d_model is 96.*joint_attention_dim is 128/],
    ["text_encoder", { vocab_size: 600 }, /vocab_size is 600.*ids up to 606/],
    ["text_encoder_3", { vocab_size: 100 }, /vocab_size is 100/],
    ["text_encoder_2", { max_position_embeddings: 64 }, /max_position_embeddings is 64.*77/],
    ["refiner", { in_channels: 16 }, /refiner.*in_channels is 16.*2 x 16/],
    ["refiner", { out_channels: 32 }, /refiner.*out_channels is 32/],
    ["refiner", { patch_size: 1 }, /refiner.*patch_size is 1/],
    ["refiner", { joint_attention_dim: 64 }, /refiner.*joint_attention_dim is 64/],
    ["refiner", { pooled_projection_dim: 32 }, /refiner.*pooled_projection_dim is 32/],
  ];
  for (const [part, changes, message] of cases)
    test(`${part}: ${message.source}`, async () => expectError(await damaged(`${part}/config.json`, changes), message));

  test("no CLIP encoder at all", async () => {
    const model = await damaged("model_index.json", {
      text_encoder: null,
      text_encoder_2: null,
      tokenizer: null,
      tokenizer_2: null,
    });
    await expectError(model, /both null/);
  });
});

test("a tensor of integers that no network reads (older files keep CLIP's positions) is in nobody's way", async () => {
  const folder = await copyModel("sd3");
  const file = join(folder, "text_encoder", "model.safetensors");
  const bytes = await readFile(file);
  const length = Number(bytes.readBigUInt64LE());
  const header = JSON.parse(bytes.toString("utf8", 8, 8 + length));
  const end = bytes.length - 8 - length;
  header["text_model.embeddings.position_ids"] = { dtype: "I64", shape: [1, 77], data_offsets: [end, end + 616] };
  const text = Buffer.from(JSON.stringify(header));
  const start = Buffer.alloc(8);
  start.writeBigUInt64LE(BigInt(text.length));
  await writeFile(file, Buffer.concat([start, text, bytes.subarray(8 + length), Buffer.alloc(616)]));
  const checkpoint = await openCheckpoint(folder);
  expect(new GraphLibrary(checkpoint).get("clip_l").externals.size).toBeGreaterThan(0);
  expect(new GraphLibrary(checkpoint, tensorRtEmitOptions()).optionsOf("clip_l").compute).toBe("float16");
});

test("an abort rejects with its reason", async () => {
  const reason = new Error("enough");
  await expect(openCheckpoint(shapes, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
  const controller = new AbortController();
  const opening = openCheckpoint(shapes, { signal: controller.signal });
  controller.abort(reason);
  await expect(opening).rejects.toBe(reason);
});
