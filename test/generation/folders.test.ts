// Folders of one checkpoint that different programs left behind, and T5 left out in each way that people do: every one draws diffusers' picture.
import { cpSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import path from "node:path";
import { FlowTurbo, type GenerateOptions, type LoadOptions } from "flowturbo";
import { describe, expect, it } from "vitest";
import { copyModel, editJson, renameTensors, scaleTensors } from "../checkpoint/folders.js";
import { fixture, readAll, relativeError } from "../support/fixtures.js";
import { withValues } from "../support/with-values.js";

const usual: GenerateOptions = {
  ...{ prompt: "a red circle above a small blue square", negativePrompt: "blurry, low quality" },
  ...{ width: 64, height: 64, sampler: "euler", maxSequenceLength: 32 },
};

/** Draws what a fixture holds the picture of. @returns what was warned of */
async function expectPicture(
  folder: string,
  [name, file]: [string, string],
  options: Partial<GenerateOptions> = {},
  loading: LoadOptions = {},
): Promise<readonly string[]> {
  const warned: string[] = [];
  const logger = { warn: (text: string) => void warned.push(text) };
  await using model = await FlowTurbo.load(folder, { ...loading, logger, measureCosts: false });
  const warnings = [...warned];
  expect(model.warnings).toEqual(warnings);
  const { noise, latents, image } = await readAll(fixture(name, `${file}.safetensors`));
  const steps = file === "euler_64" ? 6 : 4;
  const result = await withValues(model, { ...usual, steps, ...options, noise });
  expect(relativeError(result.latents, latents!)).toBeLessThan(1e-5);
  expect(relativeError(result.pixels, image!)).toBeLessThan(1e-5);
  return warnings;
}

const euler: [string, string] = ["large", "euler_64"];
const transformer = "transformer/diffusion_pytorch_model";

describe("without T5, diffusers' picture of text_encoder_3=None", () => {
  const reference: [string, string] = ["large", "without_t5"];

  it("by an option, whatever is wrong with T5's files", async () => {
    const folder = await copyModel("large");
    expect(await expectPicture(folder, reference, {}, { textEncoder3: false })).toEqual([]);
    writeFileSync(path.join(folder, "text_encoder_3/model.safetensors"), "");
    rmSync(path.join(folder, "tokenizer_3"), { recursive: true });
    expect(await expectPicture(folder, reference, {}, { textEncoder3: false })).toEqual([]);
  });

  it("by null for the encoder, with the tokenizer that diffusers keeps", async () => {
    const folder = await copyModel("large");
    await editJson(path.join(folder, "model_index.json"), (json) => {
      json.text_encoder_3 = [null, null];
    });
    expect(await expectPicture(folder, reference)).toEqual([]);
  });

  it("where it was not downloaded, with a warning", async () => {
    const folder = await copyModel("large");
    rmSync(path.join(folder, "text_encoder_3/model.safetensors"));
    expect(await expectPicture(folder, reference)).toEqual([
      expect.stringMatching(
        /text_encoder_3 holds no weights, though model_index\.json names it: .* without T5.*--no-t5/,
      ),
    ]);
    rmSync(path.join(folder, "text_encoder_3"), { recursive: true });
    rmSync(path.join(folder, "tokenizer_3"), { recursive: true });
    expect(await expectPicture(folder, reference)).toEqual([expect.stringMatching(/text_encoder_3 is missing/)]);
  });
});

it("one token of T5 is its end token, as in diffusers", () =>
  expectPicture(fixture("large", "model"), ["large", "sequence_1"], { maxSequenceLength: 1 }));

describe("the same picture from", () => {
  it("the files that diffusers 0.42 and transformers 5.24 save", async () => {
    const folder = await copyModel("medium");
    for (const part of ["tokenizer", "tokenizer_2", "tokenizer_3"])
      rmSync(path.join(folder, part), { recursive: true });
    cpSync(fixture("medium", "layout"), folder, { recursive: true });
    expect(await expectPicture(folder, ["medium", "euler_64"])).toEqual([]);
  });

  it("a modular pipeline's folder, whose parts are where its index says", async () => {
    const folder = await copyModel("large");
    const usualIndex = path.join(folder, "model_index.json");
    const parts = Object.entries(JSON.parse(readFileSync(usualIndex, "utf8"))).filter(
      (entry): entry is [string, [string, string]] => Array.isArray(entry[1]) && entry[1][0] !== null,
    );
    // As ModularPipeline.save_pretrained writes it.
    const entryOf = ([name, [library, className]]: [string, [string, string]]) => {
      const from = { pretrained_model_name_or_path: "somebody/sd3", subfolder: name, variant: null, revision: null };
      return [name, [library, className, { type_hint: [library, className], ...from }]];
    };
    const modular = Object.fromEntries(parts.map(entryOf));
    modular.vae[2].subfolder = "other/vae";
    cpSync(path.join(folder, "vae"), path.join(folder, "other/vae"), { recursive: true });
    rmSync(path.join(folder, "vae"), { recursive: true });
    renameSync(path.join(folder, `${transformer}.safetensors`), path.join(folder, `${transformer}.fp32.safetensors`));
    modular.transformer[2].variant = "fp32";
    rmSync(usualIndex);
    const names = { _class_name: "StableDiffusion3ModularPipeline", _blocks_class_name: "StableDiffusion3AutoBlocks" };
    writeFileSync(path.join(folder, "modular_model_index.json"), JSON.stringify({ ...names, ...modular }));
    expect(await expectPicture(folder, euler)).toEqual([]);
    // What it was saved without is not listed.
    delete modular.text_encoder_3;
    delete modular.tokenizer_3;
    writeFileSync(path.join(folder, "modular_model_index.json"), JSON.stringify({ ...names, ...modular }));
    expect(await expectPicture(folder, ["large", "without_t5"])).toEqual([]);
  });

  it("shards beside an older single file of the transformer, and a single file beside older shards of a text encoder", async () => {
    const folder = await copyModel("large");
    for (const part of [transformer, "text_encoder/model"]) {
      const file = path.join(folder, `${part}.safetensors`);
      const shard = `${path.basename(part)}-00001-of-00001.safetensors`;
      cpSync(file, path.join(path.dirname(file), shard));
      const names = renameTensors(file, (name) => name);
      const index = { metadata: {}, weight_map: Object.fromEntries(names.map((name) => [name, shard])) };
      writeFileSync(`${file}.index.json`, JSON.stringify(index));
      scaleTensors(part === transformer ? file : path.join(path.dirname(file), shard), 1.05);
    }
    const warnings = await expectPicture(folder, euler);
    expect(warnings).toHaveLength(2);
    expect(warnings[0]).toMatch(
      /model\.safetensors\.index\.json is read, as diffusers does, and not .*model\.safetensors /,
    );
    expect(warnings[1]).toMatch(
      /model\.safetensors is read, as transformers does, and not .*\.safetensors\.index\.json /,
    );
  });

  it("CLIP's tensors without their prefix, and T5's table under its other name", async () => {
    const folder = await copyModel("large");
    for (const part of ["text_encoder", "text_encoder_2"])
      renameTensors(path.join(folder, part, "model.safetensors"), (name) => name.replace("text_model.", ""));
    const t5 = path.join(folder, "text_encoder_3/model.safetensors");
    renameTensors(t5, (name) => (name === "shared.weight" ? "encoder.embed_tokens.weight" : name));
    expect(await expectPicture(folder, euler)).toEqual([]);
  });

  it("JSON files and merges.txt with a byte order mark", async () => {
    const folder = await copyModel("large");
    const texts = readdirSync(folder, { recursive: true, encoding: "utf8" }).filter((name) =>
      /\.(json|txt)$/.test(name),
    );
    expect(texts.length).toBeGreaterThan(15);
    for (const name of texts) {
      const file = path.join(folder, name);
      writeFileSync(file, `\ufeff${readFileSync(file, "utf8")}`);
    }
    expect(await expectPicture(folder, euler)).toEqual([]);
  });
});
