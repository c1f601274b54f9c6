// What the health of a model says after what may befall its runtime, and who is told.
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { DeviceLostError, RuntimeDiedError } from "../../lib/errors.js";
import { HealthMonitor } from "../../lib/serving/health.js";

beforeEach(() => {
  vi.useFakeTimers();
});
afterEach(() => {
  vi.useRealTimers();
});

const died = (message = "It died.") => new RuntimeDiedError(message, null, "SIGKILL");

it("is ready and not degraded while nothing happens", () => {
  expect(new HealthMonitor().report(null, null)).toEqual({
    ...{ live: true, ready: true, degraded: false, reasons: [], restarts: 0, lastError: null, oldestLaunch: null },
  });
});

it("is degraded from a loss until a minute after the restart, and ready all the time", () => {
  const monitor = new HealthMonitor();
  monitor.lost(died());
  expect(monitor.report(null, null)).toMatchObject({
    ready: true,
    degraded: true,
    reasons: ["The runtime was lost; the next call starts it again: It died."],
    lastError: { code: "ERR_FLOWTURBO_RUNTIME_DIED", message: "It died.", at: Date.now() },
  });
  monitor.restarted();
  vi.advanceTimersByTime(59_000);
  expect(monitor.report(null, null)).toMatchObject({
    ...{ ready: true, degraded: true, restarts: 1, reasons: ["The runtime was started again 59 s ago."] },
  });
  vi.advanceTimersByTime(2000);
  expect(monitor.report(null, null)).toMatchObject({ degraded: false, reasons: [], restarts: 1 });
  expect(monitor.counters).toEqual({ restarts: 1, slowLaunches: 0 });
});

it("is not ready where the runtime is lost again before it ran, until it runs", () => {
  const monitor = new HealthMonitor();
  monitor.lost(died());
  monitor.lost(died("It cannot start."));
  expect(monitor.report(null, null)).toMatchObject({
    ready: false,
    reasons: ["The runtime could not be started again: It cannot start."],
  });
  monitor.restarted();
  expect(monitor.report(null, null).ready).toBe(true);
  expect(monitor.report(null, "disposed")).toMatchObject({ ready: false, degraded: true });
});

it("is neither live nor ready once the GPU is lost, whatever comes", () => {
  const monitor = new HealthMonitor();
  monitor.lost(new DeviceLostError("This process has lost the GPU."));
  const dead = { live: false, ready: false, degraded: true, reasons: ["This process has lost the GPU."] };
  expect(monitor.report(null, null)).toMatchObject({ ...dead, restarts: 0 });
  monitor.lost(new DeviceLostError("Again."));
  monitor.restarted();
  vi.advanceTimersByTime(3_600_000);
  expect(monitor.report(null, null)).toMatchObject(dead);
});

it("is live, and ready, where a GPU was lost with the process that used it", () => {
  const monitor = new HealthMonitor();
  const error = new DeviceLostError("Its process has lost the GPU.", { permanent: false });
  monitor.failed(error);
  monitor.lost(error);
  expect(monitor.report(null, null)).toMatchObject({
    ...{ live: true, ready: true, degraded: true, lastError: { code: "ERR_FLOWTURBO_DEVICE_RESET" } },
    reasons: ["The runtime was lost; the next call starts it again: Its process has lost the GPU."],
  });
  monitor.restarted();
  expect(monitor.report(null, null)).toMatchObject({ live: true, ready: true, restarts: 1 });
});

it("says since when the runtime is silent, and which launch is slow, while that is so", () => {
  const monitor = new HealthMonitor();
  monitor.silent(4200);
  expect(monitor.report(null, null).reasons).toEqual(["The runtime has not answered for 4 s."]);
  monitor.silent(null);
  const launch = { graph: "predict", size: "64x64", batch: 1, milliseconds: 12_000, usualMs: 20 };
  monitor.slow(launch);
  const later = { ...launch, milliseconds: 14_000 };
  expect(monitor.report(later, null)).toMatchObject({
    degraded: true,
    oldestLaunch: later,
    reasons: ['A launch of "predict" runs for 14 s; it usually takes 20 ms.'],
  });
  // The next launch of the graph is not slow.
  expect(monitor.report({ ...launch, milliseconds: 10 }, null).degraded).toBe(false);
  expect(monitor.counters.slowLaunches).toBe(1);
});

it("tells listeners, whose errors disturb nobody", async () => {
  const monitor = new HealthMonitor();
  const told: unknown[] = [];
  monitor.events.on("lost", ({ error }) => told.push(["lost", error.message]));
  monitor.events.on("restart", ({ restarts, error }) => told.push(["restart", restarts, error.message]));
  monitor.events.on("slow", ({ graph }) => told.push(["slow", graph]));
  monitor.lost(died());
  monitor.restarted();
  monitor.slow({ graph: "predict", size: "64x64", batch: 1, milliseconds: 12_000, usualMs: 20 });
  // Not in the middle of what the runtime does.
  expect(told).toEqual([]);
  await Promise.resolve();
  expect(told).toEqual([["lost", "It died."], ["restart", 1, "It died."], ["slow", "predict"]]); // biome-ignore format: one line
});
