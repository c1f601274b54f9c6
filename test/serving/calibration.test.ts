// Measuring: what callers wait for together, what is measured between requests, and on which values.
import { mkdtempSync, rmSync } from "node:fs";
import os from "node:os";
import path from "node:path";
import { setImmediate } from "node:timers/promises";
import { afterAll, describe, expect, it } from "vitest";
import { float32 } from "../../lib/common/tensor.js";
import type { Constant, Launch, Program } from "../../lib/program/program.js";
import { validateProgram } from "../../lib/program/validate.js";
import type { RunOptions } from "../../lib/runtimes/runtime.js";
import { Calibration } from "../../lib/serving/calibration.js";
import { CostTable } from "../../lib/serving/costs.js";
import type { Terms } from "../../lib/serving/prediction.js";
import { CostStore } from "../../lib/serving/store.js";
import { SimulatedRuntime, shapesOf } from "./simulated.js";

const cache = mkdtempSync(path.join(os.tmpdir(), "flowturbo-calibration-"));
afterAll(() => rmSync(cache, { recursive: true, force: true }));

/** Decodes latents of a size; they are a slot. */
function template(size: string): Program {
  const slot: Constant = { kind: "slot", dtype: "float32", shape: [1, 4, 2, 2] };
  const image = { dtype: "float32", shape: [1, 3, 4, 4] } as const;
  return {
    registers: { image },
    constants: { latents: slot },
    instructions: [
      {
        ...{ op: "launch", graph: "vae_decoder", inputs: { latents: "latents" }, outputs: { image: "image" } },
        ...{ sharing: { size }, label: { kind: "decode", name: "decode" } },
      },
    ],
    results: ["image"],
  };
}

const terms = (signal?: AbortSignal): Terms => ({
  ...{ priority: 0, prefer: "admission", arrival: 0, deadlineMs: 1000, pictures: 1, size: "4x4", pin: null, signal },
});
const candidates = (...sizes: string[]) =>
  sizes.map((size) => ({ text: size, demands: [{ program: template(size), rows: 1 }] }));

/** A runtime whose runs end when they are told to. */
function open() {
  const runtime = new SimulatedRuntime();
  const run = runtime.run.bind(runtime);
  const programs: Program[] = [];
  const ends: { resolve(): void; reject(error: unknown): void }[] = [];
  runtime.run = async (program: Program, options: RunOptions = {}) => {
    programs.push(program);
    await new Promise<void>((resolve, reject) => ends.push({ resolve, reject }));
    options.signal?.throwIfAborted();
    return run(program, options);
  };
  const costs = new CostTable();
  const calibration = new Calibration(
    runtime,
    costs,
    { batches: [1], background: true, graph: shapesOf, store: new CostStore("key", cache), about: {} },
    async () => {},
  );
  /** Waits for a run to begin, and ends it. */
  const end = async (error?: unknown) => {
    while (ends.length === 0) await setImmediate();
    const { resolve, reject } = ends.shift()!;
    if (error === undefined) resolve();
    else reject(error);
  };
  /** Runs that begin within some turns of the event loop. */
  const begun = async () => {
    for (let turn = 0; turn < 10; turn++) await setImmediate();
    return ends.length;
  };
  return { calibration, costs, programs, end, begun };
}

/** One run that is not counted and three that are. */
const runsEach = 4;

describe("before a promise", () => {
  it("callers wait for the same measuring, and the abort of one does not reach the others", async () => {
    const { calibration, costs, programs, end, begun } = open();
    const controller = new AbortController();
    const first = calibration.learn(candidates("a"), terms(controller.signal));
    await begun();
    const second = calibration.learn(candidates("a", "b"), terms());
    await begun();
    controller.abort(new Error("enough"));
    await expect(first).rejects.toThrow("enough");
    for (let run = 0; run < 2 * runsEach; run++) await end();
    await second;
    expect(await begun()).toBe(0);
    expect(programs).toHaveLength(2 * runsEach);
    for (const size of ["a", "b"]) expect(costs.get("vae_decoder", size, 1)).toMatchObject({ runs: 3 });
    // Nothing is left to learn.
    await calibration.learn(candidates("a", "b"), terms());
  });

  it("nothing more is measured when every caller has left, and the next caller begins again", async () => {
    const { calibration, costs, programs, end, begun } = open();
    const controllers = [new AbortController(), new AbortController()];
    const calls = controllers.map(({ signal }) => calibration.learn(candidates("a"), terms(signal)));
    expect(await begun()).toBe(1);
    for (const controller of controllers) controller.abort(new Error("enough"));
    for (const call of calls) await expect(call).rejects.toThrow("enough");
    const next = calibration.learn(candidates("a"), terms());
    for (let run = 0; run < 1 + runsEach; run++) await end();
    await next;
    expect(await begun()).toBe(0);
    expect(programs).toHaveLength(1 + runsEach);
    expect(costs.get("vae_decoder", "a", 1)).toMatchObject({ runs: 3 });
  });

  it("a failure reaches every caller, and the next one measures again", async () => {
    const { calibration, costs, end } = open();
    const calls = [0, 1].map(() => calibration.learn(candidates("a"), terms()));
    await end(new RangeError("failed"));
    for (const call of calls) await expect(call).rejects.toThrow("failed");
    const next = calibration.learn(candidates("a"), terms());
    for (let run = 0; run < runsEach; run++) await end();
    await next;
    expect(costs.get("vae_decoder", "a", 1)).toBeDefined();
  });

  it("the end of the model waits for a launch under way, whose caller may have left", async () => {
    const { calibration, end, begun } = open();
    const controller = new AbortController();
    const call = calibration.learn(candidates("a"), terms(controller.signal));
    expect(await begun()).toBe(1);
    controller.abort(new Error("enough"));
    await expect(call).rejects.toThrow("enough");
    let isStopped = false;
    const stopped = calibration.stop().then(() => {
      isStopped = true;
    });
    await begun();
    expect(isStopped).toBe(false);
    await end();
    await stopped;
  });
});

it("what has been asked for is measured between requests at every batch, and stored", async () => {
  const { calibration, costs, end } = open();
  calibration.remember(candidates("background"));
  calibration.rest();
  // One run that is not counted and seven that are.
  for (let run = 0; run < 8; run++) await end();
  while (!costs.get("vae_decoder", "background", 1)) await setImmediate();
  await calibration.stop();
  const stored = await new CostStore("key", cache).read();
  expect(stored.filter(({ size }) => size === "background")).toMatchObject([
    { graph: "vae_decoder", batch: 1, runs: 7 },
  ]);
});

it("slots are measured with made-up values, other constants that are the same for all rows with their own", async () => {
  const { calibration, programs, end } = open();
  const position = { kind: "value", tensor: float32([1, 4, 4], new Float32Array(16).fill(7)) } as const;
  const slot = (...shape: number[]): Constant => ({ kind: "slot", dtype: "float32", shape });
  const register = (...shape: number[]) => ({ dtype: "float32", shape }) as const;
  const names = ["x", "velocity", "context", "pooled", "position_embedding", "sigma", "a_in", "a_old", "a_new"];
  const shapes = { x: [1, 4, 2, 2], velocity: [2, 4, 2, 2], context: [2, 3, 5], pooled: [2, 20] };
  const launch: Launch = {
    ...{ op: "launch", graph: "predict.guidance", sharing: { size: "a" }, label: { kind: "step", name: "step" } },
    inputs: Object.fromEntries([...names, "guidance"].map((name) => [name, name])),
    outputs: { x_next: "x_next", velocity_next: "velocity_next" },
  };
  const program: Program = {
    registers: { x_next: register(...shapes.x), velocity_next: register(...shapes.velocity) },
    constants: {
      ...Object.fromEntries(["sigma", "a_in", "a_old", "a_new", "guidance"].map((name) => [name, slot(1)])),
      ...Object.fromEntries(Object.entries(shapes).map(([name, shape]) => [name, slot(...shape)])),
      position_embedding: position,
    },
    ...{ instructions: [launch], results: ["x_next"] },
  };
  const learnt = calibration.learn([{ text: "H1", demands: [{ program, rows: 1 }] }], { ...terms(), pin: 2 });
  for (let run = 0; run < runsEach; run++) await end();
  await learnt;
  const [measured] = programs;
  validateProgram(measured!, () => true);
  expect(Object.values(measured!.constants).map(({ kind }) => kind)).not.toContain("slot");
  expect(measured!.constants["in position_embedding"]).toBe(position);
  expect(measured!.constants["in velocity"]).toMatchObject({ tensor: { shape: [4, 4, 2, 2] } });
});
