/**
 * Texts of any length: the ids of what is tokenised piece by piece are those of the whole text, and how much is given to
 * the tokenizer does not grow with the text. The reference is the same tokenizer with one endless piece.
 */
import { join } from "node:path";
import { Tokenizer as HuggingFaceTokenizer } from "@huggingface/tokenizers";
import fc from "fast-check";
import { afterEach, beforeAll, describe, expect, type Mock, test, vi } from "vitest";
import { piecesOf } from "../../lib/checkpoint/pieces.js";
import { type Bounds, openClipTokenizer, openT5Tokenizer, type Tokenizer } from "../../lib/checkpoint/tokenizers.js";
import { copyModel, editJson, fixture } from "./folders.js";

const kinds = ["tokenizer", "tokenizer_2", "tokenizer_3"] as const;
const endless: Bounds = { word: Number.POSITIVE_INFINITY, perToken: Number.POSITIVE_INFINITY };
const open = (folder: string, bounds?: Bounds) =>
  (folder.endsWith("3") ? openT5Tokenizer : openClipTokenizer)(folder, bounds);

/** What makes up odd texts: words, every kind of white space, marks that join, special tokens, what vanishes. */
const atoms = [
  ...[
    "a",
    "red",
    "circle",
    "BLUE",
    "don't",
    "café",
    "cafe\u0301",
    "\u0301",
    "\u0316",
    "Σ",
    "ΟΔΟΣ",
    "İ",
    "ﬁ",
    "½",
    "¨",
    "´",
  ],
  ...["3", "42", ",", ",,,", "!", "...", "<|endoftext|>", "<|startoftext|>", "</s>", "<unk>", "<pad>", "<extra_id_0>"],
  ...[
    "山",
    "水画",
    "😀",
    "👩‍🚀",
    "☃",
    "\u{1d400}",
    "가",
    "\u1100\u1161\u11a8",
    "～",
    "\ud800",
    "▁",
    "\u0001",
    "\u007f",
  ],
  ...[" ", " ", " ", "  ", "\n", "\t", "\r\n", "\v", "\f", "\u0085", "\u00a0", "\u1680", "\u2003", "\u200b", "\u200d"],
  ...["\u2028", "\u202f", "\u3000", "\ufeff", " \ufeff ", "\ufffd"],
];
const oddText = fc.array(fc.constantFrom(...atoms), { maxLength: 60 }).map((parts) => parts.join(""));
/** None but where white space is scarce and the words are long. */
const anyText = fc.oneof(
  oddText,
  fc.string({ unit: "binary", maxLength: 80 }),
  fc.string({ unit: "grapheme", maxLength: 80 }),
);

describe("pieces", () => {
  test("are the text without white space at their ends, no longer than asked for", () => {
    fc.assert(
      fc.property(anyText, fc.integer({ min: 1, max: 40 }), (text, longest) => {
        let at = 0;
        for (const piece of piecesOf(text, longest)) {
          if (!piece) continue;
          expect(piece.text.length).toBeLessThanOrEqual(longest);
          expect(piece.text).not.toMatch(/^[ \t\n\r\u00a0\u3000]|^$/);
          const found = text.indexOf(piece.text, at);
          // What is between two pieces is white space, unless a word was cut.
          expect(text.slice(at, found)).toMatch(/^\s*$/);
          at = found + piece.text.length;
          if (piece.cut) at += text.slice(at).search(/[ \t\n\r\u00a0\u3000]|$/);
        }
        expect(text.slice(at)).toMatch(/^\s*$/);
      }),
    );
  });

  test("do not cut a pair of surrogates", () => {
    const pieces = [...piecesOf("😀".repeat(10), 5)];
    expect(pieces).toEqual([{ text: "😀😀", cut: true }]);
  });

  test("give others a chance in long white space and in long words", () => {
    for (const text of [`${" ".repeat(1e6)}a`, "a".repeat(1e6)])
      expect([...piecesOf(text, 100)].filter((piece) => piece === null).length).toBeGreaterThan(10);
  });
});

describe.each(["large", "shapes"])("tokens of %s", (model) => {
  const folder = model === "shapes" ? join(import.meta.dirname, "../../models/shapes") : fixture(model, "model");
  const whole: Record<string, Tokenizer> = {};
  beforeAll(async () => {
    for (const kind of kinds) whole[kind] = await open(join(folder, kind), endless);
  });

  test.each(kinds)("%s: of pieces and of the whole text are the same", async (kind) => {
    const bounded = await open(join(folder, kind), { word: 24, perToken: 1e6 });
    let exact = 0;
    await fc.assert(
      fc.asyncProperty(anyText, fc.integer({ min: 2, max: 60 }), async (text, length) => {
        const given = await bounded.encode(text, length);
        const wanted = await whole[kind]!.encode(text, length);
        // Only a word that is cut may change anything, and then it is said.
        const isCut = [...piecesOf(text, 24)].some((piece) => piece?.cut);
        if (!isCut) {
          exact++;
          expect(given.unread).toBeNull();
          expect(given.ids).toEqual(wanted.ids);
          expect(given.truncated).toBe(wanted.truncated);
        } else if (given.unread === null) expect(given.truncated).toBe(true);
        // Quoted in short, with a mark where there is more.
        if (given.truncated && !isCut)
          expect(wanted.dropped.startsWith(given.dropped.replace(/\.{3}$/, ""))).toBe(true);
      }),
      { numRuns: 300 },
    );
    expect(exact).toBeGreaterThan(50);
  });

  test.each(kinds)("%s: a million spaces, then words", async (kind) => {
    const tokenizer = await open(join(folder, kind));
    const text = `${" ".repeat(1e6)}a red${"\n ".repeat(1e5)}circle`;
    expect(await tokenizer.encode(text, 20)).toEqual(await whole[kind]!.encode("a red circle", 20));
  });
});

describe("how much is tokenised", () => {
  afterEach(() => {
    vi.restoreAllMocks();
  });

  const texts: Record<string, string> = {
    words: "a large red circle above the small blue square ".repeat(2e4),
    "a word": "a".repeat(1e6),
    commas: ",".repeat(1e5),
    emoji: "😀".repeat(5e5),
    Chinese: "山水画中的小船".repeat(1e5),
    "words of emoji": `${"😀".repeat(400)} `.repeat(1000),
    "combining marks": `a${"\u0301\u0316".repeat(5e5)}`,
    spaces: " ".repeat(1e6),
    "control characters": "\u0001".repeat(1e6),
    "words of control characters": `${"\u0001".repeat(500)} `.repeat(2000),
  };

  test.each(kinds)("%s: no more than the bounds say, and the event loop gets its turns", async (kind) => {
    const tokenizer = await open(join(fixture("large", "model"), kind));
    const encode = vi.spyOn(HuggingFaceTokenizer.prototype, "encode") as unknown as Mock<(text: string) => unknown>;
    const length = kind === "tokenizer_3" ? 512 : 77;
    for (const [name, text] of Object.entries(texts)) {
      encode.mockClear();
      const { ids, truncated, unread } = await tokenizer.encode(text, length);
      const given = encode.mock.calls.map(([part]) => (part as string).length);
      expect(ids, name).toHaveLength(length);
      expect(Math.max(0, ...given), name).toBeLessThanOrEqual(1024);
      expect(
        given.reduce((sum, each) => sum + each, 0),
        name,
      ).toBeLessThanOrEqual(64 * length + 1024);
      if (name !== "spaces") expect(truncated || unread !== null, name).toBe(true);
    }
  });

  test("what is left out is said", async () => {
    const tokenizer = await open(join(fixture("large", "model"), "tokenizer_3"));
    expect((await tokenizer.encode(`${"😀".repeat(600)} a`, 64)).unread).toBe("a word of more than 1024 characters");
    expect((await tokenizer.encode(texts["words of control characters"]!, 64)).unread).toBe(
      "more than 4096 characters for 64 tokens",
    );
  });

  test("tokens with white space in them: all of the text counts as one word", async () => {
    const folder = join(await copyModel("large"), "tokenizer_3");
    await editJson(join(folder, "tokenizer.json"), (json) => {
      json.added_tokens.push({ id: 160, content: "two  words", special: true, normalized: false });
    });
    const text = `${"a ".repeat(11)}two  words a`;
    const [whole, bounded] = [await open(folder, endless), await open(folder, { word: 10, perToken: 1e6 })];
    expect(await bounded.encode(text, 40)).toEqual(await whole.encode(text, 40));
    expect((await bounded.encode(`${"a ".repeat(30)}`, 40)).unread).toBe("a word of more than 40 characters");
  });
});

test("tokenising leaves the event loop free", async () => {
  const tokenizer = await openT5Tokenizer(join(fixture("large", "model"), "tokenizer_3"));
  let turns = 0;
  const timer = setInterval(() => turns++, 1);
  // Many at once take no longer slices than one.
  await Promise.all(Array.from({ length: 20 }, () => tokenizer.encode(texts20, 512)));
  clearInterval(timer);
  expect(turns).toBeGreaterThan(10);
});
const texts20 = `${"😀".repeat(400)} `.repeat(1000);
