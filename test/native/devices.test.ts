// A model on several simulated GPUs of different speeds, from load() to pictures: the shipped addon, one process, one copy of
// the weights on each device.
import path from "node:path";
import { afterEach, beforeEach, expect, it, vi } from "vitest";
import { DeviceLostError, MemoryError, OptionError } from "../../lib/errors.js";
import { embeddedModel, FlowTurbo } from "../../lib/flowturbo.js";
import { EngineCompiler } from "../../lib/runtimes/tensorrt/compile.js";
import type { EngineSource } from "../../lib/runtimes/tensorrt/engines.js";
import type * as Opening from "../../lib/runtimes/tensorrt/open.js";
import { formsOf } from "../support/model-forms.js";
import { leftOver, SimulatedEngines, simulated, simulatedFolder, simulatedRuntime } from "../support/simulated.js";
import { withValues } from "../support/with-values.js";
import { describeAddons, temporaryFolder } from "./support.js";

const { engines } = vi.hoisted(() => ({ engines: { source: null as EngineSource | null } }));
vi.mock("../../lib/runtimes/tensorrt/open.js", async (original) => {
  const { TensorRtRuntime } = await import("../../lib/runtimes/tensorrt/runtime.js");
  const { loadAddon } = await import("../support/addon.js");
  const { flavours } = await import("../../lib/runtimes/tensorrt/flavours.js");
  const openTensorRt: typeof Opening.openTensorRt = async (kind, options) => {
    const { tensorrtFolder: folder, capture, device: ordinal, listener, logger } = options;
    const runtime = new TensorRtRuntime({
      ...{ kind, capture, ordinal, listener, logger, addon: loadAddon(kind), engines: engines.source! },
      library: path.join(folder!, flavours[kind].library),
      parser: path.join(folder!, flavours[kind].parser),
    });
    const { device } = await runtime.start();
    return { runtime, device, version: "1" };
  };
  return { ...(await original<typeof Opening>()), openTensorRt };
});

const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );
const options = { prompt: "a red circle", blocks: "H1P2R1", guidanceScale: 4, seed: 7 } as const;
const pictures = { ...options, count: 8 } as const;

describeAddons("a model on several simulated devices", () => {
  const kind = "tensorrt" as const;
  const tensorrtFolder = path.join(simulatedFolder, kind);
  const load = async (more: Parameters<typeof FlowTurbo.load>[1] = {}) => {
    const formOf = await formsOf(embeddedModel);
    engines.source = new SimulatedEngines(temporaryFolder(), ({ name }) => formOf(name));
    const settings = { runtime: kind, tensorrtFolder, cache: temporaryFolder(), measureCosts: false };
    return FlowTurbo.load(embeddedModel, { ...settings, ...more });
  };
  const use = async (more: Parameters<typeof load>[0], body: (model: FlowTurbo) => Promise<void>) => {
    const model = await load(more);
    try {
      await body(model);
    } finally {
      simulated.let(-1);
      await model.dispose();
    }
  };
  const alone = async (request: Parameters<FlowTurbo["generate"]>[0]) => {
    const model = await load();
    const result = await withValues(model, request);
    await model.dispose();
    return result.pixels.data;
  };
  /** Kernels of each device. */
  const kernels = (count: number) => Array.from({ length: count }, (_, device) => simulated.kernelsOn(device));

  beforeEach(() => simulated.reset());
  afterEach(async () => {
    engines.source = null;
    expect(simulated.violation()).toBe("");
    await vi.waitFor(() => expect(leftOver()).toEqual({}));
    simulated.reset();
  });

  it.each([[[0]], [[0, 20_000]], [[0, 20_000, 20_000, 60_000]]])(
    "whose kernels take %j µs more draws the same pictures, and most where they are drawn soonest",
    async (delays) => {
      const expected = await alone(pictures);
      simulated.devices(delays);
      await use({ devices: "all" }, async (model) => {
        const names = delays.map((delay) => `Simulated GPU${delay > 0 ? ` ${delay}` : ""}`);
        const devices = names.map((name, number) => ({ number, name }));
        expect(model.runtime).toEqual({ name: kind, passedOver: [], devices, leftOut: [] });
        // Nothing is known yet: each device draws as many.
        expect((await withValues(model, pictures)).pixels.data).toEqual(expected);
        for (const count of kernels(delays.length)) expect(count).toBeGreaterThan(0);
        await model.profile({ batches: [1, 2, 4, 8], rounds: 3 });
        const tables = model.costs.devices!;
        expect(tables.map(({ number, name }) => ({ number, name }))).toEqual(devices);
        const cost = (device: number) => tables[device]!.estimate("predict.guidance", "64x64", 1)!;
        for (const [device, delay] of delays.entries()) expect(cost(device)).toBeGreaterThanOrEqual(delay / 1000);
        // Those of one kind keep one table.
        const folders = tables.map(({ folder }) => folder);
        expect(new Set(folders).size).toBe(new Set(names).size);
        const before = model.stats().devices!;
        expect((await withValues(model, pictures)).pixels.data).toEqual(expected);
        const rows = model.stats().devices!.map(({ rows }, device) => rows - before[device]!.rows);
        expect(Math.max(...rows)).toBe(rows[0]);
        expect(model.stats().devices!.map(({ lost }) => lost)).toEqual(delays.map(() => false));
      });
    },
  );

  it("draws with those that are named, and with CUDA graphs too", async () => {
    const expected = await alone(pictures);
    simulated.devices([0, 0, 0]);
    await use({ devices: [2, 0], capture: true }, async (model) => {
      expect(model.runtime.devices!.map(({ number }) => number)).toEqual([2, 0]);
      for (let run = 0; run < 3; run++) expect((await withValues(model, pictures)).pixels.data).toEqual(expected);
      const [first, second, third] = kernels(3);
      expect(second).toBe(0);
      expect(Math.min(first!, third!)).toBeGreaterThan(0);
      expect(simulated.counts().graphLaunches).toBeGreaterThan(8);
    });
  });

  it("has a copy of the weights on each device, and frees text encoders on all", async () => {
    simulated.devices([0, 0]);
    await use({ devices: "all", keepTextEncoders: false }, async (model) => {
      await model.generate({ ...pictures, prompt: ["a red circle", "a blue square"] });
      await vi.waitFor(() => expect(simulated.counts().engines).toBe(6));
    });
  });

  it.each([false, true])("goes on without a device that is lost while it draws (capture: %s)", async (capture) => {
    const requests = Array.from({ length: 6 }, (_, index) => ({ ...options, seed: 100 + index }));
    const expected: Uint8Array[] = [];
    for (const request of requests) expected.push((await alone(request)) as unknown as Uint8Array);
    simulated.devices([0, 0, 0]);
    await use({ devices: "all", capture }, async (model) => {
      await model.generate(pictures);
      const told: unknown[] = [];
      model.on("lost", ({ device }) => told.push(device));
      simulated.hold();
      const results = requests.map((request) => withValues(model, request));
      await vi.waitFor(() => expect(model.stats().running.requests).toBe(6));
      simulated.loseDevice(1, 700);
      simulated.let(-1);
      for (const [index, result] of results.entries()) expect((await result).pixels.data).toEqual(expected[index]);
      expect(told).toEqual([1]);
      expect(model.stats().devices!.map(({ lost }) => lost)).toEqual([false, true, false]);
      expect(model.stats().requests).toMatchObject({ completed: 7, failed: 0 });
      const health = model.health();
      expect(health).toMatchObject({ live: true, ready: true, degraded: true });
      expect(health.reasons).toEqual([
        expect.stringMatching(/^Device 1 \(Simulated GPU\): This process has lost the GPU/),
      ]);
      // It stays lost, for other models too, and takes no work.
      const before = simulated.kernelsOn(1);
      await model.generate(pictures);
      expect(simulated.kernelsOn(1)).toBe(before);
      expect(await rejection(load({ devices: [1] }))).toBeInstanceOf(DeviceLostError);
      await use({ devices: "all" }, async (other) => {
        expect(other.runtime.devices!.map(({ number }) => number)).toEqual([0, 2]);
        expect(other.runtime.leftOut!.map(({ number }) => number)).toEqual([1]);
      });
      simulated.loseDevice(0, 700);
      simulated.loseDevice(2, 700);
      expect(await rejection(model.generate(options))).toBeInstanceOf(DeviceLostError);
      await vi.waitFor(() => expect(model.health()).toMatchObject({ live: false, ready: false }));
    });
  });

  it("refuses numbers that there are not, runtimes that cannot choose, and what fits on none", async () => {
    simulated.devices([0, 0]);
    const missing = await rejection(load({ devices: [0, 2] }));
    expect(missing).toBeInstanceOf(OptionError);
    expect(missing.message).toBe(
      "There is no device 2: the runtime tensorrt finds 2 here, 0 (Simulated GPU), 1 (Simulated GPU). CUDA_VISIBLE_DEVICES decides which there are.",
    );
    const cpu = await rejection(load({ runtime: "onnxruntime", devices: "all" }));
    expect(cpu).toBeInstanceOf(OptionError);
    expect(cpu.message).toContain("cannot choose among devices; tensorrt, tensorrt-rtx, cuda can");
    simulated.capacity(1e6);
    expect(await rejection(load({ devices: "all" }))).toBeInstanceOf(MemoryError);
  });

  it("keeps a promised time", async () => {
    simulated.devices([0, 5000]);
    await use({ devices: "all" }, async (model) => {
      const { deadline } = await model.generate({ ...pictures, blocks: undefined, deadlineMs: 60_000 });
      expect(deadline!.predictedMs).toBeGreaterThan(0);
      expect(deadline!.actualMs).toBeLessThan(60_000);
    });
  });
});

describeAddons("devices of the simulation", () => {
  afterEach(() => simulated.reset());

  it("have memory of their own, so that what is on one is not taken on another", async () => {
    simulated.reset();
    simulated.devices([0, 0]);
    const source = new SimulatedEngines(temporaryFolder());
    const runtimes = [0, 1].map((ordinal) => simulatedRuntime("tensorrt", source, { ordinal }));
    const names = await Promise.all(runtimes.map(async (runtime) => (await runtime.start()).device.name));
    expect(names).toEqual(["Simulated GPU", "Simulated GPU"]);
    expect(simulated.counts().contexts).toBe(2);
    await Promise.all(runtimes.map((runtime) => runtime.dispose()));
    expect(leftOver()).toEqual({});
  });

  it("have engines of their own where they are of different kinds", async () => {
    simulated.reset();
    simulated.devices([0, 1000, 0]);
    const folder = path.join(simulatedFolder, "tensorrt");
    const open = (gpu: number) => EngineCompiler.open({ kind: "tensorrt", folder, gpu, cache: temporaryFolder() });
    const devices = await Promise.all([0, 1, 2].map(async (gpu) => (await open(gpu)).device));
    expect(devices[1]).not.toEqual(devices[0]);
    expect(devices[2]).toEqual(devices[0]);
  });
});
