// Blocks C of the public API on the embedded model, against their definition written out on velocities that the same graphs compute
// one at a time: transformer and refiner, both halves of a pair apart.
import { cp, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { FlowTurbo } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Values } from "../../bench/shapes/baselines.js";
import { Direct } from "../../bench/shapes/direct.js";
import { fingerprintOf } from "../../lib/checkpoint/index.js";
import { embeddedModel } from "../../lib/flowturbo.js";
import { shiftedSigmas } from "../../lib/schedule/index.js";

const prompt = "a red circle above a small blue square";
const size = 64;

describe("refined midpoint blocks", () => {
  let model: FlowTurbo;
  let direct: Direct;
  beforeAll(async () => {
    model = await FlowTurbo.load(undefined, { measureCosts: false });
    direct = await Direct.open();
  });
  afterAll(() => model?.dispose());

  const plus = (x: Values, weight: number, v: Values) => x.map((value, i) => value + weight * v[i]!);
  const guided = (pair: Values, g: number) => {
    const half = pair.length / 2;
    return pair.slice(0, half).map((u, i) => u + g * (pair[half + i]! - u));
  };

  /** E and C: the velocity at the start, its line to the middle, what the refiner makes of it there. */
  async function drawn(blocks: string, scales: readonly number[], extrapolates = true): Promise<Values> {
    const condition = await direct.condition([prompt]);
    const [predict, refine] = (["predict", "refine"] as const).map((type) => direct.pair(type, condition, 1, size));
    const sigmas = shiftedSigmas(blocks.length, { shift: direct.checkpoint.scheduler.shift });
    let x = direct.noise(5, 1, size);
    const none = new Float32Array(2 * x.length);
    let before: { at: number; pair: Values } | null = null;
    for (const [i, block] of [...blocks].entries()) {
      const [from, to, g] = [sigmas[i]!, sigmas[i + 1]!, scales[i]!];
      const middle = (from + to) / 2;
      const now: Values = await predict!(x, from, none);
      if (block === "E") x = plus(x, to - from, guided(now, g));
      else {
        const part: number = before && extrapolates ? (middle - from) / (from - before.at) : 0;
        const ahead = now.map((v, k) => v + part * (v - (before?.pair[k] ?? 0)));
        const refined = await refine!(plus(x, middle - from, guided(ahead, g)), middle, ahead);
        x = plus(x, to - from, guided(refined, g));
      }
      before = { at: from, pair: now };
    }
    return x;
  }

  const distance = (a: Values, b: Values) =>
    Math.max(...a.map((value, i) => Math.abs(value - b[i]!))) / Math.max(...b.map(Math.abs));

  it.each([
    ["CCCC", [2, 2, 2, 2]],
    ["ECECC", [4.5, 4.5, 3, 3, 2]],
  ])("%s with the scales %j", async (blocks, scales) => {
    const expected = await drawn(blocks, scales);
    const result = await model.generate({
      ...{ prompt, seed: 5, width: size, height: size, blocks, guidanceScale: scales, include: ["latents"] },
    });
    const latents = result.latents!.data as Float32Array;
    expect(distance(latents, expected)).toBeLessThan(2e-5);
    expect(distance(latents, await drawn(blocks, scales, false))).toBeGreaterThan(1e-3);
    const refined = [...blocks].filter((block) => block === "C").length;
    expect(result.evaluations).toEqual({ predictor: blocks.length, refiner: refined, rows: 2 * blocks.length });
  });

  it("end a calibrated schedule that the refiner improves", async () => {
    const folder = await mkdtemp(path.join(tmpdir(), "flowturbo-refined-"));
    try {
      await cp(embeddedModel, folder, { recursive: true });
      const sigmas = [1, 0.75, 0.35, 0];
      const weights = [
        [-0.3, 0, 0],
        [-0.5, 0.1, 0],
        [-0.4, 0.1, -0.05],
      ] as const;
      const own = { width: size, height: size, guidanceScale: 2, guided: [true, true, true], sigmas, weights };
      const model = await fingerprintOf(direct.checkpoint);
      const calibrated = [{ ...own, refined: true }];
      await writeFile(path.join(folder, "schedules.json"), JSON.stringify({ version: 1, model, calibrated }));

      const condition = await direct.condition([prompt]);
      const [predict, refine] = (["predict", "refine"] as const).map((type) => direct.pair(type, condition, 1, size));
      let x = direct.noise(5, 1, size);
      const none = new Float32Array(2 * x.length);
      const pairs: Values[] = [];
      for (const [i, step] of weights.entries()) {
        pairs.unshift(await predict!(x, sigmas[i]!, none));
        for (const [k, weight] of step.entries()) if (weight !== 0) x = plus(x, weight, guided(pairs[k]!, 2));
      }
      const fitted = x;
      // The last step goes from 0.35 to 0; its middle is 0.175.
      const part = (0.175 - 0.35) / (0.35 - 0.75);
      const ahead = pairs[0]!.map((v, k) => v + part * (v - pairs[1]![k]!));
      const refined = await refine!(plus(x, 0.175, guided(ahead, 2)), 0.175, ahead);
      x = plus(plus(x, 0.35, guided(ahead, 2)), -0.35, guided(refined, 2));

      const loaded = await FlowTurbo.load(folder, { measureCosts: false });
      try {
        const request = { prompt, seed: 5, width: size, height: size, steps: 3, guidanceScale: 2 };
        const { latents, evaluations } = await loaded.generate({ ...request, include: ["latents"] });
        expect(distance(latents!.data as Float32Array, x)).toBeLessThan(2e-5);
        expect(distance(fitted, x)).toBeGreaterThan(1e-3);
        expect(evaluations).toEqual({ predictor: 3, refiner: 1, rows: 6 });
      } finally {
        await loaded.dispose();
      }
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  });

  it("share launches with others, paint a mask, show previews, run without guidance", async () => {
    const options = { prompt, width: size, height: size, include: ["latents"] } as const;
    const data = new Uint8Array(3 * size * size).map((_, i) => (Math.floor(i / 3) % size < size / 2 ? 255 : 0));
    const original = (await model.generate({ prompt, seed: 8, steps: 4 })).images[0]!;
    const kinds = [
      { ...options, seed: 1, blocks: "C4" },
      { ...options, seed: 2, blocks: "E1C3", guidanceScale: 1 },
      { ...options, seed: 3, blocks: "C2R1P1C1", guidanceStop: 0.5 },
      { ...options, seed: 4, blocks: "H1C2A1", preview: "fast" as const, onStep: () => {} },
      { ...options, seed: 5, blocks: "C4", image: original, mask: { width: size, height: size, data }, strength: 1 },
    ];
    const alone = [];
    for (const kind of kinds) alone.push(await model.generate(kind));
    const together = await Promise.all(kinds.map((kind) => model.generate(kind)));
    for (const [index, { latents }] of together.entries())
      expect(distance(latents!.data as Float32Array, alone[index]!.latents!.data as Float32Array)).toBeLessThan(1e-4);
    const right = (picture: { data: Uint8Array }) =>
      picture.data.filter((_, i) => Math.floor(i / 3) % size >= size / 2 + 8);
    expect(right(together[4]!.images[0]!)).toEqual(right(original));
  });
});
