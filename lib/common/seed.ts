/**
 * Seeds: whole numbers of 64 bits, as torch takes them. Most are small; one that a number cannot hold exactly is a BigInt in memory and
 * text of digits in JSON, so that none is ever shown or stored as another.
 */

/** A seed: a number where that holds it exactly, else a BigInt. */
export type Seed = number | bigint;

export const largestSeed = 2n ** 64n - 1n;

/** @param value a whole number of at least 0; what is above the largest seed begins at 0 again */
export function seedOf(value: number | bigint | string): Seed {
  const whole = BigInt.asUintN(64, BigInt(value));
  return whole <= Number.MAX_SAFE_INTEGER ? Number(whole) : whole;
}

/** `count` seeds, each one more than the one before. */
export function seedsFrom(first: number | bigint | string, count: number): Seed[] {
  const start = BigInt(first);
  return Array.from({ length: count }, (_, index) => seedOf(start + BigInt(index)));
}

/** As JSON and a picture's parameters have it, and as options take it: text of digits where a number would not be exact. */
export function seedToJson(seed: number | bigint | string): number | string {
  const exact = seedOf(seed);
  return typeof exact === "bigint" ? String(exact) : exact;
}
