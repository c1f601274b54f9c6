// The watch over the launch that runs, on a clock of the test's own.
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import type { AssignedLaunch } from "../../lib/serving/scheduler.js";
import { LaunchWatch, type SlowLaunch } from "../../lib/serving/watch.js";

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

const launch = (graph: string): AssignedLaunch => ({ graph, size: "64x64", batch: 1, rows: [] });
function open(costs: Record<string, number>) {
  const slow: SlowLaunch[] = [];
  const hung: SlowLaunch[] = [];
  const watch = new LaunchWatch({
    watchdogMs: 1000,
    costOf: ({ graph }) => costs[graph] ?? null,
    onSlow: (launch) => slow.push(launch),
    onHung: (launch) => hung.push(launch),
  });
  return { watch, slow, hung };
}

it("tells once that a launch is slow, and once that it hangs", () => {
  const { watch, slow, hung } = open({ predict: 20 });
  watch.submitted(1, [launch("predict"), launch("predict")]);
  watch.begun(1);
  vi.advanceTimersByTime(900);
  watch.made(1, 1);
  vi.advanceTimersByTime(1000);
  expect(slow).toEqual([]);
  vi.advanceTimersByTime(3000);
  expect(slow).toHaveLength(1);
  expect(slow[0]).toMatchObject({ graph: "predict", size: "64x64", batch: 1, usualMs: 20 });
  expect(slow[0]!.milliseconds).toBeGreaterThan(1000);
  expect(hung).toEqual([]);
  vi.advanceTimersByTime(60_000);
  expect(slow).toHaveLength(1);
  expect(hung).toHaveLength(1);
  expect(hung[0]!.milliseconds).toBeGreaterThan(5000);
  watch.over(1);
  expect(watch.running).toBeNull();
  expect(vi.getTimerCount()).toBe(0);
});

it("allows ten times the cost, and five times that, where that is more than the limit", () => {
  const { watch, slow, hung } = open({ large: 30_000 });
  watch.submitted(1, [launch("large")]);
  watch.begun(1);
  vi.advanceTimersByTime(300_000);
  expect(slow).toEqual([]);
  vi.advanceTimersByTime(1000);
  expect(slow).toHaveLength(1);
  vi.advanceTimersByTime(1_199_000);
  expect(hung).toEqual([]);
  vi.advanceTimersByTime(1000);
  expect(hung).toHaveLength(1);
});

it("says nothing of a launch whose cost is not known, and shows how long it runs", () => {
  const { watch, slow, hung } = open({});
  watch.submitted(1, [launch("unknown")]);
  watch.begun(1);
  vi.advanceTimersByTime(3_600_000);
  expect([slow, hung]).toEqual([[], []]);
  expect(watch.running).toEqual({ graph: "unknown", size: "64x64", batch: 1, milliseconds: 3_600_000, usualMs: null });
});

it("times a submission from when the runtime begins with it, and each launch from the report before", () => {
  const { watch, slow } = open({ predict: 20, decode: 20 });
  watch.submitted(1, [launch("predict")]);
  watch.submitted(2, [launch("decode"), launch("decode")]);
  // The runtime may be at work on something that is no submission.
  vi.advanceTimersByTime(60_000);
  expect(watch.running).toBeNull();
  watch.begun(1);
  expect(watch.running).toMatchObject({ graph: "predict", milliseconds: 0 });
  for (let round = 0; round < 3; round++) vi.advanceTimersByTime(300);
  watch.over(1);
  vi.advanceTimersByTime(60_000);
  expect(watch.running).toBeNull();
  watch.begun(2);
  vi.advanceTimersByTime(900);
  watch.made(2, 1);
  vi.advanceTimersByTime(900);
  expect(watch.running).toMatchObject({ graph: "decode", milliseconds: 900 });
  expect(slow).toEqual([]);
  // All that it has was reported: it only has to end.
  watch.made(2, 2);
  expect(watch.running).toBeNull();
  vi.advanceTimersByTime(60_000);
  watch.begun(7);
  watch.made(7, 1);
  watch.over(7);
  watch.over(2);
  expect(slow).toEqual([]);
  expect(vi.getTimerCount()).toBe(0);
});
