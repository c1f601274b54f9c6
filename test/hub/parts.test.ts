/** What else is taken from the hub: the base of a file, the autoencoder of previews, and repositories of modular pipelines. */

import { cp, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import { FlowTurbo } from "flowturbo";
import { describe, expect, test } from "vitest";
import { openCheckpoint, openControlNet } from "../../lib/checkpoint/index.js";
import { CheckpointError, HubError } from "../../lib/errors.js";
import { type LocateOptions, locateAll } from "../../lib/generation/locate.js";
import { fixture, temporaryFolder } from "../checkpoint/folders.js";
import { readSafetensors, writeSafetensors } from "../checkpoint/safetensors-file.js";
import { bytes, home, hub, modelFiles, name, pullModel, settingsOf } from "./support.js";

const folder = fixture("sd3", "model");
const single = fixture("sd3", "single/full.safetensors");

async function locate(model: string, options: LocateOptions, env: Record<string, string> = {}) {
  return locateAll(model, { settings: await settingsOf(env), ...options });
}

async function refused<E extends Error>(call: Promise<unknown>, kind: new (...a: never[]) => E): Promise<E> {
  const error = await call.then(
    () => null,
    (error) => error,
  );
  expect(error).toBeInstanceOf(kind);
  return error;
}

/** Paths of the files in a folder. */
async function filesIn(root: string): Promise<string[]> {
  const found = await readdir(root, { recursive: true, withFileTypes: true });
  return found
    .filter((each) => !each.isDirectory())
    .map((each) => path.relative(root, path.join(each.parentPath, each.name)).split(path.sep).join("/"))
    .sort();
}

/** The files of a fixture's folder, as a repository. */
async function repositoryOf(...of: string[]): Promise<Map<string, Buffer>> {
  const files = await filesIn(fixture(...of));
  return new Map(await Promise.all(files.map(async (file) => [file, await readFile(fixture(...of, file))] as const)));
}

const contentsAsked = () => hub.seen.filter(({ host, path: asked }) => host === "cdn" || asked.includes("/resolve/"));

describe("ControlNets", () => {
  const weights = "diffusion_pytorch_model.safetensors";
  const canny = "owner/SD3-Controlnet-Canny";
  const add = async (change: (files: Map<string, Buffer>) => void = () => {}) => {
    const files = await repositoryOf("sd3", "controlnet");
    for (const other of ["README.md", "canny.jpg", "sd3_canny.safetensors"]) files.set(other, bytes(50));
    change(files);
    hub.add(canny, { files });
  };

  test("are their configuration and their weights, and open as their folders do", async () => {
    await add();
    const local = fixture("sd3", "controlnet_own");
    const { controlNets, warnings } = await locate(folder, { controlNets: [{ folder: canny }, { folder: local }] });
    expect([controlNets[1], warnings]).toEqual([local, []]);
    expect(await filesIn(controlNets[0]!)).toEqual(["config.json", weights]);
    const { config } = await openControlNet(controlNets[0]!);
    expect(config).toEqual((await openControlNet(fixture("sd3", "controlnet"))).config);
    // By `flowturbo pull`, too.
    expect(await pullModel(canny)).toMatchObject({ path: controlNets[0], files: 2, downloaded: 0 });
  });

  test("of other models are refused before their weights are downloaded", async () => {
    await add((files) => files.set("config.json", Buffer.from(JSON.stringify({ _class_name: "FluxControlNetModel" }))));
    const { message } = await refused(locate(folder, { controlNets: [{ folder: canny }] }), CheckpointError);
    expect(message).toContain("a ControlNet of FLUX");
    expect(contentsAsked().filter(({ path: asked }) => asked.includes("safetensors"))).toEqual([]);
    await add((files) => files.delete("config.json"));
    const none = await refused(locate(folder, { controlNets: [{ folder: canny }] }), HubError);
    expect(none.message).toContain("it is not one ControlNet, such as");
  });

  test("that are folders are looked at before a model is downloaded", async () => {
    hub.add(name, { files: await modelFiles() });
    const wrong = { controlNets: [{ folder: fixture("sd3", "model") }] };
    const { message } = await refused(locate(name, wrong), CheckpointError);
    expect(message).toContain("without a folder controlnet/");
    expect(contentsAsked()).toEqual([]);
  });
});

describe("the autoencoder of previews", () => {
  const weights = "diffusion_pytorch_model.safetensors";
  const tiny = "owner/taesd3";
  const addTiny = async (change: (files: Map<string, Buffer>) => void = () => {}) => {
    const files = await repositoryOf("tiny", "vae");
    for (const other of ["README.md", "diffusion_pytorch_model.bin", "taesd3_encoder.pth"]) files.set(other, bytes(50));
    change(files);
    hub.add(tiny, { files });
  };

  test("is its configuration and its weights, and opens as its folder does", async () => {
    await addTiny();
    const { previewVae, path: model, warnings } = await locate(folder, { previewVae: tiny });
    expect([model, warnings]).toEqual([folder, []]);
    expect(await filesIn(previewVae!)).toEqual(["config.json", weights]);
    const opened = await openCheckpoint(folder, { previewVae });
    expect(opened.previewVae!.config).toMatchObject({ kind: "tiny", latentChannels: 16, scalingFactor: 1.25 });
    // From the cache, and by `flowturbo pull`.
    const before = hub.seen.length;
    expect((await locate(folder, { previewVae: tiny }, { HF_HUB_OFFLINE: "1" })).previewVae).toBe(previewVae);
    expect(hub.seen.length).toBe(before);
    expect(await pullModel(tiny)).toMatchObject({ path: previewVae, files: 2, downloaded: 0 });
  });

  test("in another precision and in shards", async () => {
    await addTiny((files) => {
      files.set("diffusion_pytorch_model.fp16.safetensors", files.get(weights)!);
      files.set("a.safetensors", files.get(weights)!);
      const map = { "decoder.layers.0.weight": "a.safetensors" };
      files.set(`${weights}.index.json`, Buffer.from(JSON.stringify({ weight_map: map })));
    });
    const of = async (options: LocateOptions) =>
      filesIn((await locate(folder, { previewVae: tiny, ...options })).previewVae!);
    expect(await of({})).toEqual(["a.safetensors", "config.json", `${weights}.index.json`]);
    await rm(home, { recursive: true });
    expect(await of({ variant: "fp16" })).toEqual(["config.json", "diffusion_pytorch_model.fp16.safetensors"]);
    await rm(home, { recursive: true });
    // As a folder is read: without files of the variant, without it.
    expect(await of({ variant: "bf16" })).toContain(`${weights}.index.json`);
  });

  test("is a path where there is one", async () => {
    await addTiny();
    const cwd = process.cwd();
    process.chdir(home);
    try {
      await cp(fixture("tiny", "vae"), tiny, { recursive: true });
      expect((await locate(folder, { previewVae: tiny })).previewVae).toBe(tiny);
      expect(hub.seen).toEqual([]);
    } finally {
      process.chdir(cwd);
    }
  });

  test("may be TAESD's own decoder, which comes with its encoder", async () => {
    const files = await repositoryOf("taesd");
    hub.add(tiny, { files });
    const { previewVae } = await locate(folder, { previewVae: `${tiny}/taesd3_decoder.safetensors` });
    expect(await filesIn(path.dirname(previewVae!))).toEqual([
      "taesd3_decoder.safetensors",
      "taesd3_encoder.safetensors",
    ]);
    expect((await openCheckpoint(folder, { previewVae })).joiningVae).not.toBeNull();
    const error = await refused(locate(folder, { previewVae: tiny }), HubError);
    expect(error.message).toMatch(/has no config\.json.*owner\/name\/file.*taesd3_decoder\.safetensors/);
  });

  test("that cannot be had is an error before the model is downloaded", async () => {
    hub.add(name, { files: await modelFiles() });
    await addTiny((files) => files.set("config.json", Buffer.from('{"_class_name":"UNet2DModel"}')));
    const asked = (previewVae: string, env = {}) => locate(name, { previewVae }, env);
    expect((await refused(asked(tiny), CheckpointError)).message).toMatch(/"_class_name" \("UNet2DModel"\)/);
    expect(hub.requestsFor(weights)).toEqual([]);
    expect((await refused(asked("owner/absent"), HubError)).reason).toBe("not_found");
    expect((await refused(asked("./absent"), CheckpointError)).message).toContain("for previewVae does not exist");
    hub.add("owner/gated", { files: await repositoryOf("tiny", "vae"), access: "gated" });
    const gated = await refused(asked("owner/gated"), HubError);
    expect([gated.reason, gated.message]).toEqual(["gated", expect.stringContaining(`${hub.url}/owner/gated`)]);
    const offline = await refused(asked("owner/gated", { HF_HUB_OFFLINE: "1" }), HubError);
    expect([offline.reason, offline.message]).toEqual([
      "offline",
      expect.stringContaining("`flowturbo pull owner/gated`"),
    ]);
    expect(hub.seen.filter(({ path: each }) => each.includes(name))).toEqual([]);
    // Nor is it a model.
    await addTiny();
    expect((await refused(locate(tiny, {}), HubError)).message).toContain("has no model_index.json");
  });
});

describe("the base of a file", () => {
  const base = "owner/base";
  const isWeights = (file: string) => file.endsWith(".safetensors");
  /** The transformer alone of the fixture's file. */
  async function transformerAlone(): Promise<string> {
    const tensors = Object.entries(readSafetensors(single)).filter(([key]) => key.startsWith("model.diffusion_model."));
    const file = path.join(await temporaryFolder(), "transformer.safetensors");
    writeSafetensors(file, Object.fromEntries(tensors));
    return file;
  }
  const addBase = async () => hub.add(base, { files: await repositoryOf("sd3", "model") });

  test("is all but the weights that the file has", async () => {
    await addBase();
    const all = await filesIn(folder);
    const needless = /^(refiner\/|schedules\.json|prompts\.txt)/;
    for (const [file, own] of [
      [single, /^(transformer|vae|text_encoder(_2)?)\//],
      [await transformerAlone(), /^transformer\//],
    ] as const) {
      await rm(home, { recursive: true, force: true });
      const located = await locate(file, { base });
      const taken = all.filter((each) => !needless.test(each) && !(isWeights(each) && own.test(each)));
      expect(await filesIn(located.base!)).toEqual(taken);
      const [opened, local] = [
        await openCheckpoint(file, { base: located.base }),
        await openCheckpoint(file, { base: folder }),
      ];
      for (const part of ["transformer", "vae", "textEncoder", "textEncoder2"] as const) {
        expect(opened[part]!.config).toEqual(local[part]!.config);
        expect(opened[part]!.weights.names).toEqual(local[part]!.weights.names);
      }
      expect(opened.scheduler).toEqual(local.scheduler);
      const before = hub.seen.length;
      expect((await locate(file, { base }, { HF_HUB_OFFLINE: "1" })).base).toBe(located.base);
      expect(hub.seen.length).toBe(before);
    }
  });

  test("that was taken for a file is no whole model, and is completed when it is asked for as one", async () => {
    await addBase();
    const { base: part } = await locate(single, { base });
    const offline = await refused(locate(base, {}, { HF_HUB_OFFLINE: "1" }), HubError);
    expect(offline.message).toContain("no weights for transformer");
    const { path: whole } = await locate(base, {});
    expect(whole).toBe(part);
    expect((await openCheckpoint(whole)).transformer.weights.names.length).toBeGreaterThan(10);
  });

  test("takes T5 where the file has none and it is used, in the variant where there is one", async () => {
    const files = await repositoryOf("medium", "model");
    const t5 = [...files.keys()].filter((file) => /^(text_encoder_3|tokenizer_3)\//.test(file));
    expect(t5.some(isWeights)).toBe(true);
    hub.add(base, { files });
    const file = fixture("medium", "single/full.safetensors");
    const withoutT5 = path.join(await temporaryFolder(), "clips.safetensors");
    const tensors = Object.entries(readSafetensors(file)).filter(([key]) => !key.includes(".t5xxl."));
    writeSafetensors(withoutT5, Object.fromEntries(tensors));
    const taken = async (options: LocateOptions) => {
      await rm(home, { recursive: true, force: true });
      return filesIn((await locate(withoutT5, { base, ...options })).base!);
    };
    expect((await taken({ textEncoder3: false })).filter((each) => each.includes("_3/"))).toEqual([]);
    expect((await taken({})).filter((each) => each.includes("_3/"))).toEqual(t5);
    // No part that is taken need have the variant.
    expect((await taken({ variant: "fp16" })).filter((each) => each.includes("_3/"))).toEqual(t5);
  });

  test("may be that of a file on the hub", async () => {
    await addBase();
    hub.add(name, { files: new Map([["fine.safetensors", await readFile(single)]]) });
    const located = await locate(`${name}/fine.safetensors`, { base });
    await openCheckpoint(located.path, { base: located.base });
  });

  test("that cannot be one is an error before anything is downloaded", async () => {
    await addBase();
    hub.add(name, { files: await modelFiles() });
    for (const [model, of, message] of [
      [name, base, /owner\/model is not one file, and only such a model has a base/],
      [name, folder, /owner\/model is not one file/],
      [folder, base, /model is not one file/],
      [single, `${base}/x.safetensors`, /owner\/base\/x\.safetensors is one file\. A base is a folder/],
      [`${name}/x.safetensors`, home, /is not a checkpoint: it has no model_index\.json/],
      [`${name}/x.safetensors`, "./absent", /absent does not exist\. A base is a folder/],
    ] as const)
      expect((await refused(locate(model, { base: of }), CheckpointError)).message).toMatch(message);
    expect(contentsAsked()).toEqual([]);
    expect((await refused(locate(single, { base: "owner/absent" }), HubError)).reason).toBe("not_found");
  });
});

test("FlowTurbo.load draws with a file, a base and an autoencoder of the hub, and tells of their downloads", async () => {
  hub.add("owner/base", { files: await repositoryOf("sd3", "model") });
  hub.add("owner/taesd3", { files: await repositoryOf("tiny", "vae") });
  hub.add(name, { files: new Map([["fine.safetensors", await readFile(single)]]) });
  const variables = { HF_ENDPOINT: hub.url, HF_HOME: home };
  const before = Object.keys(variables).map((key) => [key, process.env[key]] as const);
  Object.assign(process.env, variables);
  try {
    const downloaded: string[] = [];
    await using model = await FlowTurbo.load(`${name}/fine.safetensors`, {
      ...{ base: "owner/base", previewVae: "owner/taesd3", measureCosts: false },
      onProgress: ({ phase, files = [] }) => {
        if (phase === "download") downloaded.push(...files.map((file) => file.path));
      },
    });
    await using local = await FlowTurbo.load(single, {
      ...{ base: folder, previewVae: fixture("tiny", "vae"), measureCosts: false },
    });
    const [a, b] = await Promise.all(
      [model, local].map(async (each) => {
        const previews: Uint8Array[] = [];
        const { images } = await each.generate({
          ...{ prompt: "a red circle", width: 64, height: 64, steps: 2, seed: 1, preview: "decoded" },
          onStep: ({ previews: [picture] }) => void previews.push(picture!.data),
        });
        return { previews, data: images[0]!.data };
      }),
    );
    expect(a).toEqual(b);
    expect(a!.previews).toHaveLength(2);
    expect(model.warnings).toEqual([]);
    expect(contentsAsked().length).toBeGreaterThan(10);
  } finally {
    for (const [key, value] of before) {
      if (value === undefined) delete process.env[key];
      else process.env[key] = value;
    }
  }
});

describe("a modular pipeline's repository", () => {
  type Loading = Record<string, string | null>;
  const modularIndex = "modular_model_index.json";
  /** The fixture's files with the index that ModularPipeline.save_pretrained writes. `change` gets what each entry says of its place. */
  async function modular(change: (loading: Record<string, Loading>) => void = () => {}, of = name) {
    const files = await modelFiles("medium");
    const usual = JSON.parse(files.get("model_index.json")!.toString()) as Record<string, [string, string]>;
    const parts = Object.entries(usual).filter(([, entry]) => Array.isArray(entry) && entry[0] !== null);
    const loading: Record<string, Loading> = {};
    for (const [part] of parts)
      loading[part] = { pretrained_model_name_or_path: of, subfolder: part, variant: null, revision: null };
    change(loading);
    const entries = parts.map(([part, [library, className]]) => [
      part,
      [library, className, { type_hint: [library, className], ...loading[part] }],
    ]);
    const names = { _class_name: "StableDiffusion3ModularPipeline", _blocks_class_name: "StableDiffusion3AutoBlocks" };
    files.set(modularIndex, Buffer.from(JSON.stringify({ ...names, ...Object.fromEntries(entries) })));
    return files;
  }
  const move = (files: Map<string, Buffer>, from: string, to: string | null) => {
    for (const [file, data] of [...files]) {
      if (!file.startsWith(from)) continue;
      files.delete(file);
      if (to !== null) files.set(to + file.slice(from.length), data);
    }
  };

  test("is pulled, with or without model_index.json, which counts first", async () => {
    const files = await modular();
    const usual = files.get("model_index.json")!;
    files.delete("model_index.json");
    hub.add(name, { files });
    const { path: alone } = await locate(name, {});
    expect(await filesIn(alone)).toEqual([...files.keys()].sort());
    await openCheckpoint(alone);
    expect((await locate(name, {}, { HF_HUB_OFFLINE: "1" })).path).toBe(alone);
    hub.add(name, { files: new Map([...files, ["model_index.json", usual]]) });
    const { path: both } = await locate(name, {});
    expect(await filesIn(both)).toEqual(
      [...files.keys(), "model_index.json"].filter((file) => file !== modularIndex).sort(),
    );
  });

  test("has its parts where the index says, in the precision that it says", async () => {
    const weights = "transformer/diffusion_pytorch_model";
    const files = await modular((loading) => {
      loading.vae!.subfolder = "other/vae/";
      loading.transformer!.variant = "fp32";
    });
    files.delete("model_index.json");
    move(files, "vae/", "other/vae/");
    const plain = [...files.keys()].filter((file) => file.startsWith(weights));
    expect(plain).toEqual([`${weights}.safetensors`]);
    files.set(`${weights}.fp32.safetensors`, files.get(`${weights}.safetensors`)!);
    files.set("vae/diffusion_pytorch_model.safetensors", bytes(10));
    hub.add(name, { files });
    const { path: pulled } = await locate(name, {});
    const needless = [`${weights}.safetensors`, "vae/diffusion_pytorch_model.safetensors"];
    expect(await filesIn(pulled)).toEqual([...files.keys()].filter((file) => !needless.includes(file)).sort());
    const opened = await openCheckpoint(pulled);
    expect(opened.transformer.weights.variant).toBe("fp32");
  });

  test("is a base, too, with its parts where the index says, in the precision that it says", async () => {
    const weights = "text_encoder_3/model";
    const files = await modular((loading) => {
      loading.tokenizer_3!.subfolder = "other/tokenizer_3";
      loading.text_encoder_3!.variant = "fp32";
    });
    files.delete("model_index.json");
    move(files, "tokenizer_3/", "other/tokenizer_3/");
    move(files, `${weights}.safetensors`, `${weights}.fp32.safetensors`);
    expect(files.has(`${weights}.fp32.safetensors`)).toBe(true);
    hub.add(name, { files });
    const tensors = Object.entries(readSafetensors(fixture("medium", "single/full.safetensors")));
    const file = path.join(await temporaryFolder(), "clips.safetensors");
    writeSafetensors(file, Object.fromEntries(tensors.filter(([key]) => !key.includes(".t5xxl."))));
    const { base } = await locate(file, { base: name });
    const { textEncoder3, tokenizer3 } = await openCheckpoint(file, { base });
    expect(textEncoder3!.weights.variant).toBe("fp32");
    const own = await openCheckpoint(fixture("medium", "model"));
    expect(await tokenizer3!.encode("a red circle", 16)).toEqual(await own.tokenizer3!.encode("a red circle", 16));
  });

  test("whose parts are in other repositories is refused with their names, and a local copy, too", async () => {
    for (const change of [
      // As an index alone names them, and as somebody's autoencoder at the root of its repository.
      { pretrained_model_name_or_path: "somebody/vae", subfolder: "vae" },
      { pretrained_model_name_or_path: "somebody/vae", subfolder: null },
    ]) {
      const files = await modular((loading) => Object.assign(loading.vae!, change));
      files.delete("model_index.json");
      move(files, "vae/", null);
      // Another program's.
      files.set("config.json", Buffer.from("{}"));
      hub.add(name, { files });
      const { reason, message } = await refused(locate(name, {}), HubError);
      expect(reason).toBe("layout");
      expect(message).toMatch(
        /^owner\/model lacks the (folder|part) vae, though modular_model_index\.json names this part \(of somebody\/vae\)\. .*Pass somebody\/vae as the model.*save_pretrained\(folder\)\.$/,
      );
      expect(contentsAsked().every(({ path: asked }) => asked.endsWith(modularIndex))).toBe(true);
      const copy = await temporaryFolder();
      for (const [file, data] of files) {
        await mkdir(path.dirname(path.join(copy, file)), { recursive: true });
        await writeFile(path.join(copy, file), data);
      }
      const error = await refused(openCheckpoint(copy), CheckpointError);
      expect(error.message).toMatch(/vae is missing.*\(of somebody\/vae\).*Pass somebody\/vae as the model/);
    }
  });

  test("without T5 as diffusers saves it: with its type alone, or with its place in another repository", async () => {
    for (const place of [null, "somebody/sd3"]) {
      const files = await modular((loading) => {
        for (const part of ["text_encoder_3", "tokenizer_3"])
          loading[part] = { pretrained_model_name_or_path: place, subfolder: place && part, variant: null };
      });
      files.delete("model_index.json");
      move(files, "text_encoder_3/", null);
      move(files, "tokenizer_3/", null);
      hub.add(name, { files });
      if (place !== null)
        expect((await refused(locate(name, {}), HubError)).message).toMatch(/of somebody\/sd3.*--no-t5/);
      const { path: pulled } = await locate(name, { textEncoder3: place === null ? undefined : false });
      const { textEncoder3, warnings } = await openCheckpoint(pulled, { textEncoder3: place === null });
      expect([textEncoder3, warnings]).toEqual([null, []]);
    }
  });

  test("of another kind is refused before its parts are downloaded", async () => {
    hub.add(name, { files: new Map([[modularIndex, Buffer.from('{"_class_name":"FluxModularPipeline"}')]]) });
    expect((await refused(locate(name, {}), CheckpointError)).message).toContain("FluxModularPipeline");
    expect(contentsAsked()).toHaveLength(1);
  });
});
