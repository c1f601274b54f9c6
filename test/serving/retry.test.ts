// Refused callers: what they are told, and whether they are accepted when they do as they are told. On a simulated device.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { DeadlineError, QueueFullError } from "../../lib/errors.js";
import { entryOf } from "../../lib/serving/costs.js";
import { type Ending, type ForecastRequest, forecast } from "../../lib/serving/forecast.js";
import { Retry } from "../../lib/serving/retry.js";
import { type Asked, elapse, milliseconds, Random, type Simulation, simulate, sleep, virtualTime } from "./timed.js";

const entries = Object.entries(milliseconds).flatMap(([graph, cost]) =>
  [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "4x4", [cost(batch)])),
);
const schedules = ["H1P7R2", "H1P3R1", "H1P1R1", "E8"];

type Refusal = (DeadlineError | QueueFullError) & { retryAfterMs: number };

/** Whether a request is accepted at once; otherwise what refused it. */
async function offer({ ask }: Simulation, asked: Asked, work: Promise<unknown>[]): Promise<Refusal | null> {
  const call = ask(asked);
  work.push(call.catch(() => undefined));
  // A refusal comes before the clock moves.
  return Promise.race([call.then(() => null), sleep(0).then(() => null)]).catch((error) => error as Refusal);
}

/** What has run once is not run again before a promise. */
async function warm({ ask }: Simulation): Promise<void> {
  for (const schedule of schedules) await ask({ ladder: [schedule], deadlineMs: 60_000 });
}

const kinds = {
  same: () => ({ ladder: ["H1P7R2"] }),
  mixed: (random: Random) => ({ ladder: [schedules[Math.floor(4 * random.even())]!] }),
  "several pictures": (random: Random) => ({ ladder: ["H1P3R1"], pictures: 1 + Math.floor(4 * random.even()) }),
};
const limits = { "a full queue": null, "a time limit": 700 };
const cases = Object.keys(kinds).flatMap((kind) =>
  Object.keys(limits).flatMap((limit) => [2, 32].map((maxQueue) => [kind, limit, maxQueue] as const)),
);

describe("a refused caller", () => {
  beforeEach(virtualTime);
  afterEach(() => {
    vi.useRealTimers();
  });

  it.each(cases)(
    "%s, at %s, %i may wait: who waits as told is accepted in 9 of 10 trials, and not told much too long",
    async (kind, limit, maxQueue) => {
      const trials = 20;
      let accepted = 0;
      const ratios: number[] = [];
      for (let seed = 1; seed <= trials; seed++) {
        const random = new Random(seed);
        const next = () => ({
          ...kinds[kind as keyof typeof kinds](random),
          deadlineMs: limits[limit as keyof typeof limits],
        });
        const trial = async (wait: (told: number, again: () => Promise<boolean>) => Promise<void>) => {
          const simulation = simulate(entries, { noise: 0.1, seed, maxQueue });
          const work: Promise<unknown>[] = [];
          await warm(simulation);
          let refusal: Refusal | null = null;
          let asked = next();
          for (let filled = 0; filled < 500 && refusal === null; filled++) {
            await sleep(filled < 4 ? 20 * random.even() : 1);
            asked = next();
            refusal = await offer(simulation, asked, work);
          }
          expect(refusal!.retryAfterMs).toBeGreaterThan(0);
          await wait(refusal!.retryAfterMs, async () => (await offer(simulation, asked, work)) === null);
          await Promise.all(work);
        };
        await elapse(
          trial(async (told, again) => {
            await sleep(told);
            if (await again()) accepted++;
          }),
        );
        // The same moment once more: when would it have been possible?
        if (seed > 5) continue;
        await elapse(
          trial(async (told, again) => {
            const start = performance.now();
            while (!(await again())) await sleep(Math.max(1, told / 50));
            ratios.push(told / Math.max(30, performance.now() - start));
          }),
        );
      }
      expect(accepted).toBeGreaterThanOrEqual(0.9 * trials);
      ratios.sort((a, b) => a - b);
      expect(ratios[2]).toBeLessThan(3);
    },
  );

  it.each(cases)(
    "%s, at %s, %i may wait: forty who do as they are told are accepted within two retries on average",
    async (kind, limit, maxQueue) => {
      let retries = 0;
      const callers = 40;
      const simulation = simulate(entries, { noise: 0.1, maxQueue });
      const random = new Random(1);
      const next = () => ({
        ...kinds[kind as keyof typeof kinds](random),
        deadlineMs: limits[limit as keyof typeof limits],
      });
      const told = new Set<number>();
      const work: Promise<unknown>[] = [];
      const caller = async () => {
        const asked = next();
        for (;;) {
          const refusal = await offer(simulation, asked, work);
          if (refusal === null) return;
          expect(refusal.retryAfterMs).toBeGreaterThan(0);
          told.add(refusal.retryAfterMs);
          retries++;
          await sleep(refusal.retryAfterMs);
        }
      };
      await elapse(
        (async () => {
          await warm(simulation);
          while ((await offer(simulation, next(), work)) === null);
          await sleep(50);
          await Promise.all(Array.from({ length: callers }, caller));
          await Promise.all(work);
        })(),
      );
      expect(retries / callers).toBeLessThanOrEqual(2);
      // They do not come back together.
      expect(told.size).toBeGreaterThan(0.8 * Math.min(callers, retries));
    },
  );
});

describe("a refused caller of a model whose costs are not known", () => {
  beforeEach(virtualTime);
  afterEach(() => {
    vi.useRealTimers();
  });

  /** Launches that take so many times what the others of this file take, in batches that are not much cheaper than guessed. */
  function unknown(slower: number, seed: number, maxQueue: number): Simulation {
    const simulation = simulate([], { noise: 0.1, seed, maxQueue, batches: [1, 2, 4] });
    const usual = simulation.runtime.cost;
    simulation.runtime.cost = (graph, batch) => slower * usual(graph, batch);
    return simulation;
  }
  const asked: Asked = { ladder: ["H1P7R2"] };
  async function fill(simulation: Simulation, work: Promise<unknown>[]): Promise<Refusal> {
    for (;;) {
      const refusal = await offer(simulation, asked, work);
      if (refusal) return refusal;
    }
  }

  it.each([2, 16])("is accepted within two tries in 9 of 10 trials, %i may wait", async (maxQueue) => {
    const trials = 20;
    let accepted = 0;
    for (let seed = 1; seed <= trials; seed++) {
      const simulation = unknown(10, seed, maxQueue);
      await elapse(
        (async () => {
          const work: Promise<unknown>[] = [];
          let refusal: Refusal | null = await fill(simulation, work);
          for (let tries = 0; tries < 2 && refusal; tries++) {
            await sleep(refusal.retryAfterMs);
            refusal = await offer(simulation, asked, work);
          }
          if (!refusal) accepted++;
          await Promise.all(work);
        })(),
      );
    }
    expect(accepted).toBeGreaterThanOrEqual(0.9 * trials);
  });

  it.each([0.3, 1, 10, 50])(
    "is told a time within a factor of 3 once there has been a picture, %s times as slow",
    async (slower) => {
      for (let seed = 1; seed <= 5; seed++) {
        const simulation = unknown(slower, seed, 4);
        await elapse(
          (async () => {
            const work: Promise<unknown>[] = [];
            const first = simulation.ask(asked);
            await first;
            const { retryAfterMs } = await fill(simulation, work);
            const start = performance.now();
            // A place is free with the first ending; the last of them is the one refused.
            await Promise.race(work.slice(0, -1));
            const ratio = retryAfterMs / (performance.now() - start);
            expect(ratio).toBeGreaterThan(1 / 3);
            expect(ratio).toBeLessThan(3);
            await Promise.all(work);
          })(),
        );
      }
    },
  );
});

describe("the forecast", () => {
  const cost = (batch: number) => 6 + 4 * batch;
  /** Launches of up to `most` rows, 10 ms for one. */
  const phase = (times: number, key = "a", most = 4, rows = 1) => ({
    ...{ key, rows, times, deferrable: key === "refine" },
    split: (rows: number) => {
      const batch = Math.min(rows, most);
      return { batch, milliseconds: Math.ceil(rows / batch) * cost(batch) };
    },
  });
  const request = (phases: ForecastRequest["phases"], extra: Partial<ForecastRequest> = {}): ForecastRequest => ({
    ...{ pictures: 1, isInside: true, counts: true, phases },
    ...extra,
  });
  const ends = (requests: ForecastRequest[], capacity = 8) => [...forecast(requests, capacity, 20)].map(({ at }) => at);

  it("lets requests that share launches end together, and others one after another", () => {
    // Four rows in 22 ms in place of 10 ms each: ten launches.
    expect(ends([10, 10, 10, 10].map((times) => request([phase(times)])))).toEqual([220, 220, 220, 220]);
    expect(ends([10, 5, 3].map((times) => request([phase(times, "a", 1)])))).toEqual([100, 150, 180]);
    // Another key is not taken along.
    expect(ends([request([phase(10)]), request([phase(10, "b")]), request([phase(10)])])).toEqual([140, 140, 240]);
  });

  it("lets a short request wait for the first one where its next launch is another", () => {
    // Three launches of both, seven of the first, and one of each of the other kind: together, since both are there.
    const last = phase(1, "decode");
    expect(ends([request([phase(10), last]), request([phase(3), last])])).toEqual([126, 126]);
    // The other way round the short one has its turn.
    expect(ends([request([phase(3), last]), request([phase(10), last])])).toEqual([52, 132]);
  });

  it("holds back deferrable launches for others that will soon make the same ones", () => {
    const refine = phase(1, "refine");
    // The second needs 10 ms to get there: both in one launch of 14 ms. If it needs 30 ms, the first goes on alone.
    expect(ends([request([refine]), request([phase(1), refine])])).toEqual([24, 24]);
    expect(ends([request([refine]), request([phase(3), refine])])).toEqual([10, 50]);
  });

  it("lets in those that wait when there is room, in their order", () => {
    const waiting = request([phase(10)], { isInside: false });
    const endings = [...forecast([request([phase(5)]), request([phase(10)]), waiting, waiting], 2, 20)];
    // Two of 14 ms a launch: after five launches the third goes on with the second.
    expect(endings.map(({ at, waiting, inside, launch }) => [at, waiting, inside.pictures, launch])).toEqual([
      [70, 1, 2, 14],
      [140, 0, 2, 14],
      [210, 0, 1, 14],
      [260, 0, 0, 14],
    ]);
    expect(endings.at(-1)!.done).toBe(350);
    // One that weighs more than the capacity goes in alone.
    const large = request([phase(10, "a", 4, 3)], { isInside: false, pictures: 3 });
    expect(ends([request([phase(3)]), large], 2)).toEqual([30, 210]);
  });

  it("counts the work of those that count, and ends requests that have nothing to do", () => {
    const endings = [...forecast([request([phase(10)]), request([phase(10)], { counts: false })], 8, 20)];
    expect(endings.at(-1)!.done).toBe(100);
    expect(ends([request([]), request([phase(1)])])).toEqual([0, 10]);
  });
});

describe("Retry", () => {
  const endings: Ending[] = [100, 200, 300].map((at, index) => ({
    ...{ at, waiting: 2 - index, inside: { requests: 1, pictures: 1 }, done: at / 2, launch: 0 },
  }));
  const places = ({ waiting }: Ending) => 3 - waiting;

  it("gives each caller the next place, and beyond the last one goes on at the same pace", () => {
    const retry = new Retry(() => 0);
    const told = Array.from({ length: 5 }, () => retry.whenPlace(endings, places, 50, 0));
    expect(told.map((each) => Math.floor(each / 1.15 + 0.01))).toEqual([100, 200, 300, 400, 500]);
    // Those whose time has come hold no place any more.
    expect(retry.whenPlace(endings, places, 50, 346)).toBe(Math.ceil(300 * 1.15));
  });

  it("adds the work of those who will come before", () => {
    const retry = new Retry(() => 0);
    const told = [20, 20, 20].map((missing) => Math.floor(retry.whenDone(endings, missing, 40, 0) / 1.15 + 0.01));
    expect(told).toEqual([40, 120, 200]);
    // One who has to wait longer than for others goes before nobody.
    expect(retry.whenDone(endings, 20, 40, 0, 10_000)).toBe(11_500);
    expect(Math.floor(retry.whenDone(endings, 20, 40, 0) / 1.15 + 0.01)).toBe(280);
    expect(new Retry(() => 0).whenDone(endings, -5, 40, 0)).toBe(1);
    expect(new Retry(() => 0).whenDone(endings, 170, 40, 0)).toBe(Math.ceil(320 * 1.15));
  });

  it("spreads what it tells, and does not tell ever longer times to callers who do not wait", () => {
    const random = new Random(3);
    const retry = new Retry(() => random.even());
    const told = Array.from({ length: 2000 }, () => retry.whenPlace(endings, places, 50, 0));
    expect(new Set(told).size).toBeGreaterThan(500);
    expect(Math.max(...told)).toBeLessThan(129 * 100 * 1.36);
    expect(Math.max(...told.slice(-100))).toBeLessThanOrEqual(Math.max(...told.slice(0, 200)) * 1.2);
  });

  /** How many endings a caller is told to wait for, where one ends every 100 ms. */
  const endless: Ending[] = Array.from({ length: 300 }, (_, index) => ({
    ...{ at: 100 * (index + 1), waiting: 0, inside: { requests: 1, pictures: 1 }, done: 100 * (index + 1), launch: 0 },
  }));
  const ordinal = (ending: Ending) => ending.at / 100;

  it.each(["a place", "time"])("keeps no %s for callers who give up, or ask whenever they like", (what) => {
    for (const interval of [3, 11, 50]) {
      const random = new Random(5);
      const retry = new Retry(() => random.even());
      const waits: number[] = [];
      for (let now = 0; now < 60_000; now += interval * (0.5 + random.even())) {
        retry.called(now);
        const wait =
          what === "time" ? retry.whenDone(endless, 50, 100, now) : retry.whenPlace(endless, ordinal, 100, now);
        if (now > 45_000) waits.push(wait / 100);
      }
      waits.sort((a, b) => a - b);
      expect(waits[Math.floor(waits.length / 2)], `every ${interval} ms`).toBeLessThan(16);
    }
  });

  it("keeps places for callers who come when they were told, however many", () => {
    for (const callers of [10, 40, 100]) {
      const random = new Random(6);
      const retry = new Retry(() => random.even());
      // Each caller's next call. One in five of them is accepted, and another comes for it.
      const calls = Array.from({ length: callers }, (_, index) => 10 * index);
      const waits: number[] = [];
      let now = 0;
      while (now < 120_000) {
        calls.sort((a, b) => a - b);
        now = calls.shift()!;
        retry.called(now);
        if (random.even() < 0.2) {
          calls.push(now + 1 + 50 * random.even());
          continue;
        }
        const wait = retry.whenPlace(endless, ordinal, 100, now);
        if (now > 60_000) waits.push(wait / 100);
        calls.push(now + wait + 3 * random.even());
      }
      waits.sort((a, b) => a - b);
      expect(waits[Math.floor(waits.length / 2)]! / callers).toBeGreaterThan(0.6);
    }
  });
});
