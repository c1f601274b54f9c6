import { describe, expect, it } from "vitest";
import { samplers, sigmaGrids } from "../../lib/schedule/index.js";
import { easing, stiffness } from "../../lib/schedule/stiffness.js";

const { scale } = samplers.flowturbo!;

/** Scales of a whole schedule on the sampler's own levels. */
function scalesOf(steps: number, guidance: number): number[] {
  const sigmas = sigmaGrids.eased!(steps, { shift: 3, numTrainTimesteps: 1000, guidance });
  return sigmas.slice(1).map((to, step) => scale!({ from: sigmas[step]!, to, steps, guidance }));
}

describe("guidance of the default schedule", () => {
  it("takes less of the scale where a step goes far", () => {
    // Half of the way from 0.5, few steps: r = 1/2, e = 1, and 0.5^1.5 = 1/√8.
    expect(scale!({ from: 0.5, to: 0.25, steps: 4, guidance: 5 })).toBeCloseTo(
      1 + 4 * (1 - 0.5 * (1 - 1 / Math.sqrt(8))),
      12,
    );
    // Many steps: e = 2.
    expect(scale!({ from: 0.5, to: 0.25, steps: 40, guidance: 5 })).toBeCloseTo(
      1 + 4 * (1 - 0.25 * (1 - 1 / Math.sqrt(8))),
      12,
    );
    // Between: 10/√4 − 4 = 1.
    expect(scale!({ from: 0.75, to: 0.5, steps: 11, guidance: 5 })).toBeCloseTo(
      1 + 4 * (1 - (1 / 3) ** 1.5 * (1 - 1 / 8)),
      12,
    );
    // The last step goes all of the way, whatever e is.
    for (const steps of [4, 40])
      expect(scale!({ from: 0.19, to: 0, steps, guidance: 3 })).toBeCloseTo(1 + 2 * 0.729, 12);
  });

  it("is between none and the scale, least in the last step, and nearer to the scale the more steps there are", () => {
    for (const guidance of [1.2, 2, 4.5, 7, 12]) {
      let before = 0;
      for (const steps of [2, 3, 5, 8, 12, 20, 50]) {
        const scales = scalesOf(steps, guidance);
        expect(Math.min(...scales)).toBe(scales.at(-1));
        expect(Math.min(...scales)).toBeGreaterThanOrEqual(1);
        expect(Math.max(...scales)).toBeLessThan(guidance);
        expect(scales.at(-1)).toBeGreaterThanOrEqual(before);
        before = scales.at(-1)!;
      }
      for (const each of scalesOf(1000, guidance)) expect(each / guidance).toBeGreaterThan(0.99);
    }
  });

  it("is a number at every shift, though shifting rounds", () => {
    for (let shift = 0.1; shift < 12; shift += 0.01)
      for (const [steps, guidance] of [
        [1, 4.5],
        [4, 4.5],
        [10, 2],
        [20, 7],
      ] as const) {
        const sigmas = sigmaGrids.eased!(steps, { shift, numTrainTimesteps: 1000, guidance });
        for (const [step, to] of sigmas.slice(1).entries()) {
          const one = scale!({ from: sigmas[step]!, to, steps, guidance });
          expect(one > 1 && one < guidance, `shift ${shift}, step ${step} of ${steps}, scale ${guidance}: ${one}`).toBe(
            true,
          );
        }
      }
  });

  it("is not left out where a single step goes all of the way", () => {
    expect(scale!({ from: 1, to: 0, steps: 1, guidance: 5 })).toBeCloseTo(1.4, 12);
  });

  it("is the default sampler's alone", () => {
    for (const [name, row] of Object.entries(samplers))
      expect(row.scale !== undefined, name).toBe(name === "flowturbo");
  });
});

// By hand, from the formulas of the documentation.
describe("how careful a schedule is", () => {
  it.each([
    // (g − 1)/n = 1, 1/2, 2/5.
    [4, 5, 3],
    [10, 11, 3],
    [8, 5, 1.25],
    [4, 3, 1.25],
    [10, 5, 1.128],
    // At most 4: 1 + 2·8, and 1 + 2·(3/2)³ = 7.75; just below it, 1 + 2·(8/7)³.
    [2, 5, 4],
    [4, 7, 4],
    [7, 9, 1 + 1024 / 343],
    // Without guidance there is nothing to hold back.
    [1, 1, 1],
    [10, 0, 1],
    [3, 0.5, 1],
  ])("%d steps at scale %d are stiff by %d", (steps, guidance, expected) => {
    expect(stiffness(steps, guidance)).toBeCloseTo(expected, 12);
  });

  it.each([
    // Mild guidance, up to 2.5: none with 6 steps and fewer, all with 8 and more.
    [4, 1, 0],
    [6, 2.5, 0],
    [7, 2.5, 0.15],
    [8, 1, 0.3],
    [30, 2, 0.3],
    // Stronger: 0.3 divided by stiffness.
    [4, 5, 0.1],
    [8, 5, 0.24],
    [2, 5, 0.075],
    [6, 2.6, 0.3 / (1 + 2 * (1.6 / 6) ** 3)],
  ])("%d steps at scale %d are eased by %d", (steps, guidance, expected) => {
    expect(easing(steps, guidance)).toBeCloseTo(expected, 12);
  });

  it("makes levels whose even steps are weighed by 1 − a·cos(2πt), shifted by s·m", () => {
    for (const [steps, guidance, shift, m, a] of [
      [4, 5, 3, 3, 0.1],
      [8, 5, 2, 1.25, 0.24],
      [2, 5, 3, 4, 0.075],
      [7, 2.5, 1, 1 + 2 * (1.5 / 7) ** 3, 0.15],
      [10, 1, 3, 1, 0.3],
      [5, 1, 3, 1, 0],
    ] as const) {
      const sigmas = sigmaGrids.eased!(steps, { shift, numTrainTimesteps: 1000, guidance });
      expect(sigmas).toHaveLength(steps + 1);
      expect(sigmas[0]).toBeCloseTo(1, 14);
      expect(sigmas[steps]).toBe(0);
      for (let i = 1; i < steps; i++) {
        // The weight from 0 to t, by Simpson's rule.
        const [t, parts] = [i / steps, 2000];
        let way = 0;
        for (let k = 0; k <= parts; k++)
          way += (k === 0 || k === parts ? 1 : k % 2 ? 4 : 2) * (1 - a * Math.cos((2 * Math.PI * t * k) / parts));
        const u = 1 - (way * t) / parts / 3;
        // A shift multiplies the odds σ : (1 − σ).
        expect(sigmas[i]! / (1 - sigmas[i]!)).toBeCloseTo((shift * m * u) / (1 - u), 8);
      }
    }
    // Without the weight's sine, in the middle: u = 1/2, odds 9 : 1.
    expect(sigmaGrids.eased!(4, { shift: 3, numTrainTimesteps: 1000, guidance: 5 })[2]).toBeCloseTo(0.9, 14);
    // Without guidance being named there is none.
    const plain = { shift: 3, numTrainTimesteps: 1000 };
    expect(sigmaGrids.eased!(9, plain)).toEqual(sigmaGrids.eased!(9, { ...plain, guidance: 1 }));
  });
});
