/** Texts of callers in messages. */

/** At most so many characters of a text, with an ellipsis where it is longer. */
export function clipped(text: string, most: number): string {
  return text.length > most ? `${text.slice(0, most - 3)}...` : text;
}
