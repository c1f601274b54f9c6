/**
 * Pictures out: the decoder's values to RGB, and RGB to files. Encoding is sharp's; the one thing done by hand is the
 * PNG text chunk with the generation parameters, which sharp has no way to write.
 */

import { randomBytes } from "node:crypto";
import { access, rename, rm, writeFile } from "node:fs/promises";
import path from "node:path";
import sharp, { type Sharp } from "sharp";
import { type FloatTensor, float32 } from "../common/tensor.js";
import { OptionError, OutputError } from "../errors.js";
import type { Picture, PictureSource, RgbPicture } from "../options.js";
import { coveringBox, type Raster, resampled } from "./resample.js";

export type ImageFormat = "png" | "jpeg" | "webp";

const formats: Record<string, ImageFormat> = { ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp" };

/** The format that a file's name asks for. @throws OptionError for a name that asks for none of them */
export function formatOf(file: string): ImageFormat {
  const format = formats[path.extname(file).toLowerCase()];
  if (!format)
    throw new OptionError("out", `Expected a file name ending in .png, .jpg, .jpeg or .webp but received "${file}".`);
  return format;
}

/** One picture, 8-bit RGB. */
export class Image implements Picture {
  readonly width: number;
  readonly height: number;
  /** Row-major RGB, 3 bytes a pixel. */
  readonly data: Uint8Array;
  /** How it was made; written into PNG files as text. */
  readonly parameters: Readonly<Record<string, unknown>>;

  constructor(width: number, height: number, data: Uint8Array, parameters: Record<string, unknown> = {}) {
    this.width = width;
    this.height = height;
    this.data = data;
    this.parameters = parameters;
  }

  /** Encoded, with the parameters as text (PNG: the chunk "parameters"; JPEG and WebP: EXIF ImageDescription). */
  async encode(format: ImageFormat): Promise<Buffer> {
    const raw = { width: this.width, height: this.height, channels: 3 as const };
    const text = JSON.stringify(this.parameters);
    const picture = sharp(this.data, { raw });
    if (format === "png") return withText(await picture.png().toBuffer(), "parameters", text);
    const described = picture.withExif({ IFD0: { ImageDescription: text, Software: "flowturbo" } });
    return format === "jpeg"
      ? described.jpeg({ quality: 95, chromaSubsampling: "4:4:4" }).toBuffer()
      : described.webp({ quality: 95 }).toBuffer();
  }

  toPNG(): Promise<Buffer> {
    return this.encode("png");
  }

  /**
   * Writes the picture; the extension decides the format. The file appears whole or not at all.
   * @throws OptionError for an unknown extension, OutputError if it cannot be written
   */
  async toFile(file: string): Promise<void> {
    const format = formatOf(file);
    await writeWhole(file, await this.encode(format));
  }
}

/** The same picture at another size, smoothly. */
export async function resized(picture: RgbPicture, width: number, height: number): Promise<Image> {
  const raw = { width: picture.width, height: picture.height, channels: 3 as const };
  const data = await sharp(picture.data, { raw }).resize(width, height, { fit: "fill" }).raw().toBuffer();
  return new Image(width, height, new Uint8Array(data));
}

/** Writes under a temporary name in the same folder, then renames. @throws OutputError */
export async function writeWhole(file: string, data: Uint8Array): Promise<void> {
  const temporary = `${file}.${randomBytes(6).toString("hex")}.tmp`;
  try {
    await writeFile(temporary, data, { flag: "wx" });
    await rename(temporary, file);
  } catch (cause) {
    await rm(temporary, { force: true }).catch(() => undefined);
    throw new OutputError(file, `Cannot write ${file}: ${(cause as Error).message}`, { cause });
  }
}

/** Row `row` of decoded values [B, 3, H, W], nominally in [-1, 1], as interleaved 8-bit RGB. */
export function toRgb(image: FloatTensor, row: number): Uint8Array {
  const [, channels, height, width] = image.shape as [number, number, number, number];
  const plane = height * width;
  const source = image.data.subarray(row * channels * plane, (row + 1) * channels * plane);
  // A clamped array rounds half to even and clamps, as numpy's round and clip do for diffusers.
  const rgb = new Uint8ClampedArray(plane * 3);
  for (let channel = 0; channel < 3; channel++) {
    const from = (channels === 1 ? 0 : channel) * plane;
    for (let i = 0, to = channel; i < plane; i++, to += 3) rgb[to] = (source[from + i]! / 2 + 0.5) * 255;
  }
  return new Uint8Array(rgb.buffer);
}

/** Pictures larger than this are refused before they are decoded: 100 megapixels, some 300 MB. */
const maxPixels = 100e6;

/** An original picture at the size of a stage. */
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

/**
 * Reads a picture as 8-bit RGB: orientation applied, transparent parts on white.
 * @throws OptionError for what is no picture, is animated, damaged or larger than 100 megapixels
 */
export async function readOriginal(source: PictureSource): Promise<Raster> {
  return decoded("image", source, (open) =>
    open().flatten({ background: "#ffffff" }).removeAlpha().toColourspace("srgb"),
  );
}

/**
 * Reads a mask: its alpha channel where it has transparent parts, else its colours.
 * @throws OptionError as `readOriginal`
 */
export async function readMask(source: PictureSource): Promise<Raster> {
  return decoded("mask", source, async (open) => {
    const { hasAlpha } = await open().metadata();
    const transparent = hasAlpha && !(await open().stats()).isOpaque;
    return transparent ? open().extractChannel("alpha") : open().removeAlpha().toColourspace("srgb");
  });
}

/** A picture at width × height: resized, and cropped to cover it. */
export async function originalAt(picture: Raster, width: number, height: number): Promise<Original> {
  const rgb = await resampled(picture, width, height, coveringBox(picture, width, height));
  const plane = width * height;
  const data = new Float32Array(3 * plane);
  for (let i = 0; i < plane; i++) for (let c = 0; c < 3; c++) data[c * plane + i] = rgb[3 * i + c]! / 127.5 - 1;
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
  // To the pixel: a mask may be a smaller copy.
  const isAlike =
    Math.abs(mask.width * picture.height - mask.height * picture.width) <= Math.max(picture.width, picture.height);
  const box = isAlike ? coveringBox(mask, width, height) : { left: 0, top: 0, width: mask.width, height: mask.height };
  const values = await resampled(mask, width, height, box);
  const grey = (i: number) =>
    mask.channels === 1
      ? values[i]!
      : // As Pillow's "L".
        (values[3 * i]! * 19595 + values[3 * i + 1]! * 38470 + values[3 * i + 2]! * 7471 + 0x8000) >> 16;
  const pixels = Uint8Array.from({ length: width * height }, (_, i) => (grey(i) >= 128 ? 1 : 0));
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
export function keepOriginal(rgb: Uint8Array, original: Uint8Array, mask: Uint8Array): void {
  for (let i = 0; i < mask.length; i++) if (mask[i] === 0) rgb.set(original.subarray(3 * i, 3 * i + 3), 3 * i);
}

async function decoded(
  option: "image" | "mask",
  source: PictureSource,
  prepare: (open: () => Sharp) => Sharp | Promise<Sharp>,
): Promise<Raster> {
  if (typeof source !== "string" && !(source instanceof Uint8Array)) return { ...source, channels: 3 };
  const name = typeof source === "string" ? `"${source}"` : "the given picture";
  try {
    if (typeof source === "string") await access(source);
    const open = () => sharp(source, { limitInputPixels: maxPixels, failOn: "warning" });
    const { pages } = await open().metadata();
    if ((pages ?? 1) > 1)
      throw new OptionError(option, `Expected a still picture for ${option} but ${name} has ${pages} frames or pages.`);
    const prepared = await prepare(() => open().autoOrient());
    const { data, info } = await prepared.raw({ depth: "uchar" }).toBuffer({ resolveWithObject: true });
    return { width: info.width, height: info.height, channels: info.channels, data: new Uint8Array(data) };
  } catch (cause) {
    if (cause instanceof OptionError) throw cause;
    const detail = (cause as Error).message.split("\n")[0]!.replace(/[\s:.]+$/, "");
    throw new OptionError(
      option,
      `Expected a whole picture of at most ${maxPixels / 1e6} megapixels for ${option} but ${name} cannot be read: ${detail}.`,
      { cause },
    );
  }
}

/** Inserts an iTXt chunk behind the header chunk of a PNG (RFC 2083 with the 1.2 extensions; UTF-8, uncompressed). */
function withText(png: Buffer, keyword: string, text: string): Buffer {
  const headerEnd = 8 + 12 + 13;
  const body = Buffer.concat([
    Buffer.from("iTXt", "latin1"),
    Buffer.from(`${keyword}\0`, "latin1"),
    // No compression, no language, no translated keyword.
    Buffer.from([0, 0, 0, 0]),
    Buffer.from(text, "utf8"),
  ]);
  const chunk = Buffer.alloc(body.length + 8);
  chunk.writeUInt32BE(body.length - 4, 0);
  body.copy(chunk, 4);
  chunk.writeUInt32BE(crc32(body), body.length + 4);
  return Buffer.concat([png.subarray(0, headerEnd), chunk, png.subarray(headerEnd)]);
}

const crcTable = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});

/** As PNG wants it; node:zlib has one only from Node 20.15. */
function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = crcTable[(crc ^ byte) & 0xff]! ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}
