import { getEventListeners } from "node:events";
import { describe, expect, it } from "vitest";
import { onAbort, SharedTask, untilAborted } from "../../lib/common/abort.js";

const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );

describe("onAbort", () => {
  it("puts one listener on a signal, whatever number follows it, and none when all have stopped", () => {
    const controller = new AbortController();
    const { signal } = controller;
    const count = () => getEventListeners(signal, "abort").length;
    let acts = 0;
    const act = () => {
      acts++;
    };
    const stops = Array.from({ length: 100 }, () => onAbort(signal, act));
    expect(count()).toBe(1);
    for (const stop of stops.slice(10)) stop();
    expect(count()).toBe(1);
    controller.abort();
    expect(acts).toBe(10);
    expect(count()).toBe(0);

    const other = new AbortController().signal;
    const [first, second] = [onAbort(other, act), onAbort(other, act)];
    first();
    first();
    expect(getEventListeners(other, "abort")).toHaveLength(1);
    second();
    expect(getEventListeners(other, "abort")).toHaveLength(0);
    onAbort(other, act)();
    expect(getEventListeners(other, "abort")).toHaveLength(0);
  });

  it("calls all that follow, whatever one of them throws, which is an uncaught error as from a listener", async () => {
    const before = process.listeners("uncaughtException");
    process.removeAllListeners("uncaughtException");
    const uncaught = new Promise((resolve) => process.once("uncaughtException", resolve));
    try {
      const controller = new AbortController();
      let acts = 0;
      onAbort(controller.signal, () => {
        throw new Error("a follower's own");
      });
      onAbort(controller.signal, () => acts++);
      controller.abort();
      expect(acts).toBe(1);
      expect(await uncaught).toMatchObject({ message: "a follower's own" });
    } finally {
      for (const listener of before) process.on("uncaughtException", listener);
    }
  });

  it("acts at once on a signal that has aborted, and does nothing without one", () => {
    let acts = 0;
    onAbort(AbortSignal.abort(), () => acts++)();
    onAbort(undefined, () => acts++)();
    expect(acts).toBe(1);
  });
});

it("untilAborted settles as the work does, or rejects with the reason", async () => {
  const controller = new AbortController();
  expect(await untilAborted(Promise.resolve(7), controller.signal)).toBe(7);
  expect(await rejection(untilAborted(Promise.reject(new Error("no")), controller.signal))).toMatchObject({ message: "no" }); // biome-ignore format: one line
  const waiting = untilAborted(new Promise(() => {}), controller.signal);
  const reason = new Error("enough");
  controller.abort(reason);
  expect(await rejection(waiting)).toBe(reason);
});

describe("SharedTask", () => {
  const open = () => {
    let resolve: (value: number) => void = () => {};
    let own: AbortSignal | null = null;
    const task = new SharedTask<number>((signal) => {
      own = signal;
      return new Promise((settle) => {
        resolve = settle;
      });
    });
    return { task, resolve: (value: number) => resolve(value), signal: () => own! };
  };

  it("goes on while one caller waits, whoever came first", async () => {
    const { task, resolve, signal } = open();
    const first = new AbortController();
    const [leaving, staying] = [task.join(first.signal), task.join()];
    const reason = new Error("gone");
    first.abort(reason);
    expect(await rejection(leaving)).toBe(reason);
    expect([signal().aborted, task.abandoned]).toEqual([false, false]);
    resolve(5);
    expect(await staying).toBe(5);
    // A result that is there stays there.
    expect(await task.join()).toBe(5);
    expect(task.abandoned).toBe(false);
  });

  it("is aborted when every caller has left", async () => {
    const { task, signal } = open();
    const controllers = [new AbortController(), new AbortController()];
    const calls = controllers.map(({ signal }) => rejection(task.join(signal)));
    controllers[0]!.abort();
    await calls[0];
    expect(signal().aborted).toBe(false);
    controllers[1]!.abort();
    await calls[1];
    expect([signal().aborted, task.abandoned]).toEqual([true, true]);
  });

  it("gives a failure to every caller, and asks nobody whose signal has aborted", async () => {
    const task = new SharedTask(() => Promise.reject(new Error("broken")));
    expect(await Promise.all([rejection(task.join()), rejection(task.join())])).toMatchObject([
      { message: "broken" },
      { message: "broken" },
    ]);
    const reason = new Error("before");
    expect(await rejection(task.join(AbortSignal.abort(reason)))).toBe(reason);
  });
});
