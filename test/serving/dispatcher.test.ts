// Jobs at the same time on a simulated runtime: results do not depend on other jobs, whatever arrives, is aborted or fails.
import { getEventListeners } from "node:events";
import { setImmediate } from "node:timers/promises";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import type { Tensor } from "../../lib/common/tensor.js";
import { DeviceLostError } from "../../lib/errors.js";
import type { Launch, Program } from "../../lib/program/program.js";
import { CostTable, entryOf } from "../../lib/serving/costs.js";
import { Dispatcher } from "../../lib/serving/dispatcher.js";
import { StatsRecorder } from "../../lib/serving/stats.js";
import type { SlowLaunch } from "../../lib/serving/watch.js";
import { conditionOf, numbers, programOf } from "./programs.js";
import { alone, type Fate, graphNames, SimulatedRuntime, shapesOf } from "./simulated.js";

interface Request {
  readonly blocks: string;
  readonly side: number;
  readonly guided: boolean;
  readonly seeds: readonly number[];
  readonly extra?: "stages" | "inpainting" | "preview" | undefined;
}

/** The row programs of a request, as a model makes them. */
function rowsOf({ seeds, guided, ...request }: Request): Program[] {
  const { side, extra } = request;
  const condition = conditionOf(seeds[0]!, guided);
  const edit = { init: numbers(77, 1, 4, side, side), mask: numbers(78, 1, 1, side, side) };
  return seeds.map((seed) =>
    programOf(
      { ...request, seed, guidanceScale: guided ? seed : null, pixelsAtOnce: 2 * (2 * side) ** 2 },
      condition,
      extra === "inpainting" ? edit : undefined,
    ),
  );
}

/** What is under way at the end. */
const nothing = {
  queue: { waiting: 0, limit: 0 },
  running: { requests: 0, pictures: 0 },
  runtime: { restarts: 0, slowLaunches: 0 },
};

const costs = (graphs: readonly string[]) =>
  new CostTable(
    graphs.flatMap((graph) =>
      ["4x4", "8x8", "16x16"].flatMap((size) =>
        [1, 2, 4, 8].map((batch) => entryOf(graph, batch, size, [5 + 5 * batch])),
      ),
    ),
  );
function open(
  extra: {
    maxBatch?: number;
    maxWaitMs?: number;
    captured?: boolean;
    preemption?: boolean;
    watchdogMs?: number;
    onSlow?: (launch: SlowLaunch) => void;
    /** Graphs whose costs are known. */
    known?: readonly string[];
  } = {},
) {
  const runtime = new SimulatedRuntime(extra);
  const stats = new StatsRecorder();
  const table = costs(extra.known ?? ["predict.guidance", "refine.guidance", "vae_decoder"]);
  const maxBatch = extra.maxBatch ?? 8;
  const dispatcher = new Dispatcher(runtime, {
    batches: [1, 2, 4, 8].filter((batch) => batch <= maxBatch),
    maxWaitMs: extra.maxWaitMs ?? 20,
    captured: extra.captured ?? false,
    graph: shapesOf,
    costs: table,
    stats,
    watchdogMs: extra.watchdogMs ?? 10_000,
    onSlow: extra.onSlow,
  });
  return {
    runtime,
    stats,
    table,
    dispatcher,
    rowsPerLaunch: () => stats.snapshot(nothing).rowsPerLaunch,
  };
}
let sequence = 0;
const priority = () => ({ level: 0, due: null, arrival: performance.now(), sequence: sequence++ });
const expectEqual = (actual: Record<string, Tensor>[], programs: readonly Program[]) => {
  expect(actual).toHaveLength(programs.length);
  for (const [index, program] of programs.entries()) {
    const expected = alone(program);
    expect(Object.keys(actual[index]!)).toEqual(Object.keys(expected));
    for (const [name, tensor] of Object.entries(expected)) {
      expect(actual[index]![name]!.shape).toEqual(tensor.shape);
      expect(actual[index]![name]!.data).toEqual(tensor.data);
    }
  }
};

const request = (extra: Partial<Request> = {}): Request => ({
  blocks: "H1P2R1",
  side: 4,
  guided: true,
  seeds: [1],
  ...extra,
});

describe("the interpreter", () => {
  it("tells rows, halves and shared operands apart: every input matters", () => {
    const base = alone(rowsOf(request())[0]!);
    for (const other of [{ seeds: [2] }, { guided: false }, { blocks: "H1P1R2" }, { side: 8 }])
      expect(alone(rowsOf(request(other))[0]!).image!.data).not.toEqual(base.image!.data);
  });
});

describe("jobs at the same time", () => {
  const mixed: Request[] = [
    request({ seeds: [1, 2, 3] }),
    request({ blocks: "H1P4", seeds: [4] }),
    request({ blocks: "E3", seeds: [5, 6], guided: false }),
    request({ side: 8, seeds: [7] }),
    request({ extra: "stages", seeds: [8, 9], blocks: "H1R1" }),
    request({ extra: "inpainting", seeds: [10, 11] }),
    request({ extra: "preview", seeds: [12] }),
  ];

  it("share launches, and each gets what it would get alone, bit for bit", async () => {
    const { dispatcher, runtime, stats, rowsPerLaunch } = open();
    const programs = mixed.map(rowsOf);
    const results = await Promise.all(programs.map((rows) => dispatcher.run({ rows, priority: priority() })));
    for (const [index, rows] of programs.entries()) expectEqual(results[index]!, rows);
    expect(Math.max(...Object.keys(rowsPerLaunch()).map(Number))).toBeGreaterThanOrEqual(4);
    expect(stats.snapshot(nothing).launches.restarted).toBe(0);
    await dispatcher.idle();
    await runtime.settled();
    expect(dispatcher.held).toBe(0);
    expect([...runtime.workspaces].map(({ values }) => values.size)).toEqual([0]);
    // One runs and one is ready behind it, no more.
    expect(runtime.mostSubmissions).toBe(2);
  });

  it("never exceed maxBatch; pinned launches are all of one batch", async () => {
    const narrow = open({ maxBatch: 2 });
    const programs = mixed.map(rowsOf);
    await Promise.all(programs.map((rows) => narrow.dispatcher.run({ rows, priority: priority() })));
    expect(Object.keys(narrow.rowsPerLaunch())).toEqual(["1", "2"]);
    const pinned = open();
    const batches = new Set<string>();
    pinned.runtime.fate = (launch) => {
      // The batch is in the names of what was gathered; a row's own registers would have none.
      batches.add(`${launch.graph} ${Object.values(launch.outputs).every((name) => name.startsWith("submission "))}`);
      return "ok";
    };
    const results = await Promise.all(
      programs.map((rows) => pinned.dispatcher.run({ rows, priority: priority(), pin: 4 })),
    );
    for (const [index, rows] of programs.entries()) expectEqual(results[index]!, rows);
    // Pictures too large for two at once are upscaled and decoded one by one.
    expect([...batches].filter((text) => text.endsWith("false")).sort()).toEqual([
      "upscale false",
      "vae_decoder false",
    ]);
  });

  it("run as captured programs, where that is asked for, and are counted and observed all the same", async () => {
    const { dispatcher, runtime, stats, table } = open({ captured: true });
    runtime.cost = () => 7;
    const programs = mixed.map(rowsOf);
    const reported = vi.fn();
    const run = () =>
      Promise.all(programs.map((rows) => dispatcher.run({ rows, priority: priority(), onLaunch: reported })));
    for (const [index, results] of (await run()).entries()) expectEqual(results, programs[index]!);
    for (let round = 0; round < 5; round++) await run();
    const count = 6 * programs.flat().reduce((sum, { instructions }) => sum + instructions.length, 0);
    const { launches, rowsPerLaunch, milliseconds } = stats.snapshot(nothing);
    expect(launches).toEqual({ count, rows: count, padding: 0, restarted: 0 });
    expect(rowsPerLaunch).toEqual({ 1: count });
    expect(milliseconds.launches["predict.guidance"]!.sum).toBe(7 * milliseconds.launches["predict.guidance"]!.count);
    expect(reported).toHaveBeenCalledTimes(count);
    // What has not been measured gets an entry.
    expect(table.get("inpaint_blend.guidance", "8x8", 1)!.milliseconds / table.drift).toBeGreaterThan(0);
  });

  it("are told of each of their launches once, in order, with the values that they asked for", async () => {
    const { dispatcher } = open();
    const requests = [request({ extra: "preview", seeds: [1, 2] }), request({ seeds: [3] })];
    const reports = requests.map(() => new Map<number, string[]>());
    let firsts = 0;
    const programs = requests.map(rowsOf);
    const previews: Tensor[] = [];
    await Promise.all(
      programs.map((rows, index) =>
        dispatcher.run({
          rows,
          priority: priority(),
          onLaunch: (row, { launch, values }, first) => {
            const list = reports[index]!.get(row) ?? [];
            list.push(launch.label.name);
            reports[index]!.set(row, list);
            if (index === 0 && row === 1) previews.push(...Object.values(values));
            if (index === 0 && first) firsts++;
          },
        }),
      ),
    );
    for (const [index, rows] of programs.entries())
      for (const [row, { instructions }] of rows.entries())
        expect(reports[index]!.get(row)).toEqual(instructions.map((instruction) => (instruction as Launch).label.name));
    expect(previews.map(({ shape }) => shape)).toEqual(new Array(4).fill([1, 3, 4, 4]));
    // Both rows shared every launch but those that decode, which do not pay together.
    expect(firsts).toBeLessThan(2 * programs[0]![0]!.instructions.length);
  });

  it("are reported launch by launch in the submissions that a watched job has a part in, and in no others", async () => {
    const { dispatcher, runtime } = open();
    const seen = { each: 0, bunched: 0 };
    const opened = runtime.open.bind(runtime);
    // The first job's rows have registers of their own, which are named by it; of the others one shares its launches.
    const watched = "job 0.";
    runtime.open = () => {
      const workspace = opened();
      const submit: typeof workspace.submit = (program, options) => {
        const isPart = Object.keys(program.registers).some((name) => name.startsWith(watched));
        expect(options?.reports).toBe(isPart ? "each" : "bunched");
        seen[options!.reports!]++;
        return workspace.submit(program, options);
      };
      return { ...workspace, submit, get lost() { return workspace.lost; } }; // biome-ignore format: one line
    };
    const rows = [request({ blocks: "H1P2", seeds: [1] }), request({ seeds: [2] }), request({ side: 8, seeds: [3] })];
    const jobs = rows.map((each, index) =>
      dispatcher.run({ rows: rowsOf(each), priority: priority(), ...(index === 0 && { reports: "each" as const }) }),
    );
    await Promise.all(jobs);
    expect(seen.each).toBeGreaterThan(1);
    expect(seen.bunched).toBeGreaterThan(1);
  });

  it("end early where they are aborted or their listener throws, and nowhere else", async () => {
    const { dispatcher, runtime } = open();
    const controller = new AbortController();
    const programs = [request({ seeds: [1] }), request({ seeds: [2] }), request({ seeds: [3, 4] })].map(rowsOf);
    const aborted = dispatcher.run({
      rows: programs[0]!,
      priority: priority(),
      signal: controller.signal,
      onLaunch: () => controller.abort(new Error("enough")),
    });
    const thrown = dispatcher.run({
      rows: programs[1]!,
      priority: priority(),
      onLaunch: (_, { index }) => {
        if (index === 1) throw new Error("listener");
      },
    });
    const third = dispatcher.run({ rows: programs[2]!, priority: priority() });
    await expect(aborted).rejects.toThrow("enough");
    await expect(thrown).rejects.toThrow("listener");
    expectEqual(await third, programs[2]!);
    await expect(
      dispatcher.run({ rows: programs[0]!, priority: priority(), signal: AbortSignal.abort(new Error("before")) }),
    ).rejects.toThrow("before");
    await dispatcher.idle();
    await runtime.settled();
    expect(dispatcher.held).toBe(0);
    expect([...runtime.workspaces].map(({ values }) => values.size)).toEqual([0]);
  });
});

it.each([false, true])("jobs that share a signal add one listener to it (captured: %s)", async (captured) => {
  const { dispatcher } = open({ captured });
  const { signal } = new AbortController();
  const rows = rowsOf(request({ seeds: [1, 2] }));
  const jobs = Array.from({ length: 12 }, () => dispatcher.run({ rows, priority: priority(), signal }));
  expect(getEventListeners(signal, "abort")).toHaveLength(1);
  await Promise.all(jobs);
  expect(getEventListeners(signal, "abort")).toHaveLength(0);
});

describe("a lone job", () => {
  it("is one submission, which is preempted for a newcomer; they share what is left, and nothing runs twice", async () => {
    const { dispatcher, runtime, rowsPerLaunch } = open();
    const [long, late] = [request({ blocks: "H1P8", seeds: [1] }), request({ blocks: "H1P4", seeds: [2] })].map(rowsOf);
    let newcomer: Promise<Record<string, Tensor>[]> | null = null;
    const reported: number[] = [];
    const first = dispatcher.run({
      rows: long!,
      priority: priority(),
      onLaunch: (_, { index }) => {
        reported.push(index);
        if (index === 2) newcomer = dispatcher.run({ rows: late!, priority: priority() });
      },
    });
    expectEqual(await first, long!);
    expectEqual(await newcomer!, late!);
    expect(reported).toEqual([...long![0]!.instructions.keys()]);
    expect(runtime.preemptions).toBe(1);
    expect(runtime.launches).toBeLessThan(long![0]!.instructions.length + late![0]!.instructions.length);
    expect(rowsPerLaunch()[2]).toBeGreaterThan(2);
    await runtime.settled();
    expect(dispatcher.held).toBe(0);
    expect([...runtime.workspaces].map(({ values }) => values.size)).toEqual([0]);
  });

  it("that is aborted while a newcomer waits for its preemption makes no more launches, and the newcomer has what both need", async () => {
    const { dispatcher, runtime } = open();
    const shared = rowsOf(request({ seeds: [1], blocks: "H1P8" }));
    const controller = new AbortController();
    const first = dispatcher.run({ rows: shared, priority: priority(), signal: controller.signal });
    first.catch(() => {});
    await setImmediate();
    const second = dispatcher.run({ rows: shared, priority: priority() });
    await setImmediate();
    controller.abort(new Error("enough"));
    await expect(first).rejects.toThrow("enough");
    expectEqual(await second, shared);
    await dispatcher.idle();
    await runtime.settled();
    expect(dispatcher.held).toBe(0);
    expect(runtime.launches).toBeLessThan(shared[0]!.instructions.length + 3);
  });
});

describe("failures", () => {
  /** Fails every launch that a given seed's row takes part in, as values that overflow would. */
  it("of one job are its own: those that shared the launch get their pictures", async () => {
    const { dispatcher, runtime } = open();
    const bad = rowsOf(request({ seeds: [666] }));
    const others = [1, 2, 3].map((seed) => rowsOf(request({ seeds: [seed] })));
    runtime.fate = (launch) => {
      // Its guidance scale is its seed, and travels as a value with the launch.
      return badLaunches.has(launch) ? "fails" : "ok";
    };
    const badLaunches = new Set<Launch>();
    const opened = runtime.open.bind(runtime);
    runtime.open = () => {
      const workspace = opened();
      const { submit } = workspace;
      return Object.assign(Object.create(workspace), {
        submit: (program: Program, options: object) => {
          for (const instruction of program.instructions) {
            if (instruction.op !== "launch") continue;
            const guidance = program.constants[instruction.inputs.guidance!];
            if (guidance?.kind === "value" && guidance.tensor.data.includes(666 as never)) badLaunches.add(instruction);
          }
          return submit(program, options);
        },
        free: workspace.free,
      });
    };
    const failed = dispatcher.run({ rows: bad, priority: priority() });
    const results = others.map((rows) => dispatcher.run({ rows, priority: priority() }));
    await expect(failed).rejects.toThrow(/The launch of "predict.guidance" failed/);
    for (const [index, result] of results.entries()) expectEqual(await result, others[index]!);
    await dispatcher.idle();
    expect(dispatcher.held).toBe(0);
  });

  it("whatever arrives, is aborted or fails, every job settles once and what is delivered is right", {
    timeout: 300_000,
  }, async () => {
    const arbitraryRequest = fc.record({
      blocks: fc.constantFrom("H1P2R1", "E2", "H2", "H1P1", "H1P4R2", "H1R1"),
      side: fc.constantFrom(2, 4),
      guided: fc.boolean(),
      seeds: fc.uniqueArray(fc.integer({ min: 1, max: 1000 }), { minLength: 1, maxLength: 4 }),
      extra: fc.constantFrom(undefined, undefined, "stages" as const, "inpainting" as const, "preview" as const),
    });
    const arbitraryJob = fc.record({
      request: arbitraryRequest,
      // Together, or while others are under way.
      delay: fc.oneof(fc.nat(12), fc.nat(80)),
      // Half of them.
      abortAfter: fc.option(fc.nat(40), { freq: 1 }),
      level: fc.integer({ min: -1, max: 1 }),
    });
    const fates = fc.array(fc.constantFrom<Fate>(...new Array<Fate>(60).fill("ok"), "fails", "dies", "killed"), {
      maxLength: 60,
    });
    const settings = fc.record({
      maxBatch: fc.constantFrom(1, 2, 8),
      pin: fc.constantFrom(null, null, 4),
      maxWaitMs: fc.constantFrom(0, 1000),
      preemption: fc.boolean(),
      known: fc.constantFrom(["predict.guidance"], graphNames),
    });
    let delivered = 0;
    let preemptions = 0;
    await fc.assert(
      fc.asyncProperty(
        fc.array(arbitraryJob, { minLength: 1, maxLength: 8, size: "max" }),
        fates,
        // Turns at which everything is lost at once, whatever is under way or not.
        fc.array(fc.nat(60), { maxLength: 2 }),
        settings,
        async (jobs, list, kills, { pin, ...extra }) => {
          const { dispatcher, runtime } = open(extra);
          for (const turns of kills)
            void (async () => {
              for (let turn = 0; turn < turns; turn++) await setImmediate();
              runtime.kill();
            })();
          const queue = [...list];
          runtime.fate = () => queue.shift() ?? "ok";
          const work = async ({ request, delay, abortAfter, level }: (typeof jobs)[number]) => {
            const rows = rowsOf(request);
            for (let turn = 0; turn < delay; turn++) await setImmediate();
            const controller = new AbortController();
            if (abortAfter !== null)
              void (async () => {
                for (let turn = 0; turn < abortAfter; turn++) await setImmediate();
                controller.abort(new Error("aborted"));
              })();
            const reported = rows.map(() => 0);
            let settled = 0;
            const job = dispatcher.run({
              rows,
              pin,
              priority: { ...priority(), level },
              signal: controller.signal,
              onLaunch: (row, { index }) => {
                expect(settled).toBe(0);
                expect(index).toBe(reported[row]!++);
              },
            });
            try {
              const results = await job;
              settled++;
              expectEqual(results, rows);
              expect(reported).toEqual(rows.map(({ instructions }) => instructions.length));
              delivered++;
            } catch (error) {
              settled++;
              expect((error as Error).message).toMatch(/^aborted$|^The launch of|^The simulated process died/);
            }
          };
          await Promise.all(jobs.map(work));
          await dispatcher.idle();
          await runtime.settled();
          expect(dispatcher.held).toBe(0);
          expect([...runtime.workspaces].map(({ values }) => values.size).filter((size) => size > 0)).toEqual([]);
          expect(runtime.workspaces.size).toBeLessThanOrEqual(1);
          preemptions += runtime.preemptions;
        },
      ),
      { numRuns: 400 },
    );
    expect(preemptions).toBeGreaterThan(15);
    expect(delivered).toBeGreaterThan(200);
  });
});

describe("a runtime that is lost", () => {
  it("between two submissions, or while idle, fails no job", async () => {
    // Without preemption each launch of a job of unknown cost is a submission of its own.
    const { dispatcher, runtime, stats } = open({ preemption: false, known: [] });
    const rows = rowsOf(request({ blocks: "H1P4", seeds: [1, 2] }));
    const launches = rows[0]!.instructions.length;
    for (let after = 1; after < launches; after++) {
      let reports = 0;
      const job = dispatcher.run({
        rows,
        priority: priority(),
        onLaunch: (_row, _report, first) => {
          if (first && ++reports === after) queueMicrotask(() => runtime.kill());
        },
      });
      expectEqual(await job, rows);
      runtime.kill();
    }
    expect(stats.snapshot(nothing).launches.restarted).toBeGreaterThan(0);
    expectEqual(await dispatcher.run({ rows, priority: priority() }), rows);
  });

  it.each([false, true])(
    "for good fails all jobs at once, and later ones without a launch (preemption: %s)",
    async (on) => {
      const { dispatcher, runtime, stats } = open({ preemption: on, maxBatch: 2 });
      let launches = 0;
      runtime.fate = () => (++launches === 4 ? "gone" : "ok");
      const jobs = [
        request({ blocks: "H1P4", seeds: [1] }),
        request({ blocks: "H1P4", seeds: [2] }),
        request({ side: 8, seeds: [3] }),
        request({ seeds: [4, 5, 6] }),
      ].map((each) => dispatcher.run({ rows: rowsOf(each), priority: priority() }));
      for (const job of jobs) await expect(job).rejects.toBeInstanceOf(DeviceLostError);
      expect(launches).toBe(4);
      expect(stats.snapshot(nothing).launches.restarted).toBe(0);
      for (let late = 0; late < 3; late++)
        await expect(dispatcher.run({ rows: rowsOf(request()), priority: priority() })).rejects.toBe(runtime.gone);
      expect(launches).toBe(4);
      await dispatcher.idle();
      expect(dispatcher.held).toBe(0);
    },
  );

  it.each([false, true])(
    "with its GPU fails the job that was alone in the launch, and no other (preemption: %s)",
    async (on) => {
      const { dispatcher, runtime } = open({ preemption: on, maxBatch: 2 });
      let resets = 1;
      runtime.fate = () => (resets-- > 0 ? "reset" : "ok");
      const [one, ...others] = [
        rowsOf(request({ blocks: "H1P4", seeds: [1] })),
        rowsOf(request({ side: 8, seeds: [2] })),
        rowsOf(request({ seeds: [3, 4, 5] })),
      ];
      const first = dispatcher.run({ rows: one!, priority: priority() }).catch((error) => error);
      // So that it is alone in its first launch.
      await setImmediate();
      const rest = others.map((rows) => dispatcher.run({ rows, priority: priority() }));
      expect(await first).toMatchObject({ code: "ERR_FLOWTURBO_DEVICE_RESET", permanent: false });
      for (const [index, job] of rest.entries()) expectEqual(await job, others[index]!);
      // The next call works; and jobs that shared the launch start again, each alone.
      resets = 1;
      const shared = [6, 7].map((seed) => rowsOf(request({ blocks: "H1P4", seeds: [seed] })));
      const both = shared.map((rows) => dispatcher.run({ rows, priority: priority() }));
      for (const [index, job] of both.entries()) expectEqual(await job, shared[index]!);
      expect(resets).toBeLessThan(0);
      await dispatcher.idle();
      expect(dispatcher.held).toBe(0);
    },
  );

  it("again and again fails the job in the end, with the error of the loss", async () => {
    const { dispatcher, runtime } = open();
    const rows = rowsOf(request());
    let kills = 0;
    runtime.fate = () => {
      kills++;
      return "killed";
    };
    await expect(dispatcher.run({ rows, priority: priority() })).rejects.toThrow("The simulated process died.");
    expect(kills).toBe(4);
    runtime.fate = () => "ok";
    expectEqual(await dispatcher.run({ rows, priority: priority() }), rows);
  });
});

describe("a launch that hangs", () => {
  beforeEach(() => {
    vi.useFakeTimers({ toFake: ["setInterval", "clearInterval", "performance"] });
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  it("is reported, then given up: its own job fails, and others start again", async () => {
    const slow: SlowLaunch[] = [];
    const { dispatcher, runtime, table } = open({ watchdogMs: 1000, onSlow: (launch) => slow.push(launch) });
    const rows = rowsOf(request());
    expect(dispatcher.running).toBeNull();
    await dispatcher.run({ rows, priority: priority() });
    let launches = 0;
    runtime.fate = () => (++launches === 3 ? "hangs" : "ok");
    const bad = dispatcher.run({ rows, priority: priority() });
    bad.catch(() => {});
    await vi.waitFor(() => expect(launches).toBe(3));
    const other = dispatcher.run({ rows: rowsOf(request({ side: 8, seeds: [7] })), priority: priority() });
    vi.advanceTimersByTime(1300);
    const usualMs = table.estimate("predict.guidance", "8x8", 1);
    expect(slow).toMatchObject([{ graph: "predict.guidance", size: "8x8", batch: 1, usualMs }]);
    expect(dispatcher.running!.milliseconds).toBeGreaterThan(1000);
    expect(runtime.givenUp).toEqual([]);
    vi.advanceTimersByTime(5000);
    expect(runtime.givenUp).toEqual([
      expect.stringMatching(/^has worked on one launch of "predict.guidance" for \d+ s$/),
    ]);
    await expect(bad).rejects.toThrow("The simulated process died.");
    expectEqual(await other, rowsOf(request({ side: 8, seeds: [7] })));
    await dispatcher.idle();
    expect(dispatcher.held).toBe(0);
    expect(vi.getTimerCount()).toBe(0);
  });

  it("has much more time where it is the first of its kind, which compiles the graph", async () => {
    const { dispatcher, runtime } = open({ watchdogMs: 1000 });
    runtime.fate = () => "hangs";
    const job = dispatcher.run({ rows: rowsOf(request()), priority: priority() });
    job.catch(() => {});
    await vi.waitFor(() => expect(dispatcher.running).not.toBeNull());
    vi.advanceTimersByTime(200_000);
    expect(runtime.givenUp).toEqual([]);
    expect(dispatcher.running!.milliseconds).toBeGreaterThanOrEqual(200_000);
    runtime.giveUp("enough");
    await expect(job).rejects.toThrow("The simulated process died.");
  });
});

it("a job over nothing is refused", async () => {
  const { dispatcher } = open();
  await expect(dispatcher.run({ rows: [], priority: priority() })).rejects.toThrow(RangeError);
  const [program] = rowsOf(request());
  const copy = { op: "copy", from: "a", fromRow: 0, to: "b", toRow: 0, rows: 1 } as const;
  await expect(dispatcher.run({ rows: [{ ...program!, instructions: [copy] }], priority: priority() })).rejects.toThrow(
    /no rows to copy/,
  );
});
