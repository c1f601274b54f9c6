// Several devices, one scheduler: on a clock of the test's own, with devices of different speeds.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { CostTable, entryOf } from "../../lib/serving/costs.js";
import type { RowLaunch } from "../../lib/serving/rows.js";
import { type ScheduledJob, Scheduler, type Submission } from "../../lib/serving/scheduler.js";

/** Milliseconds of a launch with one row on a device of speed 1; more rows cost a little less than in proportion. */
const graphs: Record<string, number> = { text: 5, predict: 10, decode: 20 };
const costOn = (speed: number, graph: string, batch: number) => (graphs[graph]! * (0.25 + 0.75 * batch)) / speed;
const tableOf = (speed: number, names = Object.keys(graphs)) =>
  new CostTable(
    names.flatMap((graph) => [1, 2, 4, 8].map((batch) => entryOf(graph, batch, "64", [costOn(speed, graph, batch)]))),
  );
const launch = (graph: string): RowLaunch => ({ key: `${graph}@64`, graph, size: "64" });
let sequence = 0;
const job = (id: number, rows: readonly string[], extra: { level?: number; due?: number } = {}): ScheduledJob => ({
  id,
  priority: { level: extra.level ?? 0, due: extra.due ?? null, arrival: 0, sequence: sequence++ },
  rows: rows.map((keys) => keys.split(" ").map(launch)),
  pin: null,
});
const picture = `${"predict ".repeat(8)}decode`;
const pictures = (count: number) => Array.from({ length: count }, () => picture);
const scheduler = (speeds: readonly number[], preemption = false, known = speeds) =>
  new Scheduler({
    ...{ batches: [1, 2, 4, 8], maxWaitMs: 20, preemption },
    costs: speeds.map((speed) => (known.includes(speed) ? tableOf(speed) : new CostTable())),
  });

/** Devices that take what their speed says. */
class Clock {
  now = 0;
  /** By job and row: the devices of its launches in order. */
  readonly made = new Map<string, number[]>();
  /** When each job was over. */
  readonly over = new Map<number, number>();
  readonly #running: ({ submission: Submission; end: number } | null)[];

  constructor(
    readonly work: Scheduler,
    readonly speeds: readonly number[],
  ) {
    this.#running = speeds.map(() => null);
  }

  submit(): void {
    for (const [device, running] of this.#running.entries()) {
      if (running) continue;
      const submission = this.work.assign(this.now, device);
      if (!submission) continue;
      expect(submission.device).toBe(device);
      const milliseconds = submission.launches.reduce(
        (sum, { graph, batch }) => sum + costOn(this.speeds[device]!, graph, batch),
        0,
      );
      this.#running[device] = { submission, end: this.now + milliseconds };
    }
  }

  get running(): readonly { submission: Submission; end: number }[] {
    return this.#running.filter((each) => each !== null);
  }

  /** The next submission ends. @returns whether there was one */
  step(): boolean {
    const next = this.running.toSorted((a, b) => a.end - b.end)[0];
    if (!next) return false;
    const { submission, end } = next;
    this.now = end;
    this.#running[submission.device] = null;
    for (const { rows } of submission.launches)
      for (const { job, attempt, row } of rows) {
        const key = `${job}.${attempt}.${row}`;
        this.made.set(key, [...(this.made.get(key) ?? []), submission.device]);
      }
    for (const id of this.work.finished(submission.id, this.now)) this.over.set(id, this.now);
    return true;
  }

  run(): void {
    for (this.submit(); this.step(); this.submit());
  }

  drop(device: number): Submission | undefined {
    const running = this.#running[device];
    this.#running[device] = null;
    return running?.submission;
  }

  /** How many rows each device has. */
  get rows(): number[] {
    const places = [...this.made.values()].map(([device]) => device);
    return this.speeds.map((_, device) => places.filter((at) => at === device).length);
  }
}

describe("rows on several devices", () => {
  it.each([
    [[1], [8]],
    [
      [1, 1],
      [4, 4],
    ],
    [
      [1, 1, 1, 1],
      [2, 2, 2, 2],
    ],
  ])("of speeds %j are %j", (speeds, expected) => {
    const clock = new Clock(scheduler(speeds), speeds);
    clock.work.start(job(1, pictures(8)), 0);
    clock.run();
    expect(clock.rows).toEqual(expected);
    expect([...clock.over.keys()]).toEqual([1]);
  });

  it("are fewer where a device is slow, and none where it would only be later", () => {
    const speeds = [3, 1];
    const clock = new Clock(scheduler(speeds), speeds);
    clock.work.start(job(1, pictures(8)), 0);
    clock.run();
    expect(clock.rows).toEqual([6, 2]);
    const two = new Clock(scheduler(speeds), speeds);
    two.work.start(job(2, pictures(1)), 0);
    two.work.start(job(3, pictures(1)), 0);
    two.run();
    expect(two.rows).toEqual([2, 0]);
  });

  it("of several jobs are shared out together, the first job first", () => {
    const speeds = [1, 4];
    const clock = new Clock(scheduler(speeds), speeds);
    for (const id of [1, 2, 3, 4, 5]) clock.work.start(job(id, pictures(1)), 0);
    clock.run();
    expect(clock.rows).toEqual([1, 4]);
    expect(clock.over.size).toBe(5);
  });

  it("go where a device is idle while another is at work, whatever is bound to it", () => {
    const speeds = [1, 1];
    const clock = new Clock(scheduler(speeds), speeds);
    clock.work.start(job(1, pictures(1)), 0);
    clock.submit();
    clock.work.start(job(2, pictures(1)), 0);
    clock.run();
    expect(clock.made.get("1.0.0")![0]).toBe(0);
    expect(clock.made.get("2.0.0")![0]).toBe(1);
  });

  it("of a job of texts and of one of pictures may be on different devices", () => {
    const speeds = [1, 2];
    const clock = new Clock(scheduler(speeds), speeds);
    clock.work.start(job(1, pictures(4)), 0);
    clock.submit();
    clock.work.start(job(2, ["text"], { level: 1 }), 0);
    clock.run();
    expect(clock.over.get(2)!).toBeLessThan(clock.over.get(1)!);
  });

  it("of a new job preempt the lone job on every device, once each", () => {
    const speeds = [1, 1];
    const work = scheduler(speeds, true);
    work.start(job(1, pictures(4)), 0);
    const lone = [work.assign(0, 0)!, work.assign(0, 1)!];
    expect(lone.map(({ preemptible, device }) => [preemptible, device])).toEqual([
      [true, 0],
      [true, 1],
    ]);
    expect([work.toPreemptOn(0), work.toPreemptOn(1)]).toEqual([null, null]);
    work.start(job(2, ["text"]), 1);
    expect([work.toPreemptOn(0), work.toPreemptOn(1)]).toEqual(lone.map(({ id }) => id));
    expect(work.assign(1, 0)).toBeNull();
    // Nothing was made on the first: its rows may go elsewhere.
    work.finished(lone[0]!.id, 1, 0);
    expect(work.assign(2, 0)!.launches[0]!.graph).toBe("predict");
  });

  it("of one job are late on no device through launches that are shared", () => {
    // As on one device: due moments limit what is shared on each.
    const speeds = [1, 1];
    const clock = new Clock(scheduler(speeds), speeds);
    for (const id of [1, 2]) clock.work.start(job(id, pictures(1), { due: 120 }), 0);
    for (const id of [3, 4, 5, 6]) clock.work.start(job(id, pictures(1)), 0);
    clock.run();
    for (const id of [1, 2]) expect(clock.over.get(id)!).toBeLessThanOrEqual(120);
  });
});

describe("a device that is lost", () => {
  it("takes only its own jobs with it, which start again on the others", () => {
    const speeds = [1, 1];
    const clock = new Clock(scheduler(speeds), speeds);
    for (const id of [1, 2]) clock.work.start(job(id, pictures(1)), 0);
    clock.submit();
    const lost = clock.drop(1)!;
    expect(lost.launches[0]!.rows[0]!.job).toBe(2);
    expect(clock.work.failed(lost.id, { lost: true, permanent: true }, 0)).toEqual({ rejected: [], restarted: [2] });
    clock.run();
    expect([...clock.over.keys()].sort()).toEqual([1, 2]);
    expect(clock.made.get("1.0.0")).toEqual(Array(9).fill(0));
    expect(clock.made.get("2.1.0")).toEqual(Array(9).fill(0));
    expect(clock.work.assign(0, 1)).toBeNull();
  });

  it("ends a job that was alone in what it was lost by, the second time", () => {
    const speeds = [1, 1, 1];
    const work = scheduler(speeds);
    work.start(job(1, pictures(1)), 0);
    const lose = (device: number) => work.failed(work.assign(0, device)!.id, { lost: true, permanent: true }, 0);
    expect(lose(0)).toEqual({ rejected: [], restarted: [1] });
    expect(lose(1)).toEqual({ rejected: [1], restarted: [] });
  });

  it("is nobody's fault where it was lost before", () => {
    const speeds = [1, 1, 1];
    const work = scheduler(speeds);
    work.start(job(1, pictures(1)), 0);
    for (const device of [0, 1]) {
      const failure = { lost: true, permanent: true, blameless: true };
      expect(work.failed(work.assign(0, device)!.id, failure, 0)).toEqual({ rejected: [], restarted: [1] });
    }
    expect(work.assign(0, 2)).not.toBeNull();
  });

  it("while nothing is in flight there, starts those again that had begun there", () => {
    const speeds = [1, 1];
    const clock = new Clock(scheduler(speeds), speeds);
    for (const id of [1, 2, 3]) clock.work.start(job(id, pictures(1)), 0);
    clock.submit();
    while (clock.running.length > 0) clock.step();
    const on = (device: number) => [1, 2, 3].filter((id) => clock.made.get(`${id}.0.0`)?.[0] === device);
    expect(clock.work.gone(1, clock.now)).toEqual(on(1));
    clock.run();
    expect(clock.over.size).toBe(3);
    for (const id of on(1)) expect(clock.made.get(`${id}.1.0`)).toEqual(Array(9).fill(0));
  });

  it("with a process takes only the jobs that have rows there, and takes rows again", () => {
    const speeds = [1, 1];
    const clock = new Clock(scheduler(speeds), speeds);
    for (const id of [1, 2]) clock.work.start(job(id, pictures(1)), 0);
    clock.submit();
    const lost = clock.drop(0)!;
    const { job: owner } = lost.launches[0]!.rows[0]!;
    const restarted = clock.work.failed(lost.id, { lost: true, blameless: true }, 0);
    expect(restarted).toEqual({ rejected: [], restarted: [owner] });
    clock.run();
    expect(clock.over.size).toBe(2);
    expect(clock.rows[0]).toBeGreaterThan(0);
  });
});

it("no row is lost, doubled or moved, whatever comes, fails or is lost", () => {
  const step = fc.oneof(
    { weight: 4, arbitrary: fc.record({ type: fc.constant("start" as const), rows: fc.integer({ min: 1, max: 6 }), level: fc.nat(2) }) },
    { weight: 8, arbitrary: fc.record({ type: fc.constant("step" as const) }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant("abort" as const), which: fc.nat(20) }) },
    { weight: 1, arbitrary: fc.record({ type: fc.constant("lose" as const), device: fc.nat(3), permanent: fc.boolean() }) },
  ); // biome-ignore format: a line each
  fc.assert(
    fc.property(
      fc.array(fc.constantFrom(1, 2, 5), { minLength: 1, maxLength: 4 }),
      fc.boolean(),
      fc.array(step, { maxLength: 40 }),
      (speeds, isKnown, steps) => {
        const clock = new Clock(scheduler(speeds, false, isKnown ? speeds : []), speeds);
        const waiting = new Set<number>();
        const rowsOf = new Map<number, number>();
        let gone = 0;
        let ids = 0;
        for (const each of steps) {
          if (each.type === "start") {
            const id = ids++;
            clock.work.start(job(id, pictures(each.rows), { level: each.level }), clock.now);
            waiting.add(id);
            rowsOf.set(id, each.rows);
          } else if (each.type === "abort") {
            const id = [...waiting][each.which % Math.max(1, waiting.size)];
            if (id !== undefined) {
              clock.work.abort(id);
              waiting.delete(id);
            }
          } else if (each.type === "lose") {
            const device = each.device % speeds.length;
            const permanent = each.permanent && gone < speeds.length - 1;
            const submission = clock.drop(device);
            if (submission) {
              const { rejected } = clock.work.failed(submission.id, { lost: true, permanent }, clock.now);
              for (const id of rejected) waiting.delete(id);
              if (permanent) gone++;
            }
          } else {
            clock.submit();
            clock.step();
          }
          for (const id of clock.over.keys()) waiting.delete(id);
        }
        clock.run();
        for (const id of clock.over.keys()) waiting.delete(id);
        expect([...waiting]).toEqual([]);
        expect(clock.work.inFlight).toBe(0);
        for (const devices of clock.made.values()) {
          expect(new Set(devices).size).toBe(1);
          expect(devices.length).toBeLessThanOrEqual(9);
        }
        for (const id of clock.over.keys()) {
          const whole = [...clock.made].filter(([key, made]) => key.startsWith(`${id}.`) && made.length === 9);
          expect(new Set(whole.map(([key]) => key.split(".")[2])).size).toBe(rowsOf.get(id));
        }
      },
    ),
    { numRuns: 300 },
  );
});
