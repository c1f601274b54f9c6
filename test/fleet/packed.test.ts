// Results as bytes, there and back.
import { describe, expect, it } from "vitest";
import { aboutResult, packResult, unpackResult } from "../../lib/fleet/packed.js";
import { Image } from "../../lib/generation/image.js";
import { resultToJson } from "../../lib/json.js";
import type { GenerateResult } from "../../lib/model.js";

const stage = { width: 5, height: 3, blocks: "E2", sigmas: [1, 0.5, 0] };
const floats = (...shape: number[]) => {
  const data = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, index) => Math.sin(index));
  return { dtype: "float32" as const, shape, data };
};
const picture = (width: number, height: number, parameters = {}) =>
  new Image(
    width,
    height,
    Uint8Array.from({ length: 3 * width * height }, (_, index) => index * 7),
    parameters,
  );
const result: GenerateResult = {
  images: [picture(5, 3, { prompt: "ein Füchslein 🦊", seed: "18446744073709551615" }), picture(5, 3)],
  ...{
    latents: floats(2, 16, 1, 2),
    pixels: floats(2, 3, 3, 5),
    seeds: [1, 2n ** 64n - 1n],
    ...stage,
    stages: [stage],
  },
  ...{ evaluations: { predictor: 2, refiner: 0, rows: 4 }, tokens: { text: 4, image: 2 } },
  timings: { load: 1, queue: 2, encode: 3, steps: [4, 5], upscale: 0, edit: 0, decode: 6, total: 21 },
  ...{ deadline: null, warnings: ["a warning"] },
};

describe("a packed result", () => {
  it.each([
    ["all", result],
    ["pictures alone", { ...result, latents: null, pixels: null }],
    ["latents alone", { ...result, images: [], pixels: null }],
    ["NaN among latents", { ...result, latents: { ...floats(1, 1, 1, 2), data: Float32Array.of(Number.NaN, -0) } }],
  ])("comes back with %s", (_name, given) => {
    const back = unpackResult(packResult(given));
    expect(back).toEqual(given);
    if (!given.latents?.data.some(Number.isNaN)) expect(resultToJson(back)).toEqual(resultToJson(given));
    expect(aboutResult(packResult(given))).toEqual({ blocks: "E2", isDisturbed: false });
    expect(aboutResult(packResult(given, true)).isDisturbed).toBe(true);
  });

  it("has pictures that can be encoded", async () => {
    const [first] = unpackResult(packResult(result)).images;
    expect(await first!.encode("png")).toEqual(await result.images[0]!.encode("png"));
  });

  it("is refused where it is cut, longer, or something else", () => {
    const bytes = packResult(result);
    for (let length = 0; length < bytes.length; length += 13)
      expect(() => unpackResult(bytes.subarray(0, length))).toThrow(/same version/);
    expect(() => unpackResult(Buffer.concat([bytes, Buffer.alloc(1)]))).toThrow(/same version/);
    expect(() => unpackResult(Buffer.from('{"images":[]}'))).toThrow(/same version/);
    const empty = Buffer.from("\u0002\0\0\0{}");
    expect(() => unpackResult(empty)).toThrow(/same version/);
  });
});
