import { readFileSync } from "node:fs";
import { test } from "vitest";
import { openClipTokenizer, openT5Tokenizer } from "../../lib/checkpoint/index.js";
test("odd", async () => {
  const all = JSON.parse(readFileSync("/tmp/w/odd.json", "utf8"));
  let same = 0;
  for (const [dir, texts] of Object.entries<Record<string, number[]>>(all)) {
    const t = await (dir.endsWith("_3") ? openT5Tokenizer : openClipTokenizer)(dir);
    for (const [s, ids] of Object.entries(texts)) {
      const got = [...t.encode(s, ids.length).ids].map(Number);
      if (JSON.stringify(got) !== JSON.stringify(ids)) console.log(dir, JSON.stringify(s), "\n got", got.slice(0, 24).join(), "\nwant", ids.slice(0, 24).join());
      else same++;
    }
  }
  console.log("same", same);
});
