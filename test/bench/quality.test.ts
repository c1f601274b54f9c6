import { describe, expect, test } from "vitest";
import { euler, reusing, taylorSeer, type Velocity } from "../../bench/shapes/baselines.js";
import { eigen, frechetDistance } from "../../bench/shapes/frechet.js";
import { randomNumbers } from "../../bench/shapes/world.js";
import { shiftedSigmas } from "../../lib/schedule/index.js";

/** Data of N(0, s²): the velocity and its flow are known, x(σ) = x(1)·√((1 − σ)²s² + σ²). */
const s = 0.4;
const variance = (sigma: number) => (1 - sigma) ** 2 * s ** 2 + sigma ** 2;
const velocity: Velocity = async (x, sigma) =>
  x.map((value) => (value * (sigma - (1 - sigma) * s ** 2)) / variance(sigma));
const noise = Float32Array.of(1, -0.5, 2);
const errorOf = async (run: Promise<Float32Array>) => {
  const x = await run;
  return Math.max(...x.map((value, i) => Math.abs(value - noise[i]! * s)));
};

describe("the samplers that are compared", () => {
  test("converge with the orders they have", async () => {
    const orders = async (sampler: (steps: number) => Promise<Float32Array>) => {
      const errors = [await errorOf(sampler(40)), await errorOf(sampler(80))];
      return Math.log2(errors[0]! / errors[1]!);
    };
    expect(await orders((n) => euler(velocity, noise, shiftedSigmas(n, { shift: 1 })))).toBeCloseTo(1, 0);
    expect(
      await orders((n) => reusing(velocity, noise, "H".repeat(n), shiftedSigmas(n, { shift: 1 }))),
    ).toBeGreaterThan(1.7);
  });

  test("skip what TaylorSeer skips, and go on along a line", async () => {
    const seen: number[] = [];
    const counted: Velocity = (x, sigma) => {
      seen.push(sigma);
      return velocity(x, sigma);
    };
    const grid = shiftedSigmas(28, { shift: 1 });
    const x = await taylorSeer(counted, noise, grid);
    const computed = [0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23, 26, 27];
    expect(seen).toEqual(computed.map((step) => grid[step]));
    // On even levels a velocity that is linear in σ is met exactly by the line through two of them.
    const linear: Velocity = async (x, sigma) => x.map(() => sigma);
    const [y, exact] = [await taylorSeer(linear, noise, grid), await euler(linear, noise, grid)];
    for (const [i, value] of y.entries()) expect(value).toBeCloseTo(exact[i]!, 5);
    for (const [i, value] of x.entries()) expect(Math.abs(value - noise[i]! * s)).toBeLessThan(0.1);
  });

  test("are exact for a single picture", async () => {
    const picture = Float32Array.of(0.3, 0.1, -0.7);
    const straight: Velocity = async (x, sigma) => x.map((value, i) => (value - picture[i]!) / Math.max(sigma, 1e-9));
    const grid = shiftedSigmas(5, { shift: 1.5 });
    for (const x of [await euler(straight, noise, grid)])
      for (const [i, value] of x.entries()) expect(value).toBeCloseTo(picture[i]!, 5);
  });

  test("reuse the velocity where R stands, and evaluate nothing", async () => {
    const seen: number[] = [];
    const counted: Velocity = (x, sigma) => {
      seen.push(sigma);
      return velocity(x, sigma);
    };
    const grid = [1, 0.7, 0.4, 0.2, 0];
    const x = await reusing(counted, noise, "HPRR", grid);
    expect(seen).toEqual([1, 0.7, 0.4]);
    const upTo = await reusing(velocity, noise, "HP", grid.slice(0, 3));
    const last = await velocity(await predicted(grid), 0.4);
    for (const [i, value] of x.entries()) expect(value).toBeCloseTo(upTo[i]! - 0.4 * last[i]!, 5);
  });
});

/** The point at which the P of HP evaluates. */
async function predicted(grid: readonly number[]): Promise<Float32Array> {
  const first = await velocity(noise, grid[0]!);
  const h = grid[1]! - grid[0]!;
  const second = await velocity(
    noise.map((x, i) => x + h * first[i]!),
    grid[1]!,
  );
  const x = noise.map((value, i) => value + (h / 2) * (first[i]! + second[i]!));
  return x.map((value, i) => value + (grid[2]! - grid[1]!) * second[i]!);
}

describe("the Fréchet distance", () => {
  const random = randomNumbers(8);
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const sample = (n: number, deviations: readonly number[], mean = 0) =>
    Array.from({ length: n }, () => deviations.map((d) => mean + d * normal()));

  test("is that of known Gaussians", () => {
    const [a, b] = [sample(20000, [1, 2, 0.5]), sample(20000, [2, 2, 1], 1)];
    // Diagonal covariances: Σ (μ₁ − μ₂)² + (d₁ − d₂)².
    expect(frechetDistance(a, b)).toBeCloseTo(3 + 1 + 0 + 0.25, 0);
    expect(frechetDistance(a, a)).toBeCloseTo(0, 9);
    expect(frechetDistance(a, b)).toBeCloseTo(frechetDistance(b, a), 9);
  });

  test("stays sound with fewer rows than columns", () => {
    const [a, b] = [sample(5, new Array(12).fill(1)), sample(5, new Array(12).fill(1), 3)];
    expect(frechetDistance(a, a)).toBeCloseTo(0, 6);
    expect(frechetDistance(a, b)).toBeGreaterThan(60);
  });

  test("rests on eigenvectors that are", () => {
    const n = 9;
    const m = Array.from({ length: n }, () => new Float64Array(n));
    for (let i = 0; i < n; i++) for (let k = 0; k <= i; k++) m[i]![k] = m[k]![i] = normal();
    const { values, vectors } = eigen(m);
    for (let k = 0; k < n; k++)
      for (let i = 0; i < n; i++) {
        const product = m[i]!.reduce((sum, value, j) => sum + value * vectors[j]![k]!, 0);
        expect(product).toBeCloseTo(values[k]! * vectors[i]![k]!, 9);
      }
  });
});
