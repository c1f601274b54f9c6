// The launches that a schedule becomes, against the definition of the blocks written out as it stands in the paper.
import { describe, expect, it } from "vitest";
import { type Block, parseBlocks, planSteps, scheduleOf, shiftedSigmas } from "../../lib/schedule/index.js";

// A toy predictor and refiner on the line: nonlinear in x and σ, so that a wrong evaluation point shows.
const V = (x: number, sigma: number) => Math.sin(3 * x + sigma) + 0.7 * x * sigma;
const r = (x: number, v: number, sigma: number) => 0.2 * Math.cos(x - 2 * v + sigma);

/** The blocks as defined: E, H, P after Lu et al.'s FlowTurbo, R keeping its first velocity. */
function reference(x: number, blocks: readonly Block[], sigmas: readonly number[]) {
  let cache: number | null = null;
  let evaluations = 0;
  const predictor = (at: number, sigma: number) => {
    evaluations++;
    return V(at, sigma);
  };
  for (const [i, block] of blocks.entries()) {
    const [from, to] = [sigmas[i]!, sigmas[i + 1]!];
    const h = to - from;
    if (block === "E") {
      cache = predictor(x, from);
      x += h * cache;
    } else if (block === "R") {
      const d0: number = r(x, cache!, from) + cache!;
      const d1 = r(x + h * d0, d0, to) + d0;
      x += (h / 2) * (d0 + d1);
      cache = d0;
    } else {
      const d0: number = block === "P" && cache !== null ? cache : predictor(x, from);
      const d1 = predictor(x + h * d0, to);
      x += (h / 2) * (d0 + d1);
      cache = d1;
    }
  }
  return { x, evaluations };
}

function launched(x: number, blocks: readonly Block[], sigmas: readonly number[]): number {
  let velocity = 0;
  for (const { type, sigma, aIn, aOld, aNew, keepsVelocity } of planSteps(blocks, sigmas)) {
    const at = x + aIn * velocity;
    const next = type === "predict" ? V(at, sigma) : r(at, velocity, sigma) + velocity;
    x = x + aOld * velocity + aNew * next;
    if (keepsVelocity) velocity = next;
  }
  return x;
}

const schedules = ["E6", "H4", "P5", "H1P4", "H1P2R2", "H2P2R1", "H1P5R3", "E1R2P1", "H1R1P1R1", "P1R1", "H8P9R5"];

describe("planSteps", () => {
  it.each(schedules)("computes %s as defined", (text) => {
    const blocks = parseBlocks(text);
    const sigmas = shiftedSigmas(blocks.length, { shift: 3 });
    const expected = reference(0.3, blocks, sigmas);
    expect(launched(0.3, blocks, sigmas)).toBeCloseTo(expected.x, 12);
    expect(scheduleOf(blocks, sigmas).evaluations.predictor).toBe(expected.evaluations);
  });

  it("counts the evaluations that the method promises", () => {
    const count = (text: string) => {
      const blocks = parseBlocks(text);
      return scheduleOf(blocks, shiftedSigmas(blocks.length, { shift: 3 })).evaluations;
    };
    expect(count("H1P5R3")).toEqual({ predictor: 7, refiner: 6 });
    expect(count("H1P9")).toEqual({ predictor: 11, refiner: 0 });
    expect(count("E28")).toEqual({ predictor: 28, refiner: 0 });
    expect(count("P3")).toEqual({ predictor: 4, refiner: 0 });
  });

  it("marks one launch of each block as its last", () => {
    for (const text of schedules) {
      const blocks = parseBlocks(text);
      const steps = planSteps(blocks, shiftedSigmas(blocks.length, { shift: 3 }));
      expect(steps.filter((step) => step.last).map((step) => step.block)).toEqual(blocks.map((_, i) => i));
    }
  });

  it("converges at second order with P and at first order with E", () => {
    const exact = reference(0.3, new Array<Block>(4096).fill("H"), shiftedSigmas(4096, 3)).x;
    const error = (block: Block, n: number) =>
      Math.abs(launched(0.3, new Array<Block>(n).fill(block), shiftedSigmas(n, 3)) - exact);
    expect(error("E", 64) / error("E", 128)).toBeGreaterThan(1.8);
    expect(error("E", 64) / error("E", 128)).toBeLessThan(2.3);
    expect(error("P", 64) / error("P", 128)).toBeGreaterThan(3.4);
  });
});
