/**
 * Folders whose files can say different things (a single file beside shards, variants in several spellings, tensors under
 * two names, four places for a tokenizer's tokens): each is read as diffusers and transformers read it. The folders were
 * drawn at random and loaded with the real libraries (fixtures/generate/folders.py); here they are made again, file by file
 * in another order each time.
 */

import { readFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { describe, expect, test } from "vitest";
import { readClipConfig, readT5Config } from "../../lib/checkpoint/configs.js";
import { openWeights } from "../../lib/checkpoint/index.js";
import { openClipTokenizer, openT5Tokenizer } from "../../lib/checkpoint/tokenizers.js";
import { namings } from "../../lib/checkpoint/weights.js";
import { CheckpointError } from "../../lib/errors.js";
import { fixture, randomFrom, safetensors, temporaryFolder } from "./folders.js";

interface Rules {
  readonly texts: readonly string[];
  readonly length: number;
  readonly weights: readonly {
    readonly kind: "transformer" | "text_encoder";
    readonly variant: string | null;
    readonly files: readonly (readonly [string, string | readonly (number | string)[]])[];
    readonly reads: readonly number[] | null;
  }[];
  readonly names: readonly {
    readonly kind: "text_encoder" | "text_encoder_3";
    readonly stored: readonly string[];
    readonly reads: Readonly<Record<string, string>> | null;
  }[];
  readonly configs: readonly {
    readonly kind: "text_encoder" | "text_encoder_3";
    readonly config: object;
    readonly width: number;
  }[];
  readonly tokenizers: readonly {
    readonly kind: "clip" | "t5";
    readonly files: Readonly<Record<string, string>>;
    readonly ids: readonly (readonly number[])[] | null;
  }[];
  readonly contents: Readonly<Record<string, unknown>>;
}

const rules: Rules = JSON.parse(readFileSync(fixture("folders.json"), "utf8"));
const random = randomFrom(7);
const shuffled = <T>(list: readonly T[]) =>
  list
    .map((item) => [random(), item] as const)
    .sort(([a], [b]) => a - b)
    .map(([, item]) => item);

const bases = { transformer: "diffusion_pytorch_model", text_encoder: "model" };

/** "model.safetensors.index.fp16.json" → "fp16" */
const variantIn = (name: string) =>
  name
    .split(".")
    .filter((piece, at) => at > 0 && !["safetensors", "index", "json"].includes(piece))
    .join();

describe("weights: the files that diffusers and transformers read", () => {
  for (const [number, { kind, variant, files, reads }] of rules.weights.entries())
    test(`${number}: ${kind}, ${variant}: ${files.map(([name]) => name).join(" ")}`, async () => {
      const folder = await temporaryFolder();
      const base = bases[kind];
      const names = files.map(([name]) => name.replace("@", base));
      for (const [place, [, content]] of shuffled([...files.entries()])) {
        const inIndex = (file: number | string) => (typeof file === "number" ? names[file]! : file.replace("@", base));
        const whole =
          typeof content === "string"
            ? safetensors([...content])
            : JSON.stringify({ metadata: {}, weight_map: { 1: inIndex(content[0]!), 2: inIndex(content[1]!) } });
        await writeFile(join(folder, names[place]!), whole);
      }
      const opened = openWeights(folder, base, { variant: variant ?? undefined });
      if (reads) {
        const weights = await opened;
        const found = ["1", "2"].map((tensor) => names.indexOf(basename(weights.find(tensor)!.file)));
        expect(found).toEqual(reads);
        // Several ways to the same weights are said.
        const part = weights.variant ?? "";
        const ways = names.filter((name) => !/-0000\d/.test(name) && variantIn(name) === part);
        const said = weights.warnings.filter((warning) => warning.includes("beside it"));
        expect(said, names.join()).toHaveLength(ways.length - 1);
        for (const name of ways) expect(said.length === 0 || said.some((warning) => warning.includes(name))).toBe(true);
        return;
      }
      // transformers does not know the older spellings of a variant's index, which lie on the hub.
      const older = (name: string) => /\.fp16\.index\.json$/.test(name);
      const weights = await opened.catch((error) => error);
      if (kind === "text_encoder" && names.some(older) && !(weights instanceof Error)) return;
      expect(weights).toBeInstanceOf(CheckpointError);
    });
});

describe("weights: the tensor of several names", () => {
  for (const [number, { kind, stored, reads }] of rules.names.entries())
    test(`${number}: ${kind}, ${stored.join(" ")}`, async () => {
      const folder = await temporaryFolder();
      await writeFile(join(folder, "model.safetensors"), safetensors(shuffled(stored)));
      const naming = kind === "text_encoder" ? namings.clip : namings.t5;
      const weights = await openWeights(folder, "model", { naming });
      const name = (tensor: string) => weights.find(tensor);
      if (!reads) {
        // A name that transformers does not know, either.
        expect(name("text_model.embeddings.token_embedding.weight")).toBeUndefined();
        return;
      }
      const bytes = readFileSync(join(folder, "model.safetensors"));
      for (const [tensor, expected] of Object.entries(reads)) {
        const table = tensor === "encoder.embed_tokens.weight" && !name(tensor) ? "shared.weight" : tensor;
        const { offset, length } = name(table)!;
        expect(bytes.toString("utf8", offset, offset + length).trim(), tensor).toBe(expected);
      }
    });
});

describe("configs: what is nested counts for CLIP", () => {
  for (const { kind, config, width } of rules.configs)
    test(`${kind}: ${JSON.stringify(config)}`, async () => {
      const file = join(await temporaryFolder(), "config.json");
      await writeFile(file, JSON.stringify(config));
      const read =
        kind === "text_encoder" ? (await readClipConfig(file)).hiddenSize : (await readT5Config(file)).dModel;
      expect(read).toBe(width);
    });
});

describe("tokenizers: the ids that transformers gives", () => {
  for (const [number, { kind, files, ids }] of rules.tokenizers.entries())
    test(`${number}: ${kind}, ${Object.keys(files).join(" ")}`, async () => {
      const folder = await temporaryFolder();
      for (const [name, key] of shuffled(Object.entries(files))) {
        const content = rules.contents[key];
        await writeFile(join(folder, name), typeof content === "string" ? content : JSON.stringify(content));
      }
      const tokenizer = await (kind === "t5" ? openT5Tokenizer : openClipTokenizer)(folder);
      for (const [place, text] of rules.texts.entries()) {
        const encoded = await tokenizer.encode(text, rules.length);
        expect([...encoded.ids].map(Number), text).toEqual(ids![place]);
      }
    });
});
