// What a checkpoint and its pictures are estimated to take on the CPU.
import { beforeAll, describe, expect, it } from "vitest";
import { type Checkpoint, openCheckpoint } from "../../lib/checkpoint/index.js";
import { elementCount } from "../../lib/common/tensor.js";
import { examineMemory } from "../../lib/generation/examine-memory.js";
import { type HeldWeights, hostMemoryNeeded } from "../../lib/generation/host-memory.js";
import { mostTokens } from "../../lib/networks/index.js";
import { GraphLibrary } from "../../lib/networks/library.js";
import { fixture } from "../support/fixtures.js";

let checkpoint: Checkpoint;
beforeAll(async () => {
  checkpoint = await openCheckpoint(fixture("sd3", "model"));
});
const square = (side: number) => ({ width: side, height: side });
const needed = (held: HeldWeights, side = 128) => hostMemoryNeeded(checkpoint, held, square(side));

it("counts weights once, in the type that they are held in", () => {
  // All of this checkpoint's weights are float16.
  const externals = new GraphLibrary(checkpoint).essential.flatMap(({ graph }) => [...graph.externals.values()]);
  const values = [...new Map(externals.map((each) => [`${each.file}:${each.offset}`, each])).values()].reduce(
    (sum, { shape }) => sum + elementCount(shape),
    0,
  );
  expect(needed("folded").weights).toBe(4 * values);
  // And the largest in float32, twice, while it is widened.
  expect(needed("lazy").weights).toBeGreaterThan(2 * values);
  expect(needed("lazy").weights).toBeLessThan(
    2 * values + 8 * Math.max(...externals.map(({ shape }) => elementCount(shape))) + 1,
  );
  expect(needed("int8").weights).toBeLessThan(needed("folded").weights);
});

it("grows with the pixels, whatever the weights are held as", () => {
  const [small, twice] = [needed("lazy", 64), needed("lazy", 128)];
  expect(twice.weights).toBe(small.weights);
  expect(twice.activations).toBeGreaterThan(small.activations);
  expect(needed("int8").activations).toBe(twice.activations);
});

it("counts no scores where attention among all tokens, the text's too, goes block by block", () => {
  const { transformer, vae } = checkpoint;
  const side = vae.config.factor * transformer.config.patchSize;
  const most = mostTokens(transformer.config.numAttentionHeads);
  const column = (patches: number) =>
    hostMemoryNeeded(checkpoint, "lazy", { width: side, height: patches * side }).activations;
  // Tokens of the text are fewer than 400.
  expect(column(most)).toBeLessThan(column(most - 400));
  expect(column(most)).toBeLessThan(column(most + 1));
});

describe("of what there is", () => {
  const model = fixture("sd3", "model");

  it("recommends what fits at the model's own size", async () => {
    const { total } = needed("folded");
    expect(await examineMemory(model, 10 * total)).toMatchObject({ recommended: "folded", auto: "folded" });
    const least = Math.min(needed("lazy").total, needed("int8").total);
    const { recommended, sizes } = await examineMemory(model, total - 1);
    expect(recommended).toBe(least < total ? (needed("lazy").total < total ? "lazy" : "int8") : null);
    expect(sizes[0]).toMatchObject({ ...square(128), weights: { folded: { fits: false } } });
  });

  it("recommends nothing where nothing fits", async () => {
    expect(await examineMemory(model, 1000)).toMatchObject({ recommended: null, auto: "lazy", available: 1000 });
  });
});
