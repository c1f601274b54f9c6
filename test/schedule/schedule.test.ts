// The launches that a schedule becomes, against the definition of the blocks written out as it stands in the paper.
import { describe, expect, it } from "vitest";
import {
  type Block,
  parseBlocks,
  planSteps,
  type StepLaunch,
  scheduleOf,
  shiftedSigmas,
  type Weights,
} from "../../lib/schedule/index.js";

// A toy predictor and refiner on the line: nonlinear in x and σ, so that a wrong evaluation point shows.
const V = (x: number, sigma: number) => Math.sin(3 * x + sigma) + 0.7 * x * sigma;
const r = (x: number, v: number, sigma: number) => 0.2 * Math.cos(x - 2 * v + sigma);

/** The blocks as defined, each from its own source: E, H, P, R after FlowTurbo, A by exact integration of a line, S likewise. */
function reference(x: number, blocks: readonly Block[], sigmas: readonly number[]) {
  /** Velocities so far, each with the noise level it was evaluated at. */
  const known: { at: number; v: number }[] = [];
  let evaluations = 0;
  const predictor = (at: number, sigma: number) => {
    evaluations++;
    return V(at, sigma);
  };
  const keep = (at: number, v: number) => {
    known.unshift({ at, v });
    return v;
  };
  /** The integral from one level to another of the line through two velocities, by Simpson's rule, which is exact for it. */
  const along = (a: { at: number; v: number }, b: { at: number; v: number }, from: number, to: number) => {
    const line = (s: number) => a.v + ((b.v - a.v) * (s - a.at)) / (b.at - a.at);
    return ((to - from) / 6) * (line(from) + 4 * line((from + to) / 2) + line(to));
  };
  for (const [i, block] of blocks.entries()) {
    const [from, to] = [sigmas[i]!, sigmas[i + 1]!];
    const h = to - from;
    const isFirst = known.length === 0;
    const beforeA = blocks[i + 1] === "A" || blocks[i + 1] === "C";
    if (block === "E" || (block === "A" && isFirst)) {
      x += h * keep(from, predictor(x, from));
    } else if (block === "A") {
      const now = { at: from, v: predictor(x, from) };
      x += along(now, known[0]!, from, to);
      keep(now.at, now.v);
    } else if (block === "C") {
      // The midpoint rule; the velocity there is read off the line through the last two, and refined.
      const now = { at: from, v: predictor(x, from) };
      const middle = (from + to) / 2;
      const slope = isFirst ? 0 : (now.v - known[0]!.v) / (now.at - known[0]!.at);
      const guess = now.v + slope * (middle - from);
      x += h * (guess + r(x + (h / 2) * guess, guess, middle));
      keep(now.at, now.v);
    } else if (block === "S") {
      x += along(known[0]!, known[1]!, from, to);
    } else if (block === "R") {
      const d0: number = r(x, known[0]!.v, from) + known[0]!.v;
      const d1 = r(x + h * d0, d0, to) + d0;
      x += (h / 2) * (d0 + d1);
      keep(from, d0);
    } else {
      const d0: number = block === "P" && !isFirst ? known[0]!.v : keep(from, predictor(x, from));
      const d1 = predictor(x + h * d0, to);
      x += (h / 2) * (d0 + d1);
      // A extrapolates from the beginning of the block before it.
      if (!beforeA) keep(to, d1);
    }
  }
  return { x, evaluations };
}

const lambda = (sigma: number) => Math.log((1 - sigma) / sigma);

/** DPM-Solver++(2M) in data prediction, as it stands in diffusers. */
function dpmSolver(x: number, sigmas: readonly number[]): number {
  let last = 0;
  const n = sigmas.length - 1;
  for (let i = 0; i < n; i++) {
    const [s, t] = [sigmas[i]!, sigmas[i + 1]!];
    const x0 = x - s * V(x, s);
    const h = t > 0 ? lambda(t) - lambda(s) : Number.POSITIVE_INFINITY;
    const second = i > 0 && i < n - 1 && sigmas[i - 1]! < 1;
    const target = second ? x0 + (0.5 * (x0 - last) * h) / (lambda(s) - lambda(sigmas[i - 1]!)) : x0;
    x = s < 1 ? (t / s) * x - (1 - t) * Math.expm1(-h) * target : t * x + (1 - t) * target;
    last = x0;
  }
  return x;
}

/**
 * The damped DPM-Solver++(2M): the same update, in which extrapolation has the weight r/2m, and 1/2m⁶ in the second step and 1/4m⁶ in the
 * last one, where there are more than four.
 * @param guidance the largest scale
 * @param steps of the whole schedule, of which these levels may be the end
 */
function damped(x: number, sigmas: readonly number[], guidance: number, steps = sigmas.length - 1): number {
  const m = guidance <= 1 ? 1 : Math.min(4, 1 + 2 * ((guidance - 1) / steps) ** 3);
  const n = sigmas.length - 1;
  let last = 0;
  for (let i = 0; i < n; i++) {
    const [s, t] = [sigmas[i]!, sigmas[i + 1]!];
    const x0 = x - s * V(x, s);
    let weight = 0;
    if (i === n - 1) weight = steps > 4 ? 1 / (4 * m ** 6) : 0;
    else if (i === 1) weight = 1 / (2 * m ** 6);
    else if (i > 1) weight = (lambda(t) - lambda(s)) / (lambda(s) - lambda(sigmas[i - 1]!)) / (2 * m);
    // A first step has nothing to extrapolate from, whatever else it is.
    const target = i === 0 ? x0 : x0 + weight * (x0 - last);
    // What is left of the noise is scaled down, and the rest of the way is the picture's.
    x = target + (t / s) * (x - target);
    last = x0;
  }
  return x;
}

/** UniPC, order 2, "bh2", predictor and corrector one after the other, as they stand in diffusers. */
function uniPC(x: number, given: readonly number[]): number {
  const sigmas = given.map((sigma) => Math.min(sigma, 1 - 1e-6));
  const n = sigmas.length - 1;
  const estimates: number[] = [];
  let sample = x;
  for (let i = 0; i < n; i++) {
    const s = sigmas[i]!;
    // The network is asked at the level as it was given.
    const x0 = x - s * V(x, given[i]!);
    if (i > 0) {
      const before = sigmas[i - 1]!;
      const h = lambda(s) - lambda(before);
      const b = Math.expm1(-h);
      const base = (s / before) * sample - (1 - s) * b * estimates[i - 1]!;
      if (i === 1) x = base - (1 - s) * b * 0.5 * (x0 - estimates[0]!);
      else {
        const ratio = (lambda(sigmas[i - 2]!) - lambda(before)) / h;
        const phi1 = b / -h - 1;
        const phi2 = phi1 / -h - 0.5;
        // [1 1; ratio 1]·c = [φ₁/b, 2φ₂/b], by Cramer's rule.
        const c0 = (phi1 / b - (2 * phi2) / b) / (1 - ratio);
        const c1 = ((2 * phi2) / b - (ratio * phi1) / b) / (1 - ratio);
        x =
          base - (1 - s) * b * ((c0 * (estimates[i - 2]! - estimates[i - 1]!)) / ratio + c1 * (x0 - estimates[i - 1]!));
      }
    }
    estimates.push(x0);
    sample = x;
    const t = sigmas[i + 1]!;
    if (t === 0) return x0;
    const h = lambda(t) - lambda(s);
    const b = Math.expm1(-h);
    x = (t / s) * sample - (1 - t) * b * x0;
    if (i > 0) x -= ((1 - t) * b * 0.5 * (estimates[i - 1]! - x0)) / ((lambda(sigmas[i - 1]!) - lambda(s)) / h);
  }
  return x;
}

function run(x: number, launches: readonly StepLaunch[], field = V, refiner = r): number {
  let [velocity, before, first, second] = [0, 0, 0, 0];
  for (const { type, sigma, aIn, aOld, aNew, keepsVelocity, extrapolation = 0, combination } of launches) {
    if (type !== "combine") {
      const old = velocity + extrapolation * (velocity - before);
      const at = x + aIn * old;
      const next = type === "predict" ? field(at, sigma) : refiner(at, old, sigma) + old;
      x = x + aOld * old + aNew * next;
      if (keepsVelocity) [before, velocity] = [velocity, next];
    }
    if (!combination) continue;
    const sum = ([w, m1, m2]: Weights) => w * velocity + m1 * first + m2 * second;
    [x, first, second] = [x + sum(combination.x), sum(combination.first), sum(combination.second)];
  }
  return x;
}

const launched = (x: number, blocks: readonly Block[], sigmas: readonly number[]) => run(x, planSteps(blocks, sigmas));

const schedules = ["E6", "H4", "P5", "H1P4", "H1P2R2", "H2P2R1", "H1P5R3", "E1R2P1", "H1R1P1R1", "P1R1", "H8P9R5", "A6", "H1A4", "H1P2A3", "H1R1A2R1A1", "E1A2P2A2", "H1S1", "A2S1A1S2A2", "H1P1S1A1", "E2S1P2S1R1", "C4", "E1C3", "H1C2", "P3C2A1C1", "A2C1R1C2S1"]; // biome-ignore format: a list

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
    expect(count("H1P5R3")).toEqual({ predictor: 7, refiner: 6, rows: 7 });
    expect(count("H1P9")).toEqual({ predictor: 11, refiner: 0, rows: 11 });
    expect(count("E28")).toEqual({ predictor: 28, refiner: 0, rows: 28 });
    expect(count("P3")).toEqual({ predictor: 4, refiner: 0, rows: 4 });
    expect(count("A2S1A1S1")).toEqual({ predictor: 3, refiner: 0, rows: 3 });
    expect(count("E1C3")).toEqual({ predictor: 4, refiner: 3, rows: 4 });
  });

  it("marks one launch of each block as its last", () => {
    for (const text of schedules) {
      const blocks = parseBlocks(text);
      const steps = planSteps(blocks, shiftedSigmas(blocks.length, { shift: 3 }));
      expect(steps.filter((step) => step.last).map((step) => step.block)).toEqual(blocks.map((_, i) => i));
    }
  });

  it.each([
    ["D", dpmSolver],
    ["U", uniPC],
  ] as const)("computes %s as diffusers does, from σ = 1 and from below", (letter, solver) => {
    for (const n of [1, 2, 3, 8])
      for (const start of [1, 0.9]) {
        const sigmas = shiftedSigmas(n, { shift: 3 }).map((sigma) => start * sigma);
        const launches = planSteps(new Array<Block>(n).fill(letter), sigmas);
        expect(launches).toHaveLength(n);
        expect(run(0.3, launches)).toBeCloseTo(solver(0.3, sigmas), letter === "U" && start === 1 ? 5 : 11);
      }
  });

  it("starts D and U anew after another letter, and goes on from where they end", () => {
    const sigmas = shiftedSigmas(6, { shift: 3 });
    for (const [letter, solver] of [
      ["D", dpmSolver],
      ["U", uniPC],
    ] as const) {
      const before = launched(0.3, ["E", "E"], sigmas.slice(0, 3));
      const expected = solver(before, sigmas.slice(2));
      expect(launched(0.3, ["E", "E", letter, letter, letter, letter], sigmas)).toBeCloseTo(expected, 11);
      // The velocity that E leaves to A here, or D, is the one at the last level before.
      const whole = launched(0.3, [letter, letter, letter, "A", "A", "A"], sigmas);
      expect(
        Math.abs(whole - launched(0.3, new Array<Block>(3000).fill("H"), shiftedSigmas(3000, { shift: 3 }))),
      ).toBeLessThan(0.05);
    }
  });

  it("computes M as defined, from σ = 1 and from below, after another letter too", () => {
    for (const guidance of [null, 1.5, 4.5, 12])
      for (const n of [1, 2, 3, 4, 5, 8, 20])
        for (const start of [1, 0.9]) {
          const sigmas = shiftedSigmas(n, { shift: 3 }).map((sigma) => start * sigma);
          const launches = planSteps(new Array<Block>(n).fill("M"), sigmas, { guidance });
          expect(launches).toHaveLength(n);
          expect(run(0.3, launches)).toBeCloseTo(damped(0.3, sigmas, guidance ?? 1), 11);
          if (n < 3) continue;
          const before = launched(0.3, ["E", "E"], sigmas.slice(0, 3));
          const mixed = planSteps(["E", "E", ...new Array<Block>(n - 2).fill("M")], sigmas, { guidance });
          expect(run(0.3, mixed)).toBeCloseTo(damped(before, sigmas.slice(2), guidance ?? 1, n), 11);
        }
  });

  it("has M hold extrapolation back the more, the stronger guidance is", () => {
    const sigmas = shiftedSigmas(8, { shift: 3 });
    const from = (guidance: number | null) => run(0.3, planSteps(parseBlocks("M8"), sigmas, { guidance }));
    // Only the largest scale of the schedule counts.
    const scales = [null, 5, 2, 3, null, 1.5, 4, 5];
    const mixed = planSteps(parseBlocks("M8"), sigmas, { guidance: (block) => scales[block]! });
    expect(run(0.3, mixed)).toBe(from(5));
    const first = launched(0.3, parseBlocks("E8"), sigmas);
    const distances = [1, 5, 9, 13].map((guidance) => Math.abs(from(guidance) - first));
    for (const [i, distance] of distances.slice(1).entries()) expect(distance).toBeLessThan(distances[i]!);
  });

  it("has R guided as the block before it, and other blocks by their own scale", () => {
    const sigmas = shiftedSigmas(5, { shift: 3 });
    const scales = [4, 3, null, 2, 5];
    const launches = planSteps(parseBlocks("H1R1E1R1E1"), sigmas, { guidance: (block) => scales[block]! });
    expect(launches.map(({ guidance }) => guidance)).toEqual([4, 4, 4, 4, null, null, null, 5]);
    expect(
      scheduleOf(parseBlocks("H1R1E1R1E1"), sigmas, { guidance: (block) => scales[block]! }).evaluations.rows,
    ).toBe(7);
  });

  it("has C as Adams-Bashforth where the refiner changes nothing, and not extrapolating from a pair to a single velocity", () => {
    const sigmas = shiftedSigmas(4, { shift: 3 });
    const scales = [4, null, null, 2];
    const extrapolated = (guidance: (block: number) => number | null) =>
      planSteps(parseBlocks("C4"), sigmas, { guidance }).flatMap(({ type, extrapolation }) =>
        type === "refine" ? [extrapolation !== undefined] : [],
      );
    expect(extrapolated(() => 3)).toEqual([false, true, true, true]);
    expect(extrapolated((block) => scales[block]!)).toEqual([false, false, true, false]);
    let [x, v, before] = [0.3, 0, 0];
    for (const { type, sigma, aIn, aOld, aNew, keepsVelocity, extrapolation = 0 } of planSteps(
      parseBlocks("C4"),
      sigmas,
    )) {
      const old = v + extrapolation * (v - before);
      const next = type === "refine" ? old : V(x + aIn * old, sigma);
      x += aOld * old + aNew * next;
      if (keepsVelocity) [before, v] = [v, next];
    }
    expect(x).toBeCloseTo(launched(0.3, parseBlocks("A4"), sigmas), 12);
  });

  it("takes weights in place of a letter's", () => {
    const sigmas = [1, 0.7, 0.4, 0.1, 0];
    const weights = [0, 1, 2, 3].map((i) => ({ in: 0.01 * i, old: 0.1 * i, new: -0.3 - 0.01 * i, older: 0.02 * i }));
    let x = 0.3;
    const v: number[] = [];
    for (const [i, each] of weights.entries()) {
      const [old = 0, older = 0] = v;
      const now = V(x + each.in * old, sigmas[i]!);
      x += each.old * old + each.new * now + each.older * older;
      v.unshift(now);
    }
    const launches = planSteps(parseBlocks("E1A3"), sigmas, { weights });
    expect(run(0.3, launches)).toBeCloseTo(x, 12);
    expect(() => planSteps(parseBlocks("E1A3"), sigmas, { weights: weights.slice(1) })).toThrow(RangeError);
  });

  it("has C add the refiner's part to a step with weights, at the middle of the step", () => {
    const sigmas = [1, 0.7, 0.3, 0];
    const weights = [0, 1, 2].map((i) => ({ in: 0, old: 0.1 * i, new: -0.3 - 0.01 * i, older: 0.02 * i }));
    let x = 0.3;
    const v: number[] = [];
    for (const [i, each] of weights.entries()) {
      const [old = 0, older = 0] = v;
      v.unshift(V(x, sigmas[i]!));
      x += each.old * old + each.new * v[0]! + each.older * older;
    }
    const plain = x;
    // The line through the velocities at 0.3 and 0.7, read at 0.15; half of the step of −0.3 back from its end.
    const ahead = v[0]! + ((v[1]! - v[0]!) / (0.7 - 0.3)) * (0.15 - 0.3);
    x += -0.3 * r(x + 0.15 * ahead, ahead, 0.15);
    const launches = planSteps(parseBlocks("E1A1C1"), sigmas, { weights });
    expect(launches.map(({ type }) => type)).toEqual(["predict", "predict", "predict", "refine"]);
    expect(run(0.3, launches)).toBeCloseTo(x, 12);
    expect(run(0.3, planSteps(parseBlocks("E1A2"), sigmas, { weights }))).toBeCloseTo(plain, 12);
    expect(Math.abs(x - plain)).toBeGreaterThan(1e-3);
  });

  // dx/dσ = −x + 3σ has x(σ) = c·e^(−σ) + 3σ − 3.
  const decay = (x: number, sigma: number) => -x + 3 * sigma;
  const errorOf = (blocks: readonly Block[], refiner = r, guidance: number | null = null) => {
    const n = blocks.length;
    const sigmas = Array.from({ length: n + 1 }, (_, i) => 0.95 - (0.9 * i) / n - 0.04 * Math.sin((6 * i) / n));
    const exact = (0.3 - 3 * sigmas[0]! + 3) * Math.exp(sigmas[0]! - sigmas[n]!) + 3 * sigmas[n]! - 3;
    return Math.abs(run(0.3, planSteps(blocks, sigmas, { guidance }), decay, refiner) - exact);
  };
  it.each([
    ["E", 0.9, 1.1],
    ["H", 1.9, 2.2],
    ["P", 1.8, 2.2],
    ["A", 1.8, 2.2],
    ["AS", 1.8, 2.2],
    ["HAS", 1.8, 2.2],
    ["HPA", 1.8, 2.2],
    ["D", 1.8, 2.3],
    ["M", 1.8, 2.3],
    ["U", 1.8, 3.2],
  ] as const)("converges with %s at the order of its method", (letters, least, most) => {
    const error = (n: number) => {
      const blocks = Array.from({ length: n }, (_, i) => (i === 0 ? "H" : letters[i % letters.length]) as Block);
      if (letters.length === 1) blocks[0] = letters as Block;
      return errorOf(blocks);
    };
    const order = Math.log2(error(240) / error(480));
    expect(order).toBeGreaterThan(least);
    expect(order).toBeLessThan(most);
  });

  it("converges at second order with M also with guidance, and with C whether the refiner knows the velocity or changes nothing", () => {
    const orderOf = (letter: Block, ...rest: [refiner?: typeof r, guidance?: number]) => {
      const [coarse, fine] = [240, 480].map((n) => errorOf(new Array<Block>(n).fill(letter), ...rest));
      return Math.log2(coarse! / fine!);
    };
    const orders = {
      guided: orderOf("M", r, 7),
      knowing: orderOf("C", (x, v, sigma) => decay(x, sigma) - v),
      idle: orderOf("C", () => 0),
    };
    for (const [name, order] of Object.entries(orders)) {
      expect(order, name).toBeGreaterThan(1.8);
      expect(order, name).toBeLessThan(2.3);
    }
    // One that is wrong leaves an error that no number of steps takes away.
    expect(orderOf("C", () => 0.1)).toBeLessThan(0.1);
  });

  it("converges at second order with P and at first order with E", () => {
    const exact = reference(0.3, new Array<Block>(4096).fill("H"), shiftedSigmas(4096, { shift: 3 })).x;
    const error = (block: Block, n: number) =>
      Math.abs(launched(0.3, new Array<Block>(n).fill(block), shiftedSigmas(n, { shift: 3 })) - exact);
    expect(error("E", 64) / error("E", 128)).toBeGreaterThan(1.8);
    expect(error("E", 64) / error("E", 128)).toBeLessThan(2.3);
    expect(error("P", 64) / error("P", 128)).toBeGreaterThan(3.4);
  });
});
