/**
 * A linear map from latents to colours, for previews that cost next to nothing. It is fitted to the autoencoder in
 * use: pictures made up of gradients and rectangles are encoded, and the colours of each latent's patch of pixels are
 * regressed on its channels (least squares). How close it comes depends on the autoencoder: on the embedded model's,
 * which is far from linear, the best map of all errs by 17 grey levels on the model's own pictures.
 */

import type { VaeConfig } from "../checkpoint/index.js";
import { solve } from "../common/linear.js";
import { type FloatTensor, float32, type Tensor } from "../common/tensor.js";
import { previewFitSide as fitSide } from "../networks/index.js";
import type { Program } from "../program/program.js";
import { rowOf, stacked } from "./latents.js";
import { encoderProgram } from "./programs.js";

export interface LatentColours {
  /** [3, C] */
  readonly map: FloatTensor;
  /** [3, 1] */
  readonly bias: FloatTensor;
}

const pictures = 8;

/** Fits the map by running the encoder, one picture at a time. */
export async function fitLatentColours(
  { latentChannels: channels, factor }: VaeConfig,
  run: (program: Program) => Promise<Record<string, Tensor>>,
): Promise<LatentColours> {
  const images = samplePictures(fitSide * factor);
  const latents: Tensor[] = [];
  for (let row = 0; row < pictures; row++) {
    const results = await run(encoderProgram(rowOf(images, row), [1, channels, fitSide, fitSide], factor));
    latents.push(results.latents!);
  }
  return regress((await stacked(latents)).data, patchColours(images.data, factor), channels);
}

/** Pictures [n, 3, size, size] in [-1, 1]: a gradient between two colours under a few rectangles of others. */
function samplePictures(size: number): FloatTensor {
  let state = 7;
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  const colour = () => [random() * 2 - 1, random() * 2 - 1, random() * 2 - 1];
  const data = new Float32Array(pictures * 3 * size * size);
  for (let n = 0; n < pictures; n++) {
    const [from, to] = [colour(), colour()];
    const angle = random() * 2 * Math.PI;
    const rectangles = Array.from({ length: 6 }, () => {
      const [left, top] = [random() * size * 0.8, random() * size * 0.8];
      return {
        left,
        top,
        right: left + size * (0.1 + random() * 0.4),
        bottom: top + size * (0.1 + random() * 0.4),
        fill: colour(),
      };
    });
    for (let y = 0; y < size; y++)
      for (let x = 0; x < size; x++) {
        const along = 0.5 + ((x / size - 0.5) * Math.cos(angle) + (y / size - 0.5) * Math.sin(angle)) / Math.SQRT2;
        const over = rectangles.findLast((r) => x >= r.left && x < r.right && y >= r.top && y < r.bottom);
        for (let c = 0; c < 3; c++)
          data[((n * 3 + c) * size + y) * size + x] = over ? over.fill[c]! : from[c]! + (to[c]! - from[c]!) * along;
      }
  }
  return float32([pictures, 3, size, size], data);
}

/** Mean colour of each latent's patch: [n, 3, fitSide · factor, …] → [n, 3, fitSide, fitSide]. */
function patchColours(images: Float32Array, factor: number): Float32Array {
  const size = fitSide * factor;
  const means = new Float32Array(pictures * 3 * fitSide * fitSide);
  for (let plane = 0; plane < pictures * 3; plane++)
    for (let y = 0; y < size; y++)
      for (let x = 0; x < size; x++)
        means[(plane * fitSide + Math.floor(y / factor)) * fitSide + Math.floor(x / factor)]! +=
          images[(plane * size + y) * size + x]! / factor ** 2;
  return means;
}

/** Least squares with a small ridge: channels may be constant. */
function regress(latents: Float32Array, colours: Float32Array, channels: number): LatentColours {
  const unknowns = channels + 1;
  const normal = Array.from({ length: unknowns }, () => new Float64Array(unknowns + 3));
  const row = new Float64Array(unknowns + 3);
  const plane = fitSide * fitSide;
  for (let n = 0; n < pictures; n++)
    for (let i = 0; i < plane; i++) {
      for (let c = 0; c < channels; c++) row[c] = latents[(n * channels + c) * plane + i]!;
      row[channels] = 1;
      for (let c = 0; c < 3; c++) row[unknowns + c] = colours[(n * 3 + c) * plane + i]!;
      for (let a = 0; a < unknowns; a++) for (let b = 0; b < unknowns + 3; b++) normal[a]![b]! += row[a]! * row[b]!;
    }
  for (let a = 0; a < channels; a++) normal[a]![a]! += 1e-3 * pictures * plane;
  solve(normal, unknowns);
  const map = new Float32Array(3 * channels);
  const bias = new Float32Array(3);
  for (let colour = 0; colour < 3; colour++) {
    for (let c = 0; c < channels; c++) map[colour * channels + c] = normal[c]![unknowns + colour]!;
    bias[colour] = normal[channels]![unknowns + colour]!;
  }
  return { map: float32([3, channels], map), bias: float32([3, 1], bias) };
}
