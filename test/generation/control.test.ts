// Control pictures at the size of a stage.
import sharp from "sharp";
import { expect, it } from "vitest";
import { openControlNet } from "../../lib/checkpoint/index.js";
import { float32 } from "../../lib/common/tensor.js";
import { controlOf, readControl } from "../../lib/generation/control.js";
import { fixture } from "../support/fixtures.js";

const request = async (more: object) => ({
  ...{ controlNet: await openControlNet(fixture("sd3", "controlnet")), index: 0, name: "x", mask: null, warnings: [] },
  ...{ scale: 1, start: 0, stop: 1, preprocess: null, pixelRange: "signed" as const },
  ...(more as { image: string }),
});
/** Red is the column, green the row, blue 255. */
const ramp = (width: number, height: number) => ({
  ...{ width, height },
  data: Uint8Array.from({ length: 3 * width * height }, (_, i) => {
    const pixel = Math.floor(i / 3);
    return [pixel % width, Math.floor(pixel / width), 255][i % 3]!;
  }),
});
const size = { width: 16, height: 8 };
const plane = size.width * size.height;

it("has pixels in the range that is asked for, and none for a stage that needs none", async () => {
  const image = ramp(16, 8);
  const [none, signed] = await readControl(await request({ image }), [null, size], 8);
  expect(none).toBeNull();
  expect(signed!.known).toBeNull();
  expect(signed!.pixels.shape).toEqual([1, 3, 8, 16]);
  expect(signed!.pixels.data[5]).toBeCloseTo(5 / 127.5 - 1, 6);
  expect(signed!.pixels.data[2 * plane]).toBe(1);
  const [canny] = await readControl(await request({ image, pixelRange: "stability_canny" }), [size], 8);
  expect(canny!.pixels.data[5]).toBe(5 * 0.5 + 0.5);
  expect(canny!.pixels.data[2 * plane]).toBe(128);
});

it("has its colours where it is transparent, as diffusers reads it; edges are those on white", async () => {
  // A white line on a transparent ground that is stored as black.
  const rgba = Uint8Array.from({ length: 4 * plane }, (_, i) => (Math.floor(i / 4) % 16 === 8 ? 255 : 0));
  const image = await sharp(rgba, { raw: { ...size, channels: 4 } })
    .png()
    .toBuffer();
  const [lines] = await readControl(await request({ image }), [size], 8);
  expect([7, 8].map((x) => lines!.pixels.data[x])).toEqual([-1, 1]);
  const [edges] = await readControl(await request({ image, preprocess: "canny" }), [size], 8);
  expect(edges!.pixels.data.every((value) => value === -1)).toBe(true);
});

it("is hidden where an inpainting ControlNet paints, with a channel that says where the picture is known", async () => {
  const data = new Uint8Array(3 * plane);
  for (let y = 0; y < 8; y++) data.fill(255, 3 * (y * 16 + 8), 3 * (y * 16 + 16));
  const [control] = await readControl(await request({ image: ramp(16, 8), mask: { ...size, data } }), [size], 8);
  const { pixels, known } = control!;
  expect([...known!.data]).toEqual([1, 0]);
  expect([7, 8].map((x) => pixels.data[2 * plane + x])).toEqual([1, -1]);
  const joined = controlOf(float32([1, 2, 1, 2], Float32Array.of(1, 2, 3, 4)), known);
  expect(joined).toEqual(float32([1, 3, 1, 2], Float32Array.of(1, 2, 3, 4, 1, 0)));
});

it("is the part of the picture that an edit draws", async () => {
  const region = { left: 20, top: 10, ...size };
  const crop = { picture: { ...ramp(64, 32), channels: 3 }, mask: new Uint8Array(64 * 32), region };
  const [control] = await readControl(await request({ image: ramp(64, 32) }), [size], 8, crop);
  const { data } = control!.pixels;
  const bytes = [0, plane].map((at) => Math.round((data[at]! + 1) * 127.5));
  expect(bytes).toEqual([20, 10]);
});
