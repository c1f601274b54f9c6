/** Pictures of requests: bytes, checked by their headers before anything decodes them. */

import type sharpModule from "sharp";
import { sharp } from "../generation/sharp.js";
import type { Control, Size } from "../model.js";
import type { Body } from "./bodies.js";
import { type Failure, invalid } from "./failure.js";
import type { Limits } from "./options.js";

/** Formats that hold pixels: no vector graphics, which may name other files. */
const formats = ["png", "jpeg", "webp", "gif", "heif", "tiff"];

/** What a request edits, as the options of `generate` take it. */
export interface Edited {
  readonly image: Uint8Array;
  /** White is painted. */
  readonly mask: Uint8Array | null;
  /** Pixels, upright. */
  readonly width: number;
  readonly height: number;
}

interface Measured {
  readonly width: number;
  readonly height: number;
  readonly hasAlpha: boolean;
}

/** @returns null for a request without a picture. @throws Failure that names the field */
export async function editedOf({ fields, files }: Body, limits: Limits): Promise<Edited | null> {
  const { image, images, mask } = fields;
  if (image !== undefined && images !== undefined)
    throw invalid("images", "Both image and images say what is edited; leave out one.");
  const picture = files.image ?? bytesOf("image", image === undefined ? images?.[0]?.image_url : [image].flat()[0]);
  const given = files.mask ?? bytesOf("mask", typeof mask === "string" ? mask : mask?.image_url);
  if (picture === undefined) {
    if (given) throw invalid("mask", "A mask needs a picture to work on; give image.");
    return null;
  }
  const { width, height } = await measure("image", picture, limits);
  const isWhole = fields.padding_mask_crop !== undefined;
  if (isWhole) checkAnswerSize(width, height, fields.n ?? 1, limits);
  const smaller = isWhole ? null : reducedSize(width, height, limits);
  const reduced = smaller ? await resizedTo(smaller, "image", picture) : picture;
  if (given === undefined) return { image: reduced, mask: null, width, height };
  const size = await measure("mask", given, limits);
  if (size.width !== width || size.height !== height)
    throw invalid(
      "mask",
      `Expected a mask of the picture's size, ${width}x${height}, but received one of ${size.width}x${size.height}.`,
    );
  if (!size.hasAlpha)
    throw invalid(
      "mask",
      "Expected a mask with an alpha channel, whose transparent parts are painted, but received one without.",
    );
  const shownMask = smaller ? await resizedTo(smaller, "mask", given) : given;
  return { image: reduced, mask: await paintedParts("mask", shownMask), width, height };
}

/** The ControlNets of a request with their pictures. @returns null for a request without any. @throws Failure that names the field */
export async function controlsOf({ fields }: Body, limits: Limits): Promise<Control[] | null> {
  if (!fields.controls) return null;
  const controls: Control[] = [];
  for (const [index, { name, image, mask, pixel_range: pixelRange, ...rest }] of fields.controls.entries()) {
    const read = (field: string, text: string) => controlPicture(`controls.${index}.${field}`, text, limits);
    const picture = await read("image", image);
    const painted = mask === undefined ? null : await whiteParts(`controls.${index}.mask`, await read("mask", mask));
    controls.push({
      ...{ folder: name, image: picture, ...rest },
      ...(painted && { mask: painted }),
      ...(pixelRange && { pixelRange }),
    });
  }
  return controls;
}

async function controlPicture(param: string, text: string, limits: Limits): Promise<Uint8Array> {
  const bytes = bytesOf(param, text)!;
  const { width, height } = await measure(param, bytes, limits);
  const smaller = reducedSize(width, height, limits);
  return smaller ? resizedTo(smaller, param, bytes) : bytes;
}

/** The mask of a control: transparent parts are painted, or where nothing is transparent the white ones. */
async function whiteParts(param: string, mask: Uint8Array): Promise<Uint8Array> {
  const open: typeof sharpModule = await sharp.load();
  const hasTransparent = async () => (await open(mask).metadata()).hasAlpha && !(await open(mask).stats()).isOpaque;
  return (await hasTransparent().catch(damaged(param))) ? paintedParts(param, mask) : mask;
}

const damaged = (param: string) => (cause: Error) => {
  throw Object.assign(invalid(param, `The picture for ${param} is damaged.`), { cause });
};

/**
 * With padding_mask_crop pictures are answered at the size of the one that is edited: they may take as much as the largest that the server draws.
 * @throws Failure
 */
function checkAnswerSize(width: number, height: number, count: number, { maxImages, maxPixels }: Limits): void {
  const most = Math.floor((maxImages * maxPixels) / count);
  if (width * height > most)
    throw invalid(
      "image",
      `Expected at most ${most} pixels for image beside padding_mask_crop, whose ${count === 1 ? "picture has" : `${count} pictures have`} its size, but received ${width}x${height}. Give a smaller image${count === 1 ? "" : ", or a smaller n"}, or leave padding_mask_crop out.`,
    );
}

/**
 * The size that a picture far larger than any that is drawn is brought to first; null for others. The library resizes as Pillow does, in
 * JavaScript, which takes seconds for tens of millions of pixels.
 */
function reducedSize(width: number, height: number, { maxPixels }: Limits): Size | null {
  const scale = Math.sqrt(Math.max(4_000_000, 2 * maxPixels) / (width * height));
  const side = (pixels: number) => Math.max(1, Math.round(scale * pixels));
  return scale < 1 ? { width: side(width), height: side(height) } : null;
}

async function resizedTo({ width, height }: Size, param: string, bytes: Uint8Array): Promise<Uint8Array> {
  const open: typeof sharpModule = await sharp.load();
  return open(bytes)
    .autoOrient()
    .resize(width, height, { fit: "fill" })
    .png({ compressionLevel: 1 })
    .toBuffer()
    .catch(damaged(param));
}

/** Base64 or a data: URL as bytes. */
function bytesOf(param: string, text: string | undefined): Uint8Array | undefined {
  if (text === undefined) return undefined;
  const data = text.replace(/^data:image\/[\w.+-]+;base64,/, "");
  if (/^\w+:/.test(data))
    throw invalid(
      param,
      `Expected base64 or a data: URL for ${param}. Nothing is fetched from other URLs; send the bytes.`,
    );
  // Lines may be broken. Without the breaks the pattern looks at each letter a bounded number of times.
  if (!/^[A-Za-z0-9+/]+={0,2}$/.test(data.replace(/\s+/g, ""))) throw invalid(param, `Expected base64 for ${param}.`);
  return Buffer.from(data, "base64");
}

async function measure(param: string, bytes: Uint8Array, { maxInputPixels }: Limits): Promise<Measured> {
  const open: typeof sharpModule = await sharp.load();
  const unreadable = () => invalid(param, `Expected a PNG, JPEG, WebP, GIF, AVIF or TIFF picture for ${param}.`);
  // An empty picture is refused at once, the others by what is read of them.
  const found = await (async () => open(bytes, { limitInputPixels: false }).metadata())().catch(
    (): Failure => unreadable(),
  );
  if (found instanceof Error) throw found;
  const { format, width, height, autoOrient, hasAlpha } = found;
  if (!format || !formats.includes(format) || !width || !height) throw unreadable();
  if (width * height > maxInputPixels)
    throw invalid(param, `Expected at most ${maxInputPixels} pixels for ${param} but received ${width}x${height}.`);
  return { ...(autoOrient ?? { width, height }), hasAlpha: hasAlpha === true };
}

/** A mask in OpenAI's meaning (transparent is painted) in the library's: white is painted. */
async function paintedParts(param: string, mask: Uint8Array): Promise<Uint8Array> {
  const open: typeof sharpModule = await sharp.load();
  return open(mask)
    .autoOrient()
    .extractChannel("alpha")
    .negate()
    .toColourspace("b-w")
    .png({ compressionLevel: 1 })
    .toBuffer()
    .catch(damaged(param));
}
