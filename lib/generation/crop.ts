/**
 * `paddingMaskCrop`: the surroundings of what a mask paints are cut out of picture and mask, drawn at the size asked for, and put back into the
 * picture. Written after diffusers' VaeImageProcessor (`get_crop_region`, `resize` with "fill" and "crop", `apply_overlay`), to the byte where
 * resample.ts equals Pillow.
 */

import { isDue, rest } from "../common/turns.js";
import type { Size } from "../model.js";
import { type Raster, resampled } from "./resample.js";

/** A part of a raster, in whole pixels. */
export interface Region extends Readonly<Size> {
  readonly left: number;
  readonly top: number;
}

/** What is put back into a picture. */
export interface Crop {
  /** The whole picture, RGB. */
  readonly picture: Raster;
  /** One byte a pixel of it: 255 where new content is wanted, 0 where the original stays, mixed in between. */
  readonly mask: Uint8Array;
  readonly region: Region;
}

/**
 * The rectangle around all of a mask that is not black, with so many pixels more on each side, and grown to the shape of `size` as far as there is
 * a picture. Of a mask that is black everywhere: all of it.
 */
export async function cropRegion(mask: Raster, size: Readonly<Size>, padding: number): Promise<Region> {
  const { width, height, data } = mask;
  let [left, right, top, bottom] = [width, -1, height, -1];
  for (let y = 0; y < height; y++) {
    if (isDue()) await rest();
    const row = data.subarray(y * width, (y + 1) * width);
    const first = row.findIndex((value) => value !== 0);
    if (first < 0) continue;
    [left, right] = [
      Math.min(left, first),
      Math.max(
        right,
        row.findLastIndex((value) => value !== 0),
      ),
    ];
    [top, bottom] = [Math.min(top, y), y];
  }
  if (right < 0) return { left: 0, top: 0, width, height };
  const x = [Math.max(left - padding, 0), Math.min(right + 1 + padding, width)] as const;
  const y = [Math.max(top - padding, 0), Math.min(bottom + 1 + padding, height)] as const;
  const [across, down] = [x[1] - x[0], y[1] - y[0]];
  const ratio = size.width / size.height;
  const isWide = across / down > ratio;
  const [x1, x2] = isWide ? x : grown(x, down * ratio, width);
  const [y1, y2] = isWide ? grown(y, across / ratio, height) : y;
  return { left: x1, top: y1, width: x2 - x1, height: y2 - y1 };
}

/** An interval of about the length that is wanted, moved to lie between 0 and `most`, and cut where it is longer. */
function grown([start, end]: readonly [number, number], length: number, most: number): [number, number] {
  const more = Math.trunc(length - (end - start));
  let [from, to] = [start - Math.floor(more / 2), end + more - Math.floor(more / 2)];
  if (to >= most) [from, to] = [from - (to - most), most];
  if (from < 0) [from, to] = [0, to - from];
  return [from, Math.min(to, most)];
}

/** A part of a raster as a raster. */
export async function cut({ width, channels, data }: Raster, region: Region): Promise<Raster> {
  const line = region.width * channels;
  const part = new Uint8Array(region.height * line);
  for (let y = 0; y < region.height; y++) {
    const from = ((region.top + y) * width + region.left) * channels;
    part.set(data.subarray(from, from + line), y * line);
    if (isDue()) await rest();
  }
  return { width: region.width, height: region.height, channels, data: part };
}

/** All of a raster within width × height, in its middle, and its edges continued over what is left. */
export async function filled(raster: Raster, width: number, height: number): Promise<Uint8Array> {
  const { channels } = raster;
  const isWide = width / height < raster.width / raster.height;
  const [w, h] = isWide
    ? [width, Math.max(1, Math.floor((raster.height * width) / raster.width))]
    : [Math.max(1, Math.floor((raster.width * height) / raster.height)), height];
  const inner = await resampled(raster, w, h, whole(raster));
  if (w === width && h === height) return inner;
  const [left, top] = [Math.floor(width / 2) - Math.floor(w / 2), Math.floor(height / 2) - Math.floor(h / 2)];
  const result = new Uint8Array(width * height * channels);
  const value = (x: number, y: number, c: number) => inner[(y * w + x) * channels + c]!;
  // Outside, what Pillow's bicubic filter makes of an empty box at the edge: 1.125 of the nearest value less 0.125 of the next.
  const beyond = (edge: number, next: number) => Math.max(0, Math.min((9 * edge - next + 4) >> 3, 255));
  const pick = (at: number, length: number) => {
    const near = Math.max(0, Math.min(at, length - 1));
    return at === near ? null : [near, Math.max(0, Math.min(at < 0 ? 1 : length - 2, length - 1))];
  };
  for (let y = 0; y < height; y++) {
    const rows = pick(y - top, h);
    for (let x = 0; x < width; x++) {
      const columns = pick(x - left, w);
      for (let c = 0; c < channels; c++)
        result[(y * width + x) * channels + c] = rows
          ? beyond(value(x - left, rows[0]!, c), value(x - left, rows[1]!, c))
          : columns
            ? beyond(value(columns[0]!, y - top, c), value(columns[1]!, y - top, c))
            : value(x - left, y - top, c);
    }
    if (isDue()) await rest();
  }
  return result;
}

/**
 * A picture with what was drawn of a part of it.
 * @param drawn RGB
 * @param masked whether the original stays where the mask says so; otherwise all of the part is replaced
 */
export async function pasted({ picture, mask, region }: Crop, drawn: Raster, masked: boolean): Promise<Uint8Array> {
  const part = await covering(drawn, region);
  const { width, data } = picture;
  const result = new Uint8Array(data);
  for (let y = 0; y < region.height; y++) {
    const start = (region.top + y) * width + region.left;
    for (let x = 0; x < region.width; x++)
      for (let c = 0; c < 3; c++) {
        const [to, value] = [3 * (start + x) + c, part[3 * (y * region.width + x) + c]!];
        result[to] = masked ? mixed(result[to]!, value, mask[start + x]!) : value;
      }
    if (isDue()) await rest();
  }
  return result;
}

/** A raster resized to cover width × height, of which what is too much is cut off on both sides. */
function covering(raster: Raster, { width, height }: Readonly<Size>): Promise<Uint8Array> {
  const isWide = width / height > raster.width / raster.height;
  const w = isWide ? width : Math.floor((raster.width * height) / raster.height);
  const h = isWide ? Math.floor((raster.height * width) / raster.width) : height;
  const [left, top] = [Math.floor(w / 2) - Math.floor(width / 2), Math.floor(h / 2) - Math.floor(height / 2)];
  const [across, down] = [raster.width / w, raster.height / h];
  return resampled(raster, width, height, {
    ...{ left: left * across, top: top * down, width: width * across, height: height * down },
  });
}

/** Pillow's `alpha_composite` of the original, as opaque as the mask is black, over what was drawn; with its rounding. */
function mixed(original: number, drawn: number, mask: number): number {
  if (mask === 0) return original;
  if (mask === 255) return drawn;
  const alpha = 255 - mask;
  const dim = Math.min(255, Math.floor((255 * over255(original * alpha + 128)) / alpha));
  return over255((dim * alpha + drawn * mask) * 128 + 128 * 128) >> 7;
}

/** Divided by 255, for values that half of it was added to. */
function over255(value: number): number {
  return ((value >> 8) + value) >> 8;
}

const whole = ({ width, height }: Raster) => ({ left: 0, top: 0, width, height });
