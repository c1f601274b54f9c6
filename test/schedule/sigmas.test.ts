import { readFileSync } from "node:fs";
import path from "node:path";
import { describe, expect, it } from "vitest";
import {
  type Block,
  diffusersSigmas,
  planSteps,
  samplers,
  shiftedSigmas,
  upscaleSigmas,
} from "../../lib/schedule/index.js";

describe("shiftedSigmas", () => {
  it("is the shift of even levels, from 1 to 0", () => {
    for (const [n, s] of [
      [1, 3],
      [4, 3],
      [10, 1.5],
      [28, 1],
    ] as const) {
      const sigmas = shiftedSigmas(n, { shift: s });
      expect(sigmas).toHaveLength(n + 1);
      expect(sigmas[0]).toBe(1);
      expect(sigmas[n]).toBe(0);
      // The shift is the Möbius map that keeps 0 and 1 and divides the odds (1 − σ) : σ by s.
      for (let i = 1; i < n; i++) {
        const u = 1 - i / n;
        expect((1 - sigmas[i]!) / sigmas[i]!).toBeCloseTo((1 - u) / u / s, 12);
      }
    }
  });
});

describe("upscaleSigmas", () => {
  it("is even in u between two levels, which it meets exactly", () => {
    for (const [n, shift, from, to] of [
      [4, 3, 0.6, 0],
      [5, 2.5, 1, 0.3],
      [1, 3, 0.9, 0.2],
      [7, 1, 0.55, 0.05],
    ] as const) {
      const sigmas = upscaleSigmas(n, { shift }, from, to);
      expect(sigmas).toHaveLength(n + 1);
      expect([sigmas[0], sigmas[n]]).toEqual([from, to]);
      // u from the odds, divided by the shift: its steps are equal.
      const even = sigmas.map((sigma) => {
        const odds = sigma / (1 - sigma) / shift;
        return odds === Number.POSITIVE_INFINITY ? 1 : odds / (1 + odds);
      });
      for (let i = 1; i <= n; i++) expect(even[i]! - even[i - 1]!).toBeCloseTo((even[n]! - even[0]!) / n, 12);
    }
  });

  it("from 1 to 0 is the whole grid", () => {
    expect(upscaleSigmas(6, { shift: 3 }, 1)).toEqual(shiftedSigmas(6, { shift: 3 }));
  });
});

describe("diffusersSigmas", () => {
  it("equals FlowMatchEulerDiscreteScheduler(shift=3).set_timesteps(4)", () => {
    const expected = [1, 0.857692, 0.602151, 0.008929, 0];
    for (const [i, sigma] of diffusersSigmas(4, { shift: 3, numTrainTimesteps: 1000 }).entries())
      expect(sigma).toBeCloseTo(expected[i]!, 6);
  });

  it("equals diffusers' sigmas for other lengths and shifts", () => {
    // From diffusers 0.42: FlowMatchEulerDiscreteScheduler(shift=s).set_timesteps(n); scheduler.sigmas
    const file = path.join(import.meta.dirname, "../fixtures/diffusers-sigmas.json");
    const printed = JSON.parse(readFileSync(file, "utf8")) as Record<string, number[]>;
    expect(Object.keys(printed).length).toBeGreaterThan(3);
    for (const [key, sigmas] of Object.entries(printed)) {
      const [n, s] = key.split(",").map(Number) as [number, number];
      const computed = diffusersSigmas(n, { shift: s, numTrainTimesteps: 1000 });
      expect(computed).toHaveLength(n + 1);
      for (const [i, sigma] of computed.entries()) expect(sigma).toBeCloseTo(sigmas[i]!, 6);
    }
  });
});

describe("levels and timesteps of multistep samplers", () => {
  // From diffusers 0.42, for 1 to 30 steps at shifts 1, 2.5 and 3: test/fixtures/generate/timesteps.py.
  const file = path.join(import.meta.dirname, "../fixtures/multistep-timesteps.json");
  type Printed = Record<string, Record<string, { timesteps: number[]; sigmas: number[] }>>;
  const printed = JSON.parse(readFileSync(file, "utf8")) as Printed;

  it.each(["dpmpp_2m", "unipc"])("of %s equal diffusers' in every bit", (name) => {
    const { blocks, diffusersSigmas, wholeTimesteps } = samplers[name]!;
    expect(wholeTimesteps).toBe(true);
    const cases = Object.entries(printed[name]!);
    expect(cases).toHaveLength(90);
    for (const [key, expected] of cases) {
      const [steps, shift] = key.split(",").map(Number) as [number, number];
      const sigmas = diffusersSigmas!(steps, { shift, numTrainTimesteps: 1000 });
      expect(sigmas, key).toEqual(expected.sigmas);
      const launches = planSteps(blocks(steps, 1) as Block[], sigmas, { wholeTimestepsOf: 1000 });
      // The networks get the level of the timestep.
      expect(
        launches.map(({ sigma }) => sigma),
        key,
      ).toEqual(expected.timesteps.map((timestep) => timestep / 1000));
    }
  });
});
