// Schedules under load, on a simulated device: who is refused, who is late, and what a lone request gets.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { Arrivals } from "../../lib/serving/arrivals.js";
import { entryOf } from "../../lib/serving/costs.js";
import {
  type Asked,
  arrivals,
  capacityOf,
  elapse,
  milliseconds,
  Random,
  simulate,
  sleep,
  virtualTime,
} from "./timed.js";

/** Minutes of simulated time take seconds, on a busy machine more. */
vi.setConfig({ testTimeout: 240_000 });

beforeEach(virtualTime);
afterEach(() => {
  vi.useRealTimers();
});

const entries = Object.entries(milliseconds).flatMap(([graph, cost]) =>
  [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "4x4", [cost(batch)])),
);
/** That of the embedded model. */
const ladder = ["H1P10", "H1P8", "H1P5R1", "H1P4R1", "H1P3R1", "H1P2R1", "H1P1R2"];
const [richest, leanest] = [ladder[0]!, ladder.at(-1)!];
/** Some eight times what the middle of the ladder takes alone. */
const deadlineMs = 600;
const free: Asked = { ladder, deadlineMs };
const open = (options = {}) => simulate(entries, { noise: 0.08, ...options });
const share = (part: number, all: { readonly length: number }) => part / all.length;

describe("a time limit that leaves the schedule open", () => {
  it("at 0.7 of capacity refuses under 2 %, and nobody is late", async () => {
    // Of the schedule that most pictures a second can be drawn with, and of one from the middle.
    for (const schedule of [leanest, ladder[3]!]) {
      const perSecond = 0.7 * (await capacityOf(open(), { ladder: [schedule] }));
      const { accepted, refused, late, arrivals: count } = await arrivals(open(), { perSecond, seconds: 40 }, free);
      expect(late).toBe(0);
      expect(refused.length / count, schedule).toBeLessThan(0.02);
      expect(share(accepted.filter(({ blocks }) => blocks === leanest).length, accepted)).toBeGreaterThan(0.5);
    }
  });

  it("at 1.3 of capacity draws as many pictures a second as the best fixed schedule, and nobody is late", async () => {
    for (const schedule of [leanest, ladder[3]!]) {
      const perSecond = 1.3 * (await capacityOf(open(), { ladder: [schedule] }));
      const load = { perSecond, seconds: 20 };
      const fixed: number[] = [];
      for (const blocks of ladder)
        fixed.push((await arrivals(open(), load, { ladder: [blocks], deadlineMs })).perSecond);
      const outcome = await arrivals(open(), load, free);
      expect(outcome.late).toBe(0);
      expect(outcome.perSecond / Math.max(...fixed), schedule).toBeGreaterThan(0.95);
    }
  });

  it("takes richer schedules the less there is to do", async () => {
    const capacity = await capacityOf(open(), { ladder: [leanest] });
    const rich: number[] = [];
    for (const load of [0.05, 0.25, 0.7]) {
      const { accepted } = await arrivals(open(), { perSecond: load * capacity, seconds: 30 }, free);
      rich.push(share(accepted.filter(({ blocks }) => ladder.indexOf(blocks) < 3).length, accepted));
    }
    expect(rich[0]).toBeGreaterThan(0.95);
    expect(rich[1]).toBeGreaterThan(0.3);
    expect(rich[2]).toBeLessThan(0.1);
  });

  it("with `prefer: quality` takes the richest that fits, at whose cost others are refused", async () => {
    const perSecond = 0.7 * (await capacityOf(open(), { ladder: [leanest] }));
    const load = { perSecond, seconds: 30 };
    const outcome = await arrivals(open(), load, { ...free, prefer: "quality" });
    expect(outcome.late).toBe(0);
    expect(outcome.refused.length / outcome.arrivals).toBeGreaterThan(0.2);
  });

  it("gives the richest to a caller who is alone, again and again, and after a time of load", async () => {
    const simulation = open();
    for (let again = 0; again < 20; again++)
      expect(await elapse(simulation.ask(free))).toMatchObject({
        blocks: richest,
        reason: expect.stringMatching(/the richest of 7 schedules\.$/),
      });
    const perSecond = 0.7 * (await capacityOf(open(), { ladder: [leanest] }));
    await arrivals(simulation, { perSecond, seconds: 20 }, free);
    await elapse(sleep(20_000));
    expect((await elapse(simulation.ask(free))).blocks).toBe(richest);
  });

  it("says that the load is why a leaner one was taken", async () => {
    const simulation = open();
    const reasons: (string | null)[] = [];
    await elapse(
      Promise.all(Array.from({ length: 4 }, () => simulation.ask(free).then(({ reason }) => reasons.push(reason)))),
    );
    expect(reasons.join("\n")).toMatch(
      /would fit too, but leave no room for the requests that are expected at the present load/,
    );
  });

  it("does not become leaner for work of lower priority", async () => {
    const simulation = open({ maxQueue: 1000 });
    const bulk = Array.from({ length: 200 }, () => simulation.ask({ ladder: [richest], priority: -50 }));
    const result = await elapse(
      (async () => {
        await sleep(500);
        return simulation.ask(free);
      })(),
    );
    expect(ladder.indexOf(result.blocks)).toBe(0);
    await elapse(Promise.all(bulk));
  });
});

describe("refused calls", () => {
  /** What some callers get while others ask again and again. */
  async function schedules(storm: Asked | null, every: number): Promise<string[]> {
    const simulation = open();
    await elapse(simulation.ask(free));
    const drawn: Promise<string>[] = [];
    const random = new Random(2);
    const callers = async () => {
      for (let caller = 0; caller < 20; caller++) {
        drawn.push(simulation.ask(free).then(({ blocks }) => blocks));
        await sleep(every * (0.5 + random.even()));
      }
    };
    let isOver = false;
    const others = async () => {
      while (!isOver && storm) {
        await simulation.ask(storm).catch(() => undefined);
        await sleep(3);
      }
    };
    const storming = others();
    await elapse(callers());
    isOver = true;
    await elapse(storming);
    return elapse(Promise.all(drawn));
  }

  it("that are impossible make nobody's schedule leaner", async () => {
    const calm = await schedules(null, 50);
    expect(new Set(calm).size).toBeGreaterThan(1);
    expect(await schedules({ ladder: [richest], deadlineMs: 40 }, 50)).toEqual(calm);
  });

  it("that come again and again do not leave only the leanest to others", async () => {
    // Possible alone, and hardly ever accepted.
    const blocks = await schedules({ ladder: [richest], deadlineMs: 135 }, 150);
    expect(blocks.filter((each) => each === leanest).length).toBeLessThan(10);
  });
});

describe("Arrivals", () => {
  it("count refused work for half of what was accepted, at most", () => {
    const load = new Arrivals();
    let now = 0;
    for (; now < 60_000; now += 100) {
      load.accepted(0, 30, now);
      for (let again = 0; again < 20; again++) load.refused(0, 30, now);
    }
    expect(load.expected(0, 500, now)).toBeCloseTo(225, -1);
    const none = new Arrivals();
    for (now = 0; now < 1000; now++) none.refused(0, 30, now);
    expect(none.expected(0, 500, now)).toBe(0);
  });

  it("expect the work of a time limit at the present rate, of this level and higher ones, and forget it", () => {
    const load = new Arrivals();
    // 30 ms of work each 100 ms, and at a lower level 60 ms.
    let now = 0;
    for (; now < 60_000; now += 100) {
      load.accepted(0, 30, now);
      load.accepted(-5, 60, now);
    }
    expect(load.expected(0, 500, now)).toBeCloseTo(150, -1);
    expect(load.expected(-5, 500, now)).toBeCloseTo(450, -2);
    expect(load.expected(1, 500, now)).toBe(0);
    expect(load.expected(0, 500, now + 30_000)).toBeLessThan(1);
    // A limit of two minutes is seen by a longer average, of which only a part has passed.
    expect(load.expected(0, 120_000, now) / (0.3 * 120_000)).toBeGreaterThan(0.45);
  });
});
