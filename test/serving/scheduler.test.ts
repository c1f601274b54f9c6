// The scheduler under any sequence of arrivals, aborts and failures: no row lost, doubled or mixed up.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { CostTable, entryOf } from "../../lib/serving/costs.js";
import { agingMilliseconds } from "../../lib/serving/priority.js";
import { type RowLaunch, Scheduler, type Submission, type Ticket } from "../../lib/serving/scheduler.js";
import { cheapestSplit } from "../../lib/serving/split.js";

const launch = (key: string, extra: Partial<RowLaunch> = {}): RowLaunch => {
  const [graph, size] = key.split("@") as [string, string];
  return { key, graph, size: size ?? "", maxRows: Number.POSITIVE_INFINITY, deferrable: graph === "refine", ...extra };
};
const launches = (keys: string) => keys.split(" ").map((key) => launch(key));

let sequence = 0;
const ticket = (
  id: number,
  rows: readonly string[],
  extra: Partial<Ticket> & { priority?: number; deadline?: number | null; arrival?: number } = {},
): Ticket => ({
  id,
  claim: {
    priority: extra.priority ?? 0,
    deadline: extra.deadline ?? null,
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
  extra: { maxBatch?: number; maxWait?: number; batches?: number[]; cuts?: boolean } = {},
) =>
  new Scheduler({
    batches: extra.batches ?? [1, 2, 4, 8],
    maxBatch: extra.maxBatch ?? 8,
    maxWait: extra.maxWait ?? 20,
    cuts: extra.cuts ?? false,
    cost: (graph, size, batch) => table.estimate(graph, size, batch),
    relativeCost: (graph, size, batch) => table.relative(graph, size, batch),
  });
const shape = (piece: Submission | null) =>
  piece?.launches.map(
    ({ graph, batch, rows }) => `${graph} ${batch}: ${rows.map(({ request, row }) => `${request}.${row}`).join(" ")}`,
  );
/** Plans and finishes pieces, one at a time, until nothing is left. */
const drain = (work: Scheduler, now = 0) => {
  const pieces: Submission[] = [];
  for (let piece = work.plan(now); piece; piece = work.plan(now)) {
    pieces.push(piece);
    work.finished(piece.id);
  }
  return pieces;
};

describe("rows", () => {
  it("share launches wherever they are in their schedules, if the cost table says that it pays", () => {
    const work = scheduler();
    work.start(ticket(1, ["predict@64 predict@64 predict@64 predict@64 decode@64"]), 0);
    expect(shape(work.plan(0))).toEqual(["predict 1: 1.0", "predict 1: 1.0"]);
    work.start(ticket(2, ["predict@64 predict@64 decode@64"]), 0);
    expect(shape(work.plan(0))).toEqual(["predict 2: 1.0 2.0"]);
    expect(shape(work.plan(0))).toEqual(["predict 2: 1.0 2.0"]);
    // Two decoded together cost as much as one after the other: the more urgent one has its picture first.
    expect(shape(work.plan(0))).toEqual(["decode 1: 1.0"]);
    expect(shape(work.plan(0))).toEqual(["decode 1: 2.0"]);
    expect(work.plan(0)).toBeNull();
  });

  it("do not share launches that do not pay, except eager ones, which a little loss does not keep apart", () => {
    const table = costs({ "predict@64": [20, 41], "refine@64": [20, 41] });
    const work = scheduler(table, { maxWait: 0 });
    work.start(ticket(1, ["predict@64 refine@64"]), 0);
    work.start(ticket(2, ["predict@64 refine@64"]), 0);
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 1.0", "refine 1: 1.0", "predict 1: 2.0", "refine 1: 2.0"]);
    const held = scheduler(table, { maxWait: 50 });
    held.start(ticket(1, ["predict@64 refine@64"]), 0);
    held.start(ticket(2, ["predict@64 refine@64"]), 0);
    expect(drain(held).flatMap(shape)).toEqual(["predict 1: 1.0", "predict 1: 2.0", "refine 2: 1.0 2.0"]);
  });

  it("with different keys, or pinned differently, never share", () => {
    const work = scheduler();
    work.start(ticket(1, ["predict@64"]), 0);
    work.start(ticket(2, ["predict@128"]), 0);
    work.start(ticket(3, ["predict@64"], { pin: 4 }), 0);
    work.start(ticket(4, ["predict@64"], { pin: 4 }), 0);
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
    work.start({ ...ticket(1, ["x"], { pin: 4 }), rows }, 0);
    expect(drain(work).flatMap(shape)).toEqual(["predict 4: 1.0 1.1 1.2", "decode 2: 1.0 1.1", "decode 2: 1.2"]);
  });

  it("of one request are split over the batches by cost, each launch its own way", () => {
    const table = costs({ "predict@64": [10, 20, 40, 45], "decode@64": [10, 19, 39, 90] });
    const work = scheduler(table);
    work.start(ticket(1, new Array(5).fill("predict@64 decode@64")), 0);
    // Padding 5 rows to 8 is cheaper than 4 + 1; decoding goes by twos.
    expect(drain(work).flatMap(shape)).toEqual([
      "predict 8: 1.0 1.1 1.2 1.3 1.4",
      "decode 2: 1.0 1.1",
      "decode 2: 1.2 1.3",
      "decode 1: 1.4",
    ]);
  });

  it("of one request are split as costs least, for 1 to 32 rows, any table and any launch", () => {
    const batches = [1, 2, 4, 8];
    const time = fc.double({ min: 0.01, max: 1000, noNaN: true });
    fc.assert(
      fc.property(fc.tuple(time, time, time, time), fc.constantFrom("predict", "refine"), (times, graph) => {
        const table = costs({ [`${graph}@64`]: times });
        for (let rows = 1; rows <= 32; rows++) {
          const work = scheduler(table);
          work.start(ticket(1, new Array(rows).fill(`${graph}@64`)), 0);
          const launches = drain(work).flatMap((piece) => piece.launches);
          const cost = (batch: number) => table.estimate(graph, "64", batch)!;
          const spent = launches.reduce((sum, { batch }) => sum + cost(batch), 0);
          const least = cheapestSplit(rows, batches, cost).milliseconds;
          expect(spent / least).toBeCloseTo(1, 9);
        }
      }),
    );
  });

  it("of several requests are never padded where that is not cheaper, however eager they are", () => {
    const start = (table: CostTable) => {
      const work = scheduler(table, { maxWait: 0 });
      for (const id of [1, 2, 3]) work.start(ticket(id, ["refine@64"]), 0);
      return drain(work).flatMap((piece) => piece.launches.map(({ batch, rows }) => [rows.length, batch]));
    };
    // 2 and 1 take 20 ms, 4 take 21.
    expect(start(costs({ "refine@64": [10, 10, 21] }))).toEqual([[2, 2], [1, 1]]); // biome-ignore format: one line
    expect(start(costs({ "refine@64": [10, 10, 19] }))).toEqual([[3, 4]]);
    // A little more together than alone: worth it for company.
    expect(start(costs({ "refine@64": [10, 20.5, 60] }))).toEqual([[2, 2], [1, 1]]); // biome-ignore format: one line
  });

  it("are at most maxBatch in a launch", () => {
    const work = scheduler(costs(paying), { maxBatch: 3, batches: [1, 2, 3] });
    work.start(ticket(1, new Array(7).fill("predict@64")), 0);
    expect(drain(work).flatMap(({ launches }) => launches.map(({ batch }) => batch))).toEqual([3, 3, 1]);
  });
});

describe("holding for company", () => {
  it("holds an eager row while one that needs the same launch is near, no longer than maxWait", () => {
    const start = (maxWait: number) => {
      const work = scheduler(costs(paying), { maxWait });
      work.start(ticket(1, ["refine@64 decode@64"]), 0);
      work.start(ticket(2, ["predict@64 refine@64 decode@64"]), 0);
      return work;
    };
    expect(drain(start(19)).flatMap(shape)[0]).toBe("refine 1: 1.0");
    expect(drain(start(20)).flatMap(shape).slice(0, 2)).toEqual(["predict 1: 2.0", "refine 2: 1.0 2.0"]);
    const late = start(20);
    expect(shape(late.plan(1))).toEqual(["refine 1: 1.0"]);
  });

  it("never leaves the device without work", () => {
    const work = scheduler(costs(paying), { maxWait: 1e9 });
    work.start(ticket(1, ["refine@64"]), 0);
    expect(shape(work.plan(0))).toEqual(["refine 1: 1.0"]);
    // Two that wait for each other.
    const both = scheduler(costs({ ...paying, "refine@32": [10, 12] }), { maxWait: 1e9 });
    both.start(ticket(1, ["refine@64 refine@32"]), 0);
    both.start(ticket(2, ["refine@32 refine@64"]), 0);
    expect(drain(both).length).toBeGreaterThan(0);
    expect(both.requests).toBe(0);
  });
});

describe("order", () => {
  it("is by priority, then deadline, then arrival", () => {
    const work = scheduler(costs({}));
    const alone = (id: number, extra: Parameters<typeof ticket>[2]) =>
      work.start(ticket(id, [`predict@${id}`], extra), 0);
    alone(1, { deadline: 900 });
    alone(2, {});
    alone(3, { deadline: 500 });
    alone(4, { priority: 1, deadline: 9000 });
    alone(5, { deadline: 500 });
    expect(drain(work).map(({ launches }) => launches[0]!.rows[0]!.request)).toEqual([4, 3, 5, 1, 2]);
  });

  it("starves nobody: a request of low priority ends while urgent ones keep coming", () => {
    const work = scheduler(costs({}));
    work.start(ticket(0, ["slow@1 slow@1 slow@1"], { priority: -2 }), 0);
    let now = 0;
    for (let id = 1; work.requests > 0 && id < 10_000; id++) {
      work.start(ticket(id, [`quick@${id}`], { priority: 0, arrival: now, deadline: now + 10 }), now);
      const piece = work.plan(now)!;
      now += 100;
      if (work.finished(piece.id).includes(0)) break;
    }
    // Two priorities up, and its default deadline past.
    expect(now).toBeLessThan(10 * agingMilliseconds);
  });

  it("puts several short launches into one piece, long ones into pieces of their own", () => {
    const work = scheduler(costs({ "predict@64": [4], "decode@64": [30] }));
    work.start(ticket(1, ["predict@64 predict@64 predict@64 predict@64 decode@64 decode@64"]), 0);
    expect(drain(work).map(({ launches }) => launches.length)).toEqual([5, 1]);
  });

  it("plans shorter pieces as soon as there is somebody who could be held up", () => {
    const work = scheduler(costs({ "predict@64": [4], "predict@128": [4] }));
    work.start(ticket(1, [Array(12).fill("predict@64").join(" ")]), 0);
    work.start(ticket(2, ["predict@128 predict@128 predict@128 predict@128"]), 0);
    expect(drain(work).map(({ launches }) => launches.length)).toEqual([3, 3, 3, 3, 4]);
  });
});

describe("whole pieces", () => {
  const table = costs({ "predict@64": [4, 5], "predict@128": [4, 5] });
  const twelve = Array(12).fill("predict@64").join(" ");

  it("hold all of a lone request, where pieces can be cut short", () => {
    const work = scheduler(table, { cuts: true });
    work.start(ticket(1, [twelve]), 0);
    const piece = work.plan(0)!;
    expect([piece.launches.length, piece.whole]).toEqual([12, true]);
    expect([work.plan(0), work.inTheWay]).toEqual([null, null]);
    expect(work.finished(piece.id)).toEqual([1]);
    // What is not measured may take long: launch by launch, until it is known.
    const unknown = scheduler(costs({}), { cuts: true });
    unknown.start(ticket(1, ["predict@64 predict@64"]), 0);
    expect(drain(unknown).map(({ launches, whole }) => [launches.length, whole])).toEqual(Array(2).fill([1, false]));
  });

  it("are in the way of a newcomer until they are cut, and then shared as any", () => {
    const work = scheduler(table, { cuts: true });
    work.start(ticket(1, [twelve]), 0);
    const whole = work.plan(0)!;
    work.start(ticket(2, [twelve]), 1);
    expect([work.inTheWay, work.plan(1)]).toEqual([whole.id, null]);
    work.cut(whole.id, 5, 2);
    expect([work.inTheWay, work.inFlight]).toEqual([null, 0]);
    const next = work.plan(2)!;
    expect(next.whole).toBe(false);
    expect(next.launches[0]!.rows.map(({ request, launch }) => [request, launch])).toEqual([[1, 5], [2, 0]]); // biome-ignore format: one line
    expect(work.finished(next.id)).toEqual([]);
    const rows = drain(work).flatMap(({ launches }) => launches.flatMap(({ rows }) => rows));
    expect(rows.length + next.launches.length * 2).toBe(7 + 12);
    expect(work.requests).toBe(0);
  });

  it("that are cut let the more urgent go first", () => {
    const work = scheduler(table, { cuts: true });
    work.start(ticket(1, [twelve]), 0);
    const whole = work.plan(0)!;
    work.start(ticket(2, ["predict@128"], { priority: 1 }), 0);
    work.start(ticket(3, ["predict@128"], { priority: -1 }), 0);
    work.cut(whole.id, 0, 0);
    const order = drain(work).flatMap(({ launches }) =>
      launches.flatMap(({ rows }) => rows.map(({ request }) => request)),
    );
    expect(order).toEqual([2, 3, ...Array(12).fill(1)]);
  });
});

describe("failures and aborts", () => {
  it("reject the only request of a piece, and restart several, each in pieces of its own", () => {
    const work = scheduler();
    work.start(ticket(1, ["predict@64 predict@64"]), 0);
    work.start(ticket(2, ["predict@64 predict@64"]), 0);
    const shared = work.plan(0)!;
    expect(shape(shared)).toEqual(["predict 2: 1.0 2.0"]);
    const next = work.plan(0)!;
    expect(work.failed(shared.id, false, 0)).toEqual({ rejected: [], restarted: [1, 2] });
    // What was planned on top of it counts for nothing.
    expect(work.finished(next.id)).toEqual([]);
    const alone = work.plan(0)!;
    expect(shape(alone)).toEqual(["predict 1: 1.0"]);
    expect(work.failed(alone.id, false, 0)).toEqual({ rejected: [1], restarted: [] });
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 2.0", "predict 1: 2.0"]);
    expect(work.requests).toBe(0);
  });

  it("restart everything when the registers are gone, and blame only those of the piece", () => {
    const work = scheduler(costs({ ...paying, "predict@128": [80] }));
    work.start(ticket(1, ["predict@64 predict@64"]), 0);
    work.start(ticket(2, ["predict@128 decode@64"]), 0);
    const first = work.plan(0)!;
    work.plan(0);
    expect(work.failed(first.id, true, 0)).toEqual({ rejected: [1], restarted: [2] });
    expect(work.inFlight).toBe(0);
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 2.0", "decode 1: 2.0"]);
  });

  it("take a request's rows out of what comes, and name the pieces that run for nobody", () => {
    const work = scheduler();
    work.start(ticket(1, ["predict@64 predict@64 predict@64"]), 0);
    const own = work.plan(0)!;
    work.start(ticket(2, ["predict@64 predict@64"]), 0);
    const shared = work.plan(0)!;
    expect(shape(shared)).toEqual(["predict 2: 1.0 2.0"]);
    // The shared piece reads what the other one writes for request 1.
    expect(work.abort(1)).toEqual([]);
    expect(work.finished(own.id)).toEqual([]);
    expect(work.finished(shared.id)).toEqual([]);
    work.start(ticket(3, ["predict@128 predict@128 predict@128"], { priority: 1 }), 0);
    const pieces = [work.plan(0)!, work.plan(0)!];
    expect(work.abort(3)).toEqual(pieces.map(({ id }) => id));
    expect(work.abort(3)).toEqual([]);
    for (const { id } of pieces) expect(work.failed(id, false, 0)).toEqual({ rejected: [], restarted: [] });
    expect(drain(work).flatMap(shape)).toEqual(["predict 1: 2.0"]);
  });

  it("are refused for what is not there", () => {
    const work = scheduler();
    work.start(ticket(1, ["predict@64"]), 0);
    expect(() => work.start(ticket(1, ["predict@64"]), 0)).toThrow(RangeError);
    expect(() => work.start({ ...ticket(2, ["x"]), rows: [[]] }, 0)).toThrow(RangeError);
    expect(() => work.start({ ...ticket(2, ["x"]), rows: [] }, 0)).toThrow(RangeError);
    expect(() => work.finished(7)).toThrow(RangeError);
    expect(() => work.failed(7, false, 0)).toThrow(RangeError);
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
const arbitraryRequest = fc.record({
  rows: fc.array(fc.array(arbitraryLaunch, { minLength: 1, maxLength: 6 }), { minLength: 1, maxLength: 5 }),
  priority: fc.integer({ min: -2, max: 2 }),
  deadline: fc.option(fc.integer({ min: 0, max: 500 })),
  pin: fc.constantFrom(null, null, null, 2, 4),
});
const event = fc.oneof(
  { weight: 4, arbitrary: fc.record({ type: fc.constant("start" as const), request: arbitraryRequest }) },
  { weight: 6, arbitrary: fc.record({ type: fc.constant("plan" as const) }) },
  { weight: 6, arbitrary: fc.record({ type: fc.constant("finish" as const) }) },
  { weight: 3, arbitrary: fc.record({ type: fc.constant("cut" as const), made: fc.nat(20) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("fail" as const), lost: fc.boolean() }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("abort" as const), which: fc.nat(20) }) },
  { weight: 1, arbitrary: fc.record({ type: fc.constant("wait" as const), milliseconds: fc.nat(30_000) }) },
);
const arbitraryTable = fc
  .array(fc.tuple(fc.constantFrom(...graphs), fc.constantFrom("64", "128"), fc.constantFrom(1, 2, 4, 8), fc.double({ min: 0.1, max: 300, noNaN: true })), { maxLength: 16, size: "max" }) // biome-ignore format: one line
  .map((entries) => new CostTable(entries.map(([graph, size, batch, milliseconds]) => entryOf(graph, batch, size, [milliseconds])))); // biome-ignore format: one line

describe("whatever happens", () => {
  it("no row is lost, doubled or mixed up, and everybody has one answer", { timeout: 300_000 }, () => {
    fc.assert(
      fc.property(
        fc.array(event, { maxLength: 120, size: "max" }),
        arbitraryTable,
        fc.constantFrom(0, 20, 1000),
        fc.constantFrom(1, 3, 8),
        fc.boolean(),
        (events, table, maxWait, maxBatch, cuts) => {
          const batches = [1, 2, 4, 8].filter((batch) => batch <= maxBatch);
          const work = scheduler(table, { maxWait, maxBatch, batches, cuts });
          const tickets = new Map<number, Ticket>();
          /** How each request ended. */
          const over = new Map<number, "done" | "rejected" | "aborted">();
          const attempts = new Map<number, number>();
          /** Launches that each row of the present attempt has had planned, and run. */
          const planned = new Map<string, number>();
          const ran = new Map<string, number>();
          const isolated = new Set<number>();
          /** Launches that have written their values, and pieces that were dropped. */
          const written = new Set<string>();
          const dropped = new Set<number>();
          const inFlight: Submission[] = [];
          let now = 0;
          const end = (id: number, how: "done" | "rejected" | "aborted") => {
            expect(over.has(id)).toBe(false);
            over.set(id, how);
          };
          const rowKey = (id: number, row: number) => `${id}.${row}.${attempts.get(id)}`;

          const plan = () => {
            const isBlocked = inFlight.some(({ whole }) => whole);
            const piece = work.plan(now);
            if (!piece) return false;
            expect(isBlocked).toBe(false);
            inFlight.push(piece);
            if (piece.whole) expect(cuts && new Set(piece.launches.flatMap(({ rows }) => rows.map(({ request }) => request))).size === 1).toBe(true); // biome-ignore format: one line
            const members = new Set<number>();
            for (const { graph, size, batch, rows } of piece.launches) {
              expect(rows.length).toBeGreaterThan(0);
              expect(rows.length).toBeLessThanOrEqual(batch);
              expect(new Set(rows.map(({ request, row }) => `${request}.${row}`)).size).toBe(rows.length);
              const keys = new Set<string>();
              for (const { request, attempt, row, launch: index, last } of rows) {
                members.add(request);
                // Nobody who is over runs on; every row makes its launches in order, none twice, none left out.
                expect(over.has(request)).toBe(false);
                expect(attempt).toBe(attempts.get(request));
                const key = rowKey(request, row);
                expect(index).toBe(planned.get(key) ?? 0);
                planned.set(key, index + 1);
                const { rows: all, pin } = tickets.get(request)!;
                const spec = all[row]![index]!;
                expect([spec.graph, spec.size]).toEqual([graph, size]);
                expect(last).toBe(index === all[row]!.length - 1);
                keys.add(`${spec.key} ${pin}`);
                expect(batch).toBeLessThanOrEqual(spec.maxRows);
                if (pin === null) expect(batches).toContain(batch);
                else expect(batch).toBe(Math.min(pin, spec.maxRows));
              }
              expect(keys.size).toBe(1);
            }
            if ([...members].some((id) => isolated.has(id))) expect(members.size).toBe(1);
            return true;
          };
          /** Pieces that the runtime cannot run: values that they read, be it of rows that are over, will not be there. */
          const doomed = (): Set<Submission> => {
            const there = new Set(written);
            const cannot = new Set<Submission>();
            for (const piece of inFlight) {
              const here = new Set<string>();
              const reads = piece.launches.flatMap(({ rows }) =>
                rows.flatMap(({ request, attempt, row, launch: index }) => {
                  const key = `${request}.${row}.${attempt}`;
                  const known = index === 0 || here.has(`${key}.${index - 1}`);
                  here.add(`${key}.${index}`);
                  return known ? [] : [`${key}.${index - 1}`];
                }),
              );
              if (dropped.has(piece.id) || !reads.every((value) => there.has(value))) cannot.add(piece);
              else for (const value of here) there.add(value);
            }
            return cannot;
          };
          const wantedIn = ({ launches }: Submission) =>
            launches.flatMap(({ rows }) =>
              rows
                .filter(({ request, attempt }) => !over.has(request) && attempt === attempts.get(request))
                .map(({ request }) => request),
            );
          const finish = () => {
            if (inFlight[0] && doomed().has(inFlight[0])) {
              fail(false);
              return;
            }
            const piece = inFlight.shift();
            if (!piece) return;
            for (const { rows } of piece.launches)
              for (const { request, attempt, row, launch: index } of rows)
                written.add(`${request}.${row}.${attempt}.${index}`);
            for (const { rows } of piece.launches)
              for (const { request, attempt, row } of rows)
                if (!over.has(request) && attempt === attempts.get(request))
                  ran.set(rowKey(request, row), (ran.get(rowKey(request, row)) ?? 0) + 1);
            for (const id of work.finished(piece.id)) {
              for (const [row, all] of tickets.get(id)!.rows.entries())
                expect(ran.get(rowKey(id, row))).toBe(all.length);
              end(id, "done");
            }
          };
          /** As far as the runtime gets to: a piece is cut before one of its launches. */
          const cut = (made: number) => {
            const [piece] = inFlight;
            if (!piece?.whole || doomed().has(piece)) return;
            inFlight.shift();
            made %= piece.launches.length;
            for (const [at, { rows }] of piece.launches.entries())
              for (const { request, attempt, row, launch: index } of rows) {
                if (at < made) written.add(`${request}.${row}.${attempt}.${index}`);
                if (over.has(request) || attempt !== attempts.get(request)) continue;
                const key = rowKey(request, row);
                if (at < made) ran.set(key, (ran.get(key) ?? 0) + 1);
                else planned.set(key, Math.min(planned.get(key)!, index));
              }
            work.cut(piece.id, made, now);
          };
          const fail = (lost: boolean) => {
            const piece = inFlight.shift();
            if (!piece) return;
            const wanted = new Set(wantedIn(piece));
            const spoilt = new Set([...doomed()].flatMap(wantedIn));
            const { rejected, restarted } = work.failed(piece.id, lost, now);
            // Only a request that was alone in a piece is blamed. Those of pieces that could not run are not in them any more.
            expect(rejected).toEqual(wanted.size === 1 ? [...wanted] : []);
            for (const id of rejected) end(id, "rejected");
            const expected = lost ? [...tickets.keys()] : [...new Set([...wanted, ...spoilt])];
            expect([...restarted].sort()).toEqual(expected.filter((id) => !over.has(id)).sort());
            if (wanted.size > 1) for (const id of wanted) isolated.add(id);
            for (const id of restarted) attempts.set(id, attempts.get(id)! + 1);
            if (lost) inFlight.length = 0;
          };

          for (const step of events) {
            now++;
            if (step.type === "start") {
              const id = tickets.size;
              const { rows, priority, deadline, pin } = step.request;
              const claim = {
                priority,
                deadline: deadline === null ? null : now + deadline,
                arrival: now,
                sequence: id,
              };
              tickets.set(id, { id, claim, rows, pin });
              attempts.set(id, 0);
              work.start(tickets.get(id)!, now);
            } else if (step.type === "plan") plan();
            else if (step.type === "finish") finish();
            else if (step.type === "cut") cut(step.made);
            else if (step.type === "fail") fail(step.lost);
            else if (step.type === "wait") now += step.milliseconds;
            else if (tickets.has(step.which) && !over.has(step.which)) {
              for (const piece of work.abort(step.which)) dropped.add(piece);
              end(step.which, "aborted");
            }
          }
          // With the disturbances over, everything ends within as many pieces as there are launches, beside those in flight.
          let left = [...tickets.values()].reduce((sum, { rows }) => sum + rows.flat().length, 0) + inFlight.length + 1;
          while (over.size < tickets.size) {
            expect(left--).toBeGreaterThan(0);
            plan();
            finish();
          }
          while (inFlight.length > 0) finish();
          expect(work.plan(now)).toBeNull();
          expect([work.requests, work.rows, work.inFlight]).toEqual([0, 0, 0]);
        },
      ),
      { numRuns: 400 },
    );
  });
});
