/**
 * Pictures to another size, exactly as `resize` of Pillow 13 does it, which diffusers prepares originals and masks with: Lanczos
 * with three lobes, widened when it reduces, in fixed-point numbers, in two passes. Not with sharp,
 * which enlarges and reduces in different ways: a mask is cut at one half, so that one grey level can change a latent. In
 * slices that leave the event loop free.
 */

import { isDue, rest } from "../common/turns.js";

/** 8-bit values, row-major, `channels` a pixel. */
export interface Raster {
  readonly width: number;
  readonly height: number;
  readonly channels: number;
  readonly data: Uint8Array;
}

/** A part of a raster, in pixels and parts of them. */
export interface Box {
  readonly left: number;
  readonly top: number;
  readonly width: number;
  readonly height: number;
}

/** For each value of a line its first source, and its fixed-point weights. */
interface Weights {
  readonly first: Int32Array;
  readonly counts: Int32Array;
  /** `taps` for each value. */
  readonly weights: Int32Array;
  readonly taps: number;
}

const lobes = 3;
/** Bits after the point, of 32: 8 are the value's, 2 are for overshoot. */
const precision = 22;

/** The greatest part of a raster, in its middle, that has the shape of width × height. */
export function coveringBox(raster: Raster, width: number, height: number): Box {
  const scale = Math.min(raster.width / width, raster.height / height);
  const [w, h] = [width * scale, height * scale];
  return { left: (raster.width - w) / 2, top: (raster.height - h) / 2, width: w, height: h };
}

/**
 * The part `box` of a raster at width × height: what would be cut out of the whole raster, resized. Rows are resized first, and only those that
 * the columns will need; columns are where the height of the whole shrinks by more than twice as many pixels as its width. Values are
 * rounded between the two, so that the order counts.
 */
export async function resampled(raster: Raster, width: number, height: number, box: Box): Promise<Uint8Array> {
  const isNarrowed = width !== raster.width || box.left !== 0 || box.width !== width;
  const isLowered = height !== raster.height || box.top !== 0 || box.height !== height;
  if (!isNarrowed && !isLowered) return raster.data;
  const across = lanczos(raster.width, box.left, box.width, width);
  const down = lanczos(raster.height, box.top, box.height, height);
  const narrowed = raster.width - Math.round((width * raster.width) / box.width);
  const lowered = raster.height - Math.round((height * raster.height) / box.height);
  if (lowered > 0 && lowered > 2 * narrowed) {
    const low = await downColumns(raster, down, 0);
    return (isNarrowed ? await alongRows(low, across, 0, height) : low).data;
  }
  const top = isNarrowed ? down.first[0]! : 0;
  const rows = down.first[height - 1]! + down.counts[height - 1]! - top;
  const narrow = isNarrowed ? await alongRows(raster, across, top, rows) : raster;
  return (isLowered ? await downColumns(narrow, down, top) : narrow).data;
}

/** Some rows of a raster, from `top` on, at another width. */
async function alongRows(raster: Raster, across: Weights, top: number, rows: number): Promise<Raster> {
  const { channels } = raster;
  const width = across.first.length;
  const data = new Uint8Array(rows * width * channels);
  for (let y = 0; y < rows; y++) {
    const from = (top + y) * raster.width * channels;
    for (let x = 0; x < width; x++) {
      const [first, count] = [from + across.first[x]! * channels, across.counts[x]!];
      const [at, weight] = [(y * width + x) * channels, x * across.taps];
      for (let c = 0; c < channels; c++)
        data[at + c] = weighed(raster.data, first + c, channels, across.weights, weight, count);
    }
    if (isDue()) await rest();
  }
  return { width, height: rows, channels, data };
}

/**
 * A raster at another height.
 * @param top the row of the source that is the raster's first
 */
async function downColumns(raster: Raster, down: Weights, top: number): Promise<Raster> {
  const height = down.first.length;
  const line = raster.width * raster.channels;
  const data = new Uint8Array(height * line);
  for (let y = 0; y < height; y++) {
    const [first, count] = [(down.first[y]! - top) * line, down.counts[y]!];
    for (let i = 0; i < line; i++)
      data[y * line + i] = weighed(raster.data, first + i, line, down.weights, y * down.taps, count);
    if (isDue()) await rest();
  }
  return { ...raster, height, data };
}

/** Sum of `count` values that lie `stride` apart, weighted and rounded. */
function weighed(
  data: Uint8Array,
  from: number,
  stride: number,
  weights: Int32Array,
  at: number,
  count: number,
): number {
  let sum = 1 << (precision - 1);
  for (let k = 0; k < count; k++) sum = (sum + Math.imul(data[from + k * stride]!, weights[at + k]!)) | 0;
  const value = sum >> precision;
  return Math.max(0, Math.min(value, 255));
}

/** Weights that take `length` values from `start` on, of `size`, to `count` values. */
function lanczos(size: number, start: number, length: number, count: number): Weights {
  const scale = length / count;
  const widening = Math.max(scale, 1);
  const support = lobes * widening;
  const taps = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(count);
  const counts = new Int32Array(count);
  const weights = new Int32Array(count * taps);
  for (let i = 0; i < count; i++) {
    const centre = start + (i + 0.5) * scale;
    const from = Math.max(0, Math.trunc(centre - support + 0.5));
    const to = Math.min(size, Math.trunc(centre + support + 0.5));
    const exact = Array.from({ length: to - from }, (_, k) => kernel((k + from - centre + 0.5) / widening));
    const sum = exact.reduce((a, b) => a + b, 0);
    first[i] = from;
    counts[i] = to - from;
    for (const [k, weight] of exact.entries()) {
      const fixed = (weight / sum) * 2 ** precision;
      // Half away from zero.
      weights[i * taps + k] = Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    }
  }
  return { first, counts, weights, taps };
}

function kernel(x: number): number {
  return x >= -lobes && x < lobes ? sinc(x) * sinc(x / lobes) : 0;
}

function sinc(x: number): number {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}
