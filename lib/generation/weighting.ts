/**
 * Prompt weighting: a text whose parts have weights of their own, and what the weights do to embeddings. Both as the Python
 * library compel has them (version 2.5, its default DownweightMode.MASK); `(text:1.3)` is another way to write its `(text)1.3`.
 */

/** A part of a text, with its weight: 1 for none. */
export interface Fragment {
  readonly text: string;
  readonly weight: number;
}

/** Parts with a weight below 1 that a text may have: each is another launch of each text encoder. */
export const mostDownweighted = 16;
/** Text encoders read no more than that of a text; and groups that are deeper in others are a mistake in writing. */
const [longestText, deepestGroup] = [32_768, 32];
/** As are larger weights. */
const largestWeight = 100;
/** Of `+` and of `-` behind a group or a word, for each sign. */
const signs: Record<string, number> = { "+": 1.1, "-": 0.9 };

const number = /\d+(?:\.\d+)?|\.\d+/y;
const suffix = /\++|-+/y;
/** What stands for itself behind a backslash. */
const escaped = "()+-:\\";

/** A text that stands for itself. */
export function unweighted(text: string): readonly Fragment[] {
  return [{ text, weight: 1 }];
}

/**
 * Reads `(text:1.3)`, `(text)1.3`, `(text)++`, `word--`, groups in groups, and `\(`.
 * @returns parts in their order, neighbours of one weight as one; at least one
 * @throws SyntaxError in words that follow the name of the option
 */
export function parseWeights(text: string): readonly Fragment[] {
  if (text.length > longestText)
    throw new SyntaxError(`${text.length} characters; a text with weights may have ${longestText}`);
  const found: { text: string; weight: number }[] = [];
  /** Of each group that is open, how many parts come before it. */
  const groups: number[] = [];
  let plain = "";
  /** Where the word that could have a sign behind it begins in `plain`; null where there is none. */
  let word: number | null = null;
  /** Whether that word holds more than signs: others are dashes, and no sign weighs them. */
  let isWeighable = false;
  const flush = () => {
    if (plain !== "") found.push({ text: plain, weight: 1 });
    plain = "";
    word = null;
    isWeighable = false;
  };
  const matchAt = (pattern: RegExp, at: number): string | null => {
    pattern.lastIndex = at;
    return pattern.exec(text)?.[0] ?? null;
  };

  let at = 0;
  while (at < text.length) {
    const character = text[at]!;
    if (character === "\\" && at + 1 < text.length && escaped.includes(text[at + 1]!)) {
      word ??= plain.length;
      isWeighable = true;
      plain += text[at + 1];
      at += 2;
    } else if (character === "(") {
      flush();
      groups.push(found.length);
      if (groups.length > deepestGroup) throw new SyntaxError(`more than ${deepestGroup} groups in each other`);
      at++;
    } else if (character === ")" || (character === ":" && groups.length > 0 && isWeightAt(at + 1))) {
      // The end of a group: what it weighs is behind a colon, or behind the parenthesis.
      const group = groups.pop();
      if (group === undefined)
        throw new SyntaxError(`a ")" at character ${at + 1} that no "(" opens; write \\) for one that is meant`);
      flush();
      let weight = 1;
      const inside = character === ":" ? matchAt(number, skipSpace(at + 1))! : null;
      if (inside !== null) at = skipSpace(skipSpace(at + 1) + inside.length);
      at++;
      const behind = inside === null ? (matchAt(number, at) ?? matchAt(suffix, at)) : null;
      if (inside !== null || behind !== null) weight = weightOf(inside ?? behind!);
      at += behind?.length ?? 0;
      for (const part of found.slice(group)) part.weight *= weight;
    } else if (word !== null && isWeighable && character in signs && isWordEnd(at)) {
      const sign = matchAt(suffix, at)!;
      const own = plain.slice(word);
      plain = plain.slice(0, word);
      flush();
      found.push({ text: own, weight: weightOf(sign) });
      at += sign.length;
    } else {
      if (/[\s,.;]/.test(character)) {
        word = null;
        isWeighable = false;
      } else {
        word ??= plain.length;
        isWeighable ||= !(character in signs);
      }
      plain += character;
      at++;
    }
  }
  flush();
  if (groups.length > 0) throw new SyntaxError('a "(" that no ")" closes; write \\( for one that is meant');
  return checked(joined(found));

  function skipSpace(from: number): number {
    let end = from;
    while (/\s/.test(text[end] ?? "")) end++;
    return end;
  }

  /** Whether a weight and the end of the group follow: else a colon is a colon. */
  function isWeightAt(from: number): boolean {
    const begin = skipSpace(from);
    const weight = matchAt(number, begin);
    return weight !== null && text[skipSpace(begin + weight.length)] === ")";
  }

  /** Whether signs end a word here: a hyphen within a word is a hyphen. */
  function isWordEnd(from: number): boolean {
    const end = from + matchAt(suffix, from)!.length;
    return end === text.length || /[\s,.;()]/.test(text[end]!);
  }
}

/** @throws SyntaxError for a weight that is too large */
function weightOf(written: string): number {
  const base = signs[written[0]!];
  const weight = base === undefined ? Number(written) : base ** written.length;
  if (weight > largestWeight)
    throw new SyntaxError(`the weight ${written}; weights are numbers from 0 to ${largestWeight}`);
  return weight;
}

/** Parts that hold a word; neighbours of one weight as one, with white space between them, as compel joins them. */
function joined(fragments: readonly Fragment[]): Fragment[] {
  const all: Fragment[] = [];
  for (const { text, weight } of fragments) {
    const last = all.at(-1);
    if (text.trim() === "") continue;
    if (last?.weight === weight) all[all.length - 1] = { text: `${last.text} ${text}`, weight };
    else all.push({ text, weight });
  }
  return all.length > 0 ? all : [{ text: "", weight: 1 }];
}

function checked(fragments: readonly Fragment[]): readonly Fragment[] {
  for (const { weight } of fragments)
    if (weight > largestWeight)
      throw new SyntaxError(`weights whose product is ${weight}; weights are numbers from 0 to ${largestWeight}`);
  const below = fragments.filter(({ weight }) => weight < 1).length;
  if (below > mostDownweighted)
    throw new SyntaxError(
      `${below} parts with a weight below 1; there may be ${mostDownweighted}, since each is encoded again`,
    );
  return fragments;
}

/** A text in the tokens of one encoder, with its weights. */
export interface TokenWeights {
  /** Of each token, [tokens]; 1 for special tokens and padding. */
  readonly perToken: Float32Array;
  /** The parts with a weight below 1: each has a mask [1, tokens], 0 for its own tokens. */
  readonly masked: readonly { readonly mask: Float32Array; readonly weight: number }[];
}

/**
 * Weights of tokens from those of parts; null where no token that is read has one.
 * @param spans the tokens of each part
 */
export function tokenWeights(
  fragments: readonly Fragment[],
  spans: readonly (readonly [from: number, to: number])[],
  tokens: number,
): TokenWeights | null {
  const perToken = new Float32Array(tokens).fill(1);
  const masked: { mask: Float32Array; weight: number }[] = [];
  for (const [index, { weight }] of fragments.entries()) {
    const [from, to] = spans[index] ?? [0, 0];
    if (from === to) continue;
    perToken.fill(weight, from, to);
    if (weight < 1) masked.push({ mask: new Float32Array(tokens).fill(1).fill(0, from, to), weight });
  }
  return perToken.every((weight) => weight === 1) ? null : { perToken, masked };
}

/**
 * The weighted hidden states [tokens, width] of a text: each is moved away from (or towards) those of the empty text, z = e + w·(z − e).
 * Those of each part with a weight w below 1 are then blended in as they are where no token attends to it, in the ratio tan((1 − w)·π/2) to 1.
 * @param hidden of the text, and for each of the masks
 * @param empty of the empty text
 */
export function weightedStates(
  hidden: readonly Float32Array[],
  empty: Float32Array,
  { perToken, masked }: TokenWeights,
): Float32Array {
  // At 0 the tangent has no bound.
  const parts = [1, ...masked.map(({ weight }) => Math.tan(((1 - Math.max(weight, 1e-5)) * Math.PI) / 2))];
  const total = parts.reduce((sum, part) => sum + part, 0);
  const width = empty.length / perToken.length;
  const blended = new Float32Array(empty.length);
  for (const [index, states] of hidden.entries()) {
    const part = parts[index]! / total;
    for (let i = 0; i < blended.length; i++) {
      const base = empty[i]!;
      blended[i] = blended[i]! + part * (base + perToken[Math.floor(i / width)]! * (states[i]! - base));
    }
  }
  return blended;
}
