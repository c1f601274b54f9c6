// Steps with guidance and steps without in one schedule: what they reuse of each other, against the rule written out on velocities
// that the same graphs compute one at a time.
import { FlowTurbo } from "flowturbo";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { Values } from "../../bench/shapes/baselines.js";
import { Direct } from "../../bench/shapes/direct.js";
import { shiftedSigmas } from "../../lib/schedule/index.js";

const prompt = "a red circle above a small blue square";
const size = 64;

describe("schedules of guided and unguided steps", () => {
  let model: FlowTurbo;
  let direct: Direct;
  beforeAll(async () => {
    model = await FlowTurbo.load(undefined, { measureCosts: false });
    direct = await Direct.open();
  });
  afterAll(() => model?.dispose());

  /** E, P, A and S on pairs (u, c) and single velocities: a reused pair has the step's own scale if the step has one. */
  async function drawn(blocks: string, scales: readonly (number | null)[]): Promise<Values> {
    const condition = await direct.condition([prompt]);
    const at = (g: number) => direct.velocity(condition, g, 1, size);
    const [unconditional, conditional] = [at(0), at(1)];
    const sigmas = shiftedSigmas(blocks.length, { shift: direct.checkpoint.scheduler.shift });
    type Velocity = { at: number; u: Values | null; c: Values; scale: number | null };
    const known: Velocity[] = [];
    const evaluate = async (x: Values, sigma: number, scale: number | null): Promise<Velocity> => ({
      ...{ at: sigma, scale, u: scale === null ? null : await unconditional(x, sigma), c: await conditional(x, sigma) },
    });
    const guided = ({ u, c, scale }: Velocity, own: number | null) => {
      const g = own ?? scale;
      return u && g !== null ? c.map((value, i) => u[i]! + g * (value - u[i]!)) : c;
    };
    const plus = (x: Values, weight: number, v: Values) => x.map((value, i) => value + weight * v[i]!);
    let x = direct.noise(5, 1, size);
    for (const [i, block] of [...blocks].entries()) {
      const [from, to, scale] = [sigmas[i]!, sigmas[i + 1]!, scales[i]!];
      const h = to - from;
      const [last] = known;
      if (block === "E") {
        known.unshift(await evaluate(x, from, scale));
        x = plus(x, h, guided(known[0]!, scale));
      } else if (block === "A") {
        const now = await evaluate(x, from, scale);
        const more = (h * h) / (2 * (from - last!.at));
        x = plus(plus(x, h + more, guided(now, scale)), -more, guided(last!, scale));
        known.unshift(now);
      } else if (block === "P") {
        const old = guided(last!, scale);
        const now = await evaluate(plus(x, h, old), to, scale);
        x = plus(plus(x, h / 2, old), h / 2, guided(now, scale));
        if (blocks[i + 1] !== "A") known.unshift(now);
      } else {
        // Each as it was guided where it was computed.
        const [a, b] = [guided(known[0]!, null), guided(known[1]!, null)];
        const part = (from + h / 2 - known[0]!.at) / (known[0]!.at - known[1]!.at);
        x = plus(plus(x, h * (1 + part), a), -h * part, b);
      }
    }
    return x;
  }

  it.each([
    ["EPPE", [3, null, 3, null]],
    ["EPPPA", [null, 2.5, 4, null, 3]],
    ["EAAAA", [4, null, null, 3, 2]],
    ["EASAS", [4, null, 1, 3, 1]],
    ["EAEASE", [2, 5, null, 2, 1, 3]],
  ] as [string, (number | null)[]][])("%s with the scales %j", async (blocks, scales) => {
    const expected = await drawn(blocks, scales);
    const steps: string[] = [];
    const result = await model.generate({
      ...{ prompt, seed: 5, width: size, height: size, blocks, include: ["latents"] },
      guidanceScale: scales.map((scale) => scale ?? 1),
      onStep: ({ block }) => steps.push(block),
    });
    const largest = Math.max(...expected.map(Math.abs));
    const worst = Math.max(...expected.map((value, i) => Math.abs(value - result.latents!.data[i]!)));
    expect(worst / largest).toBeLessThan(2e-5);
    expect(steps.join("")).toBe(blocks);
    const evaluated = [...blocks].flatMap((block, i) => (block === "S" ? [] : [scales[i] === null ? 1 : 2]));
    expect(result.evaluations.rows).toBe(evaluated.reduce((a, b) => a + b, 0));
  });

  it("share launches with others, and come out the same", async () => {
    const options = { prompt, width: size, height: size, steps: 6, guidanceScale: 4, include: ["latents"] } as const;
    const kinds = [
      { ...options, seed: 1, guidanceStop: 0.5 },
      { ...options, seed: 2, guidanceStart: 0.4 },
      { ...options, seed: 3 },
      { ...options, seed: 4, guidanceScale: 1 },
      { ...options, seed: 5, sampler: "dpmpp_2m" as const, guidanceStop: 0.7 },
      { ...options, seed: 6, sampler: "unipc" as const },
      { ...options, seed: 7, guidanceMode: "cfg_zero" as const },
    ];
    const alone = [];
    for (const kind of kinds) alone.push(await model.generate(kind));
    const together = await Promise.all(kinds.map((kind) => model.generate(kind)));
    for (const [index, { latents }] of together.entries())
      for (const [i, value] of latents!.data.entries()) expect(value).toBeCloseTo(alone[index]!.latents!.data[i]!, 3);
  });

  it("paint a mask and show previews", async () => {
    const original = (await model.generate({ prompt, seed: 8, steps: 4 })).images[0]!;
    const data = new Uint8Array(3 * size * size).fill(0).map((_, i) => (Math.floor(i / 3) % size < size / 2 ? 255 : 0));
    const previews: number[] = [];
    const result = await model.generate({
      ...{ prompt, seed: 9, blocks: "E1P1A1S1P2", guidanceScale: [3, 1, 3, 1, 1, 3], preview: "fast" },
      ...{ image: original, mask: { width: size, height: size, data }, strength: 1 },
      onStep: ({ previews: pictures }) => previews.push(pictures.length),
    });
    expect(previews).toEqual([1, 1, 1, 1, 1, 1]);
    const right = (picture: { data: Uint8Array }) =>
      picture.data.filter((_, i) => Math.floor(i / 3) % size >= size / 2 + 8);
    expect(right(result.images[0]!)).toEqual(right(original));
  });
});
