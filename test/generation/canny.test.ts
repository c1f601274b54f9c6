// Edges against OpenCV's (test/fixtures/generate/canny.py).
import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { OptionError } from "../../lib/errors.js";
import { canny } from "../../lib/generation/canny.js";
import { fixture } from "../support/fixtures.js";

interface Case {
  readonly name: string;
  readonly width: number;
  readonly height: number;
  readonly low: number;
  readonly high: number;
  readonly rgb: string;
  /** One bit a pixel, the highest first. */
  readonly edges: string;
  readonly count: number;
}

const { pictures } = JSON.parse(readFileSync(fixture("canny.json"), "utf8")) as { pictures: readonly Case[] };
const bytes = (text: string) => new Uint8Array(Buffer.from(text, "base64"));

describe("canny", () => {
  it.each(pictures)("finds OpenCV's edges of $name", async ({ width, height, low, high, rgb, edges, count }) => {
    const { data, ...size } = await canny({ width, height, data: bytes(rgb) }, { low, high });
    expect(size).toEqual({ width, height });
    const expected = bytes(edges);
    const wrong = Array.from({ length: width * height }, (_, i) => i).filter((i) => {
      const white = ((expected[i >> 3]! >> (7 - (i & 7))) & 1) * 255;
      return [0, 1, 2].some((c) => data[3 * i + c] !== white);
    });
    expect(wrong).toEqual([]);
    expect(data.filter((value) => value === 255)).toHaveLength(3 * count);
  });

  it("takes OpenCV's usual thresholds by default, and leaves out fine edges with a blur", async () => {
    const { width, height, rgb } = pictures.find(({ name }) => name === "noise")!;
    const picture = { width, height, data: bytes(rgb) };
    const count = async (options?: Parameters<typeof canny>[1]) =>
      (await canny(picture, options)).data.filter((value) => value === 255).length;
    expect(await count()).toBe(await count({ low: 100, high: 200, sigma: 0 }));
    expect(await count({ sigma: 4 })).toBeLessThan((await count()) / 4);
  });

  it("reads files", async () => {
    const { width, height, data } = await canny(fixture("medium", "init.png"));
    expect(data).toHaveLength(3 * width * height);
    expect(data).toContain(255);
  });

  it.each([
    ["low", { low: -1 }],
    ["high", { high: Number.NaN }],
    ["low", { low: 201 }],
    ["sigma", { sigma: 0.1 }],
  ] as const)("refuses a wrong %s", async (option, options) => {
    const refused = await canny({ width: 1, height: 1, data: new Uint8Array(3) }, options).catch((error) => error);
    expect(refused).toBeInstanceOf(OptionError);
    expect(refused.option).toBe(option);
  });
});
