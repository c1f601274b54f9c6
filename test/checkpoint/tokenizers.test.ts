/**
 * Tokenizers against the ids that transformers 5.23 gave: those of the fixtures, and odd texts recorded from the same
 * version. Padding, truncation and special tokens inside a text all change the picture, so ids must be equal, not close.
 */

import { readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import { openClipTokenizer, openT5Tokenizer, type Tokenizer } from "../../lib/checkpoint/tokenizers.js";
import { CheckpointError } from "../../lib/errors.js";
import { copyModel, editJson, fixture } from "./folders.js";

const ids = async (tokenizer: Tokenizer, text: string, length: number) =>
  [...(await tokenizer.encode(text, length)).ids].map(Number);
const readJson = async (file: string) => JSON.parse(await readFile(file, "utf8"));

async function openAll(name: string): Promise<Record<string, Tokenizer>> {
  const model = fixture(name, "model");
  return {
    tokenizer: await openClipTokenizer(join(model, "tokenizer")),
    tokenizer_1: await openClipTokenizer(join(model, "tokenizer")),
    tokenizer_2: await openClipTokenizer(join(model, "tokenizer_2")),
    ...(name === "sd3" ? {} : { tokenizer_3: await openT5Tokenizer(join(model, "tokenizer_3")) }),
  };
}

describe("ids equal transformers'", () => {
  for (const name of ["large", "medium", "sd3"])
    test(`${name}: the fixture's five texts`, async () => {
      const tokenizers = await openAll(name);
      const expected: Record<string, Record<string, number[]>> = await readJson(fixture(name, "token_ids.json"));
      expect(Object.keys(expected).length).toBe(name === "sd3" ? 2 : 3);
      for (const [key, texts] of Object.entries(expected))
        for (const [text, wanted] of Object.entries(texts))
          expect(await ids(tokenizers[key]!, text, wanted.length), `${key}: ${text}`).toEqual(wanted);
    });

  test("medium, as transformers 5.24 saves it: tokenizer.json alone", async () => {
    const layout = fixture("medium", "layout");
    const tokenizers: Record<string, Tokenizer> = {
      tokenizer_1: await openClipTokenizer(join(layout, "tokenizer")),
      tokenizer_2: await openClipTokenizer(join(layout, "tokenizer_2")),
      tokenizer_3: await openT5Tokenizer(join(layout, "tokenizer_3")),
    };
    const expected: Record<string, Record<string, number[]>> = await readJson(fixture("medium", "token_ids.json"));
    for (const [key, texts] of Object.entries(expected))
      for (const [text, wanted] of Object.entries(texts))
        expect(await ids(tokenizers[key]!, text, wanted.length), `${key}: ${text}`).toEqual(wanted);
  });

  test("special tokens in a text, white space, forms of letters, one endless word", async () => {
    const tokenizers = await openAll("large");
    const expected: Record<string, Record<string, number[]>> = await readJson(
      fileURLToPath(new URL("odd_token_ids.json", import.meta.url)),
    );
    for (const [key, texts] of Object.entries(expected))
      for (const [text, recorded] of Object.entries(texts)) {
        // The record leaves out repetitions of its last id: all of them padding.
        const length = key === "tokenizer_3" ? 32 : 77;
        const wanted = [...recorded, ...new Array(length - recorded.length).fill(recorded.at(-1))];
        expect(await ids(tokenizers[key]!, text, length), `${key}: ${text}`).toEqual(wanted);
      }
  });
});

describe("truncation", () => {
  test("keeps the end token last and returns what was cut off", async () => {
    const { tokenizer_1: clip, tokenizer_3: t5 } = await openAll("large");
    const fits = await clip!.encode("a red circle above a small blue square", 10);
    expect(fits).toMatchObject({ truncated: false, unread: null, dropped: "" });
    const cut = await clip!.encode("a red circle above a small blue square", 6);
    expect(cut).toMatchObject({ truncated: true, unread: null, dropped: "a small blue square" });
    expect([...cut.ids].map(Number)).toEqual([605, 320, 562, 588, 584, 606]);
    const sentence = await t5!.encode("a red circle", 4);
    expect(sentence.truncated).toBe(true);
    expect(sentence.ids[3]).toBe(1n);
    expect(sentence.dropped.length).toBeGreaterThan(0);
    await expect(clip!.encode("a", 1)).rejects.toThrow(RangeError);
    expect([...(await t5!.encode("a red circle", 1)).ids]).toEqual([1n]);
    await expect(t5!.encode("a", 0)).rejects.toThrow(RangeError);
  });

  test("says nothing of a part of a character", async () => {
    const { tokenizer_1: clip } = await openAll("large");
    for (let length = 2; length < 16; length++) {
      const { truncated, dropped } = await clip!.encode("🦊 赤い 🦊🦊", length);
      if (truncated) expect(dropped, `${length}`).not.toMatch(/^\ufffd|\ufffd$/);
    }
  });

  test("maxLength: from the file, within the model's limit, whatever the file says", async () => {
    const model = await copyModel("large");
    const [clip, t5] = [join(model, "tokenizer"), join(model, "tokenizer_3")];
    for (const [declared, clipLength, t5Length] of [
      [16, 16, 16],
      [1e30, 77, 512],
      [undefined, 77, 512],
    ]) {
      for (const folder of [clip, t5])
        await editJson(join(folder, "tokenizer_config.json"), (json) => {
          json.model_max_length = declared;
        });
      expect((await openClipTokenizer(clip)).maxLength).toBe(clipLength);
      expect((await openT5Tokenizer(t5)).maxLength).toBe(t5Length);
    }
  });
});

describe("files", () => {
  test("a tokenizer.json instead of vocab.json and merges.txt gives the same ids", async () => {
    const folder = join(await copyModel("large"), "tokenizer");
    const before = await openClipTokenizer(folder);
    const vocab = await readJson(join(folder, "vocab.json"));
    const merges = (await readFile(join(folder, "merges.txt"), "utf8")).trim().split("\n").slice(1);
    await writeFile(join(folder, "tokenizer.json"), JSON.stringify({ model: { type: "BPE", vocab, merges } }));
    await rm(join(folder, "vocab.json"));
    await rm(join(folder, "merges.txt"));
    const after = await openClipTokenizer(folder);
    const text = "the photo of a café, 3 dogs & a cat's bowl!";
    expect(await ids(after, text, 77)).toEqual(await ids(before, text, 77));
  });

  test("padding: special_tokens_map.json overrides, unless the config lists its added tokens", async () => {
    const folder = join(await copyModel("large"), "tokenizer_2");
    await editJson(join(folder, "tokenizer_config.json"), (json) => {
      json.pad_token = "<|endoftext|>";
    });
    expect(await ids(await openClipTokenizer(folder), "", 3)).toEqual([605, 606, 0]);
    await editJson(join(folder, "tokenizer_config.json"), (json) => {
      json.added_tokens_decoder = { "606": { content: "<|endoftext|>", normalized: true, special: true } };
    });
    expect(await ids(await openClipTokenizer(folder), "", 3)).toEqual([605, 606, 606]);
    expect(await ids(await openClipTokenizer(folder), "<|ENDOFTEXT|>", 4)).toEqual([605, 606, 606, 606]);
  });

  test("a special token as an object", async () => {
    const folder = join(await copyModel("large"), "tokenizer_2");
    await editJson(join(folder, "special_tokens_map.json"), (json) => {
      json.pad_token = { content: "!", lstrip: false, normalized: false, rstrip: false, single_word: false };
    });
    expect(await ids(await openClipTokenizer(folder), "", 3)).toEqual([605, 606, 0]);
  });

  const damages: [string, string, (folder: string) => Promise<void>, RegExp][] = [
    ["no vocab.json", "tokenizer", (f) => rm(join(f, "vocab.json")), /vocab\.json is missing/],
    ["no merges.txt", "tokenizer", (f) => rm(join(f, "merges.txt")), /merges\.txt/],
    ["vocab.json not JSON", "tokenizer", (f) => writeFile(join(f, "vocab.json"), "{"), /vocab\.json is not JSON/],
    ["vocab.json a list", "tokenizer", (f) => writeFile(join(f, "vocab.json"), "[]"), /vocab\.json does not hold/],
    ["ids not numbers", "tokenizer", (f) => writeFile(join(f, "vocab.json"), '{"a":"b"}'), /is not a vocabulary/],
    ["a damaged merge", "tokenizer", (f) => writeFile(join(f, "merges.txt"), "#version: 0.2\na b c\n"), /merge 1/],
    [
      "a pad token outside the vocabulary",
      "tokenizer_2",
      (f) =>
        editJson(join(f, "special_tokens_map.json"), (json) => {
          json.pad_token = "<nothing>";
        }),
      /lacks the special token "<nothing>"/,
    ],
    [
      "padding on the left",
      "tokenizer",
      (f) =>
        editJson(join(f, "tokenizer_config.json"), (json) => {
          json.padding_side = "left";
        }),
      /tokenizer_config\.json: padding_side is left/,
    ],
    [
      "a token that is whole words only",
      "tokenizer",
      (f) =>
        editJson(join(f, "tokenizer_config.json"), (json) => {
          json.added_tokens_decoder = { 607: { content: "<cat>", single_word: true } };
        }),
      /"<cat>" is marked single_word/,
    ],
    ["only spiece.model", "tokenizer_3", (f) => rm(join(f, "tokenizer.json")), /no tokenizer\.json.*save_pretrained/],
    ["T5 without a unigram model", "tokenizer_3", (f) => writeFile(join(f, "tokenizer.json"), "{}"), /unigram/],
    [
      "T5 without an end token",
      "tokenizer_3",
      (f) =>
        editJson(join(f, "tokenizer.json"), (json) => {
          json.added_tokens = [];
          json.model.vocab[1][0] = "x";
        }),
      /lacks the eos_token/,
    ],
  ];
  for (const [what, part, damage, message] of damages)
    test(what, async () => {
      const folder = join(await copyModel("large"), part);
      await damage(folder);
      const error = await (part === "tokenizer_3" ? openT5Tokenizer : openClipTokenizer)(folder).catch((e) => e);
      expect(error).toBeInstanceOf(CheckpointError);
      expect(error.message).toMatch(message);
    });
});
