// Upscaling in latents: the graph against loops that are written from the definition, and the distribution that it gives
// against the one that the next stage's network expects.
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { elementCount, type FloatTensor, float32 } from "../../lib/common/tensor.js";
import { sigmaBeforeUpscale, upscaleConstants, upscaleJump, upscaleScale } from "../../lib/networks/index.js";
import { emitUpscaleLatents } from "../../lib/networks/upscale-latents.js";
import { OnnxRuntime } from "../../lib/runtimes/onnxruntime/onnxruntime.js";
import { bundle } from "../runtimes/build.js";

type Area = readonly [height: number, width: number];

const channels = 3;
let runtime: OnnxRuntime;
let close: () => Promise<void>;
beforeAll(async () => {
  const { host, remove } = await bundle();
  runtime = new OnnxRuntime({ host, weights: "lazy" });
  runtime.add(emitUpscaleLatents("upscale_latents", channels));
  runtime.add(emitUpscaleLatents("one channel", 1));
  close = async () => {
    await runtime.dispose();
    remove();
  };
});
afterAll(() => close());

/** What the graph gives, with the operands that a program has. */
async function upscaled(graph: string, latents: FloatTensor, noise: FloatTensor, sigma: readonly number[]) {
  const areaOf = ({ shape }: FloatTensor) => shape.slice(2) as unknown as Area;
  const [before, next] = [areaOf(latents), areaOf(noise)];
  const perRow = (values: readonly number[]) => float32([values.length], Float32Array.from(values));
  const jump = upscaleJump(before, next);
  const values = {
    ...{ latents, noise, sigma: perRow(sigma), scale: perRow(sigma.map((level) => upscaleScale(level, jump))) },
    ...upscaleConstants(before, next),
  };
  const { x } = await runtime.run({
    constants: Object.fromEntries(Object.entries(values).map(([name, tensor]) => [name, { kind: "value", tensor }])),
    registers: { x: { dtype: "float32", shape: noise.shape } },
    instructions: [
      {
        ...{ op: "launch", graph, inputs: Object.fromEntries(Object.keys(values).map((name) => [name, name])) },
        ...{ outputs: { x: "x" }, label: { kind: "upscale", name: graph } },
      },
    ],
    results: ["x"],
  });
  return x!.data as Float32Array;
}

/** Deterministic numbers of about the size of normal noise. */
function numbers(shape: readonly number[], seed: number): FloatTensor {
  let state = seed;
  const data = Float32Array.from({ length: elementCount(shape) }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 32 - 0.5) * 3;
  });
  return float32(shape, data);
}

/** The element that one is repeated from: the one whose place holds the middle of its own. */
function source(index: number, from: number, to: number): number {
  for (let at = 0; at < from; at++) if ((index + 0.5) / to < (at + 1) / from) return at;
  throw new RangeError("beyond the end");
}

const sizes: [string, Area, Area, number][] = [
  ["twice", [4, 6], [8, 12], 2],
  ["three times", [2, 2], [6, 6], 3],
  ["by different factors", [2, 3], [8, 6], Math.sqrt(8)],
  ["in one direction", [3, 4], [3, 8], Math.sqrt(2)],
  ["one and a half times", [4, 4], [6, 6], 2],
  ["by a quarter", [8, 4], [10, 5], 2],
  ["by a little more than twice", [3, 3], [7, 7], 3],
  ["from one element", [1, 1], [3, 2], Math.sqrt(6)],
];

describe.each(sizes)("upscaling in latents, %s", (_, before, next, jump) => {
  it("is what loops compute", async () => {
    const sigma = [0.3, 0.75];
    const latents = numbers([2, channels, ...before], 1);
    const noise = numbers([2, channels, ...next], 2);
    const actual = await upscaled("upscale_latents", latents, noise, sigma);
    const [[h, w], [H, W]] = [before, next];
    const blocks = new Map<string, [number, number][]>();
    for (let y = 0; y < H; y++)
      for (let x = 0; x < W; x++) {
        const key = `${source(y, h, H)} ${source(x, w, W)}`;
        blocks.set(key, [...(blocks.get(key) ?? []), [y, x]]);
      }
    expect(blocks.size).toBe(h * w);
    const most = Math.max(...[...blocks.values()].map(({ length }) => length));
    expect(upscaleJump(before, next)).toBeCloseTo(Math.sqrt(most), 12);
    expect(upscaleJump(before, next)).toBeCloseTo(jump, 12);
    for (const [row, level] of sigma.entries())
      for (let c = 0; c < channels; c++)
        for (const [key, members] of blocks) {
          const [from, across] = key.split(" ").map(Number) as [number, number];
          const plane = row * channels + c;
          const fine = ([y, x]: [number, number]) => (plane * H + y) * W + x;
          const mean = members.reduce((sum, at) => sum + noise.data[fine(at)]!, 0) / members.length;
          const share = 1 - Math.sqrt(1 - members.length / most);
          const repeated = (1 - level + level / Math.sqrt(most)) * latents.data[(plane * h + from) * w + across]!;
          for (const at of members)
            expect(actual[fine(at)]).toBeCloseTo(repeated + level * (noise.data[fine(at)]! - share * mean), 5);
        }
  });

  it("gives the next stage a state as its network knows it: (1 − σ)·z, and white noise of σ", async () => {
    // The graph is linear: what it makes of each unit vector of the old and of the new noise is its matrix A, and the
    // covariance of the state is A·Aᵀ. It has to be σ²·I, without a sample drawn.
    const sigma = 0.55;
    const end = sigmaBeforeUpscale(sigma, jump);
    expect(end).toBeLessThan(sigma);
    const [old, fresh] = [elementCount(before), elementCount(next)];
    const rows = old + fresh;
    const latents = float32([rows, 1, ...before], new Float32Array(rows * old));
    const noise = float32([rows, 1, ...next], new Float32Array(rows * fresh));
    for (let unit = 0; unit < old; unit++) latents.data[unit * old + unit] = end;
    for (let unit = 0; unit < fresh; unit++) noise.data[(old + unit) * fresh + unit] = 1;
    const matrix = await upscaled("one channel", latents, noise, new Array(rows).fill(sigma));
    for (let a = 0; a < fresh; a++)
      for (let b = 0; b <= a; b++) {
        let covariance = 0;
        for (let unit = 0; unit < rows; unit++) covariance += matrix[unit * fresh + a]! * matrix[unit * fresh + b]!;
        expect(Math.abs(covariance - (a === b ? sigma ** 2 : 0))).toBeLessThan(1e-6);
      }
    // A picture z reaches the end of its stage as (1 − σ_e)·z.
    const picture = numbers([1, 1, ...before], 3);
    const state = float32(
      picture.shape,
      picture.data.map((value) => (1 - end) * value),
    );
    const silent = float32([1, 1, ...next], new Float32Array(fresh));
    const signal = await upscaled("one channel", state, silent, [sigma]);
    const [[h, w], [H, W]] = [before, next];
    for (let y = 0; y < H; y++)
      for (let x = 0; x < W; x++) {
        const value = picture.data[source(y, h, H) * w + source(x, w, W)]!;
        expect(signal[y * W + x]).toBeCloseTo((1 - sigma) * value, 5);
      }
  });
});

describe("the level before", () => {
  it("is that of RALU, and half as noisy by the odds at twice the size", () => {
    for (const jump of [1, Math.sqrt(2), 2, 3])
      for (const sigma of [0.05, 0.3, 0.6, 0.95]) {
        const end = sigmaBeforeUpscale(sigma, jump);
        // In the paper's terms: s = e / (Z·(1 − e) + e), β = 1 / (Z·(1 − e) + e), where time is 1 − σ.
        const e = 1 - end;
        expect(1 - sigma).toBeCloseTo(e / (jump * (1 - e) + e), 12);
        expect(upscaleScale(sigma, jump)).toBeCloseTo(1 / (jump * (1 - e) + e), 12);
        expect(sigma / (1 - sigma)).toBeCloseTo((jump * end) / (1 - end), 10);
      }
  });
});
