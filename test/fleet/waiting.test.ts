// The model that waits in place of computing is a model like any other: what tests and benchmarks of the fleet ask of it is asked here.
import { mkdir, writeFile } from "node:fs/promises";
import path from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import { DeadlineError } from "../../lib/errors.js";
import type { FlowTurbo } from "../../lib/flowturbo.js";
import type { GenerateOptions, GenerateResult, StepEvent } from "../../lib/model.js";
import { runtimeNames, runtimes } from "../../lib/runtimes/index.js";
import { root } from "../support/fixtures.js";
import { startScript } from "../support/processes.js";
import { loadWaiting, type WaitingOptions } from "../support/waiting.js";

const opened: FlowTurbo[] = [];
afterEach(async () => {
  for (const model of opened.splice(0)) await model.dispose();
});

async function load(options: Partial<WaitingOptions> = {}): Promise<FlowTurbo> {
  const model = await loadWaiting({ msPerLaunch: 4, msPerRow: 0.5, ...options });
  opened.push(model);
  return model;
}

const red: GenerateOptions = { prompt: "a red circle", seed: 7 };
const circle: GenerateOptions = { ...red, steps: 4 };
const pixelsOf = ({ images }: GenerateResult) => images.map(({ data }) => Buffer.from(data).toString("base64"));

describe("a picture", () => {
  const requests: GenerateOptions[] = [
    circle,
    { ...circle, seed: 8 },
    { ...circle, prompt: "a blue square" },
    { ...circle, negativePrompt: "a line" },
    { ...circle, steps: 5 },
    { ...circle, guidanceScale: 3 },
    { ...circle, guidanceScale: 1 },
    { ...circle, sampler: "heun" },
    { ...circle, width: 96, height: 48 },
    { ...circle, prompt: "a (red:1.3) (circle:0.6)", promptWeighting: true },
    {
      ...red,
      stages: [
        { width: 32, height: 32, blocks: "E2" },
        { width: 64, height: 64, blocks: "E2" },
      ],
    },
    { ...circle, include: ["latents"], preview: "decoded" },
    { ...circle, seed: 9, count: 3 },
  ];

  it("is the same alone and among others, and another one for whatever else is asked for", async () => {
    const model = await load();
    const alone: GenerateResult[] = [];
    for (const request of requests) alone.push(await model.generate(request));
    expect(model.stats().rowsPerLaunch).not.toHaveProperty("8");
    const together = await Promise.all([...requests, ...requests].map((request) => model.generate(request)));
    for (const [index, result] of together.entries())
      expect(pixelsOf(result)).toEqual(pixelsOf(alone[index % requests.length]!));
    // Only the request with previews is one that is there twice.
    const distinct = new Set(alone.flatMap(pixelsOf));
    expect(distinct.size).toBe(alone.flatMap(pixelsOf).length - 1);
    expect(alone[11]!.latents).toEqual(together[11]!.latents);
    const shared = Object.entries(model.stats().rowsPerLaunch).filter(([rows]) => Number(rows) > 4);
    expect(shared.length).toBeGreaterThan(0);
  });

  it("does not depend on the process", async () => {
    const file = path.join(root, ".cache", "waiting-draws.ts");
    await mkdir(path.dirname(file), { recursive: true });
    await writeFile(
      file,
      `import { loadWaiting } from "../test/support/waiting.js";
      async function draw() {
        const model = await loadWaiting({ msPerLaunch: 1, msPerRow: 1 });
        const { images } = await model.generate(${JSON.stringify(circle)});
        console.log("picture " + Buffer.from(images[0]!.data).toString("base64"));
        await model.dispose();
      }
      void draw();`,
    );
    const other = await startScript(file);
    const drawn = await other.line("picture ");
    expect(await other.ended).toEqual({ code: 0, signal: null });
    expect(drawn).toBe(`picture ${pixelsOf(await (await load()).generate(circle))[0]}`);
  });

  it("does not depend on the times, or on how launches are shared", async () => {
    const [one, other] = [await load(), await load({ msPerLaunch: 0, msPerRow: 1, speed: 3, preemption: false })];
    const batched = await load({ maxBatch: 3, name: "other" });
    for (const request of requests.slice(0, 5)) {
      const [first, ...others] = await Promise.all([one, other, batched].map((model) => model.generate(request)));
      for (const result of others) expect(pixelsOf(result)).toEqual(pixelsOf(first!));
    }
  });

  it("is shown as it is drawn, the same in shared launches", async () => {
    const model = await load();
    const drawn = async (request: GenerateOptions) => {
      const events: StepEvent[] = [];
      await model.generate({ ...request, preview: "decoded", onStep: (event) => void events.push(event) });
      return events.map(({ step, previews }) => [step, previews.map(({ data }) => Buffer.from(data).toString("hex"))]);
    };
    const alone = await drawn(circle);
    expect(alone.map(([step]) => step)).toEqual([0, 1, 2, 3]);
    expect(new Set(alone.map(([, previews]) => String(previews))).size).toBe(4);
    const together = await Promise.all([circle, { ...circle, seed: 3 }, { ...circle, steps: 6 }].map(drawn));
    expect(together[0]).toEqual(alone);
    expect(together[1]).not.toEqual(alone);
  });
});

describe("time", () => {
  it("is what was asked for, of the clock and not of the processor", async () => {
    const model = await load({ msPerLaunch: 30, msPerRow: 10 });
    await model.generate(circle);
    const before = process.cpuUsage();
    const { timings } = await model.generate({ ...circle, seed: 1 });
    const { user } = process.cpuUsage(before);
    expect(timings.steps.length).toBe(4);
    for (const milliseconds of timings.steps) expect(milliseconds).toBeGreaterThanOrEqual(40);
    expect(timings.total).toBeGreaterThanOrEqual(4 * 40 + 20 - 2);
    expect(user / 1000).toBeLessThan(timings.total / 2);
  });

  it("does not grow by the lateness of timers", async () => {
    const model = await load({ msPerLaunch: 0.3, msPerRow: 0.2 });
    const totals: number[] = [];
    for (let seed = 0; seed < 4; seed++)
      totals.push((await model.generate({ ...red, seed, blocks: "E200" })).timings.total);
    for (const total of totals) expect(total).toBeGreaterThan(200 * 0.5 - 2);
    // Timers one after another would take 200 × 1 at least. The machine may be busy with other work.
    expect(Math.min(...totals)).toBeLessThan(190);
  });

  it("is less for a fast model, and more for large pictures", async () => {
    const [usual, fast] = [await load({ msPerRow: 8 }), await load({ msPerRow: 8, speed: 4 })];
    const stepOf = async (model: FlowTurbo, size: Partial<GenerateOptions> = {}) =>
      (await model.generate({ ...red, blocks: "E2", ...size })).timings.steps[0]!;
    expect(await stepOf(usual)).toBeCloseTo(12);
    expect(await stepOf(fast)).toBeCloseTo(3);
    expect(await stepOf(usual, { width: 128, height: 64 })).toBeCloseTo(20);
  });

  it("is shared", async () => {
    const model = await load({ msPerLaunch: 40, msPerRow: 0 });
    const start = performance.now();
    await Promise.all([1, 2, 3, 4, 5, 6, 7, 8].map((seed) => model.generate({ ...circle, seed })));
    // One after another: 8 × (4 × 42 + 20).
    expect(performance.now() - start).toBeLessThan(1200);
    const rows = Object.keys(model.stats().rowsPerLaunch).map(Number);
    expect(Math.max(...rows)).toBeGreaterThanOrEqual(4);
  });

  it("is known from measuring: a limit is kept, or refused before any work", async () => {
    const model = await load({ msPerLaunch: 10, msPerRow: 2 });
    expect(model.stats().requests.accepted).toBe(0);
    const refusal = await model.generate({ ...circle, deadlineMs: 10 }).catch((error) => error);
    expect(refusal).toBeInstanceOf(DeadlineError);
    expect(model.costs.estimate("predict.guidance", "64x64", 1)).toBe(12);
    expect(model.costs.estimate("vae_decoder", "64x64", 1)).toBe(6);
    expect(model.stats().rowsPerLaunch).toEqual({});
    const { deadline } = await model.generate({ ...red, deadlineMs: 2000 });
    expect(deadline!.predictedMs).toBeGreaterThan(12);
    expect(deadline!.actualMs).toBeLessThan(2000);
    // So many that the last cannot be done in time.
    const many = Array.from({ length: 40 }, (_, seed) =>
      model.generate({ ...circle, seed, deadlineMs: 400 }).then(
        () => "drawn",
        (error) => error.name,
      ),
    );
    const endings = await Promise.all(many);
    expect(new Set(endings)).toEqual(new Set(["drawn", "DeadlineError"]));
    expect(endings[0]).toBe("drawn");
  });
});

describe("a call", () => {
  it.each([true, false])("that is aborted ends within a launch (preemption: %s)", async (preemption) => {
    const seen: string[] = [];
    const model = await load({
      ...{ msPerLaunch: 60, msPerRow: 0, preemption },
      onLaunch: ({ graph }) => void seen.push(graph),
    });
    await model.generate({ ...red, steps: 1 });
    seen.length = 0;
    const controller = new AbortController();
    const { signal } = controller;
    const why = new Error("no longer wanted");
    const onStep = () => controller.abort(why);
    await expect(model.generate({ ...red, blocks: "E9", reports: "each", signal, onStep })).rejects.toBe(why);
    const begun = seen.length;
    await sleep(150);
    // The launch that ran ends; no other begins.
    expect(seen.length).toBeLessThanOrEqual(begun + 1);
    expect(seen.length).toBeLessThan(9);
    await model.generate(circle);
  });

  it("goes before others by its priority", async () => {
    const model = await load({ msPerLaunch: 10, msPerRow: 0, maxBatch: 1 });
    const order: string[] = [];
    const draw = (name: string, priority: number) =>
      model.generate({ ...circle, priority }).then(() => void order.push(name));
    await Promise.all([draw("a", 0), draw("b", 0), draw("c", 0), draw("first", 5)]);
    expect(order.indexOf("first")).toBeLessThan(2);
  });

  it("fails with what its launch fails with, and no other does", async () => {
    let isBroken = false;
    const model = await load({
      onLaunch: ({ graph }) => {
        if (isBroken && graph.startsWith("combine")) throw new Error("broken");
        return undefined;
      },
    });
    isBroken = true;
    const endings = await Promise.allSettled([
      model.generate({ ...red, blocks: "S1S2" }),
      model.generate({ ...red, blocks: "E3" }),
    ]);
    expect(endings.map(({ status }) => status)).toEqual(["rejected", "fulfilled"]);
  });

  it("finds the model drained and disposed of like any other", async () => {
    const model = await load();
    const call = model.generate(circle);
    const drained = model.drain();
    await expect(model.generate(circle)).rejects.toThrow("takes no new calls");
    expect((await call).images.length).toBe(1);
    await drained;
  });
});

describe("the model", () => {
  it("has the name and the native size that were asked for", async () => {
    const model = await load({ name: "large", nativeSide: 128 });
    expect([model.name, model.nativeSize]).toEqual(["large", { width: 128, height: 128 }]);
    const { images, timings } = await model.generate({ ...red, blocks: "E1", metadata: "full" });
    expect([images[0]!.width, images[0]!.parameters.model, images[0]!.parameters.runtime]).toEqual([128, "large", "waiting"]); // biome-ignore format: one line
    expect(timings.steps[0]).toBeCloseTo(4.5);
    await expect(load({ nativeSide: 512 })).rejects.toThrow("no positions for 512");
    await expect(load({ msPerLaunch: 0, msPerRow: 0 })).rejects.toThrow("has to take some time");
  });

  it("leaves the table of runtimes as it was", async () => {
    const usual = { ...runtimes };
    const models = await Promise.all([load(), load({ speed: 2 }), load({ maxBatch: 2 })]);
    expect({ ...runtimes }).toEqual(usual);
    expect(runtimeNames()).not.toContain("waiting");
    for (const model of models) expect(model.runtime).toEqual({ name: "waiting", passedOver: [] });
  });

  it("encodes prompts, and draws from what it made of them", async () => {
    const model = await load();
    const embeds = await model.encode({ prompt: "a red circle" });
    const [first, again, other] = await Promise.all([
      model.generate({ promptEmbeds: embeds, seed: 7, steps: 4 }),
      model.generate(circle),
      model.encode({ prompt: "a blue square" }),
    ]);
    expect(pixelsOf(first!)).toEqual(pixelsOf(again!));
    expect(other!.promptEmbeds.data).not.toEqual(embeds.promptEmbeds.data);
  });
});
