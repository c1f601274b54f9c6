/** Pictures and masks for the tests of clients, and what files hold. */

import sharp from "sharp";
import type { Picture } from "../../lib/index.js";

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
