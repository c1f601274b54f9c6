// The scheduler under any sequence of arrivals, aborts and failures: no row lost, doubled or mixed up.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { CostTable, entryOf } from "../../lib/serving/costs.js";
import { agingMilliseconds, type Priority } from "../../lib/serving/priority.js";
import type { RowLaunch } from "../../lib/serving/rows.js";
import { type ScheduledJob, Scheduler, type Submission } from "../../lib/serving/scheduler.js";
import { cheapestSplit, launchBatches } from "../../lib/serving/split.js";

const launch = (key: string, extra: Partial<RowLaunch> = {}): RowLaunch => {
  const [graph, size] = key.split("@") as [string, string];
  return { key, graph, size: size ?? "", maxRows: Number.POSITIVE_INFINITY, deferrable: graph === "refine", ...extra };
};
const launches = (keys: string) => keys.split(" ").map((key) => launch(key));

let sequence = 0;
const job = (
  id: number,
  rows: readonly string[],
  extra: Partial<Pick<ScheduledJob, "pin">> & Partial<Priority> = {},
): ScheduledJob => ({
  id,
  priority: {
    level: extra.level ?? 0,
    due: extra.due ?? null,
    arrival: extra.arrival ?? 0,
    sequence: sequence++,
  },
  rows: rows.map(launches),
  pin: extra.pin ?? null,
});

/** Milliseconds of batches 1, 2, 4 and 8. */
const costs = (table: Record<string, readonly number[]>) =>
  new CostTable(
    Object.entries(table).flatMap(([key, times]) => {
      const { graph, size } = launch(key);
      return times.map((milliseconds, index) => entryOf(graph, 2 ** index, size, [milliseconds]));
    }),
  );
const paying = { "predict@64": [20, 30, 50, 90], "refine@64": [10, 12, 16, 24], "decode@64": [30, 60, 120, 240] };
const scheduler = (
  table = costs(paying),
  extra: { maxWaitMs?: number; batches?: readonly number[]; preemption?: boolean } = {},
) =>
  new Scheduler({
    ...{ batches: [1, 2, 4, 8], maxWaitMs: 20, preemption: false, costs: table },
    ...extra,
  });
const shape = (submission: Submission | null) =>
  submission?.launches.map(
    ({ graph, batch, rows }) => `${graph} ${batch}: ${rows.map(({ job, row }) => `${job}.${row}`).join(" ")}`,
  );
/** Assigns and finishes submissions, one at a time, until nothing is left. */
const drain = (work: Scheduler, now = 0) => {
  const submissions: Submission[] = [];
  for (let submission = work.assign(now); submission; submission = work.assign(now)) {
    submissions.push(submission);
    work.finished(submission.id, now);
  }
  return submissions;
};

describe("rows", () => {
  it("share launches wherever they are in their schedules, if the cost table says that it pays", () => {
    const work = scheduler();
    work.start(job(1, ["predict@64 predict@64 predict@64 predict@64 decode@64"]), 0);
    expect(shape(work.assign(0))).toEqual(["predict 1: 1.0", "predict 1: 1.0"]);
    work.start(job(2, ["predict@64 predict@64 decode@64"]), 0);
    expect(shape(work.assign(0))).toEqual(["predict 2: 1.0 2.0"]);
    expect(shape(work.assign(0))).toEqual(["predict 2: 1.0 2.0"]);
    // Two decoded together cost as much as one after the other: the one that arrived first has its picture first.
    expect(shape(work.assign(0))).toEqual(["decode 1: 1.0"]);
    expect(shape(work.assign(0))).toEqual(["decode 1: 2.0"]);
    expect(work.assign(0)).toBeNull();
  });

  it("do not share launches that do not pay, except deferrable ones, which share even at a little loss", () => {
    const table = costs({ "predict@64": [20, 41], "refine@64": [20, 41] });
    const work = scheduler(table, { maxWaitMs: 0 });
    work.start(job(1, ["predict@64 refine@64"]), 0);
    work.start(job(2, ["predict@64 refine@64"]), 0);
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 1.0", "refine 1: 1.0", "predict 1: 2.0", "refine 1: 2.0"]);
    const held = scheduler(table, { maxWaitMs: 50 });
    held.start(job(1, ["predict@64 refine@64"]), 0);
    held.start(job(2, ["predict@64 refine@64"]), 0);
    expect(drain(held).flatMap(shape)).toEqual(["predict 1: 1.0", "predict 1: 2.0", "refine 2: 1.0 2.0"]);
  });

  it("with different keys, or pinned differently, never share", () => {
    const work = scheduler();
    work.start(job(1, ["predict@64"]), 0);
    work.start(job(2, ["predict@128"]), 0);
    work.start(job(3, ["predict@64"], { pin: 4 }), 0);
    work.start(job(4, ["predict@64"], { pin: 4 }), 0);
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 1.0", "predict 1: 2.0", "predict 4: 3.0 4.0"]);
  });

  it("are padded to the pinned batch, or as far as the launch allows", () => {
    const work = scheduler();
    const decode = launch("decode@64", { maxRows: 2 });
    const rows = [
      [launch("predict@64"), decode],
      [launch("predict@64"), decode],
      [launch("predict@64"), decode],
    ];
    work.start({ ...job(1, ["x"], { pin: 4 }), rows }, 0);
    expect(drain(work).flatMap(shape)).toEqual(["predict 4: 1.0 1.1 1.2", "decode 2: 1.0 1.1", "decode 2: 1.2"]);
  });

  it("of one job are split over the batches by cost, each launch its own way", () => {
    const table = costs({ "predict@64": [10, 20, 40, 45], "decode@64": [10, 19, 39, 90] });
    const work = scheduler(table);
    work.start(job(1, new Array(5).fill("predict@64 decode@64")), 0);
    // Padding 5 rows to 8 is cheaper than 4 + 1; decoding goes by twos.
    expect(drain(work).flatMap(shape)).toEqual([
      "predict 8: 1.0 1.1 1.2 1.3 1.4",
      "decode 2: 1.0 1.1",
      "decode 2: 1.2 1.3",
      "decode 1: 1.4",
    ]);
  });

  it("of one job are split as costs least, for 1 to 32 rows, any table and any launch", () => {
    const batches = [1, 2, 4, 8];
    const time = fc.double({ min: 0.01, max: 1000, noNaN: true });
    fc.assert(
      fc.property(fc.tuple(time, time, time, time), fc.constantFrom("predict", "refine"), (times, graph) => {
        const table = costs({ [`${graph}@64`]: times });
        for (let rows = 1; rows <= 32; rows++) {
          const work = scheduler(table);
          work.start(job(1, new Array(rows).fill(`${graph}@64`)), 0);
          const launches = drain(work).flatMap((submission) => submission.launches);
          const cost = (batch: number) => table.estimate(graph, "64", batch)!;
          const spent = launches.reduce((sum, { batch }) => sum + cost(batch), 0);
          const least = cheapestSplit(rows, batches, cost).milliseconds;
          expect(spent / least).toBeCloseTo(1, 9);
        }
      }),
    );
  });

  it("of several jobs are never padded where that is not cheaper, deferrable or not", () => {
    const start = (table: CostTable) => {
      const work = scheduler(table, { maxWaitMs: 0 });
      for (const id of [1, 2, 3]) work.start(job(id, ["refine@64"]), 0);
      return drain(work).flatMap((submission) => submission.launches.map(({ batch, rows }) => [rows.length, batch]));
    };
    // 2 and 1 take 20 ms, 4 take 21.
    expect(start(costs({ "refine@64": [10, 10, 21] }))).toEqual([[2, 2], [1, 1]]); // biome-ignore format: one line
    expect(start(costs({ "refine@64": [10, 10, 19] }))).toEqual([[3, 4]]);
    // A little more together than alone: worth it to share.
    expect(start(costs({ "refine@64": [10, 20.5, 60] }))).toEqual([[2, 2], [1, 1]]); // biome-ignore format: one line
  });

  it("are launched in no other batch than the compiled ones, even where sharing makes a job late", () => {
    const table = new CostTable([entryOf("predict", 3, "64", [100])]);
    const work = scheduler(table, { batches: [3] });
    work.start(job(1, ["predict@64 predict@64"], { due: 150 }), 0);
    work.start(job(2, ["predict@64 predict@64"], { due: 150 }), 0);
    expect(drain(work).flatMap(({ launches }) => launches.map(({ batch }) => batch))).toEqual([3, 3]);
  });

  it("are at most as many in a launch as the largest batch has", () => {
    const work = scheduler(costs(paying), { batches: [1, 2, 3] });
    work.start(job(1, new Array(7).fill("predict@64")), 0);
    expect(drain(work).flatMap(({ launches }) => launches.map(({ batch }) => batch))).toEqual([3, 3, 1]);
  });
});

describe("holding back", () => {
  it("holds a deferrable launch while a row that needs the same launch is near, no longer than maxWaitMs", () => {
    const start = (maxWaitMs: number) => {
      const work = scheduler(costs(paying), { maxWaitMs });
      work.start(job(1, ["refine@64 decode@64"]), 0);
      work.start(job(2, ["predict@64 refine@64 decode@64"]), 0);
      return work;
    };
    expect(drain(start(19)).flatMap(shape)[0]).toBe("refine 1: 1.0");
    expect(drain(start(20)).flatMap(shape).slice(0, 2)).toEqual(["predict 1: 2.0", "refine 2: 1.0 2.0"]);
    const late = start(20);
    expect(shape(late.assign(1))).toEqual(["refine 1: 1.0"]);
  });

  it("never leaves the device without work", () => {
    const work = scheduler(costs(paying), { maxWaitMs: 1e9 });
    work.start(job(1, ["refine@64"]), 0);
    expect(shape(work.assign(0))).toEqual(["refine 1: 1.0"]);
    // Two that wait for each other.
    const both = scheduler(costs({ ...paying, "refine@32": [10, 12] }), { maxWaitMs: 1e9 });
    both.start(job(1, ["refine@64 refine@32"]), 0);
    both.start(job(2, ["refine@32 refine@64"]), 0);
    expect(drain(both).length).toBeGreaterThan(0);
    expect(both.assign(0)).toBeNull();
  });
});

describe("order", () => {
  it("is by level, then due moment, then arrival", () => {
    const work = scheduler(costs({}));
    const alone = (id: number, extra: Parameters<typeof job>[2]) => work.start(job(id, [`predict@${id}`], extra), 0);
    alone(1, { due: 900 });
    alone(2, {});
    alone(3, { due: 500 });
    alone(4, { level: 1, due: 9000 });
    alone(5, { due: 500 });
    expect(drain(work).map(({ launches }) => launches[0]!.rows[0]!.job)).toEqual([4, 3, 5, 1, 2]);
  });

  it("lets no job wait for ever: one of low priority ends while others of higher priority keep coming", () => {
    const work = scheduler(costs({}));
    work.start(job(0, ["slow@1 slow@1 slow@1"], { level: -2 }), 0);
    let now = 0;
    for (let id = 1; id < 10_000; id++) {
      work.start(job(id, [`quick@${id}`], { level: 0, arrival: now, due: now + 10 }), now);
      const submission = work.assign(now)!;
      now += 100;
      if (work.finished(submission.id, now).includes(0)) break;
    }
    // Two priorities up, and its default due past.
    expect(now).toBeLessThan(10 * agingMilliseconds);
  });

  it("puts several short launches into one submission, long ones into submissions of their own", () => {
    const work = scheduler(costs({ "predict@64": [4], "decode@64": [30] }));
    work.start(job(1, ["predict@64 predict@64 predict@64 predict@64 decode@64 decode@64"]), 0);
    expect(drain(work).map(({ launches }) => launches.length)).toEqual([5, 1]);
  });

  it("assigns shorter submissions as soon as there is another job that they could delay", () => {
    const work = scheduler(costs({ "predict@64": [4], "predict@128": [4] }));
    work.start(job(1, [Array(12).fill("predict@64").join(" ")]), 0);
    work.start(job(2, ["predict@128 predict@128 predict@128 predict@128"]), 0);
    expect(drain(work).map(({ launches }) => launches.length)).toEqual([3, 3, 3, 3, 4]);
  });
});

describe("preemptible submissions", () => {
  const table = costs({ "predict@64": [4, 5], "predict@128": [4, 5] });
  const twelve = Array(12).fill("predict@64").join(" ");

  it("hold all of a lone job, where submissions can be preempted", () => {
    const work = scheduler(table, { preemption: true });
    work.start(job(1, [twelve]), 0);
    const submission = work.assign(0)!;
    expect([submission.launches.length, submission.preemptible]).toEqual([12, true]);
    expect([work.assign(0), work.toPreempt]).toEqual([null, null]);
    expect(work.finished(submission.id, 0)).toEqual([1]);
    // What is not measured may take long: launch by launch, until it is known.
    const unknown = scheduler(costs({}), { preemption: true });
    unknown.start(job(1, ["predict@64 predict@64"]), 0);
    expect(drain(unknown).map(({ launches, preemptible }) => [launches.length, preemptible])).toEqual(
      Array(2).fill([1, false]),
    );
    // Behind known ones it does not keep others waiting.
    const last = scheduler(table, { preemption: true });
    last.start(job(1, ["predict@64 predict@64 decode@64"]), 0);
    expect(drain(last).map(({ launches, preemptible }) => [launches.length, preemptible])).toEqual([[3, true]]);
  });

  it("are put together in one turn of the event loop, however many rows the job has", () => {
    const work = scheduler(table, { preemption: true, batches: [1, 2] });
    const rows = Array.from({ length: 1000 }, () => "predict@64 predict@64");
    work.start(job(1, rows), 0);
    const submissions = drain(work);
    // Each launch looks at all rows.
    for (const { launches, preemptible } of submissions) {
      expect(launches.length * rows.length).toBeLessThan(6000);
      expect(preemptible).toBe(true);
    }
    const assigned = submissions.flatMap(({ launches }) => launches.flatMap(({ rows }) => rows));
    expect(new Set(assigned.map(({ row, launch }) => `${row} ${launch}`)).size).toBe(2000);
    expect(assigned.length).toBe(2000);
  });

  it("delay a newcomer until they are preempted, and then share launches as any", () => {
    const work = scheduler(table, { preemption: true });
    work.start(job(1, [twelve]), 0);
    const lone = work.assign(0)!;
    work.start(job(2, [twelve]), 1);
    expect([work.toPreempt, work.assign(1)]).toEqual([lone.id, null]);
    work.finished(lone.id, 2, 5);
    expect([work.toPreempt, work.inFlight]).toEqual([null, 0]);
    const next = work.assign(2)!;
    expect(next.preemptible).toBe(false);
    expect(next.launches[0]!.rows.map(({ job, launch }) => [job, launch])).toEqual([[1, 5], [2, 0]]); // biome-ignore format: one line
    expect(work.finished(next.id, 2)).toEqual([]);
    const rows = drain(work).flatMap(({ launches }) => launches.flatMap(({ rows }) => rows));
    expect(rows.length + next.launches.length * 2).toBe(7 + 12);
    expect(work.assign(0)).toBeNull();
  });

  it("let the job of higher priority go first when they are preempted", () => {
    const work = scheduler(table, { preemption: true });
    work.start(job(1, [twelve]), 0);
    const lone = work.assign(0)!;
    work.start(job(2, ["predict@128"], { level: 1 }), 0);
    work.start(job(3, ["predict@128"], { level: -1 }), 0);
    work.finished(lone.id, 0, 0);
    const order = drain(work).flatMap(({ launches }) => launches.flatMap(({ rows }) => rows.map(({ job }) => job)));
    expect(order).toEqual([2, 3, ...Array(12).fill(1)]);
  });
});

describe("failures and aborts", () => {
  it("reject the only job of a submission, and restart several, each in submissions of its own", () => {
    const work = scheduler();
    work.start(job(1, ["predict@64 predict@64"]), 0);
    work.start(job(2, ["predict@64 predict@64"]), 0);
    const shared = work.assign(0)!;
    expect(shape(shared)).toEqual(["predict 2: 1.0 2.0"]);
    const next = work.assign(0)!;
    expect(work.failed(shared.id, { lost: false }, 0)).toEqual({ rejected: [], restarted: [1, 2] });
    // What was assigned after it, and reads its values, does not count.
    expect(work.finished(next.id, 0)).toEqual([]);
    const alone = work.assign(0)!;
    expect(shape(alone)).toEqual(["predict 1: 1.0"]);
    expect(work.failed(alone.id, { lost: false }, 0)).toEqual({ rejected: [1], restarted: [] });
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 2.0", "predict 1: 2.0"]);
    expect(work.assign(0)).toBeNull();
  });

  it("restart everything when the registers are gone, and reject only the job of the submission", () => {
    const work = scheduler(costs({ ...paying, "predict@128": [80] }));
    work.start(job(1, ["predict@64 predict@64"]), 0);
    work.start(job(2, ["predict@128 decode@64"]), 0);
    const first = work.assign(0)!;
    work.assign(0);
    expect(work.failed(first.id, { lost: true }, 0)).toEqual({ rejected: [1], restarted: [2] });
    expect(work.inFlight).toBe(0);
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 2.0", "decode 1: 2.0"]);
  });

  it("that are nobody's fault end a job when they come again and again, not when they come rarely", () => {
    const blameless = { lost: true, blameless: true };
    const work = scheduler(costs({}));
    work.start(job(1, ["predict@64 predict@64"]), 0);
    for (let death = 0; death < 20; death++) {
      // One launch runs, and before the other one the process is killed.
      expect(work.finished(work.assign(0)!.id, 0)).toEqual([]);
      expect(work.failed(work.assign(0)!.id, blameless, 0)).toEqual({ rejected: [], restarted: [1] });
    }
    for (let death = 0; death < 2; death++)
      expect(work.failed(work.assign(0)!.id, blameless, 0)).toEqual({ rejected: [], restarted: [1] });
    expect(work.failed(work.assign(0)!.id, blameless, 0).rejected).toEqual([1]);
  });

  it("that are nobody's fault count for every job that was there", () => {
    const blameless = { lost: true, blameless: true };
    const work = scheduler(costs(paying));
    work.start(job(1, ["predict@64"]), 0);
    for (let death = 0; death < 3; death++) work.failed(work.assign(0)!.id, blameless, 0);
    work.start(job(2, ["predict@64"]), 0);
    // Both are in it: the first has had enough, and from now on each is by itself.
    const shared = work.assign(0)!;
    expect(shape(shared)).toEqual(["predict 2: 1.0 2.0"]);
    expect(work.failed(shared.id, blameless, 0)).toEqual({ rejected: [], restarted: [1, 2] });
    expect(work.failed(work.assign(0)!.id, blameless, 0).rejected).toEqual([1]);
    for (let death = 0; death < 2; death++) expect(work.failed(work.assign(0)!.id, blameless, 0).rejected).toEqual([]);
    expect(work.failed(work.assign(0)!.id, blameless, 0).rejected).toEqual([2]);
  });

  it("leave a job's rows out of later submissions, and name the submissions that no job needs", () => {
    const work = scheduler();
    work.start(job(1, ["predict@64 predict@64 predict@64"]), 0);
    const own = work.assign(0)!;
    work.start(job(2, ["predict@64 predict@64"]), 0);
    const shared = work.assign(0)!;
    expect(shape(shared)).toEqual(["predict 2: 1.0 2.0"]);
    // The shared submission reads what the other one writes for job 1.
    expect(work.abort(1)).toEqual([]);
    expect(work.finished(own.id, 0)).toEqual([]);
    expect(work.finished(shared.id, 0)).toEqual([]);
    work.start(job(3, ["predict@128 predict@128 predict@128"], { level: 1 }), 0);
    const submissions = [work.assign(0)!, work.assign(0)!];
    expect(work.abort(3)).toEqual(submissions.map(({ id }) => id));
    expect(work.abort(3)).toEqual([]);
    for (const { id } of submissions)
      expect(work.failed(id, { lost: false }, 0)).toEqual({ rejected: [], restarted: [] });
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 2.0"]);
  });

  it("are refused for what is not there", () => {
    const work = scheduler();
    work.start(job(1, ["predict@64"]), 0);
    expect(() => work.start(job(1, ["predict@64"]), 0)).toThrow(RangeError);
    expect(() => work.start({ ...job(2, ["x"]), rows: [[]] }, 0)).toThrow(RangeError);
    expect(() => work.start({ ...job(2, ["x"]), rows: [] }, 0)).toThrow(RangeError);
    expect(() => work.finished(7, 0)).toThrow(RangeError);
    expect(() => work.failed(7, { lost: false }, 0)).toThrow(RangeError);
  });
});

// ── Any sequence of events ───────────────────────────────────────────────────────────────────────────────────────────

const graphs = ["predict", "refine", "decode"] as const;
const arbitraryLaunch = fc
  .tuple(fc.constantFrom(...graphs), fc.constantFrom("64", "128"), fc.constantFrom(1, 3, Number.POSITIVE_INFINITY))
  .map(([graph, size, maxRows]) =>
    launch(`${graph}@${size}`, {
      maxRows: graph === "decode" ? maxRows : Number.POSITIVE_INFINITY,
      key: `${graph}@${size}${graph === "decode" ? `/${maxRows}` : ""}`,
    }),
  );
const arbitraryJob = fc.record({
  rows: fc.array(fc.array(arbitraryLaunch, { minLength: 1, maxLength: 6 }), { minLength: 1, maxLength: 5 }),
  level: fc.integer({ min: -2, max: 2 }),
  due: fc.option(fc.integer({ min: 0, max: 500 })),
  pin: fc.constantFrom(null, null, null, 2, 4),
});
const event = fc.oneof(
  { weight: 4, arbitrary: fc.record({ type: fc.constant("start" as const), job: arbitraryJob }) },
  { weight: 6, arbitrary: fc.record({ type: fc.constant("assign" as const) }) },
  { weight: 6, arbitrary: fc.record({ type: fc.constant("finish" as const) }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constant("preempt" as const), made: fc.nat(20) }) },
  {
    weight: 1,
    arbitrary: fc.record({ type: fc.constant("fail" as const), lost: fc.boolean(), blameless: fc.boolean() }),
  },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("abort" as const), which: fc.nat(20) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("wait" as const), milliseconds: fc.nat(30_000) }) },
);
const arbitraryTable = fc
  .array(fc.tuple(fc.constantFrom(...graphs), fc.constantFrom("64", "128"), fc.constantFrom(1, 2, 4, 8), fc.double({ min: 0.1, max: 300, noNaN: true })), { maxLength: 16, size: "max" }) // biome-ignore format: one line
  .map((entries) => new CostTable(entries.map(([graph, size, batch, milliseconds]) => entryOf(graph, batch, size, [milliseconds])))); // biome-ignore format: one line

describe("whatever happens", () => {
  it("no row is lost, doubled or mixed up, and every job has one answer", { timeout: 300_000 }, () => {
    fc.assert(
      fc.property(
        fc.array(event, { maxLength: 120, size: "max" }),
        arbitraryTable,
        fc.constantFrom(0, 20, 1000),
        fc.constantFrom([1], [1, 2], [1, 2, 4, 8], [2, 8], [3]),
        fc.boolean(),
        (events, table, maxWaitMs, batches, preemption) => {
          const work = scheduler(table, { maxWaitMs, batches, preemption });
          const jobs = new Map<number, ScheduledJob>();
          /** How each job ended. */
          const over = new Map<number, "done" | "rejected" | "aborted">();
          const attempts = new Map<number, number>();
          /** Launches that each row of the present attempt has had assigned, and run. */
          const assigned = new Map<string, number>();
          const ran = new Map<string, number>();
          const isolated = new Set<number>();
          /** Launches that have written their values, and submissions that were dropped. */
          const written = new Set<string>();
          const dropped = new Set<number>();
          const inFlight: Submission[] = [];
          let now = 0;
          const end = (id: number, how: "done" | "rejected" | "aborted") => {
            expect(over.has(id)).toBe(false);
            over.set(id, how);
          };
          const rowKey = (id: number, row: number) => `${id}.${row}.${attempts.get(id)}`;

          const assign = () => {
            const isBlocked = inFlight.some(({ preemptible }) => preemptible);
            const submission = work.assign(now);
            if (!submission) return false;
            expect(isBlocked).toBe(false);
            inFlight.push(submission);
            if (submission.preemptible) expect(preemption && new Set(submission.launches.flatMap(({ rows }) => rows.map(({ job }) => job))).size === 1).toBe(true); // biome-ignore format: one line
            const members = new Set<number>();
            for (const { graph, size, batch, rows } of submission.launches) {
              expect(rows.length).toBeGreaterThan(0);
              expect(rows.length).toBeLessThanOrEqual(batch);
              expect(new Set(rows.map(({ job, row }) => `${job}.${row}`)).size).toBe(rows.length);
              const keys = new Set<string>();
              for (const { job, attempt, row, launch: index, last } of rows) {
                members.add(job);
                // No job that is over runs on; every row makes its launches in order, none twice, none left out.
                expect(over.has(job)).toBe(false);
                expect(attempt).toBe(attempts.get(job));
                const key = rowKey(job, row);
                expect(index).toBe(assigned.get(key) ?? 0);
                assigned.set(key, index + 1);
                const { rows: all, pin } = jobs.get(job)!;
                const spec = all[row]![index]!;
                expect([spec.graph, spec.size]).toEqual([graph, size]);
                expect(last).toBe(index === all[row]!.length - 1);
                keys.add(`${spec.key} ${pin}`);
                expect(batch).toBeLessThanOrEqual(spec.maxRows!);
                expect(launchBatches(batches, spec.maxRows, pin)).toContain(batch);
              }
              expect(keys.size).toBe(1);
            }
            if ([...members].some((id) => isolated.has(id))) expect(members.size).toBe(1);
            return true;
          };
          /** Submissions that cannot run: values that they read, also those of rows that are over, will not be there. */
          const unable = (): Set<Submission> => {
            const there = new Set(written);
            const cannot = new Set<Submission>();
            for (const submission of inFlight) {
              const here = new Set<string>();
              const reads = submission.launches.flatMap(({ rows }) =>
                rows.flatMap(({ job, attempt, row, launch: index }) => {
                  const key = `${job}.${row}.${attempt}`;
                  const known = index === 0 || here.has(`${key}.${index - 1}`);
                  here.add(`${key}.${index}`);
                  return known ? [] : [`${key}.${index - 1}`];
                }),
              );
              if (dropped.has(submission.id) || !reads.every((value) => there.has(value))) cannot.add(submission);
              else for (const value of here) there.add(value);
            }
            return cannot;
          };
          const wantedIn = ({ launches }: Submission) =>
            launches.flatMap(({ rows }) =>
              rows.filter(({ job, attempt }) => !over.has(job) && attempt === attempts.get(job)).map(({ job }) => job),
            );
          /** Failures in a row that were nobody's fault, by job. */
          const excused = new Map<number, number>();
          const finish = () => {
            if (inFlight[0] && unable().has(inFlight[0])) {
              fail(false);
              return;
            }
            const submission = inFlight.shift();
            if (!submission) return;
            for (const { rows } of submission.launches)
              for (const { job, attempt, row, launch: index } of rows) written.add(`${job}.${row}.${attempt}.${index}`);
            for (const { rows } of submission.launches)
              for (const { job, attempt, row } of rows)
                if (!over.has(job) && attempt === attempts.get(job)) {
                  ran.set(rowKey(job, row), (ran.get(rowKey(job, row)) ?? 0) + 1);
                  excused.set(job, 0);
                }
            for (const id of work.finished(submission.id, now)) {
              for (const [row, all] of jobs.get(id)!.rows.entries()) expect(ran.get(rowKey(id, row))).toBe(all.length);
              end(id, "done");
            }
          };
          /** A submission is preempted before one of its launches. */
          const preempt = (made: number) => {
            const [submission] = inFlight;
            if (!submission?.preemptible || unable().has(submission)) return;
            inFlight.shift();
            made %= submission.launches.length;
            for (const [at, { rows }] of submission.launches.entries())
              for (const { job, attempt, row, launch: index } of rows) {
                if (at < made) written.add(`${job}.${row}.${attempt}.${index}`);
                if (over.has(job) || attempt !== attempts.get(job)) continue;
                const key = rowKey(job, row);
                if (at < made) {
                  ran.set(key, (ran.get(key) ?? 0) + 1);
                  excused.set(job, 0);
                } else assigned.set(key, Math.min(assigned.get(key)!, index));
              }
            expect(work.finished(submission.id, now, made)).toEqual([]);
          };
          const fail = (lost: boolean, blameless = false) => {
            const submission = inFlight.shift();
            if (!submission) return;
            const wanted = new Set(wantedIn(submission));
            const affected = new Set([...unable()].flatMap(wantedIn));
            const { rejected, restarted } = work.failed(submission.id, { lost, blameless }, now);
            // Only a job that was alone in a submission is rejected. Jobs of submissions that could not run have started again.
            // Where nobody is at fault not even that one is, as long as that does not happen again and again.
            if (rejected.length > 0) expect(rejected).toEqual([...wanted]);
            const times = blameless ? Math.max(...[...wanted].map((id) => excused.get(id) ?? 0), 0) : 3;
            if (times < 3) expect(rejected).toEqual([]);
            else if (!blameless || (excused.get([...wanted][0]!) ?? 0) >= 3)
              expect(rejected).toEqual(wanted.size === 1 ? [...wanted] : []);
            if (blameless) for (const id of wanted) excused.set(id, (excused.get(id) ?? 0) + 1);
            for (const id of rejected) end(id, "rejected");
            const expected = lost ? [...jobs.keys()] : [...new Set([...wanted, ...affected])];
            expect([...restarted].sort()).toEqual(expected.filter((id) => !over.has(id)).sort());
            if (wanted.size > 1 && times >= 3) for (const id of wanted) isolated.add(id);
            for (const id of restarted) attempts.set(id, attempts.get(id)! + 1);
            if (lost) inFlight.length = 0;
          };

          for (const step of events) {
            now++;
            if (step.type === "start") {
              const id = jobs.size;
              const { rows, level, due, pin } = step.job;
              const priority = {
                level,
                due: due === null ? null : now + due,
                arrival: now,
                sequence: id,
              };
              jobs.set(id, { id, priority, rows, pin });
              attempts.set(id, 0);
              work.start(jobs.get(id)!, now);
            } else if (step.type === "assign") assign();
            else if (step.type === "finish") finish();
            else if (step.type === "preempt") preempt(step.made);
            else if (step.type === "fail") fail(step.lost, step.blameless);
            else if (step.type === "wait") now += step.milliseconds;
            else if (jobs.has(step.which) && !over.has(step.which)) {
              for (const submission of work.abort(step.which)) dropped.add(submission);
              end(step.which, "aborted");
            }
          }
          // With the disturbances over, everything ends within as many submissions as there are launches, beside those in flight.
          let left = [...jobs.values()].reduce((sum, { rows }) => sum + rows.flat().length, 0) + inFlight.length + 1;
          while (over.size < jobs.size) {
            expect(left--).toBeGreaterThan(0);
            assign();
            finish();
          }
          while (inFlight.length > 0) finish();
          expect(work.assign(now)).toBeNull();
          expect(work.inFlight).toBe(0);
        },
      ),
      { numRuns: 400 },
    );
  });
});
