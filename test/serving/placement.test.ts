// Which device makes which rows: compared with every way to place them.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { type DeviceLoad, type PlacedRow, placeRows, type RowWork } from "../../lib/serving/placement.js";
import { shareOut, togetherMs } from "../../lib/serving/shares.js";
import { cheapestSplit } from "../../lib/serving/split.js";

const batches = [1, 2, 4, 8];
const work = (graph: string, times = 1): RowWork => ({
  key: `${graph} x ${times}`,
  parts: [{ graph, size: "", maxRows: undefined, times }],
  pin: null,
});
const rows = (count: number, of = work("predict"), device: number | null = null): PlacedRow[] =>
  Array.from({ length: count }, () => ({ device, work: of }));
/** A launch takes so much, and more for each row. */
const device = (first: number, more: number, busy = 0): DeviceLoad => ({
  busy,
  cost: (_graph, _size, batch) => first + more * batch,
});
const countsOf = (placed: readonly number[], devices: number) =>
  Array.from({ length: devices }, (_, device) => placed.filter((at) => at === device).length);

describe("rows are shared out over devices", () => {
  it("evenly where they are equally fast and idle, and in the order of their numbers", () => {
    const equal = Array.from({ length: 4 }, () => device(10, 5));
    expect(placeRows(rows(8), equal, batches)).toEqual([0, 1, 2, 3, 0, 1, 2, 3]);
    expect(placeRows(rows(1), equal, batches)).toEqual([0]);
  });

  it("by speed, and not at all to one that would only be later", () => {
    const [fast, slow] = [device(0, 10), device(0, 25)];
    expect(countsOf(placeRows(rows(7), [fast, slow], batches), 2)).toEqual([5, 2]);
    // Two on the fast one are done in 20 ms.
    expect(placeRows(rows(2), [slow, fast], batches)).toEqual([1, 1]);
  });

  it("after what a device has begun", () => {
    expect(countsOf(placeRows(rows(4), [device(0, 10, 1000), device(0, 10)], batches), 2)).toEqual([0, 4]);
    expect(countsOf(placeRows(rows(4), [device(0, 10, 20), device(0, 10)], batches), 2)).toEqual([1, 3]);
  });

  it("so that rows which share a launch for nothing do so", () => {
    const padded: RowWork = { ...work("predict"), pin: 4 };
    const equal = Array.from({ length: 3 }, () => device(10, 5));
    expect(placeRows(rows(8, padded), equal, batches)).toEqual([0, 0, 0, 0, 1, 1, 1, 1]);
  });

  it("where nothing is known evenly, and a device that has measured nothing as one that has", () => {
    const unknown: DeviceLoad = { busy: 0, cost: () => null };
    expect(countsOf(placeRows(rows(4), [unknown, unknown], batches), 2)).toEqual([2, 2]);
    expect(countsOf(placeRows(rows(4), [unknown, device(0, 100)], batches), 2)).toEqual([2, 2]);
  });

  it("never to one that takes none, and none without a device", () => {
    expect(placeRows(rows(2), [null, device(0, 10)], batches)).toEqual([1, 1]);
    expect(() => placeRows(rows(2), [null], batches)).toThrow(RangeError);
  });

  it("with those that are bound where they are, which delay what comes after them alone", () => {
    const equal = [device(0, 10), device(0, 10)];
    const bound = rows(4, work("predict", 10), 0);
    expect(placeRows([...bound, ...rows(2)], equal, batches)).toEqual([0, 0, 0, 0, 1, 1]);
    // What goes first would be done equally soon on both: it goes where less is bound.
    expect(placeRows([...rows(1), ...bound], equal, batches)).toEqual([1, 0, 0, 0, 0]);
    expect(placeRows([...rows(1), ...bound], [device(0, 10), device(0, 11)], batches)).toEqual([0, 0, 0, 0, 0]);
  });

  const speeds = fc.array(
    fc.record({ first: fc.integer({ min: 0, max: 30 }), more: fc.integer({ min: 1, max: 30 }), busy: fc.nat(60) }),
    { minLength: 1, maxLength: 4 },
  );

  it("so that the last of equal rows is done as soon as in any other way", () => {
    fc.assert(
      fc.property(speeds, fc.integer({ min: 1, max: 6 }), (kinds, count) => {
        const devices = kinds.map(({ first, more, busy }) => device(first, more, busy));
        const time = (at: number, rows: number) =>
          rows === 0
            ? 0
            : devices[at]!.busy +
              cheapestSplit(rows, batches, (batch) => devices[at]!.cost("", "", batch)!).milliseconds;
        const end = (counts: readonly number[]) => Math.max(...counts.map((rows, at) => time(at, rows)));
        let best = Number.POSITIVE_INFINITY;
        const tryAll = (counts: number[], left: number) => {
          if (counts.length === devices.length - 1) best = Math.min(best, end([...counts, left]));
          else for (let own = 0; own <= left; own++) tryAll([...counts, own], left - own);
        };
        tryAll([], count);
        expect(end(countsOf(placeRows(rows(count), devices, batches), devices.length))).toBeCloseTo(best, 6);
        // The forecast shares out alike.
        const ready = new Map(devices.map(({ busy }, at) => [at, busy]));
        const shared = shareOut(time0, count, [...devices.keys()], ready);
        function time0(at: number, rows: number) {
          return time(at, rows) - (rows === 0 ? 0 : devices[at]!.busy);
        }
        expect(shared.end).toBeCloseTo(best, 6);
      }),
      { numRuns: 300 },
    );
  });

  it("whatever comes after them", () => {
    fc.assert(
      fc.property(speeds, fc.nat(6), fc.nat(6), (kinds, before, after) => {
        const devices = kinds.map(({ first, more, busy }) => device(first, more, busy));
        const own = rows(before);
        const both = placeRows([...own, ...rows(after, work("decode", 3))], devices, batches);
        expect(both.slice(0, before)).toEqual(placeRows(own, devices, batches));
      }),
    );
  });

  it("in little time, however many there are", () => {
    const start = performance.now();
    const equal = Array.from({ length: 4 }, () => device(10, 5));
    expect(countsOf(placeRows(rows(2000), equal, batches), 4)).toEqual([500, 500, 500, 500]);
    expect(performance.now() - start).toBeLessThan(1000);
  });
});

describe("the forecast of a request", () => {
  it("shares out many pictures several at a time", () => {
    const { counts, end } = shareOut((at, rows) => rows * (at + 1), 1000, [0, 1], new Map());
    expect([...counts.values()].reduce((sum, each) => sum + each, 0)).toBe(1000);
    expect(end).toBeGreaterThanOrEqual(1000 / 1.5);
    expect(end).toBeLessThan(700);
  });

  it("counts what devices take together, and not those whose costs are not known", () => {
    expect(togetherMs((device) => [30, 60][device]!, 1, [0, 1])).toBeCloseTo(20);
    expect(togetherMs((device) => [30, Number.POSITIVE_INFINITY][device]!, 1, [0, 1])).toBe(30);
    expect(togetherMs(() => 0.1, 1, [0])).toBe(0.1);
  });
});
