// The cost table: estimates between and beyond measured batches, drift, entries from observed launches.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { CostTable, entryOf } from "../../lib/serving/costs.js";
import { cheapestSplit } from "../../lib/serving/split.js";

const entry = (batch: number, milliseconds: number, size = "64x64", graph = "predict") =>
  entryOf(graph, batch, size, [milliseconds]);

describe("entryOf", () => {
  it("has the median and the quartiles of its runs", () => {
    expect(entryOf("predict", 2, "64x64", [5, 1, 4, 2, 3])).toEqual({
      graph: "predict",
      batch: 2,
      size: "64x64",
      milliseconds: 3,
      low: 2,
      high: 4,
      runs: 5,
    });
    expect(entryOf("predict", 1, "64x64", [1, 2]).milliseconds).toBe(1.5);
    expect(entryOf("predict", 1, "64x64", [7]).low).toBe(7);
  });
});

describe("CostTable", () => {
  it("gives measured batches as they are, is linear between them and goes on beyond", () => {
    const table = new CostTable([entry(1, 10), entry(2, 16), entry(4, 28)]);
    expect([1, 2, 3, 4, 6].map((batch) => table.estimate("predict", "64x64", batch))).toEqual([10, 16, 22, 28, 40]);
    expect(table.estimate("predict", "128x128", 1)).toBeNull();
    expect(table.estimate("refine", "64x64", 1)).toBeNull();
  });

  it("takes no launch to cost more than one of more rows, so that single rows are not always padded", () => {
    const table = new CostTable([entry(1, 25), entry(2, 13), entry(4, 28)]);
    expect([1, 2, 3, 4].map((batch) => table.estimate("predict", "64x64", batch))).toEqual([13, 13, 20.5, 28]);
    expect(cheapestSplit(1, [1, 2, 4], (batch) => table.estimate("predict", "64x64", batch)!).batches).toEqual([1]);
  });

  it("assumes that a fifth of a launch is fixed cost where one batch is known, and where none is", () => {
    const table = new CostTable([entry(2, 18)]);
    expect(table.estimate("predict", "64x64", 1)).toBeCloseTo(10, 9);
    expect(table.estimate("predict", "64x64", 4)).toBeCloseTo(34, 9);
    expect(table.relative("refine", "64x64", 1)).toBe(1);
    expect(table.relative("refine", "64x64", 8)).toBeCloseTo(6.6, 9);
  });

  it("estimates a positive cost at every batch, whatever was measured", () => {
    const measured = fc.uniqueArray(
      fc.tuple(fc.integer({ min: 1, max: 32 }), fc.double({ min: 0.001, max: 1e5, noNaN: true })),
      { minLength: 1, maxLength: 6, selector: ([batch]) => batch },
    );
    fc.assert(
      fc.property(measured, fc.integer({ min: 1, max: 64 }), (pairs, batch) => {
        const table = new CostTable(pairs.map(([b, milliseconds]) => entry(b, milliseconds)));
        expect(table.estimate("predict", "64x64", batch)).toBeGreaterThan(0);
      }),
    );
  });

  it("follows the machine when it becomes slower than it was measured, and one slow launch does not matter", () => {
    const table = new CostTable([entry(1, 10)]);
    table.observe("predict", "64x64", 1, 10_000);
    expect(table.estimate("predict", "64x64", 1)!).toBeLessThan(10.6);
    for (let i = 0; i < 200; i++) table.observe("predict", "64x64", 1, 15);
    expect(table.estimate("predict", "64x64", 1)!).toBeCloseTo(15, 0);
    expect(table.get("predict", "64x64", 1)!.milliseconds).toBe(10);
  });

  it("makes an entry of launches that were not measured, without the present drift, when it has observed five", () => {
    const table = new CostTable([entry(1, 10)]);
    for (let i = 0; i < 500; i++) table.observe("predict", "64x64", 1, 20);
    const before = table.version;
    for (const milliseconds of [30, 32, 34, 36]) table.observe("refine", "64x64", 1, milliseconds);
    expect(table.get("refine", "64x64", 1)).toBeUndefined();
    table.observe("refine", "64x64", 1, 38);
    expect(table.get("refine", "64x64", 1)!.milliseconds).toBeCloseTo(17, 3);
    expect(table.estimate("refine", "64x64", 1)!).toBeCloseTo(34, 3);
    expect(table.version).toBeGreaterThan(before);
  });

  it("lists entries by graph, size and batch", () => {
    const table = new CostTable([entry(2, 1), entry(1, 1, "128x128"), entry(1, 1), entry(1, 1, "64x64", "clip_l")]);
    expect(table.entries.map(({ graph, size, batch }) => `${graph} ${size} ${batch}`)).toEqual([
      "clip_l 64x64 1",
      "predict 64x64 1",
      "predict 64x64 2",
      "predict 128x128 1",
    ]);
  });
});
