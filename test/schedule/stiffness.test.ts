import { describe, expect, it } from "vitest";
import { samplers, sigmaGrids } from "../../lib/schedule/index.js";

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
