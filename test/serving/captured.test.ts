// Captured programs: which goes first, how many the runtime has.
import { setImmediate } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { CapturedQueue } from "../../lib/serving/captured.js";
import type { Priority } from "../../lib/serving/priority.js";

let sequence = 0;
const priority = (extra: Partial<Priority> = {}): Priority => ({
  ...{ level: 0, due: null, arrival: performance.now(), sequence: sequence++ },
  ...extra,
});

/** Programs that end when they are told to. */
function open() {
  const programs = new CapturedQueue();
  const begun: string[] = [];
  const ends = new Map<string, { resolve(value: string): void; reject(error: unknown): void }>();
  const run = (name: string, extra: Partial<Priority> = {}, signal = new AbortController().signal) =>
    programs.run(priority(extra), signal, () => {
      begun.push(name);
      return new Promise<string>((resolve, reject) => ends.set(name, { resolve, reject }));
    });
  return { programs, begun, run, end: (name: string) => ends.get(name)! };
}

describe("captured programs", () => {
  it("run two at a time, those of the highest priority first", async () => {
    const { programs, begun, run, end } = open();
    const all = [run("a"), run("b"), run("late"), run("high", { level: 1 }), run("due", { due: 0 })];
    await setImmediate();
    expect(begun).toEqual(["a", "b"]);
    expect(programs.size).toBe(5);
    let idle = false;
    const ended = programs.idle().then(() => {
      idle = true;
    });
    for (const name of ["b", "a", "due", "high", "late"]) {
      expect(idle).toBe(false);
      while (!begun.includes(name)) await setImmediate();
      end(name).resolve(name);
    }
    expect(await Promise.all(all)).toEqual(["a", "b", "late", "high", "due"]);
    expect(begun).toEqual(["a", "b", "high", "due", "late"]);
    await ended;
    expect(programs.size).toBe(0);
    await programs.idle();
  });

  it("no longer wait when they are aborted, and let the next one run when they fail", async () => {
    const { programs, begun, run, end } = open();
    const controller = new AbortController();
    const [a, b, c] = [run("a"), run("b"), run("c", {}, controller.signal)];
    const d = run("d");
    controller.abort("no longer");
    await expect(c).rejects.toBe("no longer");
    await expect(run("e", {}, controller.signal)).rejects.toBe("no longer");
    end("a").reject(new RangeError("failed"));
    await expect(a).rejects.toThrow("failed");
    await setImmediate();
    expect(begun).toEqual(["a", "b", "d"]);
    for (const name of ["b", "d"]) end(name).resolve(name);
    expect(await Promise.all([b, d])).toEqual(["b", "d"]);
    expect(programs.size).toBe(0);
  });
});
