/**
 * Pictures in: the original and the mask of an edit, read and brought to the size of each stage.
 */

import { open as openFile } from "node:fs/promises";
import type { Sharp } from "sharp";
import { type FloatTensor, float32 } from "../common/tensor.js";
import { isDue, rest } from "../common/turns.js";
import { OptionError } from "../errors.js";
import type { PictureSource, Size } from "../model.js";
import { type Crop, cropRegion, cut, filled } from "./crop.js";
import { headLength, undecodable } from "./file-kinds.js";
import type { EditRequest } from "./request.js";
import { coveringBox, type Raster, resampled } from "./resample.js";
import { sharp } from "./sharp.js";

/** An original, and a mask where there is one, for each stage of a request; and what they were cut out of, where they were. */
export type Edit = readonly {
  readonly original: Original;
  readonly mask: Mask | null;
  readonly crop?: Crop | undefined;
}[];

/**
 * @param sizes of the stages
 * @param factor pixels of a latent's side
 * @throws OptionError for a picture that cannot be read
 */
export async function readEdit(
  { image, mask, paddingMaskCrop }: EditRequest,
  sizes: readonly Size[],
  factor: number,
): Promise<Edit> {
  const picture = await readOriginal(image);
  const painted = mask === null ? null : await readMask(mask);
  if (painted && paddingMaskCrop !== null) return croppedEdit(picture, painted, paddingMaskCrop, sizes, factor);
  const edit: Edit[number][] = [];
  for (const { width, height } of sizes)
    edit.push({
      original: await originalAt(picture, width, height),
      mask: painted && (await maskAt(painted, picture, width, height, factor)),
    });
  return edit;
}

/** An edit of a part of the picture: the mask's surroundings, by the shape of the last stage. A mask of another size is stretched to the picture. */
async function croppedEdit(
  picture: Raster,
  painted: Raster,
  padding: number,
  sizes: readonly Size[],
  factor: number,
): Promise<Edit> {
  const { width, height } = picture;
  const isAlike = painted.width === width && painted.height === height;
  const box = { left: 0, top: 0, width: painted.width, height: painted.height };
  const data = isAlike ? painted.data : await resampled(painted, width, height, box);
  const whole = { width, height, channels: painted.channels, data };
  const grey = await greyOf(whole);
  const region = await cropRegion({ width, height, channels: 1, data: grey }, sizes.at(-1)!, padding);
  const crop: Crop = { picture, mask: grey, region };
  const [part, partOfMask] = [await cut(picture, region), await cut(whole, region)];
  const edit: Edit[number][] = [];
  for (const { width, height } of sizes) {
    const original = await originalOf(await filled(part, width, height), width, height);
    const values = await filled(partOfMask, width, height);
    const mask = await maskOf({ width, height, channels: whole.channels, data: values }, factor);
    edit.push({ original, mask, crop });
  }
  // What is too small for a latent is painted nowhere.
  if (edit.every(({ mask }) => mask!.empty)) grey.fill(0);
  return edit;
}

/** Pictures larger than this are refused before they are decoded: 100 megapixels, some 300 MB. */
const maxPixels = 100e6;

/** An original at the size of a stage. */
export interface Original {
  /** Row-major RGB, 3 bytes a pixel. */
  readonly rgb: Uint8Array;
  /** [1, 3, H, W] in [-1, 1], as the autoencoder reads it. */
  readonly pixels: FloatTensor;
}

/** Where to paint, at the size of a stage. */
export interface Mask {
  /** One byte a pixel: 1 where new content is wanted. */
  readonly pixels: Uint8Array;
  /** [1, 1, H/f, W/f], 0 or 1: the pixel at the corner of each latent's patch, as diffusers' nearest-neighbour. */
  readonly latents: FloatTensor;
  /** Whether no latent is to be painted; no pixel is, then. */
  readonly empty: boolean;
}

/** An option that a picture is of, for messages. */
export interface PictureName {
  readonly option: string;
  /** The picture's own name, such as "controls[0].image". Default: the option's. */
  readonly field?: string | undefined;
}

/**
 * Reads a picture as 8-bit RGB: orientation applied, transparent parts on white.
 * @throws OptionError for what is no picture, is animated, damaged or larger than 100 megapixels
 */
export async function readOriginal(source: PictureSource, name: PictureName = { option: "image" }): Promise<Raster> {
  return decoded(name, source, (open) => open().flatten({ background: "#ffffff" }).removeAlpha().toColourspace("srgb"));
}

/**
 * Reads a control picture as 8-bit RGB: its colours without regard to transparency, as `load_image` of diffusers does. White lines on a
 * transparent ground, which is mostly stored as black, would be lost on white.
 * @throws OptionError as `readOriginal`
 */
export async function readControlPicture(source: PictureSource, name: PictureName): Promise<Raster> {
  return decoded(name, source, (open) => open().removeAlpha().toColourspace("srgb"));
}

/**
 * Reads a mask: its alpha channel where it has transparent parts, else its colours.
 * @throws OptionError as `readOriginal`
 */
export async function readMask(source: PictureSource, name: PictureName = { option: "mask" }): Promise<Raster> {
  return decoded(name, source, async (open) => {
    const { hasAlpha } = await open().metadata();
    const transparent = hasAlpha && !(await open().stats()).isOpaque;
    return transparent ? open().extractChannel("alpha") : open().removeAlpha().toColourspace("srgb");
  });
}

/** A picture at width × height: resized, and cropped to cover it. */
export async function originalAt(picture: Raster, width: number, height: number): Promise<Original> {
  return originalOf(await resampled(picture, width, height, coveringBox(picture, width, height)), width, height);
}

async function originalOf(rgb: Uint8Array, width: number, height: number): Promise<Original> {
  const plane = width * height;
  const data = new Float32Array(3 * plane);
  for (let start = 0; start < plane; start += width) {
    for (let i = start; i < start + width; i++)
      for (let c = 0; c < 3; c++) data[c * plane + i] = rgb[3 * i + c]! / 127.5 - 1;
    if (isDue()) await rest();
  }
  return { rgb, pixels: float32([1, 3, height, width], data) };
}

/**
 * A mask at width × height: cropped as the picture is if it has the picture's shape, else stretched as diffusers does;
 * grey, white from one half on (diffusers' binarisation), then taken at the corner of each latent's patch.
 */
export async function maskAt(
  mask: Raster,
  picture: Raster,
  width: number,
  height: number,
  factor: number,
): Promise<Mask> {
  // Ratios are compared to one pixel: a mask may be a smaller copy.
  const isAlike =
    Math.abs(mask.width * picture.height - mask.height * picture.width) <= Math.max(picture.width, picture.height);
  const box = isAlike ? coveringBox(mask, width, height) : { left: 0, top: 0, width: mask.width, height: mask.height };
  const data = await resampled(mask, width, height, box);
  return maskOf({ width, height, channels: mask.channels, data }, factor);
}

/** One byte a pixel, as Pillow's "L". */
async function greyOf({ width, height, channels, data }: Raster): Promise<Uint8Array> {
  const grey = new Uint8Array(width * height);
  for (let start = 0; start < grey.length; start += width) {
    for (let i = start; i < start + width; i++)
      grey[i] =
        channels === 1
          ? data[i]!
          : (data[3 * i]! * 19595 + data[3 * i + 1]! * 38470 + data[3 * i + 2]! * 7471 + 0x8000) >> 16;
    if (isDue()) await rest();
  }
  return grey;
}

/** A mask at its size in pixels. */
export async function maskOf(mask: Raster, factor: number): Promise<Mask> {
  const { width, height } = mask;
  const grey = await greyOf(mask);
  const pixels = new Uint8Array(width * height);
  for (let start = 0; start < pixels.length; start += width) {
    for (let i = start; i < start + width; i++) pixels[i] = grey[i]! >= 128 ? 1 : 0;
    if (isDue()) await rest();
  }
  const [h, w] = [height / factor, width / factor];
  const latents = Float32Array.from(
    { length: h * w },
    (_, i) => pixels[Math.floor(i / w) * factor * width + (i % w) * factor]!,
  );
  const empty = !latents.includes(1);
  if (empty) pixels.fill(0);
  return { pixels, latents: float32([1, 1, h, w], latents), empty };
}

/** Takes the pixels outside the mask from the original. */
export async function keepOriginal(rgb: Uint8Array, original: Uint8Array, mask: Uint8Array): Promise<void> {
  for (let start = 0; start < mask.length; start += 4096) {
    for (let i = start; i < Math.min(start + 4096, mask.length); i++)
      if (mask[i] === 0) for (let k = 3 * i; k < 3 * i + 3; k++) rgb[k] = original[k]!;
    if (isDue()) await rest();
  }
}

async function decoded(
  { option, field = option }: PictureName,
  source: PictureSource,
  prepare: (open: () => Sharp) => Sharp | Promise<Sharp>,
): Promise<Raster> {
  if (typeof source !== "string" && !(source instanceof Uint8Array)) return { ...source, channels: 3 };
  const isPath = typeof source === "string";
  const name = isPath ? `"${source}"` : "the given picture";
  // Of a file a client is told the same for each cause, so that it does not learn what is there.
  const expected = `Expected a whole, still picture of at most ${maxPixels / 1e6} megapixels for ${field} but the given one cannot be used.`;
  const read = await sharp.load();
  let head = isPath ? new Uint8Array() : source.subarray(0, headLength);
  try {
    if (isPath) head = await headOf(source);
    const open = () => read(source, { limitInputPixels: maxPixels, failOn: "warning" });
    const { pages } = await open().metadata();
    if ((pages ?? 1) > 1)
      throw new OptionError(
        option,
        `Expected a still picture for ${field} but ${name} has ${pages} frames or pages.`,
        isPath ? { publicMessage: expected } : {},
      );
    const prepared = await prepare(() => open().autoOrient());
    const { data, info } = await prepared.raw({ depth: "uchar" }).toBuffer({ resolveWithObject: true });
    return { width: info.width, height: info.height, channels: info.channels, data };
  } catch (cause) {
    if (cause instanceof OptionError) throw cause;
    const kind = undecodable(head);
    const detail = kind
      ? `it is ${kind.name}. ${kind.remedy.replace(/\.$/, "")}`
      : (cause as Error).message.split("\n")[0]!.replace(/[\s:.]+$/, "");
    throw new OptionError(
      option,
      `Expected a whole picture of at most ${maxPixels / 1e6} megapixels for ${field} but ${name} cannot be read: ${detail}.`,
      { cause, publicMessage: expected },
    );
  }
}

/** The first bytes of a file. */
async function headOf(file: string): Promise<Uint8Array> {
  const handle = await openFile(file);
  try {
    const { buffer, bytesRead } = await handle.read(new Uint8Array(headLength), 0, headLength);
    return buffer.subarray(0, bytesRead);
  } finally {
    await handle.close();
  }
}
