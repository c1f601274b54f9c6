/** Texts in messages, those of callers and of other errors, and texts of files. */

/** At most so many characters of a text, with an ellipsis where it is longer. No half of a surrogate pair stays at the end. */
export function clipped(text: string, most: number): string {
  return text.length > most ? `${text.slice(0, most - 3).replace(/[\ud800-\udbff]$/, "")}...` : text;
}

/** The message of whatever was thrown. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The lines of a text that hold something, without white space around them. */
export function filledLines(text: string): string[] {
  return text
    .split("\n")
    .map((line) => line.trim())
    .filter((line) => line !== "");
}
