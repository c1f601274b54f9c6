/**
 * Prompts to token ids, exactly as transformers' tokenizers give them with `padding="max_length", truncation=True`.
 * SD3 checkpoints ship CLIP's tokenizers as vocab.json + merges.txt alone, so the description that a tokenizer.json would
 * hold is made here, as transformers 5 makes it. CLIP and T5 have no padding mask, which is why padding ids matter:
 * tokenizer_2 pads with "!" and the files must say so. The BPE and unigram models are @huggingface/tokenizers'.
 */

import { join } from "node:path";
import type { Tokenizer as HuggingFaceTokenizer } from "@huggingface/tokenizers";
import { Dependency } from "../common/dependency.js";
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
}

export interface Tokenizer {
  /** The longest sequence the checkpoint was made for, special tokens included. */
  readonly maxLength: number;
  /** Largest id + 1: the embedding must have at least this many rows. */
  readonly vocabSize: number;
  /**
   * The ids of a text of any length, in slices that leave the event loop free.
   * @throws RangeError if length is less than 2
   */
  encode(text: string, length: number): Promise<Tokens>;
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
const t5MaxLength = 512;

/**
 * CLIP's tokenizer from vocab.json and merges.txt, or from the same two in a tokenizer.json.
 *
 * @throws CheckpointError for a missing or damaged file, or a special token that the vocabulary lacks.
 */
export async function openClipTokenizer(folder: string, bounds = usualBounds): Promise<Tokenizer> {
  const [names, { vocab, merges, file }] = await Promise.all([readSpecialTokens(folder), readClipVocabulary(folder)]);
  const end = names.token("eos_token") ?? plainToken("<|endoftext|>");
  const start = names.token("bos_token") ?? plainToken("<|startoftext|>");
  const pad = names.token("pad_token") ?? plainToken("<|endoftext|>");
  const unknown = names.token("unk_token") ?? plainToken("<|endoftext|>");
  const idOf = (token: AddedToken): number => {
    const id = vocab[token.content] ?? names.ids.get(token.content);
    if (id === undefined)
      throw new CheckpointError(
        file,
        `${file} lacks the special token "${token.content}" that ${join(folder, "tokenizer_config.json")} (or its ` +
          "default) names. Download the tokenizer's files again.",
      );
    return id;
  };
  // Special tokens are cut out of the text before anything else, so that "!" in a prompt for tokenizer_2 is its
  // padding token and not the word "!</w>": transformers does so, and the models saw it in training.
  const added = new Map<string, AddedToken>();
  for (const token of [...names.added, start, end, pad, unknown])
    if (!added.has(token.content)) added.set(token.content, token);

  const description = {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: [...added.values()].map((token) => ({ ...token, id: idOf(token) })),
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
        { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
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
  return tokenizer(file, description, names.config, facts, isolated([...added.keys()], bounds));
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
  const [names, json] = await Promise.all([readSpecialTokens(folder), readJsonObject(file)]);
  const model = json.model as JsonObject | undefined;
  const vocab = model?.vocab;
  if (
    model?.type !== "Unigram" ||
    !Array.isArray(vocab) ||
    !vocab.every((item) => Array.isArray(item) && typeof item[0] === "string")
  )
    throw new CheckpointError(file, `${file} does not describe a T5 tokenizer: its model is not a unigram vocabulary.`);
  const ids = new Map(vocab.map((item, id) => [item[0] as string, id]));
  const jsonAdded = (Array.isArray(json.added_tokens) ? json.added_tokens : []).filter(isRecord);
  for (const token of jsonAdded) if (typeof token.content === "string") ids.set(token.content, Number(token.id));
  const idOf = (name: string, fallback: string): number => {
    const token = names.token(name)?.content ?? fallback;
    const id = ids.get(token);
    if (id === undefined)
      throw new CheckpointError(file, `${file} lacks the ${name} "${token}". Download the tokenizer's files again.`);
    return id;
  };
  // Of a file of any converter transformers 5 keeps only the vocabulary, the character map and the end token, and
  // splits at white space in its own way: two converters' files must not give two pictures.
  const normalizer = findPrecompiled(json.normalizer);
  const added = new Map(jsonAdded.map((token) => [token.content as string, token]));
  for (const name of ["eos_token", "unk_token", "pad_token"]) {
    const token = names.token(name);
    if (token && !added.has(token.content)) added.set(token.content, { ...token, id: idOf(name, token.content) });
  }
  const sentinels = typeof names.config.extra_ids === "number" ? names.config.extra_ids : 100;
  for (let i = 0; i < Math.min(sentinels, vocab.length); i++) {
    const content = `<extra_id_${i}>`;
    const id = ids.get(content);
    if (id !== undefined && !added.has(content)) added.set(content, { ...plainToken(content), id });
  }
  const end = names.token("eos_token")?.content ?? "</s>";
  const description = {
    ...json,
    truncation: null,
    padding: null,
    added_tokens: [...added.values()],
    normalizer,
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        { type: "WhitespaceSplit" },
        { type: "Metaspace", replacement: "\u2581", prepend_scheme: "always", split: true },
      ],
    },
    post_processor: {
      type: "TemplateProcessing",
      single: [{ Sequence: { id: "A", type_id: 0 } }, { SpecialToken: { id: end, type_id: 0 } }],
      pair: [{ Sequence: { id: "A", type_id: 0 } }, { SpecialToken: { id: end, type_id: 0 } }],
      special_tokens: { [end]: { id: end, ids: [idOf("eos_token", "</s>")], tokens: [end] } },
    },
    decoder: { type: "Metaspace", replacement: "\u2581", prepend_scheme: "always", split: true },
  };
  const facts = { pad: idOf("pad_token", "<pad>"), vocabulary: ids.values(), maxLength: names.maxLength(t5MaxLength) };
  // Unknown characters in a row are one token, also those of two words where the sign of a word's beginning is unknown.
  const words = ids.has("\u2581") ? [] : [" "];
  return tokenizer(file, description, names.config, facts, isolated([...added.keys(), ...words], bounds));
}

/** The bounds where no token reaches from one word into the next; else all of the text is one word, of which more is read. */
function isolated(tokens: readonly string[], bounds: Bounds): Bounds & { readonly isolated: boolean } {
  const isolated = !tokens.some((token) => /\s/.test(token.normalize("NFKC")));
  return { ...bounds, isolated };
}

async function tokenizer(
  file: string,
  description: object,
  config: JsonObject,
  { pad, vocabulary, maxLength }: { pad: number; vocabulary: Iterable<number>; maxLength: number },
  bounds: Bounds & { readonly isolated: boolean },
): Promise<Tokenizer> {
  const { Tokenizer } = await huggingFaceTokenizers.load();
  let inner: HuggingFaceTokenizer;
  let special: readonly number[];
  try {
    inner = new Tokenizer(description, config);
    inner.encode("a");
    special = inner.encode("").ids;
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
      if (!Number.isInteger(length) || length < 2)
        throw new RangeError(`Expected a length of at least 2 tokens but received ${length}.`);
      // Both kinds end with exactly one special token, and truncation keeps it.
      const [before, end] = [special.slice(0, -1), special.at(-1)!];
      const room = length - special.length;
      const found: number[] = [];
      let unread: Tokens["unread"] = null;
      let more = false;
      let read = 0;
      for (const piece of pieces(text)) {
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
      const truncated = found.length > room;
      const ids = new BigInt64Array(length).fill(BigInt(pad));
      const taken = [...before, ...found.slice(0, room), end];
      ids.set(taken.map(BigInt));
      const dropped = truncated ? beginning(found.slice(room), more) : "";
      return { ids, count: taken.length, truncated, dropped, unread };
    },
  };

  function pieces(text: string): Iterable<Piece | null> {
    if (bounds.isolated) return piecesOf(text, bounds.word);
    return [{ text: text.slice(0, 4 * bounds.word), cut: text.length > 4 * bounds.word }];
  }

  function beginning(ids: readonly number[], more: boolean): string {
    const text = inner.decode(ids.slice(0, shownTokens)).trim();
    return more || ids.length > shownTokens ? `${text}...` : text;
  }
}

interface AddedToken {
  readonly content: string;
  readonly single_word: boolean;
  readonly lstrip: boolean;
  readonly rstrip: boolean;
  /** Whether it is looked for before or after the text is normalized. */
  readonly normalized: boolean;
  readonly special: boolean;
}

/**
 * tokenizer_config.json is authoritative once it lists its added tokens; before transformers 4.34 it did not, and
 * special_tokens_map.json overrides it.
 */
async function readSpecialTokens(folder: string) {
  const [config = {}, map = {}] = await Promise.all([
    readOptionalJson(join(folder, "tokenizer_config.json")),
    readOptionalJson(join(folder, "special_tokens_map.json")),
  ]);
  const decoder = isRecord(config.added_tokens_decoder) ? config.added_tokens_decoder : undefined;
  // Tokens of added_tokens_decoder, and their ids.
  const added: AddedToken[] = [];
  const ids = new Map<string, number>();
  for (const [id, value] of Object.entries(decoder ?? {})) {
    const token = addedToken(value);
    if (!token || !Number.isSafeInteger(Number(id))) continue;
    added.push(token);
    ids.set(token.content, Number(id));
  }
  const named = decoder ? config : { ...config, ...map };
  return {
    ...{ config, added, ids },
    token: (name: string) => {
      const token = addedToken(named[name]);
      return added.find(({ content }) => content === token?.content) ?? token;
    },
    maxLength: (limit: number) => {
      const declared = config.model_max_length;
      return typeof declared === "number" && declared >= 2 ? Math.min(Math.floor(declared), limit) : limit;
    },
  };
}

function plainToken(content: string): AddedToken {
  return { content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true };
}

/** A token is spelled as a string or as an object with `content`. */
function addedToken(value: unknown): AddedToken | undefined {
  if (typeof value === "string") return plainToken(value);
  if (!isRecord(value) || typeof value.content !== "string") return undefined;
  return {
    content: value.content,
    single_word: value.single_word === true,
    lstrip: value.lstrip === true,
    rstrip: value.rstrip === true,
    normalized: value.normalized === true,
    special: true,
  };
}

async function readClipVocabulary(folder: string) {
  const vocabFile = join(folder, "vocab.json");
  const mergesFile = join(folder, "merges.txt");
  const combined = join(folder, "tokenizer.json");
  if (!(await exists(vocabFile)) && (await exists(combined))) {
    const model = (await readJsonObject(combined)).model;
    if (!isRecord(model) || !Array.isArray(model.merges))
      throw new CheckpointError(combined, `${combined} does not describe a CLIP tokenizer: its model has no merges.`);
    return {
      file: combined,
      vocab: checkVocabulary(combined, model.vocab),
      merges: checkMerges(combined, model.merges),
    };
  }
  const [vocab, text] = await Promise.all([readJsonObject(vocabFile), readText(mergesFile)]);
  const lines = text.split(/\r?\n/).filter((line, i) => line !== "" && !(i === 0 && line.startsWith("#version")));
  return { file: vocabFile, vocab: checkVocabulary(vocabFile, vocab), merges: checkMerges(mergesFile, lines) };
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
