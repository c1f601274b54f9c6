// What a short disturbance of the machine does to promises, and for how long: on a simulated device.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { DeadlineError } from "../../lib/errors.js";
import { type CostEntry, CostTable, entryOf } from "../../lib/serving/costs.js";
import { Predictor, type Terms } from "../../lib/serving/prediction.js";
import type { CostStore } from "../../lib/serving/store.js";
import { conditionOf, programOf } from "./programs.js";
import { type Asked, elapse, MemoryStore, milliseconds, simulate, sleep, virtualTime } from "./timed.js";

beforeEach(virtualTime);
afterEach(() => {
  vi.useRealTimers();
});

const entries = Object.entries(milliseconds).flatMap(([graph, cost]) =>
  [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "4x4", [cost(batch)])),
);
const blocks = "H1P3R1";
/** Five launches of the predictor, two of the refiner, and the decoder. */
const alone = 5 * 10 + 2 * 4 + 5;

describe("a device that stands still for a moment", () => {
  it("makes a limit that fits alone possible later, never impossible, and it is accepted when it was said to be", async () => {
    const simulation = simulate(entries, { noise: 0 });
    const { runtime, ask } = simulation;
    const usual = runtime.cost;
    const asked: Asked = { ladder: [blocks], deadlineMs: Math.ceil(1.2 * alone) };
    await elapse(ask({ ...asked, deadlineMs: 1000 }));
    await elapse(ask(asked));
    let isStopped = false;
    runtime.cost = (graph, batch) => {
      const stop = isStopped ? 270 : 0;
      isStopped = false;
      return usual(graph, batch) + stop;
    };
    isStopped = true;
    await elapse(Promise.all([1, 2, 3].map((each) => ask({ ...asked, deadlineMs: 4 * alone + each }))));
    expect(simulation.service.stats().requests.late).toBe(3);
    const error = (await elapse(ask(asked).catch((reason) => reason))) as DeadlineError;
    expect(error).toMatchObject({ code: "ERR_FLOWTURBO_DEADLINE", retryAfterMs: expect.any(Number) });
    expect(error.message).toMatch(/since the machine has lately been slower than usual/);
    expect(error.retryAfterMs).toBeLessThan(200_000);
    await elapse(sleep(error.retryAfterMs!));
    expect((await elapse(ask(asked))).actualMs).toBeLessThan(asked.deadlineMs!);
    // Less than it takes alone is impossible, disturbed or not.
    isStopped = true;
    await elapse(ask({ ladder: [blocks], deadlineMs: 2 * alone }));
    const impossible = await elapse(ask({ ladder: [blocks], deadlineMs: alone }).catch((reason) => reason));
    expect(impossible).toMatchObject({ code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE", retryAfterMs: null });
  });
});

it("the drift goes back to 1 while nothing is launched, slowly if it lasted", () => {
  const drifted = (launches: number) => {
    const table = new CostTable([entryOf("a", 1, "4x4", [10])]);
    for (let launch = 0; launch < launches; launch++) table.observe("a", "4x4", 1, 20);
    return table;
  };
  const table = drifted(40);
  const { drift } = table;
  expect(drift).toBeGreaterThan(1.6);
  vi.advanceTimersByTime(5000);
  expect(table.drift).toBeCloseTo(drift, 3);
  vi.advanceTimersByTime(30_000);
  expect((table.drift - 1) / (drift - 1)).toBeCloseTo(0.55, 1);
  // A launch says that it is as it was, for some seconds more.
  table.observe("a", "4x4", 1, 10 * table.drift);
  const half = table.drift;
  vi.advanceTimersByTime(5000);
  expect(table.drift).toBeCloseTo(half, 3);
  vi.advanceTimersByTime(300_000);
  expect(table.drift).toBeLessThan(1.06);
  vi.advanceTimersByTime(24 * 3600_000);
  expect(table.drift).toBe(1);
  // A machine that is slower for good is not believed to be as fast as it was each time that it rests.
  const slow = drifted(4000);
  vi.advanceTimersByTime(300_000);
  expect(slow.drift).toBeGreaterThan(1.9);
});

it("costs that make a limit impossible are measured again while nothing else is asked for", async () => {
  const wide = (graph: string, batch: number): CostEntry => ({
    ...entryOf(
      graph,
      batch,
      "4x4",
      [1, 3, 5].map((factor) => factor * milliseconds[graph]!(batch)),
    ),
  });
  const poisoned = entries.map(({ graph, batch }) => wide(graph, batch));
  const simulation = simulate(poisoned, { background: true, store: new MemoryStore() as unknown as CostStore });
  const asked: Asked = { ladder: [blocks], deadlineMs: 2 * alone };
  let error: unknown = null;
  // Callers that come again and again do not put it off.
  for (let poll = 0; poll < 100; poll++) {
    error = await elapse(
      simulation.ask(asked).then(
        () => null,
        (reason) => reason,
      ),
    );
    if (error === null) break;
    await elapse(sleep(100));
  }
  expect(error).toBeNull();
});

describe("a runtime that is lost", () => {
  const host = (simulation: ReturnType<typeof simulate>) => simulation.service.costs.get("host", "4x4", 1);
  const asked: Asked = { ladder: [blocks], deadlineMs: 2000 };

  it("is run once more before a promise", async () => {
    const { runtime, service, ask } = simulate(entries);
    await elapse(ask(asked));
    const { measured } = runtime;
    await elapse(ask(asked));
    expect(runtime.measured).toBe(measured);
    service.lost();
    await elapse(ask(asked));
    // One run of each graph.
    expect(runtime.measured).toBe(measured + 3);
  });

  it("does not count its start as a cost of the requests that waited for it", async () => {
    const simulation = simulate(entries, { noise: 0 });
    const { runtime, service, ask } = simulation;
    const open = runtime.open.bind(runtime);
    let startMs = 7;
    runtime.open = () => {
      const workspace = open();
      const submit = workspace.submit;
      workspace.submit = (...args) => sleep(startMs).then(() => submit(...args));
      return workspace;
    };
    for (let i = 0; i < 3; i++) await elapse(ask(asked));
    expect(host(simulation)!.milliseconds).toBeCloseTo(7, 0);
    const { runs } = host(simulation)!;
    startMs = 900;
    for (let i = 0; i < 5; i++) {
      const drawn = ask({ ladder: [blocks] });
      await sleepAndLose();
      await elapse(drawn);
    }
    expect(host(simulation)).toMatchObject({ runs, milliseconds: expect.closeTo(7, 0) });

    async function sleepAndLose() {
      await elapse(sleep(20));
      service.lost();
    }
  });
});

it("costs that are reset while others are measured for a limit are measured again, and nothing is impossible by that", async () => {
  const { runtime, service, ask } = simulate([]);
  // All but the refiner becomes known.
  await elapse(ask({ ladder: ["H1P1"], deadlineMs: 5000 }));
  const { measured } = runtime;
  const drawn = ask({ ladder: [blocks], deadlineMs: 5000 });
  drawn.catch(() => undefined);
  await elapse(sleep(6));
  await elapse(service.reset());
  expect((await elapse(drawn)).actualMs).toBeLessThan(5000);
  // Three graphs, four runs of each.
  expect(runtime.measured).toBe(measured + 12);
});

it("a limit is neither promised nor impossible while costs are not known", () => {
  const program = programOf({ blocks, side: 2, seed: 0, guidanceScale: 4 }, conditionOf(1, true));
  const predictor = new Predictor(new CostTable(), [1], new Set(), { capacity: 2, maxWaitMs: 20 });
  for (const deadlineMs of [10, 100_000]) {
    const terms: Terms = {
      ...{ arrival: performance.now(), deadlineMs, prefer: "admission", priority: 0 },
      ...{ pictures: 1, size: "4x4", pin: null },
    };
    const error = predictor.choose({ level: 0, due: null, arrival: 0, sequence: 0 }, terms, [
      { text: blocks, demands: [{ program, rows: 1 }] },
    ]) as DeadlineError;
    expect(error).toMatchObject({ code: "ERR_FLOWTURBO_DEADLINE", bestMs: 1150 });
    expect(error.retryAfterMs).toBeGreaterThan(0);
    expect(error.retryAfterMs).toBeLessThan(2000);
  }
});
