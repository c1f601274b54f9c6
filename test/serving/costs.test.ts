// The cost table: estimates between and beyond measured batches, drift, entries from observed launches.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type CostEntry, CostTable, doubtOf, entryOf } from "../../lib/serving/costs.js";
import { cheapestSplit } from "../../lib/serving/split.js";

const entry = (batch: number, milliseconds: number, size = "64x64", graph = "predict") =>
  entryOf(graph, batch, size, [milliseconds]);

describe("entryOf", () => {
  it("has the median and the quartiles of its runs", () => {
    expect(entryOf("predict", 2, "64x64", [5, 1, 4, 2, 3], 7)).toEqual({
      graph: "predict",
      batch: 2,
      size: "64x64",
      milliseconds: 3,
      low: 2,
      high: 4,
      runs: 5,
      at: 7,
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

describe("launches that contradict an entry", () => {
  /** Launches of each batch in turn, so much slower than in truth. */
  function observe(table: CostTable, truth: Record<number, number>, slower: number, rounds: number) {
    for (let round = 0; round < rounds; round++)
      for (const [batch, milliseconds] of Object.entries(truth))
        table.observe("predict", "64x64", Number(batch), milliseconds * slower * (round % 2 ? 1.02 : 0.98));
  }
  const truth = { 1: 10, 2: 14, 4: 22 };
  const ratios = (table: CostTable) =>
    [2, 4].map((batch) => table.estimate("predict", "64x64", batch)! / table.estimate("predict", "64x64", 1)!);

  it("in its ratio to the others replace it", () => {
    for (const poisoned of [1, 2, 4] as const)
      for (const factor of [0.5, 2]) {
        const entries = Object.entries(truth).map(([batch, time]) =>
          entry(Number(batch), Number(batch) === poisoned ? factor * time : time),
        );
        const table = new CostTable(entries);
        observe(table, truth, 1, 150);
        expect(ratios(table)[0]! / 1.4).toBeCloseTo(1, 1);
        expect(ratios(table)[1]! / 2.2).toBeCloseTo(1, 1);
        expect(table.estimate("predict", "64x64", 1)!).toBeCloseTo(10, 0);
      }
  });

  it("because the whole machine is slower only drift", () => {
    const table = new CostTable(Object.entries(truth).map(([batch, time]) => entry(Number(batch), time)));
    const { version } = table;
    observe(table, truth, 1, 30);
    observe(table, truth, 2.5, 150);
    expect(table.version).toBe(version);
    expect(table.drift).toBeCloseTo(2.5, 1);
  });
});

describe("doubtOf", () => {
  const now = Date.UTC(2026, 5, 1);
  const minutes = (count: number) => now - 60_000 * count;
  const at = (batch: number, milliseconds: number, when: number): CostEntry => ({
    ...entry(batch, milliseconds),
    at: when,
  });
  const doubts = (entries: CostEntry[]) => entries.map((each) => doubtOf(each, entries, now));

  it("is about entries whose runs differed much, and old ones", () => {
    const wide = entryOf("predict", 1, "64x64", [10, 12, 20, 24, 30], minutes(1));
    expect(doubts([wide, at(2, 34, minutes(1))])).toEqual(["spread", null]);
    expect(doubts([at(1, 10, minutes(60 * 24 * 29)), at(2, 14, minutes(60 * 24 * 31))])).toEqual([null, "age"]);
  });

  it("is about batches that would never be launched, unless they have just been measured", () => {
    expect(doubts([1, 2, 4].map((batch) => at(batch, [0, 10, 14, 0, 22][batch]!, minutes(60))))).toEqual([
      null,
      null,
      null,
    ]);
    // Two of 14 ms are cheaper than one of 30 ms.
    expect(doubts([at(1, 10, minutes(60)), at(2, 14, minutes(60)), at(4, 30, minutes(60))])).toEqual([
      null,
      null,
      "unchosen",
    ]);
    expect(doubts([at(1, 10, minutes(60)), at(2, 14, minutes(60)), at(4, 30, minutes(1))])).toEqual([null, null, null]);
    // One row never takes longer than two.
    expect(doubts([at(1, 20, minutes(60)), at(2, 14, minutes(60))])).toEqual(["unchosen", null]);
  });
});

it("a table forgets what was measured up to a moment, and how the machine was", () => {
  const table = new CostTable([entryOf("predict", 1, "64x64", [10], 100), entryOf("predict", 2, "64x64", [14], 200)]);
  for (let i = 0; i < 500; i++) table.observe("predict", "64x64", 1, 20);
  const { version } = table;
  table.forget(50);
  expect(table.version).toBe(version);
  table.forget(100);
  expect(table.entries.map(({ batch }) => batch)).toEqual([2]);
  expect(table.drift).toBe(1);
  expect(table.version).toBeGreaterThan(version);
  table.forget();
  expect(table.entries).toEqual([]);
});
