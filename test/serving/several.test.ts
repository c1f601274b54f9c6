// A dispatcher and a service over several devices: results, losses, promises.
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Tensor } from "../../lib/common/tensor.js";
import { DeviceLostError, RuntimeDiedError, RuntimeError } from "../../lib/errors.js";
import type { Program } from "../../lib/program/program.js";
import { type CostEntry, CostTable, entryOf } from "../../lib/serving/costs.js";
import { Dispatcher, type Job } from "../../lib/serving/dispatcher.js";
import { HealthMonitor } from "../../lib/serving/health.js";
import { StatsRecorder } from "../../lib/serving/stats.js";
import { conditionOf, programOf } from "./programs.js";
import { alone, SimulatedRuntime, shapesOf } from "./simulated.js";
import { arrivals, capacityOf, elapse, milliseconds, simulate, sleep, virtualTime } from "./timed.js";

const nothing = {
  queue: { waiting: 0, limit: 0 },
  running: { requests: 0, pictures: 0 },
  runtime: { restarts: 0, slowLaunches: 0 },
};
const condition = conditionOf(1, true);
const rowsOf = (seeds: readonly number[], blocks = "H1P2R1") =>
  seeds.map((seed) => programOf({ blocks, side: 4, seed, guidanceScale: 4 }, condition));
let sequence = 0;
const priority = () => ({ level: 0, due: null, arrival: performance.now(), sequence: sequence++ });
const expectEqual = (actual: Record<string, Tensor>[], programs: readonly Program[]) => {
  for (const [index, program] of programs.entries())
    for (const [name, tensor] of Object.entries(alone(program)))
      expect(actual[index]![name]!.data).toEqual(tensor.data);
};

/** Devices of those speeds, whose costs are known. */
function open(speeds: readonly number[], options: { captured?: boolean; preemption?: boolean } = {}) {
  const runtimes = speeds.map(() => new SimulatedRuntime({ preemption: options.preemption ?? false }));
  const devices = speeds.map((speed, number) => ({ number, name: `speed ${speed}` }));
  const stats = new StatsRecorder(devices);
  const costs = speeds.map(
    (speed) =>
      new CostTable(
        ["predict.guidance", "refine.guidance", "vae_decoder"].flatMap((graph) =>
          [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "8x8", [(5 + 5 * batch) / speed])),
        ),
      ),
  );
  const dispatcher = new Dispatcher(runtimes, {
    ...{ batches: [1, 2, 4, 8], maxWaitMs: 20, captured: options.captured ?? false, graph: shapesOf },
    ...{ costs, stats, watchdogMs: 10_000 },
  });
  const places: number[][] = [];
  const run = (rows: readonly Program[], extra: Partial<Job> = {}) => {
    const own: number[] = [];
    places.push(own);
    return dispatcher.run({
      ...{ rows, priority: priority(), ...extra },
      onPlaced: (row, device) => {
        own[row] = device;
      },
    });
  };
  const snapshot = () => stats.snapshot(nothing, dispatcher.there);
  return { runtimes, dispatcher, run, places, snapshot };
}
const count = (places: readonly number[], device: number) => places.filter((at) => at === device).length;

describe("a dispatcher of several devices", () => {
  it.each([[[1]], [[1, 1]], [[4, 1]], [[1, 1, 2, 4]]])("of speeds %j draws the same", async (speeds) => {
    const { dispatcher, run, places, runtimes, snapshot } = open(speeds);
    const jobs = [rowsOf([1, 2, 3, 4, 5, 6, 7, 8]), rowsOf([9]), rowsOf([10, 11], "E3")];
    const results = await Promise.all(jobs.map((rows) => run(rows)));
    for (const [index, rows] of jobs.entries()) expectEqual(results[index]!, rows);
    // Faster ones get more, and what was placed is what was launched.
    const rows = speeds.map((_, device) => count(places.flat(), device));
    for (const [device, speed] of speeds.entries())
      for (const [other, slower] of speeds.entries())
        if (speed > slower) expect(rows[device]).toBeGreaterThanOrEqual(rows[other]!);
    if (Math.max(...speeds) > Math.min(...speeds)) expect(Math.max(...rows)).toBeGreaterThan(Math.min(...rows));
    expect(rows.reduce((sum, each) => sum + each, 0)).toBe(11);
    const { devices, launches } = snapshot();
    expect(devices!.map(({ launches }) => launches)).toEqual(runtimes.map(({ launches }) => launches));
    expect(devices!.reduce((sum, { rows }) => sum + rows, 0)).toBe(launches.rows);
    expect(devices!.map(({ lost }) => lost)).toEqual(speeds.map(() => false));
    expect(dispatcher.held).toBe(0);
  });

  it("gives a row to a captured program of the device that is done with it first", async () => {
    const { run, places } = open([1, 3], { captured: true });
    const rows = rowsOf([1, 2, 3, 4]);
    expectEqual(await run(rows), rows);
    expect([count(places[0]!, 0), count(places[0]!, 1)]).toEqual([1, 3]);
  });

  it("goes on without a device that is lost for good, with its rows alone begun again", async () => {
    const { dispatcher, runtimes, run, places, snapshot } = open([1, 1, 1]);
    let launches = 0;
    runtimes[1]!.fate = () => (++launches === 3 ? "gone" : "ok");
    const restarted: number[][] = [[], [], []];
    const jobs = [[1], [2], [3]].map((seeds) => rowsOf(seeds));
    const results = await Promise.all(
      jobs.map((rows, index) => run(rows, { onRestart: (row) => restarted[index]!.push(row) })),
    );
    for (const [index, rows] of jobs.entries()) expectEqual(results[index]!, rows);
    expect(restarted).toEqual([[], [0], []]);
    expect(dispatcher.there).toEqual([0, 2]);
    expect(places.map(([place]) => place)).not.toContain(1);
    expect(snapshot().devices!.map(({ lost }) => lost)).toEqual([false, true, false]);
    expectEqual(await run(rowsOf([4, 5, 6])), rowsOf([4, 5, 6]));
    expect(count(places.at(-1)!, 1)).toBe(0);
    expect(dispatcher.held).toBe(0);
  });

  it("fails what loses a second device, and leaves the others", async () => {
    const { dispatcher, runtimes, run } = open([1, 1, 1]);
    for (const runtime of runtimes) runtime.fate = ({ graph }) => (graph === "refine.guidance" ? "gone" : "ok");
    await expect(run(rowsOf([1]))).rejects.toThrow(DeviceLostError);
    expect(dispatcher.there).toHaveLength(1);
    expectEqual(await run(rowsOf([2], "E2")), rowsOf([2], "E2"));
    // The last one is as the only one.
    await expect(run(rowsOf([1]))).rejects.toThrow(DeviceLostError);
    await expect(run(rowsOf([2], "E2"))).rejects.toThrow(DeviceLostError);
    expect(dispatcher.held).toBe(0);
  });

  it("does without a device that was found lost while it was idle, blaming no job", async () => {
    const { dispatcher, runtimes, run } = open([1, 1]);
    runtimes[0]!.gone = new DeviceLostError("It is lost.");
    expectEqual(await run(rowsOf([1, 2])), rowsOf([1, 2]));
    expect(dispatcher.there).toEqual([1]);
    dispatcher.lose(1);
    expect(dispatcher.there).toEqual([1]);
  });

  it("is told of a loss, and starts elsewhere what had begun there", async () => {
    const { dispatcher, run } = open([1, 1]);
    expectEqual(await run(rowsOf([1, 2])), rowsOf([1, 2]));
    dispatcher.lose(0);
    expect(dispatcher.there).toEqual([1]);
    expectEqual(await run(rowsOf([3, 4])), rowsOf([3, 4]));
  });

  it("retries captured programs on another device", async () => {
    const { dispatcher, runtimes, run } = open([1, 1], { captured: true });
    const { run: works } = runtimes[0]!;
    runtimes[0]!.run = async () => {
      throw new DeviceLostError("It is lost.");
    };
    expectEqual(await run(rowsOf([1, 2])), rowsOf([1, 2]));
    expect(dispatcher.there).toEqual([1]);
    runtimes[0]!.run = works;
    runtimes[1]!.run = async () => {
      throw new DeviceLostError("It is lost, too.");
    };
    await expect(run(rowsOf([3]))).rejects.toThrow("too");
  });

  it("loses a process of one device with the rows that are there", async () => {
    const { dispatcher, runtimes, run } = open([1, 1], { preemption: true });
    let launches = 0;
    runtimes[0]!.fate = () => (++launches === 2 ? "killed" : "ok");
    const restarted: number[] = [];
    const jobs = [rowsOf([1]), rowsOf([2])];
    const results = await Promise.all(jobs.map((rows, index) => run(rows, { onRestart: () => restarted.push(index) })));
    for (const [index, rows] of jobs.entries()) expectEqual(results[index]!, rows);
    expect(restarted).toHaveLength(1);
    expect(dispatcher.there).toEqual([0, 1]);
  });

  it("fails one job alone where a launch of it fails, and ends one that is aborted on all of them", async () => {
    const { dispatcher, runtimes, run } = open([1, 1]);
    runtimes[1]!.fate = ({ graph }) => (graph === "refine.guidance" ? "fails" : "ok");
    const abort = new AbortController();
    const outcomes = await Promise.allSettled([
      run(rowsOf([1, 2])),
      run(rowsOf([3], "E3")),
      run(rowsOf([4, 5, 6, 7], "E20"), {
        signal: abort.signal,
        onLaunch: (_row, { index }) => {
          if (index === 5) abort.abort(new Error("enough"));
        },
      }),
    ]);
    expect(outcomes[0]).toMatchObject({ status: "rejected", reason: expect.any(RuntimeError) });
    expect(outcomes[1]!.status).toBe("fulfilled");
    expect(outcomes[2]).toMatchObject({ status: "rejected", reason: { message: "enough" } });
    await dispatcher.idle();
    expect(dispatcher.held).toBe(0);
    for (const runtime of runtimes)
      expect([...runtime.workspaces].reduce((sum, { values }) => sum + values.size, 0)).toBe(0);
  });
});

describe("the health of several devices", () => {
  const devices = [
    { number: 0, name: "A" },
    { number: 3, name: "B" },
  ];
  it("is that of all of them: ready while one works, live while one is left", () => {
    const monitor = new HealthMonitor();
    const listeners = devices.map((device) => monitor.listenerOf(device));
    monitor.follow(listeners);
    const heard: unknown[] = [];
    monitor.events.on("lost", ({ device }) => heard.push(device));
    listeners[1]!.lost(new DeviceLostError("It fell off the bus."));
    expect(monitor.report(null, null)).toMatchObject({
      ...{ live: true, ready: true, degraded: true, restarts: 0 },
      reasons: ["Device 3 (B): It fell off the bus."],
    });
    listeners[0]!.silent(5000);
    expect(monitor.report(null, null).reasons).toHaveLength(2);
    listeners[0]!.lost(new DeviceLostError("It fell, too."));
    expect(monitor.report(null, null)).toMatchObject({ live: false, ready: false, degraded: true });
    return vi.waitFor(() => expect(heard).toEqual([3, 0]));
  });

  it("counts restarts of their processes", () => {
    const monitor = new HealthMonitor();
    const listeners = devices.map((device) => monitor.listenerOf(device));
    monitor.follow(listeners);
    const died = () => new RuntimeDiedError("It died.", null, "SIGKILL", false);
    listeners[0]!.lost(died());
    listeners[0]!.lost(died());
    expect(monitor.report(null, null)).toMatchObject({ ready: true, degraded: true });
    listeners[1]!.lost(died());
    listeners[1]!.lost(died());
    expect(monitor.report(null, null)).toMatchObject({ live: true, ready: false });
    listeners[1]!.restarted();
    expect(monitor.report(null, null)).toMatchObject({ ready: true, restarts: 1 });
  });
});

describe("a service of several devices", () => {
  const entries: CostEntry[] = Object.entries(milliseconds).flatMap(([graph, cost]) =>
    [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "4x4", [cost(batch)])),
  );
  const ladder = ["E12", "E8", "E4"];
  beforeEach(virtualTime);
  afterEach(() => {
    vi.useRealTimers();
  });
  const use = async (
    speeds: readonly number[],
    body: (simulation: ReturnType<typeof simulate>) => Promise<void>,
    options: Parameters<typeof simulate>[1] = {},
  ) => {
    const simulation = simulate(entries, { speeds, ...options });
    await body(simulation);
    await elapse(simulation.service.close());
  };
  const size = "4x4";
  const launchesOf = ({ service }: ReturnType<typeof simulate>) =>
    service.stats().devices!.map(({ launches }) => launches);

  it.each([[[1, 1]], [[1, 3]], [[1, 1, 2, 4]]])(
    "of speeds %j predicts when pictures are there, and they are",
    async (speeds) => {
      await use(
        speeds,
        async ({ ask }) => {
          for (const pictures of [1, 2, 8, 20]) {
            const { predictedMs, actualMs } = await elapse(ask({ ladder: ["E12"], pictures, deadlineMs: 60_000 }));
            expect(predictedMs).not.toBeNull();
            expect(actualMs).toBeLessThan(1.15 * predictedMs!);
            expect(actualMs).toBeGreaterThan(0.6 * predictedMs!);
          }
        },
        { noise: 0 },
      );
    },
  );

  it.each([[[1, 1]], [[1, 4]], [[1, 1, 2, 4]]])("of speeds %j keeps its promises under load", async (speeds) => {
    const power = speeds.reduce((sum, each) => sum + each, 0);
    await use(speeds, async (simulation) => {
      // About as much as all of them can draw, of the richest.
      const outcome = await arrivals(simulation, { perSecond: 8 * power, seconds: 20 }, { ladder, deadlineMs: 1000 });
      expect(outcome.accepted.length).toBeGreaterThan(0.5 * outcome.arrivals);
      expect(outcome.late).toBeLessThanOrEqual(0.005 * outcome.accepted.length);
      for (const launches of launchesOf(simulation)) expect(launches).toBeGreaterThan(0);
    });
  });

  it("draws about as much as its devices together", async () => {
    const measure = async (speeds: readonly number[]) => {
      let perSecond = 0;
      await use(speeds, async (simulation) => {
        perSecond = await capacityOf(simulation, { ladder: ["E8"] }, 300, 64);
      });
      return perSecond;
    };
    const one = await measure([1]);
    expect((await measure([1, 1])) / one).toBeGreaterThan(1.7);
    expect((await measure([1, 3])) / one).toBeGreaterThan(3);
    expect((await measure([1, 1, 1, 1])) / one).toBeGreaterThan(3);
  });

  it("tells callers who are refused when there will be room, which there is", async () => {
    await use([1, 2], async ({ ask, service }) => {
      const calls = Array.from({ length: 8 }, () => ask({ ladder: ["E12"], pictures: 8, priority: 1 }));
      const refused = await elapse(
        ask({ ladder: ["E12"], pictures: 8, deadlineMs: 900 }).then(
          () => null,
          (error) => error,
        ),
      );
      expect(refused).toMatchObject({ code: "ERR_FLOWTURBO_DEADLINE" });
      expect(refused.retryAfterMs).toBeGreaterThan(0);
      await elapse(sleep(refused.retryAfterMs));
      const { actualMs } = await elapse(ask({ ladder: ["E12"], pictures: 8, deadlineMs: 900 }));
      expect(actualMs).toBeLessThanOrEqual(900);
      await elapse(Promise.all(calls));
      expect(service.stats().requests).toMatchObject({ accepted: 9, completed: 9 });
    });
  });

  it("lets in twice the largest batch for each device that is there", async () => {
    const monitor = new HealthMonitor();
    const listeners = [0, 1].map((number) => monitor.listenerOf({ number, name: "" }));
    monitor.follow(listeners);
    await use(
      [1, 1],
      async ({ ask, service }) => {
        const calls = Array.from({ length: 40 }, () => ask({ ladder: ["E4"] }));
        await elapse(sleep(5));
        expect(service.stats().running.pictures).toBe(32);
        await elapse(Promise.all(calls));
        listeners[0]!.lost(new DeviceLostError("It is lost."));
        await elapse(sleep(5));
        const { devices } = service.stats();
        expect(devices!.map(({ lost }) => lost)).toEqual([true, false]);
        const more = Array.from({ length: 20 }, () => ask({ ladder: ["E4"] }));
        await elapse(sleep(5));
        expect(service.stats().running.pictures).toBe(16);
        await elapse(Promise.all(more));
        expect(service.stats().devices![0]!.launches).toBe(devices![0]!.launches);
      },
      { monitor },
    );
  });

  it("goes on with the work of a device that is lost under load", async () => {
    await use([1, 1, 1], async (simulation) => {
      const { ask, service, runtimes } = simulation;
      const calls = Array.from({ length: 30 }, () => ask({ ladder: ["E8"] }));
      await elapse(sleep(60));
      runtimes[1]!.failure = { error: new DeviceLostError("It is lost."), lost: true };
      await elapse(Promise.all(calls));
      expect(service.stats().requests).toMatchObject({ completed: 30, failed: 0 });
      expect(service.stats().devices!.map(({ lost }) => lost)).toEqual([false, true, false]);
      expect(service.stats().launches.restarted).toBeGreaterThan(0);
    });
  });

  it("measures each device before it promises, and knows how they differ", async () => {
    const simulation = simulate([], { speeds: [1, 4], noise: 0 });
    await elapse(simulation.ask({ ladder: ["E4"], deadlineMs: 5000, pictures: 2 }));
    const [slow, fast] = simulation.service.tables;
    expect(simulation.runtimes.every(({ measured }) => measured > 0)).toBe(true);
    expect(slow!.estimate("predict.guidance", size, 1)! / fast!.estimate("predict.guidance", size, 1)!).toBeCloseTo(4);
    await elapse(simulation.service.close());
  });
});
