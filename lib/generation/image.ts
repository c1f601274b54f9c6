/**
 * Pictures out: the decoder's values to RGB, and RGB to files with the generation parameters as text.
 */

import path from "node:path";
import { writeFileAtomic } from "../common/files.js";
import type { FloatTensor } from "../common/tensor.js";
import { clipped } from "../common/text.js";
import { isDue, rest } from "../common/turns.js";
import { OptionError, OutputError } from "../errors.js";
import type { ImageFormat, Picture, RgbPicture } from "../model.js";
import { exifOf, withText } from "./metadata.js";
import { sharp } from "./sharp.js";

const formats: Record<string, ImageFormat> = { ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp" };

/** The format that a file's name asks for. @throws OptionError for a name that asks for none of them */
export function formatOf(file: string): ImageFormat {
  const format = formats[path.extname(file).toLowerCase()];
  if (!format) {
    const expected = "Expected a file name ending in .png, .jpg, .jpeg or .webp";
    throw new OptionError("out", `${expected} but received "${file}".`, { publicMessage: `${expected}.` });
  }
  return format;
}

/** One picture, 8-bit RGB. */
export class Image implements Picture {
  /** Pixels. */
  readonly width: number;
  /** Pixels. */
  readonly height: number;
  /** Row-major RGB, 3 bytes a pixel. */
  readonly data: Uint8Array;
  /** How it was made; written into encoded files as text, if there is anything. */
  readonly parameters: Readonly<Record<string, unknown>>;

  /** @param data row-major RGB, 3 bytes a pixel */
  constructor(width: number, height: number, data: Uint8Array, parameters: Record<string, unknown> = {}) {
    this.width = width;
    this.height = height;
    this.data = data;
    this.parameters = parameters;
  }

  /**
   * Encoded, with the parameters as text where there are any (PNG: the chunk "parameters"; JPEG and WebP: EXIF ImageDescription,
   * in which there is room for 64,800 characters: longer texts are shortened, and the field `truncated` names them).
   * @param options `quality` of jpeg and webp, 1 to 100; default: 95
   * @throws OptionError for another quality, or one for png, which loses nothing
   */
  async encode(format: ImageFormat, options: { quality?: number | undefined } = {}): Promise<Buffer> {
    const quality = checkedQuality(format, options.quality);
    const raw = { width: this.width, height: this.height, channels: 3 as const };
    const isDescribed = Object.keys(this.parameters).length > 0;
    const picture = (await sharp.load())(this.data, { raw });
    if (format === "png") {
      const png = await picture.png().toBuffer();
      return isDescribed ? withText(png, "parameters", JSON.stringify(this.parameters)) : png;
    }
    const described = isDescribed ? picture.withExif({ IFD0: exifOf(this.parameters) }) : picture;
    return format === "jpeg"
      ? described.jpeg({ quality, chromaSubsampling: "4:4:4" }).toBuffer()
      : described.webp({ quality }).toBuffer();
  }

  /** As `encode("png")`. */
  toPNG(): Promise<Buffer> {
    return this.encode("png");
  }

  /**
   * Writes the picture; the extension decides the format. The file appears whole or not at all.
   * @throws OptionError for an unknown extension, OutputError if it cannot be written
   */
  async toFile(file: string): Promise<void> {
    const format = formatOf(file);
    const data = await this.encode(format);
    await writeFileAtomic(file, data).catch((cause: Error) => {
      throw new OutputError(file, `Cannot write ${file}: ${cause.message}`, { cause });
    });
  }
}

/** Of jpeg and webp, where none is named. */
const defaultQuality = 95;

/** @throws OptionError for what no encoder of the format takes */
function checkedQuality(format: ImageFormat, quality: number | undefined): number {
  if (quality === undefined) return defaultQuality;
  if (format === "png")
    throw new OptionError(
      "quality",
      `The format png loses nothing and takes no quality; leave out quality (${quality}), or use jpeg or webp.`,
    );
  if (!Number.isInteger(quality) || quality < 1 || quality > 100)
    throw new OptionError(
      "quality",
      `Expected a whole number from 1 to 100 for quality but received ${clipped(String(quality), 80)}.`,
    );
  return quality;
}

/** The same picture at another size, smoothly. */
export async function resized(picture: RgbPicture, width: number, height: number): Promise<Image> {
  const raw = { width: picture.width, height: picture.height, channels: 3 as const };
  const open = await sharp.load();
  const data = await open(picture.data, { raw }).resize(width, height, { fit: "fill" }).raw().toBuffer();
  return new Image(width, height, new Uint8Array(data));
}

/** Row `row` of decoded values [B, 3, H, W], nominally in [-1, 1], as interleaved 8-bit RGB. */
export function toRgb(image: FloatTensor, row: number): Uint8Array {
  const rgb = rgbOf(image);
  for (const _ of lines(image, row, rgb));
  return new Uint8Array(rgb.buffer);
}

/** As `toRgb`, in slices that leave the event loop free. */
export async function toRgbInSlices(image: FloatTensor, row: number): Promise<Uint8Array> {
  const rgb = rgbOf(image);
  for (const _ of lines(image, row, rgb)) if (isDue()) await rest();
  return new Uint8Array(rgb.buffer);
}

/** A clamped array rounds half to even and clamps, as numpy's round and clip do for diffusers. */
function rgbOf({ shape: [, , height, width] }: FloatTensor): Uint8ClampedArray<ArrayBuffer> {
  return new Uint8ClampedArray(height! * width! * 3);
}

/** Yields after each line. */
function* lines(image: FloatTensor, row: number, rgb: Uint8ClampedArray): Generator<void, void> {
  const [, channels, height, width] = image.shape as [number, number, number, number];
  const plane = height * width;
  const source = image.data.subarray(row * channels * plane, (row + 1) * channels * plane);
  for (let start = 0; start < plane; start += width) {
    for (let channel = 0; channel < 3; channel++) {
      const from = (channels === 1 ? 0 : channel) * plane;
      for (let i = start, to = 3 * start + channel; i < start + width; i++, to += 3)
        rgb[to] = (source[from + i]! / 2 + 0.5) * 255;
    }
    yield;
  }
}
