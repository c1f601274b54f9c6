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
function open(costs: Record<string, number>, isWarm = true) {
  const slow: SlowLaunch[] = [];
  const hung: SlowLaunch[] = [];
  const watch = new LaunchWatch({
    watchdogMs: 1000,
    costOf: ({ graph }) => costs[graph] ?? null,
    isWarm: () => isWarm,
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
  watch.at(1, 1);
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

it("gives the first launch of a kind sixty times as long, and one of unknown cost no end", () => {
  for (const cost of [20, undefined]) {
    const { watch, slow, hung } = open(cost ? { first: cost } : {}, false);
    watch.submitted(1, [launch("first")]);
    watch.begun(1);
    vi.advanceTimersByTime(60_000);
    expect(slow).toEqual([]);
    vi.advanceTimersByTime(1000);
    expect(slow).toMatchObject([{ graph: "first", usualMs: cost ?? null }]);
    vi.advanceTimersByTime(238_000);
    expect(hung).toEqual([]);
    vi.advanceTimersByTime(3_600_000);
    expect(hung).toHaveLength(cost ? 1 : 0);
    expect(watch.running!.milliseconds).toBeCloseTo(3_899_000, -3);
    watch.over(1);
  }
});

it("counts no time in which nothing could look, and never tells both at once", () => {
  const { watch, slow, hung } = open({ predict: 20 });
  watch.submitted(1, [launch("predict")]);
  watch.begun(1);
  vi.advanceTimersByTime(400);
  // The process stops for an hour, and with it the runtime: one timer is due at the end, not thousands.
  vi.setSystemTime(Date.now() + 3_600_000);
  const now = performance.now();
  vi.spyOn(performance, "now").mockImplementation(() => now + 3_600_000);
  vi.advanceTimersByTime(200);
  expect([slow, hung]).toEqual([[], []]);
  expect(watch.running!.milliseconds).toBeLessThan(1000);
  vi.restoreAllMocks();
});

it("does not hold a short launch for a long one behind it that the runtime says it is at", () => {
  const { watch, slow, hung } = open({ blend: 1, predict: 5600 });
  watch.submitted(1, [launch("blend"), launch("predict"), launch("predict")]);
  watch.begun(1);
  // The first one's report is held back; the runtime says where it is.
  watch.at(1, 1);
  vi.advanceTimersByTime(50_000);
  expect([slow, hung]).toEqual([[], []]);
  expect(watch.running!.graph).toBe("predict");
  // A report of the first that comes late changes nothing.
  watch.at(1, 1);
  expect(watch.running!.milliseconds).toBeGreaterThan(49_000);
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
  watch.at(2, 1);
  vi.advanceTimersByTime(900);
  expect(watch.running).toMatchObject({ graph: "decode", milliseconds: 900 });
  expect(slow).toEqual([]);
  // All that it has was reported: it only has to end.
  watch.at(2, 2);
  expect(watch.running).toBeNull();
  vi.advanceTimersByTime(60_000);
  watch.begun(7);
  watch.at(7, 1);
  watch.over(7);
  watch.over(2);
  expect(slow).toEqual([]);
  expect(vi.getTimerCount()).toBe(0);
});
