// What two requests have in common: the result, the price, both or neither.
import { describe, expect, it } from "vitest";
import { knownSizes, usefulBatch } from "../../lib/fleet/capacity.js";
import { followedAs, hashOf, kindOf, namesItsNoise, withSeed } from "../../lib/fleet/job.js";
import type { CostEntry } from "../../lib/serving/costs.js";

const base = { prompt: "a fox", seed: 1, width: 512, height: 512, steps: 8, count: 1 };
const hash = (request: object) => hashOf("m", "draw", request as never);
const kind = (request: object, pictures = 1) => kindOf("draw", request as never, pictures);

describe("a job", () => {
  it.each([
    ["priority", { priority: 3 }],
    ["ticket", { ticket: "me" }],
    ["timeoutMs", { timeoutMs: 5 }],
    ["preview", { preview: "fast", previewCount: 2 }],
    ["order of fields", { count: 1, steps: 8, height: 512, width: 512, seed: 1, prompt: "a fox" }],
  ])("has the same result whatever its %s", (_name, more) => {
    expect(hash({ ...more, ...base })).toBe(hash(base));
  });

  it.each([
    ["prompt", { prompt: "a fix" }],
    ["seed", { seed: 2 }],
    ["seed as text", { seed: "18446744073709551615" }],
    ["size", { width: 520 }],
    ["steps", { steps: 9 }],
    ["time limit", { deadlineMs: 900 }],
    ["guidance", { guidanceScale: 2 }],
    ["LoRA", { loras: [{ name: "a", scale: 1 }] }],
    ["picture", { image: { file: "AAAA" } }],
    ["what the result holds", { include: ["pixels"] }],
    ["metadata", { metadata: false }],
  ])("has another result with another %s", (_name, more) => {
    expect(hash({ ...base, ...more })).not.toBe(hash(base));
  });

  it("has another result with another model, and as encoding", () => {
    expect(hashOf("n", "draw", base)).not.toBe(hash(base));
    expect(hashOf("m", "encode", base)).not.toBe(hash(base));
    expect(hash(base)).toMatch(/^[0-9a-f]{64}$/);
  });

  it("is followed with those that show the same on the way", () => {
    const of = (request: object) => followedAs(hash(request), request as never);
    expect(of({ ...base, priority: 2 })).toBe(of(base));
    expect(of({ ...base, preview: "fast" })).not.toBe(of(base));
    expect(of({ ...base, preview: "fast" })).not.toBe(of({ ...base, preview: "decoded" }));
  });

  it("costs the same whatever its words, seed, pictures and metadata are", () => {
    const edit = { ...base, image: { file: "AAAA" }, controls: [{ folder: "c", image: { file: "AA" }, scale: 1 }] };
    expect(kind({ ...base, prompt: "another", seed: 5, metadata: false, priority: 1, ticket: "x" })).toBe(kind(base));
    expect(
      kind({ ...edit, image: { file: "BBBB" }, controls: [{ folder: "c", image: { file: "BB" }, scale: 1 }] }),
    ).toBe(kind(edit));
    const texts = { prompt2: "a", prompt3: "b", negativePrompt: "c", negativePrompt2: "d", negativePrompt3: "e" };
    const others = { prompt2: "f", prompt3: "g", negativePrompt: "h", negativePrompt2: "i", negativePrompt3: "j" };
    expect(kind({ ...base, ...texts })).toBe(kind({ ...base, ...others }));
    expect(kind(base, 2)).not.toBe(kind(base));
    expect(kind({ ...base, deadlineMs: 5 })).toBe(kind({ ...base, deadlineMs: 500 }));
  });

  it.each([
    ["size", { width: 520 }],
    ["steps", { steps: 9 }],
    ["pictures", { count: 2 }],
    ["prompts", { prompt: ["a", "b"] }],
    ["edits", { image: { file: "AAAA" } }],
    ["time limits", { deadlineMs: 5 }],
    ["previews", { preview: "decoded" }],
    ["ControlNets", { controls: [{ folder: "c", image: { file: "AA" } }] }],
  ])("costs something else with other %s", (_name, more) => {
    expect(kind({ ...base, ...more })).not.toBe(kind(base));
  });

  it("gets a seed where it names no noise", () => {
    expect(withSeed({ prompt: "x" }).seed).toBeTypeOf("number");
    expect(withSeed({ prompt: "x", seed: 3 })).toEqual({ prompt: "x", seed: 3 });
    expect(withSeed({ prompt: "x", seeds: [3] })).toEqual({ prompt: "x", seeds: [3] });
    expect(namesItsNoise({ prompt: "x" })).toBe(false);
    expect(namesItsNoise({ noise: {} })).toBe(true);
  });
});

describe("pictures that a worker takes at a time", () => {
  const entry = (graph: string, size: string, batch: number, milliseconds: number): CostEntry => ({
    ...{ graph, size, batch, milliseconds, low: milliseconds, high: milliseconds, runs: 9, at: 0 },
  });

  it.each([
    ["unknown costs", [], 4],
    ["one batch alone", [entry("predict", "64x64", 1, 10)], 4],
    ["a device that gains nothing", [1, 2, 4, 8].map((n) => entry("predict", "64x64", n, 10 * n)), 1],
    ["a device that gains all", [1, 2, 4, 8].map((n) => entry("predict", "64x64", n, 10)), 8],
    [
      "a gain that ends at four",
      [
        entry("predict", "64x64", 1, 10),
        entry("predict", "64x64", 2, 14),
        entry("predict", "64x64", 4, 20),
        entry("predict", "64x64", 8, 40),
      ],
      4,
    ],
    ["text encoders", [1, 8].map((n) => entry("clip_l", "77 tokens", n, 10)), 4],
  ] as const)("with %s", (_name, entries, pictures) => {
    expect(usefulBatch(entries as CostEntry[])).toBe(pictures);
  });

  it("is warm for sizes that it knows", () => {
    const entries = [
      entry("predict.guidance", "64x64", 1, 1),
      entry("vae_decoder", "32x32", 1, 1),
      entry("predict", "128x64", 1, 1),
    ];
    expect(knownSizes(entries)).toEqual(["64x64", "128x64"]);
  });
});
