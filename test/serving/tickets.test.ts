// Callers who are known by tickets: who was refused, and comes back when it was told, has its room, whatever comes meanwhile.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { DeadlineError, QueueFullError } from "../../lib/errors.js";
import { entryOf } from "../../lib/serving/costs.js";
import { Retry } from "../../lib/serving/retry.js";
import {
  type Asked,
  capacityOf,
  elapse,
  milliseconds,
  Random,
  type Simulation,
  simulate,
  sleep,
  virtualTime,
} from "./timed.js";

vi.setConfig({ testTimeout: 240_000 });
beforeEach(virtualTime);
afterEach(() => {
  vi.useRealTimers();
});

const entries = Object.entries(milliseconds).flatMap(([graph, cost]) =>
  [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "4x4", [cost(batch)])),
);
const ladder = ["H1P10", "H1P8", "H1P5R1", "H1P3R1", "H1P1R2"];

/** Poisson arrivals, each of whom comes back when it was told until it is accepted. */
async function patient(
  { ask }: Simulation,
  { perSecond, seconds, hasTickets }: { perSecond: number; seconds: number; hasTickets: boolean },
  asked: Asked,
) {
  const random = new Random(11);
  const tries: number[] = [];
  let late = 0;
  const caller = async (name: string) => {
    for (let calls = 1; ; calls++)
      try {
        const { actualMs } = await ask({ ...asked, ...(hasTickets && { ticket: name }) });
        if (asked.deadlineMs != null && actualMs > asked.deadlineMs) late++;
        tries.push(calls);
        return;
      } catch (error) {
        await sleep((error as DeadlineError | QueueFullError).retryAfterMs!);
      }
  };
  const start = performance.now();
  await elapse(
    (async () => {
      const callers: Promise<void>[] = [];
      while (performance.now() - start < 1000 * seconds) {
        await sleep((1000 * random.exponential()) / perSecond);
        callers.push(caller(`caller ${callers.length}`));
      }
      await Promise.all(callers);
    })(),
  );
  const refused = tries.filter((calls) => calls > 1);
  return {
    ...{ late, all: tries.length, refused: refused.length },
    second: refused.filter((calls) => calls === 2).length / refused.length,
    perSecond: (1000 * tries.length) / (performance.now() - start),
  };
}

describe("at 1.3 of capacity", () => {
  it("with a time limit, those who come back have their room, and nobody is late", async () => {
    const open = () => simulate(entries, { noise: 0.08 });
    const asked: Asked = { ladder, deadlineMs: 600 };
    const perSecond = 1.3 * (await capacityOf(open(), { ladder: [ladder.at(-1)!] }));
    const load = { perSecond, seconds: 6 };
    const known = await patient(open(), { ...load, hasTickets: true }, asked);
    const unknown = await patient(open(), { ...load, hasTickets: false }, asked);
    expect(known.refused).toBeGreaterThan(20);
    expect(known.late).toBe(0);
    expect(known.second).toBeGreaterThan(0.95);
    expect(known.second).toBeGreaterThan(unknown.second);
    // Room that is kept is used.
    expect(known.perSecond / unknown.perSecond).toBeGreaterThan(0.85);
  });

  it("without a limit, they have a place in the queue", async () => {
    const open = () => simulate(entries, { noise: 0.08, maxQueue: 8, batches: [1] });
    const asked: Asked = { ladder: ["H1P3R1"] };
    const perSecond = 1.3 * (await capacityOf(open(), asked, 200, 8));
    const load = { perSecond, seconds: 20 };
    const known = await patient(open(), { ...load, hasTickets: true }, asked);
    const unknown = await patient(open(), { ...load, hasTickets: false }, asked);
    expect(known.refused).toBeGreaterThan(20);
    expect(known.second).toBeGreaterThan(0.9);
    expect(known.second).toBeGreaterThan(unknown.second);
    expect(known.perSecond / unknown.perSecond).toBeGreaterThan(0.9);
  });
});

describe("room", () => {
  const caller = (ticket: string | undefined, deadlineMs = 100) => ({ ticket, deadlineMs });

  it("is left free by others until its caller comes, or does not", () => {
    const retry = new Retry(() => 0);
    const told = retry.whenDone([], 100, 50, 0, 0, caller("a"));
    expect(told).toBe(115);
    // What is done in 115 ms, and 50 of the 100 ms that it then has.
    expect(retry.mostWork(1, 0)).toBe(165);
    expect(retry.claims("b", told)).toBe(false);
    expect(retry.claims("a", told - 20)).toBe(false);
    expect(retry.claims("a", told)).toBe(true);
    expect(retry.claims("a", told)).toBe(false);
    expect(retry.mostWork(1, told)).toBe(Number.POSITIVE_INFINITY);
  });

  it("is given up when its caller does not come", () => {
    const retry = new Retry(() => 0);
    const told = retry.whenDone([], 100, 50, 0, 0, caller("a"));
    expect(retry.mostWork(1, told + 1)).toBe(50);
    expect(retry.mostWork(1, told + 2000)).toBe(Number.POSITIVE_INFINITY);
  });

  it("is kept for nobody who is not known", () => {
    const retry = new Retry(() => 0);
    retry.whenDone([], 100, 50, 0, 0, caller(undefined));
    expect(retry.mostWork(1, 0)).toBe(Number.POSITIVE_INFINITY);
  });

  it("is told one after another to those who would take that of others", () => {
    const retry = new Retry(() => 0);
    const first = retry.whenDone([], 100, 50, 0, 0, caller("a"));
    const second = retry.afterAll(50, caller("b"), 0);
    const third = retry.afterAll(50, caller("c"), 0);
    expect([second - first, third - second]).toEqual([50, 50]);
  });
});
