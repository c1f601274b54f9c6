/**
 * Prompts to token ids, exactly as transformers' tokenizers give them with `padding="max_length", truncation=True`.
 * SD3 checkpoints ship CLIP's tokenizers as vocab.json + merges.txt, as tokenizer.json, or as both, so the description that
 * a tokenizer is made of is put together here, as transformers 5 does it: where files disagree, the same one counts. CLIP
 * and T5 have no padding mask, which is why padding ids matter: tokenizer_2 pads with "!" and the files must say so. The
 * BPE and unigram models are @huggingface/tokenizers'.
 */

import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import type { Tokenizer as HuggingFaceTokenizer } from "@huggingface/tokenizers";
import { Dependency } from "../common/dependency.js";
import { packageFile } from "../common/package.js";
import { isDue, rest } from "../common/turns.js";
import { CheckpointError } from "../errors.js";
import { exists, isRecord, type JsonObject, readJsonObject, readOptionalJson, readText } from "./files.js";
import { type Piece, piecesOf } from "./pieces.js";

/** The library of tokenizers, loaded with the first checkpoint. */
export const huggingFaceTokenizers = new Dependency(
  "@huggingface/tokenizers",
  () => import("@huggingface/tokenizers"),
  () => null,
  () => "Run `npm install` again, or `npm install @huggingface/tokenizers`.",
);

/** The tokens of one text. */
export interface Tokens {
  /** [length] ids, padded or truncated; the end token stays when the text is truncated. */
  readonly ids: BigInt64Array;
  /** Ids before the padding, special tokens included. */
  readonly count: number;
  readonly truncated: boolean;
  /** The beginning of what truncation cut off, as far as it can be told from its tokens ("" if nothing was). */
  readonly dropped: string;
  /**
   * What the text has too much of, in words, where some of it was left out before the ids were complete: they may not be
   * those of the whole text. See `Bounds`.
   */
  readonly unread: string | null;
  /** For each text the ids that are its own: from one index to before another. */
  readonly spans: readonly (readonly [from: number, to: number])[];
}

export interface Tokenizer {
  /** The longest sequence the checkpoint was made for, special tokens included. */
  readonly maxLength: number;
  /** Largest id + 1: the embedding must have at least this many rows. */
  readonly vocabSize: number;
  /**
   * The ids of a text of any length, in slices that leave the event loop free. Of several texts, each is tokenised by itself and
   * their ids follow each other.
   * @throws RangeError for a length that the special tokens do not fit into: less than 2 for CLIP, less than 1 for T5
   */
  encode(text: string | readonly string[], length: number): Promise<Tokens>;
}

/** How much of a text is tokenised. The ids are those of the whole text unless one of these is exceeded. */
export interface Bounds {
  /** UTF-16 code units of a word (what stands between white space): of a longer one the rest is left out. */
  readonly word: number;
  /** UTF-16 code units for each token that is wanted, white space not counted: what follows more of them is left out. */
  readonly perToken: number;
}

/**
 * The slowest words take some 3 ms (unknown characters in a row, for T5). Texts have 4 or 5 characters a token, and no
 * token of CLIP or T5 has more than a few tens; more of them for a token are characters that are removed, or unknown ones
 * in a row, which T5 takes for one token.
 */
export const usualBounds: Bounds = { word: 1024, perToken: 64 };

/** Tokens that are decoded to say what was dropped. */
const shownTokens = 64;

/** What transformers assumes when tokenizer_config.json says nothing, or says 1e30, which stands for an unknown length. */
const clipMaxLength = 77;
/** OpenAI's file of merges, and how many of them CLIP has: 49408 tokens, less two for each byte and two that are special. */
const clipMergesFile = "bpe_simple_vocab_16e6.txt.gz";
const clipMerges = 49408 - 2 * 256 - 2;
const t5MaxLength = 512;

/**
 * CLIP's tokenizer from tokenizer.json, or else from vocab.json and merges.txt, or from OpenAI's own file of merges.
 *
 * @param vocabularyFolder where these are, if not with the files that say the special tokens
 * @throws CheckpointError for a missing or damaged file, or a special token that the vocabulary lacks.
 */
export async function openClipTokenizer(
  folder: string,
  bounds = usualBounds,
  vocabularyFolder = folder,
): Promise<Tokenizer> {
  const { vocab, merges, file, json } = await readClipVocabulary(vocabularyFolder);
  const names = await readTokens(folder, json);
  const end = names.token("eos_token") ?? plainToken("<|endoftext|>");
  const start = names.token("bos_token") ?? plainToken("<|startoftext|>");
  const pad = names.token("pad_token") ?? plainToken("<|endoftext|>");
  const unknown = names.token("unk_token") ?? plainToken("<|endoftext|>");
  // Special tokens are cut out of the text before anything else, so that "!" in a prompt for tokenizer_2 is its
  // padding token and not the word "!</w>": transformers does so, and the models saw it in training.
  const added = withIds(vocab, Object.keys(vocab).length, [
    ...names.listed,
    ...names.withoutListed([start, end, unknown, names.token("sep_token"), pad, ...names.others]),
    ...names.withoutListed(names.extra ?? names.additional ?? []),
  ]);
  const idOf = ({ content }: AddedToken): number => {
    // One that is in no list would get an id behind the vocabulary, where the encoder has no row.
    if (Object.hasOwn(vocab, content) || names.isListed(content)) return added.get(content)!.id;
    throw new CheckpointError(
      file,
      `${file} lacks the special token "${content}" that ${join(folder, "tokenizer_config.json")} (or its ` +
        "default) names. Download the tokenizer's files again.",
    );
  };

  const description = {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [...added.values()],
    normalizer: {
      type: "Sequence",
      normalizers: [
        { type: "NFC" },
        { type: "Replace", pattern: { Regex: "\\s+" }, content: " " },
        // JavaScript lowers a sigma at a word's end to its final form; transformers lowers letter by letter.
        { type: "Replace", pattern: { String: "\u03a3" }, content: "\u03c3" },
        { type: "Lowercase" },
      ],
    },
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        {
          type: "Split",
          pattern: {
            Regex:
              "<\\|startoftext\\|>|<\\|endoftext\\|>|'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+",
          },
          behavior: "Removed",
          invert: true,
        },
        // What ByteLevel itself would split by: its own expression takes U+FEFF for white space, which transformers does not.
        { type: "Split", pattern: { Regex: byteLevelWords }, behavior: "Removed", invert: true },
        { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: false },
      ],
    },
    post_processor: {
      type: "RobertaProcessing",
      sep: [end.content, idOf(end)],
      cls: [start.content, idOf(start)],
      trim_offsets: false,
      add_prefix_space: false,
    },
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: unknown.content,
      continuing_subword_prefix: "",
      end_of_word_suffix: "</w>",
      fuse_unk: false,
      byte_fallback: false,
      vocab,
      merges,
    },
  };
  const ids = [...Object.values(vocab), ...description.added_tokens.map(({ id }) => id)];
  const facts = { pad: idOf(pad), vocabulary: ids, maxLength: names.maxLength(clipMaxLength) };
  return tokenizer(file, description, end.content, facts, isolated([...added.keys()], bounds));
}

/**
 * T5's tokenizer from tokenizer.json.
 *
 * @throws CheckpointError for a missing or damaged file; a spiece.model alone is not read.
 */
export async function openT5Tokenizer(folder: string, bounds = usualBounds): Promise<Tokenizer> {
  const file = join(folder, "tokenizer.json");
  if (!(await exists(file)) && (await exists(join(folder, "spiece.model"))))
    throw new CheckpointError(
      file,
      `${folder} has spiece.model, but no tokenizer.json. Download tokenizer.json from the checkpoint's page, or make it in ` +
        "Python: transformers.T5TokenizerFast.from_pretrained(folder).save_pretrained(folder).",
    );
  const json = await readJsonObject(file);
  const names = await readTokens(folder, json);
  const model = json.model;
  const vocab = isRecord(model) && model.type === "Unigram" ? model.vocab : undefined;
  if (!isUnigramVocabulary(vocab))
    throw new CheckpointError(file, `${file} does not describe a T5 tokenizer: its model is not a unigram vocabulary.`);
  const pieces = Object.fromEntries(vocab.map(([piece], id) => [piece, id]));
  const token = (name: string, fallback: string) => names.token(name) ?? plainToken(fallback);
  const [end, unknown, pad] = [token("eos_token", "</s>"), token("unk_token", "<unk>"), token("pad_token", "<pad>")];
  const sentinels = typeof names.config.extra_ids === "number" ? names.config.extra_ids : 100;
  const usual = Array.from({ length: Math.min(Math.max(0, sentinels), vocab.length) }, (_, i) => `<extra_id_${i}>`);
  // Sentinels that the vocabulary lacks would get ids that the encoder has no rows for; no prompt needs them.
  const known = usual.filter((content) => Object.hasOwn(pieces, content)).map(plainToken);
  const additional = names.additional ?? [];
  const hasSentinels = additional.some(({ content }) => content.includes("<extra_id_"));
  const extra = names.extra ?? [...additional, ...(hasSentinels ? [] : known)];
  const added = withIds(pieces, vocab.length, [
    ...names.listed,
    ...names.withoutListed([names.token("bos_token"), end, unknown, names.token("sep_token"), pad, ...names.others]),
    ...names.withoutListed(extra),
  ]);
  const idOf = (name: string, { content }: AddedToken): number => {
    if (Object.hasOwn(pieces, content) || names.isListed(content)) return added.get(content)!.id;
    throw new CheckpointError(file, `${file} lacks the ${name} "${content}". Download the tokenizer's files again.`);
  };
  // Of a file of any converter transformers 5 keeps only the vocabulary, the character map and the end token, and
  // splits at white space in its own way: two converters' files must not give two pictures.
  const normalizer = findPrecompiled(json.normalizer);
  const description = {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [...added.values()],
    normalizer,
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        // As WhitespaceSplit, whose white space in JavaScript is not Unicode's: U+0085 and U+FEFF.
        { type: "Split", pattern: { Regex: "\\s+" }, behavior: "Removed", invert: false },
        { type: "Metaspace", replacement: "\u2581", prepend_scheme: "always", split: true },
      ],
    },
    post_processor: {
      type: "TemplateProcessing",
      single: [{ Sequence: { id: "A", type_id: 0 } }, { SpecialToken: { id: end.content, type_id: 0 } }],
      pair: [{ Sequence: { id: "A", type_id: 0 } }, { SpecialToken: { id: end.content, type_id: 0 } }],
      special_tokens: {
        [end.content]: { id: end.content, ids: [idOf("eos_token", end)], tokens: [end.content] },
      },
    },
    decoder: { type: "Metaspace", replacement: "\u2581", prepend_scheme: "always", split: true },
    // Whatever the file says, transformers 5 takes the third token for unknown characters.
    model: { type: "Unigram", unk_id: 2, vocab, byte_fallback: false },
  };
  const ids = [...Object.values(pieces), ...[...added.values()].map(({ id }) => id)];
  const facts = { pad: idOf("pad_token", pad), vocabulary: ids, maxLength: names.maxLength(t5MaxLength) };
  // Unknown characters in a row are one token, also those of two words where the sign of a word's beginning is unknown.
  const words = Object.hasOwn(pieces, "\u2581") ? [] : [" "];
  return tokenizer(file, description, end.content, facts, isolated([...added.keys(), ...words], bounds));
}

/** Of GPT-2, as ByteLevel has it in the library tokenizers. */
const byteLevelWords = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

/** The bounds where no token reaches from one word into the next; else all of the text is one word, of which more is read. */
function isolated(tokens: readonly string[], bounds: Bounds): Bounds & { readonly isolated: boolean } {
  const isolated = !tokens.some((token) => /\s/.test(token.normalize("NFKC")));
  return { ...bounds, isolated };
}

/** @param description its vocabulary and merges are gone afterwards */
async function tokenizer(
  file: string,
  description: { readonly model: { vocab: object; merges?: unknown[] } },
  end: string,
  { pad, vocabulary, maxLength }: { pad: number; vocabulary: Iterable<number>; maxLength: number },
  bounds: Bounds & { readonly isolated: boolean },
): Promise<Tokenizer> {
  const { Tokenizer } = await huggingFaceTokenizers.load();
  let inner: HuggingFaceTokenizer;
  let special: readonly number[];
  try {
    inner = new Tokenizer(description, { eos_token: end });
    inner.encode("a");
    special = inner.encode("").ids;
    // The library has made tables of these, and would keep them besides: 9 MB for CLIP.
    description.model.vocab = {};
    description.model.merges?.splice(0);
  } catch (cause) {
    throw new CheckpointError(file, `${file} cannot be used as a tokenizer: ${(cause as Error).message}`, { cause });
  }
  // Too many to be the arguments of Math.max.
  let largest = 0;
  for (const id of vocabulary) largest = Math.max(largest, id);
  return {
    maxLength,
    vocabSize: largest + 1,
    async encode(text, length) {
      if (!Number.isInteger(length) || length < special.length)
        throw new RangeError(`Expected a length of at least ${special.length} tokens but received ${length}.`);
      // Both kinds end with exactly one special token, and truncation keeps it.
      const [before, end] = [special.slice(0, -1), special.at(-1)!];
      const room = length - special.length;
      const found: number[] = [];
      let unread: Tokens["unread"] = null;
      let more = false;
      let read = 0;
      const ends: number[] = [];
      for (const each of [text].flat()) {
        for (const piece of pieces(each)) {
          if (isDue()) await rest();
          if (!piece) continue;
          // A few more than there is room for: they say what is dropped.
          more = found.length > room + shownTokens || (read >= bounds.perToken * length && found.length > room);
          if (more) break;
          if (read >= bounds.perToken * length) {
            unread = `more than ${bounds.perToken * length} characters for ${length} tokens`;
            break;
          }
          for (const id of inner.encode(piece.text, { add_special_tokens: false }).ids) found.push(id);
          read += piece.text.length;
          if (piece.cut && found.length <= room) unread = `a word of more than ${piece.text.length} characters`;
        }
        ends.push(before.length + Math.min(found.length, room));
      }
      const truncated = found.length > room;
      const ids = new BigInt64Array(length).fill(BigInt(pad));
      const taken = [...before, ...found.slice(0, room), end];
      ids.set(taken.map(BigInt));
      const dropped = truncated ? beginning(found.slice(room), more) : "";
      const spans = ends.map((end, index) => [ends[index - 1] ?? before.length, end] as const);
      return { ids, count: taken.length, truncated, dropped, unread, spans };
    },
  };

  function pieces(text: string): Iterable<Piece | null> {
    if (bounds.isolated) return piecesOf(text, bounds.word);
    return [{ text: text.slice(0, 4 * bounds.word), cut: text.length > 4 * bounds.word }];
  }

  function beginning(ids: readonly number[], more: boolean): string {
    // Tokens are parts of characters, too: what is left of the first and of the last one cannot be read.
    const text = inner
      .decode(ids.slice(0, shownTokens))
      .replace(/^\ufffd+|\ufffd+$/g, "")
      .trim();
    return more || ids.length > shownTokens ? `${text}...` : text;
  }
}

interface AddedToken {
  readonly content: string;
  readonly lstrip: boolean;
  readonly rstrip: boolean;
  /** Whether it is looked for before or after the text is normalized. */
  readonly normalized: boolean;
  readonly special: boolean;
  readonly singleWord: boolean;
}

/** Names of special tokens that transformers knows, in its order; those of a file's own end in _token, too. */
const tokenNames = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/**
 * The tokens that a folder's files name and add, as transformers 5 reads them: tokenizer_config.json is authoritative once
 * it lists its added tokens. Before transformers 4.34 it did not: then special_tokens_map.json overrides it, and the added
 * tokens are those of added_tokens.json and of tokenizer.json, which counts where both have an id.
 * @param json tokenizer.json, where there is one
 */
async function readTokens(folder: string, json: JsonObject | null) {
  const read = (name: string) => readOptionalJson(join(folder, name));
  const [config = {}, map = {}, encoder = {}] = await Promise.all([
    read("tokenizer_config.json"),
    read("special_tokens_map.json"),
    read("added_tokens.json"),
  ]);
  refuseUnknown(folder, config, json);
  const decoder = isRecord(config.added_tokens_decoder) ? config.added_tokens_decoder : undefined;
  const named = decoder ? config : { ...config, ...map };
  const ofConfig = [config.extra_special_tokens, config.additional_special_tokens].filter(Array.isArray);
  const first = ofConfig.find((tokens) => tokens.length > 0) ?? ofConfig[0];
  const further = !decoder && Array.isArray(map.extra_special_tokens) ? map.extra_special_tokens : undefined;
  const extra = first || further ? tokensOf([...(first ?? []), ...(further ?? [])]) : null;
  // The older name of the same list in special_tokens_map.json counts where there is none by the newer one.
  const older =
    !decoder && !extra && Array.isArray(map.additional_special_tokens) ? map.additional_special_tokens : null;
  const additional = older && tokensOf(older);

  const byId = new Map<number, AddedToken>();
  const list = (id: unknown, token: AddedToken | undefined) => {
    if (token && token.content !== "" && Number.isSafeInteger(Number(id))) byId.set(Number(id), token);
  };
  if (decoder) for (const [id, value] of Object.entries(decoder)) list(id, addedToken(value));
  else {
    const special = new Set([
      ...tokenNames.map((name) => addedToken(named[name])?.content),
      ...(extra ?? []).map(({ content }) => content),
    ]);
    for (const [content, id] of Object.entries(encoder)) {
      const isSpecial = special.has(content);
      list(id, { ...plainToken(content), special: isSpecial, normalized: !isSpecial });
    }
    for (const value of Array.isArray(json?.added_tokens) ? json.added_tokens : [])
      if (isRecord(value)) list(value.id, addedToken(value));
  }
  const listed = [...byId].sort(([id], [other]) => id - other).map(([, token]) => token);
  const contents = new Set(listed.map(({ content }) => content));
  const whole = listed.find((token) => token.singleWord);
  if (whole)
    throw new CheckpointError(
      join(folder, "tokenizer_config.json"),
      `${folder}: the added token "${whole.content}" is marked single_word, which is not supported. Set it to false.`,
    );
  // The last one with the same text, as in a table.
  const orListed = (value: AddedToken | undefined) =>
    listed.findLast(({ content }) => content === value?.content) ?? value;
  const token = (name: string) => orListed(addedToken(named[name], !decoder && map[name] !== undefined));
  // A list that is an object has tokens with names.
  const objects = [config.extra_special_tokens, !decoder && map.extra_special_tokens].filter(isRecord);
  const ofObjects = objects
    .flatMap((object) => Object.values(object))
    .map((value) => orListed(addedToken(value, true)));
  const own = Object.keys(named).filter((name) => name.endsWith("_token") && !tokenNames.includes(name));
  return {
    ...{ config, listed, extra, additional, token },
    /** Tokens with a name that neither CLIP nor T5 uses. */
    others: [...["cls_token", "mask_token", ...own].map(token), ...ofObjects],
    isListed: (content: string) => contents.has(content),
    withoutListed: (tokens: readonly (AddedToken | undefined)[]) =>
      tokens.filter((each): each is AddedToken => each !== undefined && !contents.has(each.content)),
    maxLength: (limit: number) => {
      const declared = config.model_max_length ?? config.max_len;
      return typeof declared === "number" && declared >= 2 ? Math.min(Math.floor(declared), limit) : limit;
    },
  };
}

/** What transformers would heed and is not done here. @throws CheckpointError for it */
function refuseUnknown(folder: string, config: JsonObject, json: JsonObject | null): void {
  const sideOf = (key: string, name: string) => config[key] ?? (isRecord(json?.[name]) && json[name].direction);
  const left = [
    ["padding_side", "padding"],
    ["truncation_side", "truncation"],
  ].find(([key, name]) => String(sideOf(key!, name!)).toLowerCase() === "left");
  const what = left ? `${left[0]} is left` : config.split_special_tokens === true ? "split_special_tokens is true" : "";
  const file = join(folder, "tokenizer_config.json");
  if (what !== "")
    throw new CheckpointError(file, `${file}: ${what}, which is not supported for a text encoder of SD3.`);
}

/**
 * Tokens with their ids, in the order in which they are added: that of the vocabulary for one that is in it, else the next
 * free one, whatever id a file gives it.
 */
function withIds(vocab: Record<string, number>, size: number, tokens: readonly AddedToken[]) {
  const added = new Map<string, AddedToken & { readonly id: number }>();
  let next = size;
  for (const token of tokens) {
    const { content } = token;
    const known = Object.hasOwn(vocab, content) ? vocab[content] : undefined;
    const id = known ?? added.get(content)?.id ?? next;
    added.set(content, { ...token, id });
    next = Math.max(next, id + 1);
  }
  return added;
}

function plainToken(content: string): AddedToken {
  return { content, lstrip: false, rstrip: false, normalized: false, special: true, singleWord: false };
}

/** A token is spelled as a string or as an object with `content`. @param isSpecial for an object that does not say */
function addedToken(value: unknown, isSpecial = false): AddedToken | undefined {
  if (typeof value === "string") return plainToken(value);
  if (!isRecord(value) || typeof value.content !== "string") return undefined;
  const special = typeof value.special === "boolean" ? value.special : isSpecial;
  return {
    content: value.content,
    lstrip: value.lstrip === true,
    rstrip: value.rstrip === true,
    normalized: typeof value.normalized === "boolean" ? value.normalized : !special,
    special,
    singleWord: value.single_word === true,
  };
}

const tokensOf = (values: readonly unknown[]) => values.flatMap((value) => addedToken(value) ?? []);

/** What is known of the tokenizers of SD3 and SD3.5 that come with the package before their files are read. */
const packedTokenizers = {
  tokenizer: { maxLength: clipMaxLength, vocabSize: 49408 },
  tokenizer_2: { maxLength: clipMaxLength, vocabSize: 49408 },
  tokenizer_3: { maxLength: t5MaxLength, vocabSize: 32100 },
} as const;

/**
 * A tokenizer that comes with the package. Its files are read with the first text: that takes longer than it takes to find out whether a
 * checkpoint's weights are right. CLIP's two differ in their padding alone.
 */
export function openPackedTokenizer(name: keyof typeof packedTokenizers): Tokenizer {
  const folder = packageFile(`models/tokenizers/${name}`);
  const vocabulary = packageFile("models/tokenizers/tokenizer");
  let opened: Promise<Tokenizer> | undefined;
  return {
    ...packedTokenizers[name],
    async encode(text, length) {
      opened ??= name === "tokenizer_3" ? openT5Tokenizer(folder) : openClipTokenizer(folder, usualBounds, vocabulary);
      return (await opened).encode(text, length);
    },
  };
}

/**
 * CLIP's vocabulary as OpenAI's simple_tokenizer.py makes it of the merges: the bytes, the bytes at a word's end, what is merged, and
 * the two special tokens.
 */
async function readClipMerges(file: string) {
  const text = gunzipSync(await readFile(file)).toString("utf8");
  // The first line says the version.
  const merges = checkMerges(file, text.split("\n").slice(1, clipMerges + 1));
  // Bytes that can be printed stand for themselves; the others for the characters from 256 on.
  const isPrinted = (byte: number) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  const bytes = Array.from({ length: 256 }, (_, byte) => byte);
  const others = bytes.filter((byte) => !isPrinted(byte)).map((_, index) => 256 + index);
  const characters = [...bytes.filter(isPrinted), ...others].map((code) => String.fromCodePoint(code));
  const merged = merges.map((pair) => pair.join(""));
  const tokens = [
    ...characters,
    ...characters.map((each) => `${each}</w>`),
    ...merged,
    "<|startoftext|>",
    "<|endoftext|>",
  ];
  return { file, vocab: Object.fromEntries(tokens.map((token, id) => [token, id])), merges, json: null };
}

async function readClipVocabulary(folder: string) {
  const packed = join(folder, clipMergesFile);
  if (await exists(packed)) return readClipMerges(packed);
  const vocabFile = join(folder, "vocab.json");
  const mergesFile = join(folder, "merges.txt");
  const combined = join(folder, "tokenizer.json");
  const json = (await readOptionalJson(combined)) ?? null;
  if (json) {
    const { model } = json;
    if (!isRecord(model) || !Array.isArray(model.merges))
      throw new CheckpointError(combined, `${combined} does not describe a CLIP tokenizer: its model has no merges.`);
    const vocab = checkVocabulary(combined, model.vocab);
    return { file: combined, vocab, merges: checkMerges(combined, model.merges), json };
  }
  const [vocab, text] = await Promise.all([readJsonObject(vocabFile), readText(mergesFile)]);
  const lines = text.split(/\r?\n/).filter((line, i) => line !== "" && !(i === 0 && line.startsWith("#version")));
  return { file: vocabFile, vocab: checkVocabulary(vocabFile, vocab), merges: checkMerges(mergesFile, lines), json };
}

function isUnigramVocabulary(vocab: unknown): vocab is readonly [piece: string, score: number][] {
  const isPiece = (item: unknown) =>
    Array.isArray(item) && typeof item[0] === "string" && typeof item[1] === "number" && item.length === 2;
  return Array.isArray(vocab) && vocab.length > 2 && vocab.every(isPiece);
}

function checkVocabulary(file: string, vocab: unknown): Record<string, number> {
  if (!isRecord(vocab) || !Object.values(vocab).every((id) => Number.isSafeInteger(id) && (id as number) >= 0))
    throw new CheckpointError(file, `${file} is not a vocabulary: expected an object of tokens and their ids.`);
  return vocab as Record<string, number>;
}

function checkMerges(file: string, merges: readonly unknown[]): [string, string][] {
  return merges.map((merge, i) => {
    const pair = typeof merge === "string" ? merge.split(" ") : merge;
    if (!Array.isArray(pair) || pair.length !== 2 || pair.some((half) => typeof half !== "string" || half === ""))
      throw new CheckpointError(file, `${file}: merge ${i + 1} (${JSON.stringify(merge)}) is not a pair of tokens.`);
    return pair as [string, string];
  });
}

/** SentencePiece's character map, wherever a converter put it. */
function findPrecompiled(normalizer: unknown): JsonObject | null {
  if (!isRecord(normalizer)) return null;
  if (normalizer.type === "Precompiled") return normalizer;
  const parts = Array.isArray(normalizer.normalizers) ? normalizer.normalizers : [];
  return parts.find((part) => isRecord(part) && part.type === "Precompiled") ?? null;
}
