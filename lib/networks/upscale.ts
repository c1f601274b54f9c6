/**
 * Upscaling between two stages, one graph: a finished picture of one size becomes the noisy start of a larger one. The
 * picture is resized in pixels, since interpolated latents decode with strong artefacts: decode, resize (bicubic,
 * half-pixel centres, a = -0.75, as torch's interpolate), encode (the mode), then x = (1 − σ)·z + σ·ε.
 */

import type { VaeConfig } from "../checkpoint/index.js";
import type { WeightSource } from "../common/tensor.js";
import { type EmitOptions, GraphBuilder, type OnnxGraph, type Value } from "../onnx/index.js";
import { scaleNoise } from "./layers.js";
import { decode, encode } from "./vae.js";

/**
 * Inputs (float32): latents [B, C, h, w], noise [B, C, H, W], sigma [B]. Output: x [B, C, H, W].
 * @throws CheckpointError if a weight is absent or has another shape than the config implies
 */
export function emitUpscale(name: string, weights: WeightSource, config: VaeConfig, options: EmitOptions): OnnxGraph {
  const g = new GraphBuilder(name);
  const channels = config.latentChannels;
  const latents = g.input("latents", "float32", ["rows", channels, "height", "width"]);
  const noise = g.input("noise", "float32", ["rows", channels, "next_height", "next_width"]);
  const sigma = g.input("sigma", "float32", ["rows"]);
  const picture = decode(g, weights, config, latents, options);
  const factor = 2 ** (config.blockOutChannels.length - 1);
  const size = g.op(
    "Concat",
    [
      g.op("Shape", [picture], { start: 0, end: 2 }),
      g.op("Mul", [g.op("Shape", [noise], { start: 2, end: 4 }), g.ints([factor, factor])]),
    ],
    { axis: 0 },
  );
  const resized: Value = g.op("Resize", [picture, null, null, size], {
    mode: "cubic",
    cubic_coeff_a: { float: -0.75 },
    coordinate_transformation_mode: "half_pixel",
  });
  const latentsAtSize = encode(g, weights, config, resized, options);
  g.output("x", scaleNoise(g, latentsAtSize, noise, sigma), ["rows", channels, "next_height", "next_width"]);
  return g.build();
}
