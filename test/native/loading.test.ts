// A model on the runtime of a (simulated) GPU, from load() to pictures. Engines cannot be built for a device that is
// none, so closed forms stand in for them; all else is as it is on a GPU.
import path from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { openCheckpoint } from "../../lib/checkpoint/index.js";
import { CompileError, MemoryError } from "../../lib/errors.js";
import { embeddedModel, FlowTurbo } from "../../lib/pipeline.js";
import type * as Opening from "../../lib/runtimes/tensorrt/open.js";
import type { ClosedForm } from "../runtimes/models.js";
import { samplingForms } from "../support/sampling.js";
import { leftOver, SimulatedEngines, simulated, simulatedFolder } from "../support/simulated.js";
import { describeAddons, temporaryFolder } from "./support.js";

const { engines } = vi.hoisted(() => ({ engines: { source: null as Opening.CachedEngines | null } }));
vi.mock("../../lib/runtimes/tensorrt/open.js", async (original) => {
  const { TensorRtRuntime } = await import("../../lib/runtimes/tensorrt/tensorrt.js");
  const { loadAddon } = await import("../../lib/runtimes/tensorrt/addon.js");
  const { layouts } = await import("../../lib/runtimes/tensorrt/libraries.js");
  const real = await original<typeof Opening>();
  const openTensorRt: typeof Opening.openTensorRt = async (options) => {
    if (!engines.source) return real.openTensorRt(options);
    const { kind, folder, capture, logger } = options;
    const runtime = new TensorRtRuntime({
      ...{ kind, capture, logger, addon: loadAddon(kind), engines: engines.source },
      library: path.join(folder!, layouts[kind].library),
      parser: path.join(folder!, layouts[kind].parser),
    });
    const { device } = await runtime.start();
    return { runtime, device, version: "1" };
  };
  return { ...real, openTensorRt };
});

const rejection = (promise: Promise<unknown>) =>
  promise.then(
    () => null,
    (error) => error,
  );

async function formsOf(folder: string): Promise<(name: string) => ClosedForm | undefined> {
  const { textEncoder, textEncoder2, textEncoder3, vae } = await openCheckpoint(folder);
  const clip = (config: { hiddenSize: number; projectionDim: number }): ClosedForm => ({
    inputs: { ids: "int64" },
    outputs: ({ ids }) => ({ hidden: [...ids!, config.hiddenSize], pooled: [ids![0]!, config.projectionDim] }),
    formulas: ["hidden ids 0.01 *", "pooled ids 0.02 *"],
  });
  const forms: Record<string, ClosedForm> = {
    clip_l: clip(textEncoder!.config),
    clip_g: clip(textEncoder2!.config),
    t5: {
      inputs: { ids: "int64", relative_buckets: "int64" },
      outputs: ({ ids }) => ({ hidden: [...ids!, textEncoder3!.config.dModel] }),
      formulas: ["hidden ids 0.03 * relative_buckets 0.04 * +"],
    },
  };
  const guided = samplingForms(true, vae.config.factor);
  const unguided = samplingForms(false, vae.config.factor);
  return (name) => forms[name] ?? guided[name] ?? unguided[name.replace("_unguided", "")];
}

describeAddons("a model on the simulated device", () => {
  describe.each(["tensorrt", "tensorrt-rtx"] as const)("with %s", (kind) => {
    const tensorrtFolder = path.join(simulatedFolder, kind);
    const load = async (options: Parameters<typeof FlowTurbo.load>[1] = {}) => {
      const formOf = await formsOf(embeddedModel);
      const source = new SimulatedEngines(temporaryFolder(), ({ name }) => formOf(name));
      engines.source = source as unknown as Opening.CachedEngines;
      const model = await FlowTurbo.load(embeddedModel, { runtime: kind, tensorrtFolder, ...options });
      return { model, source };
    };
    afterEach(async () => {
      engines.source = null;
      expect(simulated.violation()).toBe("");
      await vi.waitFor(() => expect(leftOver()).toEqual({}));
      simulated.reset();
    });

    it("draws, the same picture alone and in a batch", async () => {
      const { model, source } = await load();
      try {
        expect(model.runtime).toEqual({ name: kind, passedOver: [] });
        const steps: string[] = [];
        const options = { blocks: "H1P2R1", guidanceScale: 4, prompt: ["a red circle", "a blue square"] };
        const both = await model.generate({ ...options, seed: 7, onStep: ({ block }) => void steps.push(block) });
        expect(steps).toEqual(["H", "P", "P", "R"]);
        expect(both.timings.steps).toHaveLength(4);
        expect(new Set(both.latents.data).size).toBeGreaterThan(100);
        const second = await model.generate({ ...options, prompt: "a blue square", seed: 8 });
        const half = both.latents.data.length / 2;
        expect(second.latents.data).toEqual(both.latents.data.subarray(half));
        // Engines grow by the batches that are drawn, and keep those that they had.
        const batches = source.requests
          .filter(({ graph }) => graph === "predict")
          .map(({ profiles }) => profiles.length);
        expect(batches).toEqual([1, 2]);
      } finally {
        await model.dispose();
      }
    });

    it("replays the same pictures with capture", async () => {
      const plain = await load();
      const options = { prompt: "a red circle", blocks: "H1P2R1", seed: 3 };
      const expected = await plain.model.generate(options);
      await plain.model.dispose();
      const { model } = await load({ capture: true });
      try {
        for (let run = 0; run < 3; run++)
          expect((await model.generate(options)).pixels.data).toEqual(expected.pixels.data);
        expect(simulated.counts().graphLaunches).toBeGreaterThan(1);
      } finally {
        await model.dispose();
      }
    });

    it("releases the text encoders after use with keepTextEncoders: false", async () => {
      const kept = await load();
      const options = { prompt: "a red circle", blocks: "E2", seed: 3 };
      const expected = await kept.model.generate(options);
      const { engines: all } = simulated.counts();
      await kept.model.dispose();
      const { model, source } = await load({ keepTextEncoders: false });
      expect((await model.generate(options)).pixels.data).toEqual(expected.pixels.data);
      await vi.waitFor(() => expect(simulated.counts().engines).toBe(all - 3));
      // A new prompt brings them back, for as long as it takes.
      await model.generate({ ...options, prompt: "a green triangle" });
      await vi.waitFor(() => expect(simulated.counts().engines).toBe(all - 3));
      expect(source.requests.filter(({ graph }) => graph === "t5")).toHaveLength(2);
      await model.dispose();
    });

    it("shares engines among models", async () => {
      const { model } = await load();
      const options = { prompt: "a red circle", blocks: "E2", seed: 3 };
      await model.generate(options);
      const { engines: one } = simulated.counts();
      const other = await FlowTurbo.load(embeddedModel, { runtime: kind, tensorrtFolder });
      await other.generate(options);
      expect(simulated.counts().engines).toBe(one);
      await Promise.all([model.dispose(), other.dispose()]);
    });

    it("refuses to load what the GPU cannot hold, with both numbers", async () => {
      simulated.capacity(1e6);
      const error = await rejection(load());
      expect(error).toBeInstanceOf(MemoryError);
      expect(error.available).toBe(1e6);
      expect(error.needed).toBeGreaterThan(1e6);
      expect(error.message).toMatch(/take 0\.0\d GB of GPU memory for their weights alone, but .* has 0\.0010 GB/);
    });

    it("is chosen by auto, and says which engine cannot be built", async () => {
      const model = await FlowTurbo.load(embeddedModel, { tensorrtFolder, cache: temporaryFolder() });
      try {
        expect(model.runtime.name).toBe(kind);
        expect(model.runtime.passedOver.map(({ name }) => name)).toEqual(kind === "tensorrt" ? [] : ["tensorrt"]);
        // The simulated library has no builder: the real one is tested in engines.test.ts.
        const error = await rejection(model.generate({ prompt: "a red circle" }));
        expect(error).toBeInstanceOf(CompileError);
        expect(error.graph).toBe("clip_l");
      } finally {
        await model.dispose();
      }
    });
  });
});
