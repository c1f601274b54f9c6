// Fitting schedules, on a velocity in closed form in place of a network.
import { describe, expect, it } from "vitest";
import { NotFiniteError } from "../../lib/errors.js";
import type { FieldPoint, VelocityField } from "../../lib/generation/field.js";
import {
  changed,
  derivatives,
  difference,
  evaluate,
  type FitProblem,
  fitted,
  launchedPsnr,
  parametersOf,
  psnrOf,
  type StepNumbers,
  sketch,
} from "../../lib/generation/fit.js";
import { planSteps, shiftedSigmas } from "../../lib/schedule/index.js";

const size = 12;
/** Data of a few places with their own spread each: the flow is curved, and differs from place to place. */
const spread = Array.from({ length: size }, (_, i) => 0.2 + 0.05 * i);
const velocityAt = (x: Float32Array, sigma: number, prompt: number) =>
  x.map((value, i) => {
    const mean = 0.3 * Math.sin(i + 2 * prompt);
    const variance = (1 - sigma) ** 2 * spread[i]! ** 2 + sigma ** 2;
    return ((value - (1 - sigma) * mean) * (sigma - (1 - sigma) * spread[i]! ** 2)) / variance - mean;
  });
let evaluations = 0;
const field = {
  velocities: async (points: readonly FieldPoint[]) =>
    points.map(({ x, sigma, prompt }) => {
      evaluations++;
      return { value: velocityAt(x, sigma, prompt), difference: null, scale: null };
    }),
  // A decoder that is not the identity.
  decoded: async (
    latents: readonly Float32Array[],
    reduced: (pixels: Float32Array, index: number) => Float32Array = (pixels) => pixels,
  ) =>
    latents.map((x, index) =>
      reduced(
        x.map((value, i) => value * (1 + 0.1 * (i % 3))),
        index,
      ),
    ),
} as unknown as VelocityField;

const noise = (seed: number) => Float32Array.from({ length: size }, (_, i) => Math.sin(17 * seed + 3 * i) * 1.5);
async function problemOf(seeds: readonly number[]): Promise<FitProblem> {
  const pictures = await Promise.all(
    seeds.map(async (seed) => {
      let x = noise(seed);
      const levels = shiftedSigmas(400, { shift: 1 });
      for (let i = 0; i < 400; i++) {
        const h = levels[i + 1]! - levels[i]!;
        const v = velocityAt(x, levels[i]!, seed % 2);
        const guess = velocityAt(
          x.map((value, k) => value + h * v[k]!),
          levels[i + 1]!,
          seed % 2,
        );
        x = x.map((value, k) => value + (h / 2) * (v[k]! + guess[k]!));
      }
      return { noise: noise(seed), prompt: seed % 2, target: (await field.decoded([x], (pixels) => pixels))[0]! };
    }),
  );
  return { field, pictures };
}
const euler = (sigmas: readonly number[]): StepNumbers => ({
  sigmas,
  weights: sigmas.slice(1).map((to, i) => [to - sigmas[i]!, 0, 0] as const),
  scales: sigmas.slice(1).map(() => null),
});

describe("fitting a schedule", () => {
  it("brings few steps nearer to many, on pictures that it has not seen as well", async () => {
    const steps = 4;
    const problem = await problemOf([1, 2, 3, 4, 5, 6]);
    const judge = await problemOf([11, 12, 13, 14]);
    const start = euler(shiftedSigmas(steps, { shift: 1 }));
    const { numbers, before, after } = await fitted(problem, start, { sets: 2, stepsPerSet: 3 });
    expect(before).toBeCloseTo(await psnrOf(problem, start), 9);
    expect(after).toBeCloseTo(await psnrOf(problem, numbers), 9);
    expect(after).toBeGreaterThan(before + 10);
    expect(await psnrOf(judge, numbers)).toBeGreaterThan((await psnrOf(judge, start)) + 8);
    expect([numbers.sigmas[0], numbers.sigmas[steps]]).toEqual([1, 0]);
    for (const [i, sigma] of numbers.sigmas.entries()) if (i > 0) expect(sigma).toBeLessThan(numbers.sigmas[i - 1]!);
  });

  it("never ends worse than it starts", async () => {
    const problem = await problemOf([1, 2]);
    const start = euler([1, 0.62, 0.3, 0]);
    const once = await fitted(problem, start, { sets: 3, stepsPerSet: 3 });
    const again = await fitted(problem, once.numbers, { sets: 1, stepsPerSet: 3 });
    expect(again.after).toBeGreaterThanOrEqual(again.before);
    expect(again.before).toBeCloseTo(once.after, 9);
  });

  it("runs only what a change acts on", async () => {
    const steps = 5;
    const problem = await problemOf([1]);
    evaluations = 0;
    await fitted(problem, euler(shiftedSigmas(steps, { shift: 1 })), { sets: 1, stepsPerSet: 0 });
    // The start; for each level its own step and those after it, for each weight those after its step.
    const levels = 4 + 3 + 2 + 1;
    const weights = [1, 2, 3, 3, 3].reduce((sum, count, step) => sum + count * (steps - 1 - step), 0);
    expect(evaluations).toBe(steps + levels + weights);
  });

  it("fits the guidance scale of each step, at no evaluation of its own step", async () => {
    const steps = 4;
    const { pictures } = await problemOf([1, 2, 3, 4]);
    // With a scale of 1 the velocity that the pictures were drawn with; the rest of it grows with the noise.
    const more = (x: Float32Array, sigma: number) => x.map((value, i) => sigma * Math.sin(3 * value + i));
    let asked = 0;
    const guided = {
      ...field,
      velocities: async (points: readonly FieldPoint[]) =>
        points.map(({ x, sigma, prompt, scale }) => {
          asked++;
          const [v, d] = [velocityAt(x, sigma, prompt), more(x, sigma)];
          const by = scale === null ? 0 : scale - 1;
          return { value: v.map((value, i) => value + by * d[i]!), difference: scale === null ? null : d, scale };
        }),
    } as unknown as VelocityField;
    const problem = { field: guided, pictures };
    const start = { ...euler(shiftedSigmas(steps, { shift: 1 })), scales: [2, 2, null, 2] };
    const { numbers, before, after } = await fitted(problem, start, { sets: 2, stepsPerSet: 3 });
    expect(after).toBeGreaterThan(before + 3);
    expect(numbers.scales[2]).toBeNull();
    // Towards the scale that leaves nothing to correct, where the difference counts most.
    expect(numbers.scales[0]).toBeLessThan(1.7);
    asked = 0;
    await fitted(problem, start, { sets: 1, stepsPerSet: 0 });
    const levels = 3 + 2 + 1;
    const weights = 1 * 3 + 2 * 2 + 3 * 1 + 3 * 0;
    // For the scales of the first, second and last step those after them.
    expect(asked / pictures.length).toBe(steps + levels + weights + (3 + 2 + 0));
  });

  it("runs weights, levels and scales as they are written out by hand, and ends where it says", async () => {
    const { pictures } = await problemOf([1, 2, 3]);
    const d = (x: Float32Array, sigma: number) => x.map((value, i) => sigma * Math.sin(value + i));
    const guided = {
      ...field,
      velocities: async (points: readonly FieldPoint[]) =>
        points.map(({ x, sigma, prompt, scale }) => {
          const [v, more] = [velocityAt(x, sigma, prompt), d(x, sigma)];
          return scale === null
            ? { value: v, difference: null, scale }
            : { value: v.map((value, i) => value + scale * more[i]!), difference: more, scale };
        }),
    } as unknown as VelocityField;
    const problem = { field: guided, pictures };
    const numbers: StepNumbers = {
      sigmas: [1, 0.8, 0.55, 0.3, 0],
      weights: [
        [-0.2, 0, 0],
        [-0.3, 0.05, 0],
        [-0.3, 0.06, -0.01],
        [-0.35, 0.06, -0.01],
      ],
      scales: [null, 1.4, 0.8, 1.1],
    };
    // A schedule with these numbers run step by step: an old velocity has the step's own scale where both are guided.
    const run = async ({ sigmas, weights, scales }: StepNumbers) => {
      let sum = 0;
      for (const { noise, prompt, target } of pictures) {
        let x = noise;
        const known: { v: Float32Array; d: Float32Array; scale: number | null }[] = [];
        for (const [step, [now, old, older]] of weights.entries()) {
          const [sigma, scale] = [sigmas[step]!, scales[step]!];
          known.unshift({ v: velocityAt(x, sigma, prompt), d: d(x, sigma), scale });
          const as = (index: number, own: number | null) => {
            const each = known[index];
            const by = each && (own === null || each.scale === null ? each.scale : own);
            return (i: number) => (each ? each.v[i]! + (by ?? 0) * each.d[i]! : 0);
          };
          const [a, b, c] = [as(0, scale), as(1, scale), as(2, null)];
          x = x.map((value, i) => value + now * a(i) + old * b(i) + older * c(i));
        }
        const [picture] = await field.decoded([x], (pixels) => pixels);
        const square = picture!.reduce((total, value, i) => total + (value - target[i]!) ** 2, 0);
        sum -= 10 * Math.log10(square / picture!.length / 4);
      }
      return sum / pictures.length;
    };
    expect(await psnrOf(problem, numbers)).toBeCloseTo(await run(numbers), 4);
    // Derivatives, found from where a change acts on, are those of whole runs.
    const parameters = parametersOf(numbers);
    expect(parameters.filter(({ which }) => which === "scale").map(({ step }) => step)).toEqual([1, 2, 3]);
    const { states, left } = await evaluate(problem, numbers);
    const columns = await derivatives(problem, numbers, parameters, states, left);
    for (const [index, { step, which }] of parameters.entries()) {
      const by = parameters.map((_, other) => (other === index ? difference : 0));
      const { left: whole } = await evaluate(problem, changed(numbers, parameters, by));
      for (const [picture, values] of whole.entries())
        for (const [i, value] of values.entries())
          expect(columns[index]![picture]![i]!, `${which} of step ${step}`).toBeCloseTo(
            (value - left[picture]![i]!) / difference,
            3,
          );
    }
    const { numbers: found, before, after } = await fitted(problem, numbers, { sets: 1, stepsPerSet: 1 });
    expect(after).toBeGreaterThan(before + 3);
    expect(await run(found)).toBeCloseTo(after, 4);
    expect(found.scales[0]).toBeNull();
  });

  it("measures launches as it measures weights", async () => {
    const problem = await problemOf([1, 2, 3]);
    const sigmas = shiftedSigmas(5, { shift: 1 });
    expect(await launchedPsnr(problem, planSteps(["E", "E", "E", "E", "E"], sigmas))).toBeCloseTo(
      await psnrOf(problem, euler(sigmas)),
      6,
    );
    const better = await launchedPsnr(problem, planSteps(["D", "D", "D", "D", "D"], sigmas));
    expect(better).toBeGreaterThan(await psnrOf(problem, euler(sigmas)));
  });

  it("goes on where a step leaves what the network can compute", async () => {
    const problem = await problemOf([1, 2]);
    const start = euler([1, 0.62, 0.3, 0]);
    let left = 3 + 3 * 2 + 60;
    const fragile = {
      ...field,
      velocities: async (points: readonly FieldPoint[]) => {
        left -= points.length;
        if (left < 0 && left > -12) throw new NotFiniteError("step", "x");
        return field.velocities(points);
      },
    } as unknown as VelocityField;
    const { before, after } = await fitted({ ...problem, field: fragile }, start, { sets: 1, stepsPerSet: 3 });
    expect(after).toBeGreaterThanOrEqual(before);
  });

  it("stops where the caller does", async () => {
    const problem = { ...(await problemOf([1])), signal: AbortSignal.abort(new Error("stopped")) };
    await expect(fitted(problem, euler([1, 0.6, 0.3, 0]), { sets: 1, stepsPerSet: 1 })).rejects.toThrow("stopped");
  });
});

describe("a sketch", () => {
  it("is the pixels themselves where they are few", () => {
    const pixels = Float32Array.of(0.5, -2, 1);
    expect(sketch(pixels)).toEqual(pixels);
  });

  it("keeps means of squares and of products of many", () => {
    const n = 200_000;
    const wave = (k: number) => Float32Array.from({ length: n }, (_, i) => Math.sin(i / k) + 0.2 * Math.cos(i / 3));
    const [a, b] = [wave(50), wave(53)];
    const product = (p: Float32Array, q: Float32Array) =>
      p.reduce((sum, value, i) => sum + value * q[i]!, 0) / p.length;
    const [sa, sb] = [sketch(a), sketch(b)];
    expect(sa.length).toBe(2 ** 14);
    expect(product(sa, sa) / product(a, a)).toBeCloseTo(1, 1);
    const difference = (p: Float32Array, q: Float32Array) => p.map((value, i) => value - q[i]!);
    const [d, sd] = [difference(a, b), difference(sa, sb)];
    expect(product(sd, sd) / product(d, d)).toBeCloseTo(1, 1);
  });
});
