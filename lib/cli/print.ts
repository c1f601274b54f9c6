/** What commands print: on stdout a text, or one JSON object with --json; on stderr warnings. */

/** @param report the JSON object; @param text without the last line's end */
export function print(json: boolean | undefined, report: object, text: string): void {
  process.stdout.write(`${json ? JSON.stringify(report) : text}\n`);
}

/** On stderr: with --json, warnings are in the object. */
export function showWarnings(warnings: readonly string[]): void {
  for (const warning of warnings) process.stderr.write(`warning: ${warning}\n`);
}

/** Milliseconds to the microsecond, below which clocks tell nothing. */
export function rounded(milliseconds: number): number {
  return Math.round(milliseconds * 1000) / 1000;
}

export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
