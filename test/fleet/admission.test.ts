// Admission of a fleet against list schedules that are written out, and against fleets that are run to the end.
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { DeadlineError, FleetEmptyError, QueueFullError } from "../../lib/errors.js";
import {
  FleetAdmission,
  type FleetRequest,
  type FleetView,
  type JobView,
  type WorkerView,
} from "../../lib/fleet/admission.js";
import type { Price, Prices } from "../../lib/fleet/classes.js";

const margin = 1.15;

const pricesOf = (kinds: Record<string, number | Price>): Prices =>
  new Map(
    Object.entries(kinds).map(([kind, price]) => [
      kind,
      typeof price === "number" ? { ms: price, leastMs: price, blocks: `E${kind}` } : price,
    ]),
  );

const worker = (id: string, prices: Prices, more: Partial<WorkerView> = {}): WorkerView => ({
  ...{ id, takes: true, backlogMs: 0, at: 0, room: 0, prices },
  ...more,
});

const job = (id: string, more: Partial<JobView> = {}): JobView => ({
  ...{ id, kind: "a", pictures: 1, level: 0, arrival: 0, due: null },
  ...more,
});

const request = (id: string, more: Partial<FleetRequest> = {}): FleetRequest => ({
  ...{ id, kind: "a", pictures: 1, level: 0, arrival: 0, deadlineMs: null },
  ...more,
});

const admissionOf = (view: Partial<FleetView>, maxQueue = 1000) => {
  const admission = new FleetAdmission({ maxQueue: () => maxQueue, random: () => 0 });
  admission.see({ at: 0, workers: [], jobs: [], ...view });
  return admission;
};

/** What a call throws. */
function refusal(call: () => unknown): unknown {
  try {
    call();
  } catch (error) {
    return error;
  }
  return null;
}

// ── The rule, written out ────────────────────────────────────────────────────────────────────────────────────────────

/** The order, in words: the level that waiting raises, then the due moment, then the arrival. */
function inOrder(jobs: readonly JobView[], now: number): JobView[] {
  const key = ({ level, arrival, due }: JobView) =>
    [-(level + Math.floor((now - arrival) / 10_000)), due ?? arrival + 60_000, arrival] as const;
  return [...jobs].sort((a, b) => {
    const [one, other] = [key(a), key(b)];
    return one[0] - other[0] || one[1] - other[1] || one[2] - other[2];
  });
}

/** When each job ends: the one worker after another is tried. */
function schedule(workers: readonly WorkerView[], jobs: readonly JobView[], now: number): Map<string, number> {
  const free = workers.map(({ at, backlogMs }) => Math.max(now, at + backlogMs));
  const ends = new Map<string, number>();
  for (const each of inOrder(jobs, now)) {
    const finishes = workers.map(({ prices }, index) => {
      const price = prices.get(each.kind)!;
      return free[index]! + (each.due === null ? price.ms : price.leastMs);
    });
    const first = finishes.indexOf(Math.min(...finishes));
    free[first] = finishes[first]!;
    ends.set(each.id, finishes[first]!);
  }
  return ends;
}

/** Whether a request with a limit may be accepted, and when it would end. */
function judge(workers: readonly WorkerView[], jobs: readonly JobView[], asked: FleetRequest, now: number) {
  const due = asked.deadlineMs === null ? null : asked.arrival + asked.deadlineMs;
  const before = schedule(workers, jobs, now);
  const after = schedule(workers, [...jobs, { ...asked, due }], now);
  const end = after.get(asked.id)!;
  const isHarmless = jobs.every(({ id, due }) => {
    if (due === null) return true;
    const [without, withIt] = [before.get(id)!, after.get(id)!];
    return [due, now + (due - now) / margin].every((limit) => without > limit || withIt <= limit);
  });
  const fits = due === null || Math.ceil((end - asked.arrival) * margin - 1e-6) <= asked.deadlineMs!;
  return { end, isAccepted: due === null || (fits && isHarmless) };
}

// ── Small fleets ─────────────────────────────────────────────────────────────────────────────────────────────────────

const milliseconds = fc.double({ min: 50, max: 800, noNaN: true });
const price = fc
  .record({ ms: milliseconds, part: fc.double({ min: 0.4, max: 1, noNaN: true }) })
  .map(({ ms, part }): Price => ({ ms, leastMs: ms * part, blocks: "E4" }));
const made = new WeakMap<Prices, Prices>();
const apart = (prices: Prices, index: number): Prices => {
  const known = made.get(prices);
  if (known) return known;
  const factor = 1 + 0.00123457 * index;
  const changed = new Map(
    Array.from(prices, ([kind, price]) => [kind, { ...price, ms: price.ms * factor, leastMs: price.leastMs * factor }]),
  );
  made.set(prices, changed);
  return changed;
};
const pricesArbitrary = fc.record({ a: price, b: price }).map((kinds): Prices => new Map(Object.entries(kinds)));
const fleet = (speeds: number) =>
  fc.array(pricesArbitrary, { minLength: 1, maxLength: speeds }).chain((prices) =>
    fc
      .array(fc.record({ of: fc.nat(prices.length - 1), backlogMs: fc.double({ min: 0, max: 2000, noNaN: true }) }), {
        minLength: 1,
        maxLength: 6,
      })
      .map((workers) =>
        // No two workers would finish a job at the same moment: it does not matter which is tried first.
        workers.map(({ of, backlogMs }, index) =>
          worker(`w${index}`, apart(prices[of]!, of), { backlogMs: backlogMs + 0.0123457 * index, at: 1e6 }),
        ),
      ),
  );
const now = 1e6;
const asked = fc.record({
  kind: fc.constantFrom("a", "b"),
  level: fc.constantFrom(0, 0, 0, 1),
  age: fc.double({ min: 0, max: 25_000, noNaN: true }),
  left: fc.option(fc.double({ min: 100, max: 6000, noNaN: true })),
});
const waiting = fc
  .array(asked, { maxLength: 10 })
  .map((jobs) =>
    jobs.map(({ kind, level, age, left }, index) =>
      job(`j${index}`, { kind, level, arrival: now - age, due: left === null ? null : now + left }),
    ),
  );
/** Prices that differ by less than a tenth are one class, with the dearer of both: that is another test. */
const isFarApart = (workers: readonly WorkerView[]) =>
  workers.every((one) =>
    workers.every(
      (other) =>
        one.prices === other.prices ||
        ["a", "b"].some((kind) => {
          const [a, b] = [one.prices.get(kind)!.ms, other.prices.get(kind)!.ms];
          return Math.max(a, b) > 1.4 * Math.min(a, b);
        }),
    ),
  );

describe("a decision", () => {
  it.each([1, 3])("is that of the list schedule, with up to %i kinds of workers", (speeds) => {
    let [accepted, refused] = [0, 0];
    fc.assert(
      fc.property(fleet(speeds).filter(isFarApart), waiting, asked, (workers, jobs, each) => {
        const admission = admissionOf({ at: now, workers, jobs });
        const { kind, level, left } = each;
        const call = request("new", { kind, level, arrival: now - 20, deadlineMs: left });
        const { end, isAccepted } = judge(workers, jobs, call, now);
        let predictedMs: number | null = null;
        const error = refusal(() => {
          ({ predictedMs } = admission.admit(call, now));
        });
        if (isAccepted) {
          expect(error).toBeNull();
          expect(predictedMs).toBeCloseTo(end - call.arrival, 6);
          accepted++;
        } else {
          expect(error).toBeInstanceOf(DeadlineError);
          refused++;
          const { bestMs } = error as DeadlineError;
          const again = (deadlineMs: number) => ({ ...call, arrival: now, deadlineMs });
          const wouldDo = [bestMs, 1e6].map((limit) => judge(workers, jobs, again(limit), now).isAccepted);
          // One of a higher level may make others late with any limit.
          expect(wouldDo, "the time that would do").not.toEqual([false, true]);
        }
      }),
      { numRuns: 1500 },
    );
    expect(Math.min(accepted, refused)).toBeGreaterThan(200);
  });

  it("sees what was accepted before, as a new copy would show it", () => {
    fc.assert(
      fc.property(fleet(3).filter(isFarApart), waiting, fc.array(asked, { maxLength: 12 }), (workers, jobs, calls) => {
        const admission = admissionOf({ at: now, workers, jobs });
        const known = [...jobs];
        for (const [index, { kind, level, left }] of calls.entries()) {
          const call = request(`n${index}`, { kind, level, arrival: now, deadlineMs: left });
          const { end, isAccepted } = judge(workers, known, call, now);
          let predictedMs: number | null = null;
          const error = refusal(() => {
            ({ predictedMs } = admission.admit(call, now));
          });
          expect(error === null).toBe(isAccepted);
          if (isAccepted) {
            expect(predictedMs).toBeCloseTo(end - now, 6);
            known.push({ ...job(call.id), kind, level, arrival: now, due: left === null ? null : now + left });
          }
          // Every other time the copy is new, and still without them.
          if (index % 2) admission.see({ at: now, workers, jobs });
        }
        expect(admission.backlogSeconds(now) * 1000 * workers.length).toBeCloseTo(workOf(workers, known), 3);
      }),
      { numRuns: 500 },
    );
  });
});

/** Milliseconds of all that is accepted, over all workers. */
function workOf(workers: readonly WorkerView[], jobs: readonly JobView[]): number {
  let sum = workers.reduce((sum, { backlogMs }) => sum + backlogMs, 0);
  const free = workers.map(({ at, backlogMs }) => at + backlogMs);
  for (const each of inOrder(jobs, now)) {
    const costs = workers.map(({ prices }) => prices.get(each.kind)![each.due === null ? "ms" : "leastMs"]);
    const finishes = costs.map((cost, index) => free[index]! + cost);
    const first = finishes.indexOf(Math.min(...finishes));
    free[first] = finishes[first]!;
    sum += costs[first]!;
  }
  return sum;
}

// ── A fleet that is run ──────────────────────────────────────────────────────────────────────────────────────────────

/** Workers of one speed that take the first job when they are free. What is predicted of them is what they do. */
class Fleet {
  readonly free: { id: string; at: number }[];
  readonly prices: Prices;
  readonly ended = new Map<string, number>();
  waiting: JobView[] = [];
  now = 0;

  constructor(workers: number, prices: Prices) {
    this.prices = prices;
    this.free = Array.from({ length: workers }, (_, index) => ({ id: `w${index}`, at: 0 }));
  }

  /** Runs up to a moment; what could begin at that moment has not. */
  run(until: number): void {
    for (;;) {
      const first = this.free.reduce((a, b) => (b.at < a.at ? b : a));
      const at = Math.max(first.at, this.now);
      if (at >= until || this.waiting.length === 0) break;
      this.now = at;
      const next = inOrder(this.waiting, at)[0]!;
      this.waiting.splice(this.waiting.indexOf(next), 1);
      const { ms, leastMs } = this.prices.get(next.kind)!;
      first.at = at + (next.due === null ? ms : leastMs);
      this.ended.set(next.id, first.at);
    }
    this.now = until;
  }

  view(): FleetView {
    const { now } = this;
    const workers = this.free.map(({ id, at }) =>
      worker(id, this.prices, { at: now, backlogMs: Math.max(0, at - now), room: at > now ? 0 : 1 }),
    );
    return { at: now, workers, jobs: [...this.waiting] };
  }

  copy(): Fleet {
    const copy = new Fleet(0, this.prices);
    copy.free.push(...this.free.map((each) => ({ ...each })));
    copy.waiting = [...this.waiting];
    copy.now = this.now;
    return copy;
  }
}

const small = pricesOf({ a: { ms: 331.7, leastMs: 207.3, blocks: "E4" }, b: { ms: 701.9, leastMs: 413.1, blocks: "E4" } }); // biome-ignore format: one line
/** Within ten seconds, so that no level rises through waiting. */
const calls = fc.array(
  fc.record({
    gap: fc.double({ min: 0.1, max: 250, noNaN: true }),
    kind: fc.constantFrom("a", "b"),
    level: fc.constantFrom(0, 0, 0, 1),
    deadlineMs: fc.option(fc.double({ min: 250, max: 4000, noNaN: true })),
  }),
  { minLength: 5, maxLength: 30 },
);

describe("a promise", () => {
  it.each(["a copy at each call", "a copy at the first call alone"])("is kept, with %s", (copies) => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 5 }), calls, (workers, list) => {
        const fleet = new Fleet(workers, small);
        const admission = admissionOf(fleet.view());
        const promised = new Map<string, number>();
        let now = 0;
        for (const [index, { gap, ...call }] of list.entries()) {
          now += gap;
          fleet.run(now);
          if (copies === "a copy at each call") admission.see(fleet.view());
          const { kind, deadlineMs } = call;
          // Who has no limit is accepted in any case, also before those who have.
          const level = deadlineMs === null ? 0 : call.level;
          const id = `n${index}`;
          if (refusal(() => admission.admit(request(id, { ...call, level, arrival: now }), now)) !== null) continue;
          const due = deadlineMs === null ? null : now + deadlineMs;
          fleet.waiting.push(job(id, { kind, level, arrival: now, due }));
          admission.queued(id, now);
          if (due !== null) promised.set(id, due);
        }
        fleet.run(Number.MAX_VALUE);
        for (const [id, due] of promised) expect(fleet.ended.get(id)).toBeLessThanOrEqual(due + 1e-6);
      }),
      { numRuns: 300 },
    );
  });
});

describe("who is refused", () => {
  const last = fc.record({
    kind: fc.constantFrom("a", "b"),
    level: fc.constantFrom(0, 0, 1),
    deadlineMs: fc.double({ min: 250, max: 1500, noNaN: true }),
  });

  it("is accepted at the moment that it is told, if nothing else comes, and not much earlier", () => {
    let told = 0;
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 4 }), calls, last, (workers, list, { kind, level, deadlineMs }) => {
        const fleet = new Fleet(workers, small);
        let now = 0;
        for (const [index, { gap, ...call }] of list.entries()) {
          // Twice as many as they can draw.
          now += (0.4 * gap) / workers;
          fleet.run(now);
          const admission = admissionOf(fleet.view());
          const id = `n${index}`;
          if (refusal(() => admission.admit(request(id, { ...call, arrival: now }), now)) !== null) continue;
          const due = call.deadlineMs === null ? null : now + call.deadlineMs;
          fleet.waiting.push(job(id, { kind: call.kind, level: call.level, arrival: now, due }));
        }
        const offer = (at: number) => {
          const later = fleet.copy();
          later.run(at);
          const call = request("new", { kind, level, arrival: at, deadlineMs });
          return refusal(() => admissionOf(later.view()).admit(call, at)) as DeadlineError | null;
        };
        const error = offer(now);
        if (error === null) return;
        if (error.retryAfterMs === null) {
          expect(small.get(kind)!.leastMs * margin).toBeGreaterThan(deadlineMs);
          return;
        }
        told++;
        expect(offer(now + error.retryAfterMs), "at the moment").toBeNull();
        // What is told is 1.15 times the time to wait, unless there was room for a moment only.
        const earliest = Array.from({ length: error.retryAfterMs }, (_, wait) => wait + 1).find(
          (wait) => offer(now + wait) === null,
        )!;
        for (let wait = earliest; wait < error.retryAfterMs; wait += 3) if (offer(now + wait) !== null) return;
        expect(error.retryAfterMs).toBeLessThanOrEqual(1.15 * 1.02 * earliest + 2);
      }),
      { numRuns: 60 },
    );
    expect(told).toBeGreaterThan(15);
  }, 120_000);
});

// ── One rule at a time ───────────────────────────────────────────────────────────────────────────────────────────────

const usual = pricesOf({ a: 100 });
const busy = (id: string, backlogMs: number, prices = usual) => worker(id, prices, { backlogMs });

describe("workers", () => {
  it("that drain take nothing; a fleet without others is empty, whatever is asked", () => {
    const drained = worker("one", usual, { takes: false });
    for (const workers of [[], [drained]])
      expect(refusal(() => admissionOf({ workers }).admit(request("r"), 0))).toBeInstanceOf(FleetEmptyError);
    const admission = admissionOf({ workers: [drained, busy("two", 500)] });
    expect(admission.admit(request("r"), 0).predictedMs).toBe(600);
    expect(new FleetAdmission({ maxQueue: () => 1 }).backlogSeconds(0)).toBe(0);
  });

  it("work off what they have while time passes", () => {
    const admission = admissionOf({ workers: [busy("one", 500)] });
    expect(admission.backlogSeconds(0)).toBe(0.5);
    expect(admission.backlogSeconds(200)).toBe(0.3);
    expect(admission.admit(request("r", { arrival: 200 }), 200).predictedMs).toBe(400);
    expect(admission.backlogSeconds(200)).toBe(0.4);
    expect(admission.backlogSeconds(1000)).toBe(0);
  });

  it("count from now where their clocks are ahead", () => {
    const workers = [0, 100].map((backlogMs, index) => worker(`${index}`, usual, { at: 13, backlogMs, room: 1 }));
    const admission = admissionOf({ at: 10, workers });
    expect(admission.admit(request("r", { arrival: 10 }), 10)).toMatchObject({ predictedMs: 100, place: 0 });
    expect(admission.admit(request("s", { arrival: 10 }), 10)).toMatchObject({ predictedMs: 200, place: 0 });
    expect(admission.admit(request("t", { arrival: 10 }), 10)).toMatchObject({ predictedMs: 200, place: 2 });
  });

  it("without a price for a kind take what the dearest of the others takes", () => {
    const workers = [busy("one", 0, pricesOf({ a: 100 })), busy("two", 1000, pricesOf({ a: 50, b: 70 }))];
    const [first, second] = [admissionOf({ workers }), admissionOf({ workers })];
    expect(first.admit(request("r", { kind: "b" }), 0).predictedMs).toBe(70);
    expect(second.admit(request("r", { kind: "a" }), 0).predictedMs).toBe(100);
  });

  it("of about equal prices count as the dearest of them", () => {
    const workers = Array.from({ length: 50 }, (_, index) => busy(`${index}`, 0, pricesOf({ a: 100 + index / 10 })));
    const admission = admissionOf({ workers });
    for (let index = 0; index < 50; index++)
      expect(admission.admit(request(`r${index}`), 0).predictedMs).toBeCloseTo(104.9);
  });
});

describe("a kind that no worker has a price for", () => {
  it("is accepted without a prediction, and counts as the dearest that is known", () => {
    const admission = admissionOf({ workers: [busy("one", 0)] });
    const unknown = request("r", { kind: "new", deadlineMs: 10 });
    expect(admission.admit(unknown, 0)).toEqual({ predictedMs: null, place: 1, price: null });
    expect(admission.admit(request("s"), 0).predictedMs).toBe(200);
  });

  it("counts as a second where nothing is known", () => {
    const admission = admissionOf({ workers: [worker("one", pricesOf({}), { room: 1 })] });
    expect(admission.admit(request("r"), 0)).toEqual({ predictedMs: null, place: 0, price: null });
    expect(admission.backlogSeconds(0)).toBe(1);
  });
});

describe("the queue", () => {
  it("has places by priority; one that a worker takes at once has none", () => {
    const free = admissionOf({ workers: [worker("one", usual, { room: 2 })] });
    expect(free.admit(request("r", { pictures: 2 }), 0).place).toBe(0);
    expect(admissionOf({ workers: [worker("one", usual, { room: 2 })] }).admit(request("r", { pictures: 3 }), 0).place).toBe(1); // biome-ignore format: one line
    const admission = admissionOf({
      workers: [busy("one", 100)],
      jobs: [job("a"), job("b", { level: 1 }), job("c", { due: 5000 }), job("d", { arrival: -10_000 })],
    });
    expect(admission.admit(request("e"), 0).place).toBe(5);
    expect(admission.admit(request("f", { deadlineMs: 6000 }), 0).place).toBe(4);
    expect(admission.admit(request("g", { level: 1, deadlineMs: 49_000 }), 0).place).toBe(1);
    expect(admission.admit(request("h", { level: 2 }), 0).place).toBe(1);
  });

  it("does not count those that free workers begin with at this very moment", () => {
    const admission = admissionOf({ workers: [busy("one", 0), busy("two", 0)] }, 1);
    for (const id of ["a", "b", "c"])
      expect(
        refusal(() => admission.admit(request(id), 0)),
        id,
      ).toBeNull();
    expect(refusal(() => admission.admit(request("d"), 0))).toMatchObject({ waiting: 1, retryAfterMs: 115 });
  });

  it("refuses when it is full, and says when there is a place", () => {
    const jobs = [1, 2, 3].map((index) => job(`${index}`));
    const admission = admissionOf({ workers: [busy("one", 50), busy("two", 80)], jobs }, 3);
    const error = refusal(() => admission.admit(request("r"), 0)) as QueueFullError;
    expect(error).toBeInstanceOf(QueueFullError);
    // The first begins in 50 ms. The next caller is told the time of the second place.
    expect([error.waiting, error.retryAfterMs]).toEqual([3, Math.ceil(50 * 1.15)]);
    expect(refusal(() => admission.admit(request("s"), 0))).toMatchObject({ retryAfterMs: Math.ceil(80 * 1.15) });
    // It needs no new copy for that.
    expect(refusal(() => admission.admit(request("t", { arrival: 60 }), 60))).toBeNull();
  });

  it("holds a place for a known caller that was told of it", () => {
    const jobs = [1, 2, 3].map((index) => job(`${index}`));
    const admission = admissionOf({ workers: [busy("one", 50)], jobs }, 3);
    const { retryAfterMs } = refusal(() => admission.admit(request("r", { ticket: "me" }), 0)) as QueueFullError;
    const at = retryAfterMs;
    expect(refusal(() => admission.admit(request("s", { arrival: at }), at))).toBeInstanceOf(QueueFullError);
    expect(refusal(() => admission.admit(request("r", { arrival: at, ticket: "me" }), at))).toBeNull();
  });

  it("forgets what was accepted here if a copy from after it was put there lacks it, if none shows it in a second, or if it has ended", () => {
    const view = (at: number, jobs: JobView[] = []) => ({ at, workers: [worker("one", usual, { at })], jobs });
    const admission = admissionOf(view(0));
    const backlog = (at: number) => Math.round(admission.backlogSeconds(at) * 1000);
    admission.admit(request("r"), 0);
    admission.admit(request("s"), 0);
    admission.see(view(500));
    expect(backlog(500)).toBe(200);
    admission.ended("r", { late: null }, 500);
    expect(backlog(500)).toBe(100);
    admission.see(view(600, [job("s")]));
    expect(backlog(600)).toBe(100);
    admission.see(view(700));
    expect(backlog(700)).toBe(0);
    admission.admit(request("t"), 700);
    admission.queued("t", 710);
    admission.see(view(705));
    expect(backlog(705)).toBe(100);
    admission.see(view(710));
    expect(backlog(710)).toBe(0);
    admission.admit(request("u"), 710);
    admission.see(view(1700));
    expect(backlog(1700)).toBe(100);
    admission.see(view(1710));
    expect(backlog(1710)).toBe(0);
  });
});

describe("a time limit", () => {
  const ladder = pricesOf({ a: { ms: 400, leastMs: 100, blocks: "H1P1" } });

  it("is met by the leanest schedule; without one the usual is drawn", () => {
    const admission = admissionOf({ workers: [busy("one", 0, ladder)] });
    expect(admission.admit(request("r", { deadlineMs: 115 }), 0)).toMatchObject({ predictedMs: 100, place: 1, price: { blocks: "H1P1" } }); // biome-ignore format: one line
    expect(admission.admit(request("s"), 0)).toMatchObject({ predictedMs: 500, place: 1 });
  });

  it("that is impossible names what would do, and never comes again", () => {
    const admission = admissionOf({ workers: [busy("one", 1000, ladder), busy("two", 900, ladder)] });
    const error = refusal(() => admission.admit(request("r", { deadlineMs: 114 }), 0)) as DeadlineError;
    expect(error).toMatchObject({
      code: "ERR_FLOWTURBO_DEADLINE_IMPOSSIBLE",
      ...{ deadlineMs: 114, bestMs: 1150, blocks: "H1P1", retryAfterMs: null },
    });
    expect(admission.admit(request("r", { deadlineMs: 1150 }), 0).predictedMs).toBe(1000);
  });

  it("counts from the arrival", () => {
    const admission = admissionOf({ workers: [busy("one", 0, ladder)] });
    expect(refusal(() => admission.admit(request("r", { arrival: -20, deadlineMs: 130 }), 0))).toBeInstanceOf(DeadlineError); // biome-ignore format: one line
    expect(admission.admit(request("r", { arrival: -20, deadlineMs: 140 }), 0).predictedMs).toBe(120);
  });

  it("that others prevent comes again, each caller after those before", () => {
    const admission = admissionOf({ workers: [busy("one", 1000, ladder)] });
    const told = [1, 2, 3].map(
      (index) => (refusal(() => admission.admit(request(`${index}`, { deadlineMs: 230 }), 0)) as DeadlineError).retryAfterMs!, // biome-ignore format: one line
    );
    // Two hundred milliseconds are left for others and itself: 900 ms have to pass, and 100 more for each before.
    expect(told).toEqual([900, 1000, 1100].map((wait) => Math.ceil(1.15 * wait)));
  });

  it("leaves free the room of known callers who were told to come", () => {
    const admission = admissionOf({ workers: [busy("one", 1000, ladder)] });
    const call = (id: string, arrival: number, ticket: string) =>
      refusal(() =>
        admission.admit(request(id, { arrival, ticket, deadlineMs: 130 }), arrival),
      ) as DeadlineError | null;
    const { retryAfterMs } = call("r", 0, "me")!;
    const at = retryAfterMs!;
    expect(call("s", at, "you")!.message).toContain("that room is kept");
    expect(call("r", at, "me")).toBeNull();
  });

  it("leaves more free after a promise was broken, until that is long ago", () => {
    const admission = admissionOf({ workers: [busy("one", 0, ladder)] });
    const fits = (at: number, deadlineMs: number, id: string) => {
      admission.see({ at, workers: [worker("one", ladder, { at })], jobs: [] });
      return refusal(() => admission.admit(request(id, { arrival: at, deadlineMs }), at)) as DeadlineError | null;
    };
    expect(fits(0, 120, "r")).toBeNull();
    admission.ended("r", { late: true }, 130);
    expect(admission.margin).toBeCloseTo(1.3);
    const error = fits(2000, 120, "s")!;
    expect(error.bestMs).toBe(130);
    expect(error.message).toContain("slower than usual");
    expect(fits(2000 + error.retryAfterMs!, 120, "t")).toBeNull();
    // Who was told of no promise says nothing.
    admission.ended("none", { late: true }, 200_000);
    expect(admission.margin).toBeCloseTo(1.15);
  });

  it("harms nobody who was promised a time, unless that one is late in any case", () => {
    const view = (due: number) => ({ workers: [busy("one", 200, ladder)], jobs: [job("j", { due })] });
    // The waiting one ends after 300 ms, or 400 with another before it.
    const call = request("r", { level: 1, deadlineMs: 1000 });
    expect(refusal(() => admissionOf(view(470)).admit(call, 0))).toBeNull();
    expect(refusal(() => admissionOf(view(450)).admit(call, 0))).toBeInstanceOf(DeadlineError);
    expect(refusal(() => admissionOf(view(290)).admit(call, 0))).toBeNull();
  });
});
