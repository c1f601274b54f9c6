/** Texts in messages: those of callers, and those of other errors. */

/** At most so many characters of a text, with an ellipsis where it is longer. */
export function clipped(text: string, most: number): string {
  return text.length > most ? `${text.slice(0, most - 3)}...` : text;
}

/** The message of whatever was thrown. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
