// Who is let in, and when: under any sequence of arrivals, aborts and endings.
import { setImmediate } from "node:timers/promises";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { Admission } from "../../lib/serving/admission.js";
import { agingMilliseconds, comparePriorities, type Priority } from "../../lib/serving/priority.js";

const claim = (sequence: number, extra: Partial<Priority> = {}): Priority => ({
  ...{ priority: 0, deadline: null, arrival: sequence, sequence },
  ...extra,
});

describe("Admission", () => {
  it("lets in by priority, then deadline, then arrival", async () => {
    const admission = new Admission(10, 1, () => 0);
    const order: string[] = [];
    const leave = await admission.enter(claim(0), 1);
    const enter = async (name: string, extra: Partial<Priority>, sequence: number) => {
      const over = await admission.enter(claim(sequence, { arrival: 0, ...extra }), 1);
      order.push(name);
      over();
    };
    const all = [
      enter("late", { deadline: 200 }, 1),
      enter("soon", { deadline: 100 }, 2),
      enter("first", {}, 3),
      enter("second", {}, 4),
      enter("important", { priority: 1, deadline: 900 }, 5),
    ];
    expect(admission.waiting).toBe(5);
    leave();
    await Promise.all(all);
    expect(order).toEqual(["important", "soon", "late", "first", "second"]);
    expect(admission.running).toEqual({ requests: 0, pictures: 0 });
  });

  it("lets a large request go alone, and nobody overtakes it for being small", async () => {
    const admission = new Admission(10, 4, () => 0);
    const first = await admission.enter(claim(0), 3);
    let large = false;
    let small = false;
    const waiting = admission.enter(claim(1), 9).then((leave) => {
      large = true;
      return leave;
    });
    const behind = admission.enter(claim(2), 1).then((leave) => {
      small = true;
      return leave;
    });
    await setImmediate();
    expect([large, small]).toEqual([false, false]);
    first();
    const leave = await waiting;
    await setImmediate();
    expect([large, small]).toEqual([true, false]);
    leave();
    leave();
    (await behind)();
    expect(admission.running).toEqual({ requests: 0, pictures: 0 });
  });

  it("starves nobody: waiting raises the priority", async () => {
    let now = 0;
    const admission = new Admission(100, 1, () => now);
    let over = await admission.enter(claim(0), 1);
    let isServed = false;
    const humble = admission.enter(claim(1, { priority: -3, arrival: 0 }), 1).then((leave) => {
      isServed = true;
      leave();
    });
    let rounds = 0;
    while (!isServed && rounds++ < 100) {
      now += 1000;
      const urgent = admission.enter(claim(1 + rounds, { priority: 3, deadline: now + 1, arrival: now }), 1);
      over();
      over = await Promise.race([urgent, humble.then(() => urgent)]);
    }
    expect(isServed).toBe(true);
    // Six steps of priority apart.
    expect(now).toBeGreaterThanOrEqual(6 * agingMilliseconds);
    over();
    await humble;
  });

  it("never exceeds its bounds, loses nobody and settles everybody once, whatever happens", async () => {
    const event = fc.oneof(
      { weight: 5, arbitrary: fc.record({ type: fc.constant("enter" as const), pictures: fc.integer({ min: 1, max: 6 }), priority: fc.integer({ min: -2, max: 2 }), deadline: fc.option(fc.nat(500)) }) }, // biome-ignore format: one line
      { weight: 4, arbitrary: fc.record({ type: fc.constant("leave" as const), which: fc.nat(20) }) },
      { weight: 2, arbitrary: fc.record({ type: fc.constant("abort" as const), which: fc.nat(30) }) },
      { weight: 1, arbitrary: fc.record({ type: fc.constant("wait" as const), milliseconds: fc.nat(30_000) }) },
    );
    await fc.assert(
      fc.asyncProperty(
        fc.array(event, { maxLength: 60, size: "max" }),
        fc.integer({ min: 0, max: 5 }),
        fc.integer({ min: 1, max: 6 }),
        async (events, limit, capacity) => {
          let now = 0;
          const admission = new Admission(limit, capacity, () => now);
          interface Entry {
            readonly claim: Priority;
            readonly pictures: number;
            readonly controller: AbortController;
            state: "waiting" | "running" | "over" | "aborted";
            leave: () => void;
          }
          const entries: Entry[] = [];
          const inState = (state: Entry["state"]) => entries.filter((entry) => entry.state === state);
          for (const step of events) {
            if (step.type === "wait") now += step.milliseconds;
            else if (step.type === "enter") {
              const sequence = entries.length;
              const deadline = step.deadline === null ? null : now + step.deadline;
              const own = claim(sequence, { priority: step.priority, deadline, arrival: now });
              const { pictures } = step;
              const isFull = admission.isFull(pictures);
              const mustWait =
                inState("waiting").length > 0 ||
                (admission.running.pictures > 0 && admission.running.pictures + pictures > capacity);
              expect(isFull).toBe(mustWait && inState("waiting").length >= limit);
              if (isFull) {
                await expect(admission.enter(own, pictures)).rejects.toThrow(RangeError);
                continue;
              }
              const entry: Entry = {
                ...{ claim: own, pictures, controller: new AbortController(), state: "waiting", leave: () => {} },
              };
              entries.push(entry);
              admission.enter(own, pictures, entry.controller.signal).then(
                (leave) => {
                  expect(entry.state).toBe("waiting");
                  entry.state = "running";
                  entry.leave = leave;
                },
                () => {
                  expect(entry.state).toBe("waiting");
                  entry.state = "aborted";
                },
              );
            } else if (step.type === "leave") {
              const running = inState("running");
              const entry = running[step.which % Math.max(1, running.length)];
              if (entry) {
                entry.state = "over";
                entry.leave();
              }
            } else entries[step.which]?.controller.abort(new Error("aborted"));
            await setImmediate();
            const running = inState("running");
            const pictures = running.reduce((sum, entry) => sum + entry.pictures, 0);
            expect(admission.running).toEqual({ requests: running.length, pictures });
            expect(admission.waiting).toBe(inState("waiting").length);
            if (running.length > 1) expect(pictures).toBeLessThanOrEqual(capacity);
            // The most urgent of those who wait would not fit: nobody waits for nothing.
            const [first] = inState("waiting").sort((a, b) => comparePriorities(a.claim, b.claim, now));
            // Aging may have changed who is first since somebody last left.
            if (first && step.type !== "wait" && inState("waiting").length === 1)
              expect(pictures > 0 && pictures + first.pictures > capacity).toBe(true);
          }
          while (inState("running").length > 0) {
            const [entry] = inState("running");
            entry!.state = "over";
            entry!.leave();
            await setImmediate();
          }
          expect(inState("waiting")).toEqual([]);
          expect(admission.running).toEqual({ requests: 0, pictures: 0 });
        },
      ),
      { numRuns: 200 },
    );
  });
});
