// What is compiled ahead for a request that is known as the model loads: the graphs that it launches, and the same picture.
import { afterEach, expect, it, vi } from "vitest";
import { OptionError } from "../../lib/errors.js";
import { FlowTurbo, loadFor } from "../../lib/flowturbo.js";
import type { GenerateOptions } from "../../lib/model.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { CostStore } from "../../lib/serving/store.js";

afterEach(() => vi.restoreAllMocks());

const options = { measureCosts: false, threads: 1 } as const;

/** The graphs that are compiled ahead, those that the runtime is told of (without `isAhead`: as they are launched), and the picture. */
async function drawn(request: GenerateOptions, isAhead = true) {
  const prepared = vi.spyOn(OnnxRuntime.prototype, "prepare").mockClear();
  const added = vi.spyOn(OnnxRuntime.prototype, "add").mockClear();
  // Folded weights give other last bits.
  const lazy = { ...options, weights: "lazy" } as const;
  await using model = await (isAhead ? loadFor(undefined, lazy, request) : FlowTurbo.load(undefined, lazy));
  const ahead = prepared.mock.calls.flatMap(([names]) => names);
  const { images } = await model.generate(request);
  return { ahead, added: added.mock.calls.map(([{ name }]) => name), pixels: images[0] && Buffer.from(images[0].data) };
}

it.each([
  ["guided", { prompt: "a red circle", seed: 1, blocks: "H1P1R1" }],
  ["not guided", { prompt: "a red circle", seed: 1, steps: 2, guidanceScale: 1 }],
  ["several pictures of two prompts", { prompt: ["a red circle", "a blue square"], count: 2, seed: 1, steps: 1 }],
  [
    "in stages",
    {
      prompt: "a red circle",
      seed: 1,
      stages: [
        { width: 64, height: 64, blocks: "E1" },
        { width: 128, height: 128, blocks: "E2" },
      ],
    },
  ],
  ["latents alone", { prompt: "a red circle", seed: 1, steps: 1, outputType: "latent" as const }],
])("the graphs of a request: %s", async (_, request) => {
  const { ahead, pixels } = await drawn(request);
  const usual = await drawn(request, false);
  expect(usual.ahead).toEqual([]);
  expect(usual.added.length).toBeGreaterThan(3);
  expect(ahead).toEqual(usual.added);
  expect(pixels && usual.pixels?.equals(pixels)).toBe("outputType" in request ? undefined : true);
});

it("costs that are observed where one request decides which weights are folded are those of such requests alone", async () => {
  const read = vi.spyOn(CostStore.prototype, "read");
  const request = { prompt: "a red circle", seed: 1, steps: 1 };
  const folded = { ...options, weights: "folded" } as const;
  const lazy = { ...options, weights: "lazy" } as const;
  for (const [load, ahead] of [
    [() => FlowTurbo.load(undefined, folded), () => loadFor(undefined, folded, request)],
    [() => FlowTurbo.load(undefined, lazy), () => loadFor(undefined, lazy, request)],
    [() => FlowTurbo.load(undefined, options), () => loadFor(undefined, options, { ...request, steps: 100 })],
    [() => FlowTurbo.load(undefined, options), () => loadFor(undefined, options, request)],
    [() => loadFor(undefined, options, { ...request, seed: 2 }), () => loadFor(undefined, options, request)],
  ] as const) {
    await using _usual = await load();
    await using _forRequest = await ahead();
  }
  const keys = (read.mock.contexts as CostStore[]).map(({ key }) => key);
  const areSame = [0, 2, 4, 6, 8].map((index) => keys[index] === keys[index + 1]);
  expect(areSame).toEqual([true, true, false, false, true]);
});

it("a time limit leaves the weights as they are", async () => {
  const expected = vi.spyOn(OnnxRuntime.prototype, "expect");
  const request = { prompt: "a red circle", seed: 1, deadlineMs: 60_000 };
  await using model = await loadFor(undefined, options, request);
  expect(expected).not.toHaveBeenCalled();
  await using _other = await loadFor(undefined, options, { ...request, deadlineMs: undefined });
  expect(expected).toHaveBeenCalledTimes(1);
  expect(model.runtime.name).toBe("onnxruntime");
});

it("a request that is wrong is refused where it is drawn", async () => {
  const request = { prompt: "a", width: 7 };
  await using model = await loadFor(undefined, options, request);
  await expect(model.generate(request)).rejects.toThrow(OptionError);
});
