// Which entries are let in, and when: under any sequence of arrivals, aborts and endings.
import { getEventListeners } from "node:events";
import { setImmediate } from "node:timers/promises";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Gate } from "../../lib/common/gate.js";

/** Lower numbers first. */
const rising = (a: number, b: number) => a - b;

describe("Gate", () => {
  it("lets in by order, and of equals the earlier ones first", async () => {
    const gate = new Gate<number>({ capacity: 1, compare: rising });
    const order: string[] = [];
    const leave = await gate.enter(0);
    const all = (
      [
        ["c", 2],
        ["d", 2],
        ["b", 1],
        ["e", 3],
        ["a", 0],
      ] as const
    ).map(async ([name, place]) => {
      const over = await gate.enter(place);
      order.push(name);
      over();
    });
    expect(gate.waiting).toBe(5);
    leave();
    await Promise.all(all);
    expect(order).toEqual(["a", "b", "c", "d", "e"]);
    expect(gate.inside).toEqual({ entries: 0, weight: 0 });
  });

  it("says which place an entry would have: 0 goes in at once", async () => {
    const gate = new Gate<number>({ capacity: 4, compare: rising });
    expect([gate.placeOf(0), gate.placeOf(9, 9)]).toEqual([0, 0]);
    const leave = await gate.enter(0, 3);
    expect([gate.placeOf(5), gate.placeOf(5, 2)]).toEqual([0, 1]);
    const controller = new AbortController();
    const waiting = [gate.enter(2, 2), gate.enter(4, 2, controller.signal)];
    // Before both, between them, and behind; of equals the earlier one goes first. A small one fits before both.
    expect([1, 2, 3, 4, 5].map((order) => gate.placeOf(order, 2))).toEqual([1, 2, 2, 3, 3]);
    expect(gate.placeOf(1, 1)).toBe(0);
    controller.abort("left");
    await expect(waiting[1]).rejects.toBe("left");
    expect(gate.placeOf(5, 2)).toBe(2);
    leave();
    (await waiting[0]!)();
    expect(gate.placeOf(5, 2)).toBe(0);
  });

  it("lets a large entry in alone, and no smaller one goes before it", async () => {
    const gate = new Gate({ capacity: 4 });
    const first = await gate.enter(undefined, 3);
    const order: string[] = [];
    const enter = (name: string, weight: number) =>
      gate.enter(undefined, weight).then((leave) => {
        order.push(name);
        return leave;
      });
    const [large, small] = [enter("large", 9), enter("small", 1)];
    await setImmediate();
    expect(order).toEqual([]);
    first();
    const leave = await large;
    await setImmediate();
    expect(order).toEqual(["large"]);
    leave();
    leave();
    (await small)();
    expect(gate.inside).toEqual({ entries: 0, weight: 0 });
  });

  it("asks again how much fits whenever an entry leaves", async () => {
    let available = 10;
    const gate = new Gate({ capacity: () => available });
    const [a, b] = [await gate.enter(undefined, 6), await gate.enter(undefined, 4)];
    const c = gate.enter(undefined, 5);
    available = 4;
    b();
    await setImmediate();
    expect(gate.waiting).toBe(1);
    available = 11;
    const d = gate.enter(undefined, 100);
    (await c)();
    a();
    (await d)();
  });

  it("refuses an entry that would have to wait where as many wait as may", async () => {
    const gate = new Gate({ capacity: 2, limit: 1 });
    const leave = await gate.enter(undefined, 2);
    expect(gate.isFull()).toBe(false);
    const next = gate.enter(undefined, 1);
    expect(gate.isFull()).toBe(true);
    await expect(gate.enter()).rejects.toThrow(RangeError);
    leave();
    (await next)();
    expect(gate.isFull(100)).toBe(false);
  });

  it("removes an entry that aborts, lets in those behind it, and stops following the signal", async () => {
    const gate = new Gate({ capacity: 4 });
    const first = await gate.enter(undefined, 3);
    const controller = new AbortController();
    const { signal } = controller;
    const large = gate.enter(undefined, 4, signal);
    const small = gate.enter(undefined, 1, signal);
    controller.abort("no longer");
    await expect(large).rejects.toBe("no longer");
    await expect(small).rejects.toBe("no longer");
    await expect(gate.enter(undefined, 1, signal)).rejects.toBe("no longer");
    const waits = new AbortController();
    const again = gate.enter(undefined, 4, waits.signal);
    const behind = gate.enter(undefined, 1);
    waits.abort("no longer");
    await expect(again).rejects.toBe("no longer");
    (await behind)();
    first();
    // An abort after that is up to the work inside.
    const late = new AbortController();
    const leave = await gate.enter(undefined, 1, late.signal);
    late.abort();
    expect(gate.inside).toEqual({ entries: 1, weight: 1 });
    leave();
  });

  it("gives a signal that many entries share one listener", async () => {
    const gate = new Gate({ capacity: 1 });
    const { signal } = new AbortController();
    const leave = await gate.enter();
    const waiting = Array.from({ length: 20 }, () => gate.enter(undefined, 1, signal));
    expect(getEventListeners(signal, "abort").length).toBe(1);
    leave();
    for (const entry of waiting) (await entry)();
    expect(getEventListeners(signal, "abort").length).toBe(0);
  });

  it("says when it is idle", async () => {
    const gate = new Gate({ capacity: 1 });
    await gate.idle();
    const leave = await gate.enter();
    const next = gate.enter();
    let isIdle = false;
    const idle = gate.idle().then(() => {
      isIdle = true;
    });
    leave();
    const over = await next;
    await setImmediate();
    expect(isIdle).toBe(false);
    over();
    await idle;
  });

  it("never exceeds its bounds, loses no entry and settles each once, whatever happens", async () => {
    const event = fc.oneof(
      { weight: 5, arbitrary: fc.record({ type: fc.constant("enter" as const), weight: fc.integer({ min: 1, max: 6 }), order: fc.nat(5) }) }, // biome-ignore format: one line
      { weight: 4, arbitrary: fc.record({ type: fc.constant("leave" as const), which: fc.nat(20) }) },
      { weight: 2, arbitrary: fc.record({ type: fc.constant("abort" as const), which: fc.nat(30) }) },
    );
    await fc.assert(
      fc.asyncProperty(
        fc.array(event, { maxLength: 60, size: "max" }),
        fc.integer({ min: 0, max: 5 }),
        fc.integer({ min: 1, max: 6 }),
        async (events, limit, capacity) => {
          const gate = new Gate<number>({ capacity, limit, compare: rising });
          interface Entry {
            readonly order: number;
            readonly weight: number;
            readonly controller: AbortController;
            state: "waiting" | "inside" | "over" | "aborted";
            leave: () => void;
          }
          const entries: Entry[] = [];
          const inState = (state: Entry["state"]) => entries.filter((entry) => entry.state === state);
          const weightInside = () => inState("inside").reduce((sum, entry) => sum + entry.weight, 0);
          for (const step of events) {
            if (step.type === "enter") {
              const { order, weight } = step;
              const isFull = gate.isFull(weight);
              const mustWait =
                inState("waiting").length > 0 || (weightInside() > 0 && weightInside() + weight > capacity);
              expect(isFull).toBe(mustWait && inState("waiting").length >= limit);
              if (isFull) {
                await expect(gate.enter(order, weight)).rejects.toThrow(RangeError);
                continue;
              }
              const controller = new AbortController();
              const entry: Entry = { order, weight, controller, state: "waiting", leave: () => {} };
              entries.push(entry);
              gate.enter(order, weight, controller.signal).then(
                (leave) => {
                  expect(entry.state).toBe("waiting");
                  entry.state = "inside";
                  entry.leave = leave;
                },
                () => {
                  expect(entry.state).toBe("waiting");
                  entry.state = "aborted";
                },
              );
            } else if (step.type === "leave") {
              const inside = inState("inside");
              const entry = inside[step.which % Math.max(1, inside.length)];
              if (entry) {
                entry.state = "over";
                entry.leave();
              }
            } else entries[step.which]?.controller.abort(new Error("aborted"));
            await setImmediate();
            const inside = inState("inside");
            expect(gate.inside).toEqual({ entries: inside.length, weight: weightInside() });
            expect(gate.waiting).toBe(inState("waiting").length);
            if (inside.length > 1) expect(weightInside()).toBeLessThanOrEqual(capacity);
            // The first of those that wait would not fit: none waits without need.
            const [first] = inState("waiting").sort((a, b) => a.order - b.order);
            if (first) expect(weightInside() > 0 && weightInside() + first.weight > capacity).toBe(true);
          }
          while (inState("inside").length > 0) {
            const [entry] = inState("inside");
            entry!.state = "over";
            entry!.leave();
            await setImmediate();
          }
          expect(inState("waiting")).toEqual([]);
          await gate.idle();
        },
      ),
      { numRuns: 200 },
    );
  });
});
