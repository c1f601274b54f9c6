// The split of rows over compiled batches, against every split there is.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { cheapestSplit, launchBatches } from "../../lib/serving/split.js";

/** Cost of the cheapest multiset of batches that covers the rows: all of them are tried, in falling order of size. */
function bruteForce(rows: number, batches: readonly number[], cost: (batch: number) => number): number {
  const sizes = [...batches].sort((a, b) => b - a);
  let best = Number.POSITIVE_INFINITY;
  const tryFrom = (index: number, covered: number, spent: number) => {
    if (covered >= rows) {
      best = Math.min(best, spent);
      return;
    }
    for (let next = index; next < sizes.length; next++)
      tryFrom(next, covered + sizes[next]!, spent + cost(sizes[next]!));
  };
  tryFrom(0, 0, 0);
  return best;
}

const table = fc.uniqueArray(fc.integer({ min: 1, max: 32 }), { minLength: 1, maxLength: 4 }).chain((batches) =>
  fc.tuple(
    fc.constant(batches),
    fc.array(fc.double({ min: 0.01, max: 1000, noNaN: true }), {
      minLength: batches.length,
      maxLength: batches.length,
    }),
  ),
);

describe("launchBatches", () => {
  it("are the compiled ones that the launch may have, or as many rows as it may have where there are none", () => {
    expect(launchBatches([1, 2, 4, 8], Number.POSITIVE_INFINITY, null)).toEqual([1, 2, 4, 8]);
    expect(launchBatches([1, 2, 4, 8], 3, null)).toEqual([1, 2]);
    expect(launchBatches([4, 8], 3, null)).toEqual([3]);
  });

  it("are the pinned one, as far as the launch allows", () => {
    expect(launchBatches([1, 2], Number.POSITIVE_INFINITY, 4)).toEqual([4]);
    expect(launchBatches([1, 2], 3, 4)).toEqual([3]);
  });
});

const rowsOf = (batches: readonly number[]) => batches.reduce((sum, batch) => sum + batch, 0);

describe("cheapestSplit", () => {
  it("is the cheapest of all splits, for 1 to 32 rows and random tables", () => {
    fc.assert(
      fc.property(table, ([batches, costs]) => {
        // Trying every multiset of 32 rows over batches of 1, 2 and 3 is the largest case: some hundreds.
        const cost = (batch: number) => costs[batches.indexOf(batch)]!;
        for (let rows = 1; rows <= 32; rows++) {
          const split = cheapestSplit(rows, batches, cost);
          const spent = split.batches.reduce((total, batch) => total + cost(batch), 0);
          expect(rowsOf(split.batches)).toBeGreaterThanOrEqual(rows);
          expect(split.milliseconds).toBeCloseTo(spent, 6);
          expect(split.milliseconds / bruteForce(rows, batches, cost)).toBeCloseTo(1, 9);
        }
      }),
      { numRuns: 150 },
    );
  });

  it("pads only where that is cheaper", () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 32 }), table, (rows, [batches, costs]) => {
        // With a batch of 1 a split without padding exists: a padded one must beat the best of those.
        const all = [...new Set([1, ...batches])];
        const cost = (batch: number) => costs[batches.indexOf(batch)] ?? 7;
        const split = cheapestSplit(rows, all, cost);
        if (rowsOf(split.batches) === rows) return;
        const exact = [0];
        for (let covered = 1; covered <= rows; covered++)
          exact.push(
            Math.min(...all.filter((batch) => batch <= covered).map((batch) => cost(batch) + exact[covered - batch]!)),
          );
        expect(split.milliseconds).toBeLessThan(exact[rows]!);
      }),
    );
  });

  it("prefers no padding, then few launches, among equally cheap splits", () => {
    const linear = (batch: number) => 0.1 * batch;
    expect(cheapestSplit(5, [1, 2, 4, 8], linear).batches).toEqual([4, 1]);
    expect(cheapestSplit(3, [4, 1], (batch) => (batch === 4 ? 3 : 1)).batches).toEqual([1, 1, 1]);
    expect(cheapestSplit(3, [4, 1], (batch) => (batch === 4 ? 2.9 : 1))).toMatchObject({ batches: [4] });
  });

  it("refuses a table that cannot be", () => {
    expect(() => cheapestSplit(1, [], () => 1)).toThrow(RangeError);
    for (const wrong of [0, -1, Number.NaN, Number.POSITIVE_INFINITY])
      expect(() => cheapestSplit(1, [1], () => wrong)).toThrow(/cannot take/);
  });
});
