/**
 * A text in pieces that can be tokenised one after another, until there are enough tokens: a tokenizer is as slow for the
 * end of a text as for its beginning, and a model reads a few hundred tokens at most. Pieces end at white space, where
 * the tokenizers of SD3 forget what came before: CLIP's and T5's split there before anything else, and neither
 * normalisation (NFC, NFKC) nor lower case looks across. So the tokens are those of the whole text, but for a word that is
 * longer than a piece.
 */

export interface Piece {
  readonly text: string;
  /** Whether it is the beginning of a word, whose rest is left out. */
  readonly cut: boolean;
}

/** Characters that are passed over between two chances to stop. */
const stretch = 2 ** 16;

/** White space that every normalisation keeps as such: T5's removes a vertical tab, and for CLIP a byte order mark is none. */
const separators = new Set([..." \t\n\r\u00a0\u3000"].map((space) => space.charCodeAt(0)));

/**
 * Lazily; null is a chance to stop, or to let others work.
 * @param longest UTF-16 code units of a piece
 */
export function* piecesOf(text: string, longest: number): Generator<Piece | null, void> {
  let start = yield* passed(text, 0, true);
  while (start < text.length) {
    // 1. The whole words that fit: they end at `end`, and the next one begins at `next`.
    let [end, next] = [start, start];
    for (let at = start; at <= text.length && at - start <= longest; at++) {
      if (at < text.length && !separators.has(text.charCodeAt(at))) continue;
      const after = yield* passed(text, at, true);
      // Special tokens may strip all white space beside them, of every kind: a gap is left whole.
      const isWhole = after === text.length || !(isSpace(text, at - 1) || isSpace(text, after));
      if (isWhole) [end, next] = [at, after];
      at = after;
    }
    // 2. Or the beginning of a longer one.
    const cut = next === start;
    if (cut) {
      end = start + longest;
      if (isHighSurrogate(text.charCodeAt(end - 1)) && longest > 1) end--;
    }
    yield { text: text.slice(start, end), cut };
    if (cut) next = yield* passed(text, yield* passed(text, end, false), true);
    start = next;
  }
}

/** The end of a run of separators, or of other characters, from `at` on. */
function* passed(text: string, at: number, isSeparated: boolean): Generator<null, number> {
  let end = at;
  while (end < text.length && separators.has(text.charCodeAt(end)) === isSeparated) {
    end++;
    if ((end - at) % stretch === 0) yield null;
  }
  return end;
}

function isSpace(text: string, at: number): boolean {
  return /\p{White_Space}/u.test(text.charAt(at));
}

function isHighSurrogate(code: number): boolean {
  return code >= 0xd800 && code < 0xdc00;
}
