/** The name that somebody may have meant. */

/** Of `names` the one that is nearest to `given`; null where none is near enough to be a slip. */
export function nearest(given: string, names: readonly string[]): string | null {
  const plain = (name: string) => name.toLowerCase().replace(/[^a-z0-9]/g, "");
  const wanted = plain(given.slice(0, 64));
  let [best, least] = [null as string | null, Number.POSITIVE_INFINITY];
  for (const name of names) {
    const distance = distanceOf(wanted, plain(name));
    if (distance < least) [best, least] = [name, distance];
  }
  return best !== null && least <= Math.max(1, Math.floor(Math.min(wanted.length, plain(best).length) / 3))
    ? best
    : null;
}

/** Changes of one letter each that make one word of the other (Levenshtein). */
function distanceOf(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (const [i, letter] of [...a].entries()) {
    const next = [i + 1];
    for (let j = 0; j < b.length; j++)
      next.push(Math.min(next[j]! + 1, row[j + 1]! + 1, row[j]! + (letter === b[j] ? 0 : 1)));
    row = next;
  }
  return row.at(-1)!;
}
