/**
 * Edges of a picture as ControlNets for edges were trained on them: Canny's detector as OpenCV computes it, to the pixel
 * (Sobel kernels of 3 × 3, magnitude |dx| + |dy| of the channel where it is largest, thinning along the gradient in four directions, hysteresis
 * over eight neighbours). In slices that leave the event loop free.
 */

import { isDue, rest } from "../common/turns.js";
import { OptionError } from "../errors.js";
import type { PictureSource, RgbPicture } from "../model.js";
import { readOriginal } from "./edit.js";
import type { Raster } from "./resample.js";
import { sharp } from "./sharp.js";

/** Options of `canny`. */
export interface CannyOptions {
  /** Magnitude of the gradient, |dx| + |dy| of 3 × 3 Sobel kernels, that an edge goes on above. Default: 100. */
  low?: number | undefined;
  /** Magnitude that an edge begins above. Default: 200. */
  high?: number | undefined;
  /** Standard deviation, in pixels, of a Gaussian blur before, which leaves out fine edges: 0 for none, or from 0.3. Default: 0. */
  sigma?: number | undefined;
}

/** OpenCV's usual thresholds for ControlNets. */
const defaultLow = 100;
const defaultHigh = 200;

/** tan 22.5° in fixed-point numbers of 15 bits. */
const tangent = Math.trunc(Math.SQRT2 * 2 ** 15 - 2 ** 15 + 0.5);

/** What a pixel is besides 0, no edge: an edge if it touches one, or an edge. */
const [candidate, edge] = [1, 2];

/**
 * The edges of a picture, white on black, for a ControlNet that was trained on Canny edges.
 * @param picture path, encoded bytes, or pixels; with `allowPaths: false` no path
 * @throws OptionError for a picture that cannot be read, or thresholds that are none
 */
export async function canny(picture: PictureSource, options: CannyOptions = {}): Promise<RgbPicture> {
  const { low = defaultLow, high = defaultHigh, sigma = 0 } = options;
  for (const [name, value] of Object.entries({ low, high }))
    if (!(value >= 0 && value <= 4096))
      throw new OptionError(name, `Expected a number from 0 to 4096 for ${name} but received ${value}.`);
  if (low > high)
    throw new OptionError(
      "low",
      `Expected low (${low}) not above high (${high}): edges begin above high, and go on above low.`,
    );
  if (!(sigma === 0 || (sigma >= 0.3 && sigma <= 1000)))
    throw new OptionError("sigma", `Expected 0, or a number from 0.3 to 1000, for sigma but received ${sigma}.`);
  const raster = await readOriginal(picture);
  const { width, height } = raster;
  return { width, height, data: await edgesOf(sigma === 0 ? raster : await blurred(raster, sigma), low, high) };
}

/** The edges of RGB pixels, as RGB pixels that are white or black. */
export async function edgesOf(raster: Raster, low = defaultLow, high = defaultHigh): Promise<Uint8Array> {
  const { width, height } = raster;
  const { dx, dy, magnitude } = await gradients(raster);

  // 1. Thinning: of pixels above the lower threshold those stay that are largest across the edge.
  const kinds = new Uint8Array(width * height);
  const sure: number[] = [];
  // Whole thresholds, as OpenCV rounds them. Beyond the border magnitudes are 0, and one more column keeps it there.
  const [least, enough] = [Math.floor(low), Math.floor(high)];
  const line = width + 2;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = y * width + x;
      const at = (y + 1) * line + x + 1;
      const value = magnitude[at]!;
      if (value <= least || !isLargest(magnitude, at, line, dx[i]!, dy[i]!)) continue;
      kinds[i] = value > enough ? edge : candidate;
      if (value > enough) sure.push(i);
    }
    if (isDue()) await rest();
  }

  // 2. Hysteresis: what touches an edge is one.
  for (let next = sure.pop(), count = 0; next !== undefined; next = sure.pop(), count++) {
    const [x, y] = [next % width, Math.trunc(next / width)];
    for (let ny = Math.max(0, y - 1); ny <= Math.min(height - 1, y + 1); ny++)
      for (let nx = Math.max(0, x - 1); nx <= Math.min(width - 1, x + 1); nx++) {
        const neighbour = ny * width + nx;
        if (kinds[neighbour] !== candidate) continue;
        kinds[neighbour] = edge;
        sure.push(neighbour);
      }
    if (count % 1024 === 0 && isDue()) await rest();
  }

  const rgb = new Uint8Array(3 * width * height);
  for (let i = 0; i < kinds.length; i++) if (kinds[i] === edge) rgb.fill(255, 3 * i, 3 * i + 3);
  return rgb;
}

/** Whether a magnitude is no less than its two neighbours along the gradient. */
function isLargest(magnitude: Int32Array, at: number, line: number, dx: number, dy: number): boolean {
  const value = magnitude[at]!;
  const [x, y] = [Math.abs(dx), Math.abs(dy) * 2 ** 15];
  const flat = x * tangent;
  if (y < flat) return value > magnitude[at - 1]! && value >= magnitude[at + 1]!;
  if (y > flat + x * 2 ** 16) return value > magnitude[at - line]! && value >= magnitude[at + line]!;
  const side = (dx ^ dy) < 0 ? -1 : 1;
  return value > magnitude[at - line - side]! && value > magnitude[at + line + side]!;
}

/** Derivatives of each pixel, those of the channel where they are largest; and |dx| + |dy|, with a border of zeros around. */
async function gradients({ width, height, channels, data }: Raster) {
  const dx = new Int16Array(width * height);
  const dy = new Int16Array(width * height);
  const magnitude = new Int32Array((width + 2) * (height + 2));
  for (let y = 0; y < height; y++) {
    // The picture goes on beyond its border as it is there.
    const [above, here, below] = [Math.max(0, y - 1), y, Math.min(height - 1, y + 1)].map((row) => row * width);
    for (let x = 0; x < width; x++) {
      const [left, right] = [Math.max(0, x - 1), Math.min(width - 1, x + 1)];
      let largest = -1;
      for (let c = 0; c < channels; c++) {
        const at = (row: number, column: number) => data[(row + column) * channels + c]!;
        const [a, b, d] = [at(above!, left), at(above!, x), at(above!, right)];
        const [e, f] = [at(here!, left), at(here!, right)];
        const [p, q, r] = [at(below!, left), at(below!, x), at(below!, right)];
        const gx = d + 2 * f + r - a - 2 * e - p;
        const gy = p + 2 * q + r - a - 2 * b - d;
        const size = Math.abs(gx) + Math.abs(gy);
        if (size <= largest) continue;
        largest = size;
        dx[y * width + x] = gx;
        dy[y * width + x] = gy;
      }
      magnitude[(y + 1) * (width + 2) + x + 1] = largest;
    }
    if (isDue()) await rest();
  }
  return { dx, dy, magnitude };
}

async function blurred(raster: Raster, sigma: number): Promise<Raster> {
  const { width, height, data } = raster;
  const open = await sharp.load();
  const soft = await open(data, { raw: { width, height, channels: 3 } })
    .blur(sigma)
    .raw({ depth: "uchar" })
    .toBuffer();
  return { ...raster, data: soft };
}
