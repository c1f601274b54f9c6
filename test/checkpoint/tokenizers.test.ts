/**
 * Tokenizers against the ids that transformers 5.23 gave: those of the fixtures, and odd texts recorded from the same
 * version. Padding, truncation and special tokens inside a text all change the picture, so ids must be equal, not close.
 */

import { readFile } from "node:fs/promises";
import { describe, expect, test } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";

const fixture = (name: string) => new URL(`../fixtures/${name}/`, import.meta.url).pathname;

describe("token ids equal transformers'", () => {
  for (const name of ["large", "medium", "sd3"])
    test(name, async () => {
      const checkpoint = await openCheckpoint(`${fixture(name)}model`);
      const expected = JSON.parse(await readFile(`${fixture(name)}token_ids.json`, "utf8"));
      const tokenizers = {
        tokenizer_1: checkpoint.tokenizer,
        tokenizer_2: checkpoint.tokenizer2,
        tokenizer_3: checkpoint.tokenizer3,
      };
      for (const [key, texts] of Object.entries<Record<string, number[]>>(expected))
        for (const [text, ids] of Object.entries(texts)) {
          const tokens = tokenizers[key as "tokenizer_1"]!.encode(text, ids.length);
          expect([...tokens.ids].map(Number), `${key}: ${text}`).toEqual(ids);
        }
    });
});
