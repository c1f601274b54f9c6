// Calls of one model that share something: no caller's abort, and no disposal, reaches another's call.
import { getEventListeners } from "node:events";
import { setImmediate } from "node:timers/promises";
import { afterAll, beforeAll, beforeEach, describe, expect, it, vi } from "vitest";
import { FlowTurbo } from "../../lib/flowturbo.js";
import type { GenerateOptions } from "../../lib/model.js";
import type { Program } from "../../lib/program/program.js";
import type { OnnxRuntimeOptions } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import type { RunOptions } from "../../lib/runtimes/runtime.js";
import { type Bundles, bundle } from "../runtimes/build.js";

type Moment = "is given to the runtime" | "has been given" | "has been launched";

/** What the tests tell the runtime, and what it tells them. */
const watched = vi.hoisted(() => ({
  host: undefined as URL | undefined,
  /** Programs of the fit of the preview's colours that have begun: the only ones that run outside a workspace. */
  fits: 0,
  onFit: (_moment: Moment) => {},
}));

vi.mock("../../lib/runtimes/onnxruntime/onnxruntime.js", async (original) => {
  const { OnnxRuntime, ...rest } = await original<typeof import("../../lib/runtimes/onnxruntime/onnxruntime.js")>();
  return {
    ...rest,
    OnnxRuntime: class extends OnnxRuntime {
      constructor(options: OnnxRuntimeOptions) {
        super({ ...options, host: watched.host });
      }
      override run(program: Program, options: RunOptions = {}) {
        if (!program.instructions.some((each) => each.op === "launch" && each.graph === "vae_encoder"))
          return super.run(program, options);
        watched.fits++;
        watched.onFit("is given to the runtime");
        const outcome = super.run(program, { ...options, onLaunch: () => watched.onFit("has been launched") });
        watched.onFit("has been given");
        return outcome;
      }
    },
  };
});

let bundles: Bundles;
beforeAll(async () => {
  bundles = await bundle();
  watched.host = bundles.host;
});
afterAll(() => bundles.remove());

const picture: GenerateOptions = { prompt: "a red circle", width: 64, height: 64, blocks: "H1", guidanceScale: 1 };
const load = () => FlowTurbo.load(undefined, { measureCosts: false });

describe("the fit of the preview's colours", () => {
  const preview = "fast";
  const programs = 8;
  const reason = new Error("gone");
  beforeEach(() => {
    watched.fits = 0;
    watched.onFit = () => {};
  });
  /** Calls `act` once, at that moment of a program of the fit. */
  const at = (count: number, moment: Moment, act: () => void) => {
    watched.onFit = (now) => {
      if (watched.fits === count && now === moment) act();
    };
  };
  const moments = (["is given to the runtime", "has been given", "has been launched"] as const).flatMap((moment) =>
    [1, 2, programs].map((count) => [count, moment] as const),
  );

  it.each(moments)("outlives the abort of one of two callers, when program %i %s", async (count, moment) => {
    await using model = await load();
    const controller = new AbortController();
    at(count, moment, () => controller.abort(reason));
    const first = model.generate({ ...picture, preview, signal: controller.signal }).catch((error) => error);
    const second = model.generate({ ...picture, preview, seed: 1 });
    expect((await second).images).toHaveLength(1);
    expect(await first).toBe(reason);
    // One fit served them, and serves later calls.
    expect((await model.generate({ ...picture, preview })).images).toHaveLength(1);
    expect(watched.fits).toBe(programs);
  });

  it("ends when all callers have left, and the next call begins it again", async () => {
    await using model = await load();
    const controller = new AbortController();
    const { signal } = controller;
    at(2, "has been given", () => controller.abort(reason));
    const calls = [0, 1].map((seed) => model.generate({ ...picture, preview, seed, signal }).catch((error) => error));
    expect(await Promise.all(calls)).toEqual([reason, reason]);
    expect((await model.generate({ ...picture, preview })).images).toHaveLength(1);
    expect(watched.fits).toBe(2 + programs);
  });
});

it("any number of calls share one signal: one listener, no warning of Node's", async () => {
  const warnings: Error[] = [];
  const listen = (warning: Error) => warnings.push(warning);
  process.on("warning", listen);
  await using model = await load();
  const controller = new AbortController();
  const { signal } = controller;
  const listeners = () => getEventListeners(signal, "abort").length;
  const seen = new Set<number>();
  const calls = (count: number) =>
    Array.from({ length: count }, (_, seed) =>
      model.generate({
        ...{ ...picture, seed, signal, ...(seed % 2 && { deadlineMs: 600_000 }) },
        onStep: () => seen.add(listeners()),
      }),
    );
  // Calls that end leave no listener.
  await Promise.all(calls(12));
  expect([...seen]).toEqual([1]);
  expect(listeners()).toBe(0);

  // Nor do those that are aborted, while they run or wait.
  const reason = new Error("enough");
  const many = calls(40).map((call) => call.catch((error) => error));
  expect(listeners()).toBe(1);
  await Promise.race(many);
  expect(listeners()).toBe(1);
  expect(model.stats().queue.waiting).toBeGreaterThan(0);
  controller.abort(reason);
  expect(await Promise.all(many)).toContain(reason);
  expect([...seen]).toEqual([1]);
  expect(listeners()).toBe(0);
  // Warnings are emitted in a later turn.
  await setImmediate();
  process.off("warning", listen);
  expect(warnings).toEqual([]);
});

it("dispose waits for a measurement under way, which ends as if nobody had disposed", async () => {
  const model = await load();
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
