// Calls of one model that share something: no caller's abort, and no disposal, reaches another's call.
import { getEventListeners } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";
import { FlowTurbo, type GenerateOptions } from "flowturbo";
import { expect, it } from "vitest";

const picture: GenerateOptions = { prompt: "a red circle", width: 64, height: 64, blocks: "H1", guidanceScale: 1 };

it("the fit of the preview's colours is nobody's own: an abort at any moment leaves the other call alone", async () => {
  for (const delay of [0, 5, 10, 20, 30, 50, 80, 120]) {
    await using model = await FlowTurbo.load(undefined, { measureCosts: false });
    const controller = new AbortController();
    const reason = new Error("gone");
    const first = model.generate({ ...picture, preview: "fast", signal: controller.signal }).catch((error) => error);
    const second = model.generate({ ...picture, preview: "fast", seed: 1 });
    await sleep(delay);
    controller.abort(reason);
    expect((await second).images).toHaveLength(1);
    const outcome = await first;
    if (outcome instanceof Error) expect(outcome).toBe(reason);
    // And the map is there for whoever comes next.
    expect((await model.generate({ ...picture, preview: "fast" })).images).toHaveLength(1);
  }
});

it("any number of calls share one signal: one listener, no warning of Node's", async () => {
  const warnings: Error[] = [];
  const listen = (warning: Error) => warnings.push(warning);
  process.on("warning", listen);
  await using model = await FlowTurbo.load(undefined, { measureCosts: false });
  const controller = new AbortController();
  const { signal } = controller;
  const calls = Array.from({ length: 40 }, (_, seed) =>
    model.generate({ ...picture, seed, ...(seed % 2 && { deadlineMs: 600_000 }), signal }).catch((error) => error),
  );
  await sleep(20);
  expect(getEventListeners(signal, "abort").length).toBeLessThanOrEqual(1);
  await calls[0];
  controller.abort(new Error("enough"));
  await Promise.all(calls);
  // Warnings are emitted in a later turn.
  await sleep(0);
  process.off("warning", listen);
  expect(warnings).toEqual([]);
  expect(getEventListeners(signal, "abort")).toHaveLength(0);
});

it("dispose waits for a measurement under way, which ends as if nobody had disposed", async () => {
  const model = await FlowTurbo.load(undefined, { measureCosts: false });
  let disposed: Promise<void> | null = null;
  const ended: string[] = [];
  const measuring = model.profile({
    ...{ sizes: [{ width: 32, height: 32 }], batches: [1], rounds: 1 },
    onProgress: () => {
      disposed ??= model.dispose().then(() => void ended.push("disposed"));
    },
  });
  const costs = await measuring;
  ended.push("measured");
  expect(costs.entries.map(({ graph }) => graph)).toContain("host");
  await disposed;
  expect(ended).toEqual(["measured", "disposed"]);
  await expect(model.profile()).rejects.toThrow(/disposed/);
});
