/** Pictures and masks for the tests of clients, and what files hold. */

import sharp from "sharp";
import { expect } from "vitest";
import type { GenerateOptions, GenerateResult, Picture } from "../../lib/index.js";

/** RGB values of an encoded picture. */
export async function pixelsOf(file: Uint8Array): Promise<{ width: number; height: number; data: Buffer }> {
  const { data, info } = await sharp(file).removeAlpha().raw().toBuffer({ resolveWithObject: true });
  return { width: info.width, height: info.height, data };
}

/** The same as `pixelsOf`, of a picture of the library. */
export const pixelsIn = ({ width, height, data }: Picture) => ({ width, height, data: Buffer.from(data) });

const side = 64;

/** A blue picture with a white square. */
export const original = (): Promise<Buffer> =>
  sharp({ create: { width: side, height: side, channels: 3, background: "#2040c0" } })
    .composite([{ input: { create: { width: 20, height: 20, channels: 3, background: "#ffffff" } }, left: 8, top: 8 }])
    .png()
    .toBuffer();

/** Whether a pixel is to be painted: the right half. */
export const isPainted = (x: number): boolean => x >= side / 2;

/** White where it is to be painted. */
export const whiteMask = (): Promise<Buffer> => {
  const data = Buffer.from(Array.from({ length: side * side }, (_, at) => (isPainted(at % side) ? 255 : 0)));
  return sharp(data, { raw: { width: side, height: side, channels: 1 } })
    .png()
    .toBuffer();
};

/** Transparent where it is to be painted, as OpenAI's masks; its colours say nothing. */
export const transparentMask = (): Promise<Buffer> => {
  const pixels = Array.from({ length: side * side }, (_, at) => [90, 90, 90, isPainted(at % side) ? 0 : 255]);
  return sharp(Buffer.from(pixels.flat()), { raw: { width: side, height: side, channels: 4 } })
    .png()
    .toBuffer();
};

/** What says how texts are encoded: a value of each that changes the picture of "a (red:1.5) circle". */
export const textOptions = {
  negativePrompt: "a blue square",
  prompt2: "a green triangle",
  prompt3: "a white square on black",
  negativePrompt2: "a blue square",
  negativePrompt3: "a purple square",
  clipSkip: 1,
  promptWeighting: true,
  maxSequenceLength: 3,
} as const satisfies Partial<GenerateOptions>;
export const textPrompt = "a (red:1.5) circle";

/** That each of them reaches the model, alone. @param draw draws `textPrompt` with one of them */
export async function expectTextOptions(
  draw: (name: keyof typeof textOptions | null) => Promise<Uint8Array>,
  direct: (options: Partial<GenerateOptions>) => Promise<GenerateResult>,
): Promise<void> {
  const plain = await pixelsOf(await draw(null));
  for (const name of Object.keys(textOptions) as (keyof typeof textOptions)[]) {
    const drawn = await pixelsOf(await draw(name));
    const { images } = await direct({ prompt: textPrompt, [name]: textOptions[name] });
    expect(drawn, name).toEqual(pixelsIn(images[0]!));
    expect(drawn, name).not.toEqual(plain);
  }
}

/** A wide picture, and where to paint it, white: a small square. */
export async function widePicture() {
  const size = { width: 128, height: 64 };
  const image = await sharp({ create: { ...size, channels: 3, background: "#2040c0" } })
    .png()
    .toBuffer();
  const square = { create: { width: 24, height: 24, channels: 3 as const, background: "#ffffff" } };
  const mask = await sharp({ create: { ...size, channels: 3, background: "#000000" } })
    .composite([{ input: square, left: 80, top: 16 }])
    .removeAlpha()
    .png()
    .toBuffer();
  return { image, mask };
}
