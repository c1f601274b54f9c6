// A model on the runtime of a (simulated) GPU, from load() to pictures. Engines cannot be built for a device that is
// none, so closed forms stand in for them; all else is as it is on a GPU.
import path from "node:path";
import { afterEach, describe, expect, it, vi } from "vitest";
import { openCheckpoint, writeSafetensors } from "../../lib/checkpoint/index.js";
import { float32 } from "../../lib/common/tensor.js";
import {
  CompileError,
  DeviceLostError,
  MemoryError,
  NotFiniteError,
  OptionError,
  QueueFullError,
} from "../../lib/errors.js";
import { embeddedModel, FlowTurbo } from "../../lib/flowturbo.js";
import type { EngineSource } from "../../lib/runtimes/tensorrt/engines.js";
import type * as Opening from "../../lib/runtimes/tensorrt/open.js";
import { formsOf } from "../support/model-forms.js";
import { leftOver, SimulatedEngines, simulated, simulatedFolder } from "../support/simulated.js";
import { withValues } from "../support/with-values.js";
import { describeAddons, temporaryFolder } from "./support.js";

const { engines } = vi.hoisted(() => ({ engines: { source: null as EngineSource | null } }));
vi.mock("../../lib/runtimes/tensorrt/open.js", async (original) => {
  const { TensorRtRuntime } = await import("../../lib/runtimes/tensorrt/runtime.js");
  const { loadAddon } = await import("../support/addon.js");
  const { flavours } = await import("../../lib/runtimes/tensorrt/flavours.js");
  const real = await original<typeof Opening>();
  const openTensorRt: typeof Opening.openTensorRt = async (kind, options, files) => {
    if (!engines.source) return real.openTensorRt(kind, options, files);
    const { tensorrtFolder: folder, capture, listener, logger } = options;
    const runtime = new TensorRtRuntime({
      ...{ kind, capture, listener, logger, addon: loadAddon(kind), engines: engines.source },
      library: path.join(folder!, flavours[kind].library),
      parser: path.join(folder!, flavours[kind].parser),
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

describeAddons("a model on the simulated device", () => {
  describe.each(["tensorrt", "tensorrt-rtx"] as const)("with %s", (kind) => {
    const tensorrtFolder = path.join(simulatedFolder, kind);
    const load = async (options: Parameters<typeof FlowTurbo.load>[1] = {}) => {
      const formOf = await formsOf(embeddedModel);
      const source = new SimulatedEngines(temporaryFolder(), ({ name }) => formOf(name));
      engines.source = source;
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
        const both = await withValues(model, { ...options, seed: 7, onStep: ({ block }) => void steps.push(block) });
        expect(steps).toEqual(["H", "P", "P", "R"]);
        expect(both.timings.steps).toHaveLength(4);
        expect(new Set(both.latents.data).size).toBeGreaterThan(100);
        const second = await withValues(model, { ...options, prompt: "a blue square", seed: 8 });
        const half = both.latents.data.length / 2;
        expect(second.latents.data).toEqual(both.latents.data.subarray(half));
        // Engines grow by the batches that are drawn, and keep those that they had.
        const batches = source.requests
          .filter(({ graph }) => graph === "predict.guidance")
          .map(({ profiles }) => profiles.length);
        expect(batches).toEqual([1, 2]);
      } finally {
        await model.dispose();
      }
    });

    it("uploads the matrices of a LoRA once, and keeps them on the device for later pictures", async () => {
      const { transformer } = await openCheckpoint(embeddedModel);
      const layer = "transformer_blocks.0.attn.to_q";
      const [to, from] = transformer.weights.find(`${layer}.weight`)!.shape as [number, number];
      const file = path.join(temporaryFolder(), "style.safetensors");
      await writeSafetensors(file, {
        [`transformer.${layer}.lora_A.weight`]: float32([4, from], new Float32Array(4 * from).fill(0.1)),
        [`transformer.${layer}.lora_B.weight`]: float32([to, 4], new Float32Array(4 * to).fill(0.1)),
      });
      const { model, source } = await load({ loras: [{ file, dynamic: true }], measureCosts: false });
      try {
        const draw = async (seed: number, scale: number) => {
          const before = simulated.counts().copies;
          // One step: of several, some may be one submission, which has each of its numbers once.
          const request = { prompt: "a red circle", blocks: "E1", guidanceScale: 2, seed };
          await model.generate({ ...request, loras: [{ name: "style", scale }] });
          return simulated.counts().copies - before;
        };
        // Texts are encoded, and engines opened, by the first.
        await draw(1, 0);
        const plain = await draw(2, 0);
        const held = simulated.counts().deviceBytes;
        // To places of their own: both matrices, and the scale.
        expect(await draw(2, 1)).toBe(plain + 2 + 1);
        const kept = simulated.counts().deviceBytes - held;
        const inputs = source.requests.find(({ graph }) => graph === "predict.guidance.lora-8")!.profiles[0]!;
        const matrices = 4 * (inputs.lora_down![1]! + inputs.lora_up![1]!);
        expect(kept).toBeGreaterThanOrEqual(matrices);
        const again = simulated.counts().deviceBytes;
        for (const [seed, scale] of [[3, 0.5], [4, -1]] as const) expect(await draw(seed, scale)).toBe(plain + 1); // biome-ignore format: one line
        expect(simulated.counts().deviceBytes).toBe(again);
      } finally {
        await model.dispose();
      }
    });

    describe("with capture", () => {
      const options = { prompt: "a red circle", blocks: "H1P2R1", seed: 3 };
      const capture = { capture: true } as const;
      const use = async (
        settings: Parameters<typeof load>[0],
        body: (model: FlowTurbo, source: SimulatedEngines) => Promise<void>,
      ) => {
        const { model, source } = await load(settings);
        try {
          await body(model, source);
        } finally {
          simulated.let(-1);
          await model.dispose();
        }
      };
      const plainly = async (request: Parameters<FlowTurbo["generate"]>[0]) => {
        const { model } = await load();
        const result = await withValues(model, request);
        await model.dispose();
        return result;
      };

      it("replays the same pictures, one or several, at once or one after another", async () => {
        const several = { ...options, prompt: ["a red circle", "a blue square"], count: 2 };
        const [one, four] = [await plainly(options), await plainly(several)];
        await use(capture, async (model, source) => {
          for (let run = 0; run < 3; run++)
            expect((await withValues(model, options)).pixels.data).toEqual(one.pixels.data);
          expect(simulated.counts().graphLaunches).toBeGreaterThan(1);
          const before = simulated.counts().graphLaunches;
          const both = await Promise.all([withValues(model, several), withValues(model, options)]);
          expect(both.map(({ pixels }) => pixels.data)).toEqual([four.pixels.data, one.pixels.data]);
          // Five pictures, and the text that was not known, by three encoders.
          expect(simulated.counts().graphLaunches).toBe(before + 8);
          // Nothing is shared, so no engine has another batch.
          for (const { profiles } of source.requests) expect(profiles).toHaveLength(1);
        });
      });

      it("replays pictures in stages and edited ones", async () => {
        const gradient = (of: (at: number) => number) => ({
          ...{ width: 64, height: 64 },
          data: Uint8Array.from({ length: 3 * 64 * 64 }, (_, at) => of(at)),
        });
        const edited = { image: gradient((at) => at % 251), mask: gradient((at) => (at > 5000 ? 255 : 0)) };
        const size = (side: number) => ({ width: side, height: side });
        const stages = [
          { ...size(64), blocks: "H1P1" },
          { ...size(96), blocks: "H1R1" },
        ];
        const requests = [
          { ...options, ...edited, count: 2 },
          { ...options, blocks: undefined, stages },
        ];
        const expected = [await plainly(requests[0]!), await plainly(requests[1]!)];
        await use(capture, async (model) => {
          for (let run = 0; run < 2; run++)
            for (const [index, request] of requests.entries())
              expect((await withValues(model, request)).pixels.data).toEqual(expected[index]!.pixels.data);
          // One text by three encoders; of each pair of edited pictures the second, since the engines grew in between; original and stages.
          expect(simulated.counts().graphLaunches).toBe(7);
        });
      });

      it("counts its launches and requests, and warns of nothing", async () => {
        const warnings: Error[] = [];
        const note = (warning: Error) => void warnings.push(warning);
        process.on("warning", note);
        await use(capture, async (model) => {
          await model.generate({ ...options, count: 12, signal: new AbortController().signal });
          const { launches, rowsPerLaunch, requests, milliseconds } = model.stats();
          expect(requests).toMatchObject({ accepted: 1, completed: 1, failed: 0 });
          // Two texts by three encoders; H and R are two launches each, and each picture is decoded.
          expect(launches).toEqual({ count: 90, rows: 90, padding: 0, restarted: 0 });
          expect(rowsPerLaunch).toEqual({ 1: 90 });
          expect(milliseconds.launches["predict.guidance"]!.count).toBe(48);
        });
        process.off("warning", note);
        expect(warnings).toEqual([]);
      });

      it.each(["fast", "decoded"] as const)("reports each step, with %s previews", async (preview) => {
        type Seen = { step: number; block: string; previews: Uint8Array[] };
        const seen = async (model: FlowTurbo) => {
          const events: Seen[] = [];
          await model.generate({
            ...{ ...options, preview, count: 2 },
            onStep: ({ step, block, previews }) =>
              void events.push({ step, block, previews: previews.map(({ data }) => data) }),
          });
          return events;
        };
        const { model } = await load();
        const expected = await seen(model);
        await model.dispose();
        expect(expected.map(({ block }) => block)).toEqual(["H", "P", "P", "R"]);
        await use(capture, async (model) => {
          for (let run = 0; run < 2; run++) expect(await seen(model)).toEqual(expected);
        });
      });

      it("stops for an abort, between launches or after the graph that runs, and nobody else notices", async () => {
        const expected = await plainly(options);
        await use(capture, async (model) => {
          await withValues(model, { ...options, blocks: "E1" });
          // The first run goes launch by launch, the second as one graph.
          for (const captured of [false, true]) {
            const before = simulated.counts();
            simulated.hold();
            const controller = new AbortController();
            const aborted = rejection(withValues(model, { ...options, count: 3, signal: controller.signal }));
            const other = withValues(model, options);
            await vi.waitFor(() => expect(simulated.counts().uploads).toBeGreaterThan(before.uploads));
            controller.abort("enough");
            expect(await aborted).toBe("enough");
            simulated.let(-1);
            expect((await other).pixels.data).toEqual(expected.pixels.data);
            // Seven launches a picture; two of the three pictures were never begun.
            expect(simulated.counts().kernels - before.kernels).toBeLessThanOrEqual(captured ? 14 : 9);
          }
          expect(model.stats().requests).toMatchObject({ completed: 3, aborted: 2 });
          expect((await withValues(model, options)).pixels.data).toEqual(expected.pixels.data);
        });
      });

      it("ends for an error of the caller's own listener", async () => {
        await use(capture, async (model) => {
          const reason = new Error("the listener's own");
          const onStep = () => {
            throw reason;
          };
          for (let run = 0; run < 2; run++) {
            expect(await rejection(model.generate({ ...options, count: 2, onStep }))).toBe(reason);
            await model.generate(options);
          }
        });
      });

      it("names the step whose values overflow, in a graph too", async () => {
        await use(capture, async (model) => {
          const { latents } = await withValues(model, options);
          const noise = { ...latents, data: new Float32Array(latents.data.length).fill(3e38) };
          await withValues(model, options);
          const before = simulated.counts().graphLaunches;
          const error = await rejection(withValues(model, { ...options, seed: undefined, noise }));
          expect(simulated.counts().graphLaunches).toBe(before + 1);
          expect(error).toBeInstanceOf(NotFiniteError);
          expect(error.message).toMatch(/holds NaN or an infinity after block \d of 4/);
          await withValues(model, options);
        });
      });

      it.each([true, false])(
        "says that the process must be restarted once the GPU is lost (capture: %s)",
        async (on) => {
          await use({ ...capture, capture: on }, async (model) => {
            await withValues(model, options);
            expect(model.health()).toMatchObject({ live: true, ready: true });
            const told: string[] = [];
            model.on("lost", ({ error }) => told.push(error.message));
            simulated.hold();
            const results = Array.from({ length: 5 }, () => rejection(withValues(model, options)));
            await vi.waitFor(() => expect(model.stats().running.requests).toBe(5));
            simulated.failKernel(2, 700);
            simulated.let(-1);
            for (const result of results) expect(await result).toBeInstanceOf(DeviceLostError);
            const error = await rejection(withValues(model, options));
            expect(error).toBeInstanceOf(DeviceLostError);
            expect(told).toEqual([error.message]);
            expect(model.health()).toMatchObject({ live: false, ready: false, reasons: [error.message], restarts: 0 });
            expect(await rejection(load())).toBeInstanceOf(DeviceLostError);
          });
          simulated.reset();
        },
      );

      it("keeps a promised time, and the queue bounded", async () => {
        await use({ ...capture, maxQueue: 0, maxBatch: 1 }, async (model, source) => {
          const { deadline } = await model.generate({ ...options, blocks: undefined, deadlineMs: 60_000 });
          expect(deadline!.actualMs).toBeLessThan(60_000);
          expect(deadline!.predictedMs).toBeGreaterThan(0);
          for (const { profiles } of source.requests) expect(profiles).toHaveLength(1);
          simulated.hold();
          const first = model.generate(options);
          const second = model.generate({ ...options, count: 2 });
          expect(await rejection(second)).toBeInstanceOf(QueueFullError);
          simulated.let(-1);
          await first;
        });
      });

      it("keeps the graphs of pictures when the text encoders go", async () => {
        await use({ ...capture, keepTextEncoders: false }, async (model) => {
          const all = simulated.counts().engines;
          await model.generate(options);
          for (const prompt of ["a green triangle", "two stars"]) {
            const before = simulated.counts().graphLaunches;
            await model.generate({ ...options, prompt });
            expect(simulated.counts().graphLaunches).toBe(before + 1);
          }
          expect(all).toBe(0);
          await vi.waitFor(() => expect(simulated.counts().engines).toBe(3));
        });
      });

      it("refuses to pad launches that nobody shares", async () => {
        expect(await rejection(load({ ...capture, pinBatch: 4 }))).toBeInstanceOf(OptionError);
        await use(capture, async (model) => {
          const error = await rejection(model.generate({ ...options, pinBatch: 2 }));
          expect(error).toMatchObject({ option: "pinBatch", message: expect.stringContaining("leave out pinBatch") });
          await model.generate({ ...options, pinBatch: 1 });
        });
      });
    });

    it("releases the text encoders after use with keepTextEncoders: false", async () => {
      const kept = await load();
      const options = { prompt: "a red circle", blocks: "E2", seed: 3 };
      const expected = await withValues(kept.model, options);
      const { engines: all } = simulated.counts();
      await kept.model.dispose();
      const { model, source } = await load({ keepTextEncoders: false });
      expect((await withValues(model, options)).pixels.data).toEqual(expected.pixels.data);
      await vi.waitFor(() => expect(simulated.counts().engines).toBe(all - 3));
      // A new prompt brings them back, for as long as it takes.
      await withValues(model, { ...options, prompt: "a green triangle" });
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
