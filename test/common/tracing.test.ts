// A tracing channel by itself: its order of events, and platforms without any. What models publish is in test/generation/traces.test.ts.
import diagnostics from "node:diagnostics_channel";
import { afterEach, describe, expect, it, vi } from "vitest";
import { Tracing } from "../../lib/common/tracing.js";

afterEach(() => {
  vi.doUnmock("node:diagnostics_channel");
  vi.resetModules();
});

describe("a tracing channel", () => {
  it("has subscribers if any of its events has", () => {
    const tracing = new Tracing("test:one");
    expect(tracing.hasSubscribers).toBe(false);
    for (const event of ["start", "end", "asyncStart", "asyncEnd", "error"]) {
      const seen = () => {};
      diagnostics.subscribe(`tracing:test:one:${event}`, seen);
      expect(tracing.hasSubscribers, event).toBe(true);
      diagnostics.unsubscribe(`tracing:test:one:${event}`, seen);
      expect(tracing.hasSubscribers, event).toBe(false);
    }
  });

  it("follows what ends elsewhere, once", async () => {
    const seen: [string, object][] = [];
    for (const event of ["start", "end", "asyncEnd", "error"])
      diagnostics.subscribe(`tracing:test:two:${event}`, (context) => seen.push([event, { ...(context as object) }]));
    const tracing = new Tracing("test:two");
    const span = tracing.begin({ name: "a" });
    expect(seen.map(([event]) => event)).toEqual(["start", "end"]);
    const error = new Error("its own");
    span.fail(error);
    span.end();
    await new Promise(setImmediate);
    expect(seen.slice(2)).toEqual([
      ["error", { name: "a", error }],
      ["asyncEnd", { name: "a", error }],
    ]);
    seen.length = 0;
    tracing.over({ name: "b" });
    expect(seen.map(([event]) => event)).toEqual(["start", "end"]);
  });
});

it("a platform without tracing channels has no tracing, and does the work", async () => {
  vi.doMock("node:diagnostics_channel", () => ({ default: {} }));
  vi.resetModules();
  const { Tracing: Without } = await import("../../lib/common/tracing.js");
  expect(Without).not.toBe(Tracing);
  const tracing = new Without("test:three");
  expect(tracing.hasSubscribers).toBe(false);
  expect(await tracing.around({}, async () => 5)).toBe(5);
  tracing.begin({}).end();
  tracing.begin({}).fail(new Error("its own"));
  tracing.over({});
  await new Promise(setImmediate);
});
