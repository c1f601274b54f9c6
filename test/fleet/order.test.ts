// BullMQ's priorities put jobs into the order that requests have in a process.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { epochOf, queuePriority } from "../../lib/fleet/order.js";
import { comparePriorities } from "../../lib/serving/priority.js";

const midday = 20_000 * 86_400_000;
const job = fc.record({
  level: fc.integer({ min: -100, max: 100 }),
  arrival: fc.integer({ min: midday, max: midday + 3_600_000 }),
  limit: fc.option(fc.integer({ min: 1, max: 2 ** 31 })),
});
const dueOf = ({ arrival, limit }: { arrival: number; limit: number | null }) =>
  limit === null ? null : arrival + limit;

describe("priority of a job", () => {
  it("is a number that BullMQ takes, whenever it came", () => {
    fc.assert(
      fc.property(
        fc.integer({ min: -100, max: 100 }),
        fc.integer({ min: 0, max: 2 ** 45 }),
        fc.option(fc.integer({ min: 1, max: 2 ** 31 })),
        (level, arrival, limit) => {
          const priority = queuePriority(level, arrival, limit === null ? null : arrival + limit);
          expect(Number.isInteger(priority)).toBe(true);
          expect(priority).toBeGreaterThanOrEqual(1);
          expect(priority).toBeLessThan(2 ** 21);
        },
      ),
    );
  });

  it("orders as comparePriorities does where levels differ, at whatever moment both wait", () => {
    fc.assert(
      fc.property(job, job, (a, b) => {
        if (epochOf(a.arrival) !== epochOf(b.arrival)) return;
        // By then waiting has raised both by whole levels.
        const now = Math.ceil((midday + 7_200_000) / 10_000) * 10_000;
        const [first, second] = [a, b].map((each, sequence) => ({
          ...{ level: each.level, due: dueOf(each), sequence },
          // The beginning of its ten seconds: numbers know no more.
          arrival: Math.floor(each.arrival / 10_000) * 10_000,
        }));
        const levels = comparePriorities({ ...first!, due: 0, sequence: 0 }, { ...second!, due: 0, sequence: 0 }, now);
        if (levels === 0) return;
        const numbers = queuePriority(a.level, a.arrival, dueOf(a)) - queuePriority(b.level, b.arrival, dueOf(b));
        expect(Math.sign(numbers)).toBe(Math.sign(levels));
      }),
      { numRuns: 2000 },
    );
  });

  it("tells limits apart by a tenth of a second, and puts requests without one where a minute is", () => {
    const at = midday + 3000;
    const of = (limit: number | null) => queuePriority(0, at, limit === null ? null : at + limit);
    expect(of(300)).toBeLessThan(of(500));
    expect(of(5000)).toBeLessThan(of(5200));
    expect(of(20_000)).toBeLessThan(of(60_000));
    expect(of(null)).toBe(of(60_000));
    expect(of(60_000)).toBeLessThan(of(600_000));
    const limits = Array.from({ length: 400 }, (_, index) => of(1.06 ** index));
    expect(limits).toEqual([...limits].sort((a, b) => a - b));
  });

  it("begins anew about once a day", () => {
    const start = midday - (midday % 1);
    const epochs = new Set(Array.from({ length: 48 }, (_, hours) => epochOf(start + hours * 3_600_000)));
    expect(epochs.size).toBeGreaterThanOrEqual(2);
    expect(epochs.size).toBeLessThanOrEqual(4);
  });
});
