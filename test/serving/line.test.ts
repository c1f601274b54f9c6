// Whole programs in a line: who goes first, how many the runtime has, what becomes of those behind a lost device.
import { setImmediate } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { DeviceLostError } from "../../lib/errors.js";
import { Line } from "../../lib/serving/line.js";
import type { Priority } from "../../lib/serving/priority.js";

let sequence = 0;
const claim = (extra: Partial<Priority> = {}): Priority => ({
  ...{ priority: 0, deadline: null, arrival: performance.now(), sequence: sequence++ },
  ...extra,
});

/** Programs that end when they are told to. */
function open() {
  const line = new Line();
  const begun: string[] = [];
  const ends = new Map<string, { resolve(value: string): void; reject(error: unknown): void }>();
  const run = (name: string, extra: Partial<Priority> = {}, signal = new AbortController().signal) =>
    line.run(claim(extra), signal, () => {
      begun.push(name);
      return new Promise<string>((resolve, reject) => ends.set(name, { resolve, reject }));
    });
  return { line, begun, run, end: (name: string) => ends.get(name)! };
}

describe("programs in a line", () => {
  it("run two at a time, the most urgent of those who wait first", async () => {
    const { line, begun, run, end } = open();
    const all = [run("a"), run("b"), run("late"), run("urgent", { priority: 1 }), run("due", { deadline: 0 })];
    await setImmediate();
    expect(begun).toEqual(["a", "b"]);
    expect(line.length).toBe(5);
    let idle = false;
    const ended = line.idle().then(() => {
      idle = true;
    });
    for (const name of ["b", "a", "due", "urgent", "late"]) {
      expect(idle).toBe(false);
      // In any order: who runs is told by name.
      await expect.poll(() => begun.includes(name)).toBe(true);
      end(name).resolve(name);
    }
    expect(await Promise.all(all)).toEqual(["a", "b", "late", "urgent", "due"]);
    expect(begun).toEqual(["a", "b", "urgent", "due", "late"]);
    await ended;
    expect(line.length).toBe(0);
    await line.idle();
  });

  it("leave it when they are aborted, and make room when they fail", async () => {
    const { line, begun, run, end } = open();
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
    expect(line.length).toBe(0);
  });

  it("start again if the device was lost under another, but not under themselves", async () => {
    const { begun, run, end } = open();
    const [a, b, c] = [run("a"), run("b"), run("c")];
    await setImmediate();
    end("a").reject(new DeviceLostError("lost"));
    await expect(a).rejects.toThrow("lost");
    end("b").reject(new DeviceLostError("lost"));
    await setImmediate();
    expect(begun).toEqual(["a", "b", "c", "b"]);
    end("b").reject(new DeviceLostError("lost again"));
    await expect(b).rejects.toThrow("lost again");
    end("c").resolve("c");
    expect(await c).toBe("c");
  });
});
