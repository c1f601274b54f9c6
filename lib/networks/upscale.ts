/**
 * Upscaling between two stages, one graph: a finished picture of one size becomes the noisy start of a larger one. The
 * picture is resized in pixels, since interpolated latents decode with strong artefacts: decode, resize (bicubic,
 * half-pixel centres, a = -0.75, as torch's interpolate), encode (the mode), then x = (1 − σ)·z + σ·ε.
 */

import type { Part, VaeConfig } from "../checkpoint/index.js";
import { type EmitOptions, GraphBuilder, type OnnxGraph } from "../onnx/index.js";
import { scaleNoise } from "./layers.js";
import { autoencoder } from "./vae.js";

/**
 * Inputs (float32): latents [B, C, h, w], noise [B, C, H, W], sigma [B]. Output: x [B, C, H, W].
 * @throws CheckpointError if a weight is absent or has another shape than the config implies
 */
export function emitUpscale(name: string, vae: Part<VaeConfig>, options: EmitOptions): OnnxGraph {
  const g = new GraphBuilder(name);
  const channels = vae.config.latentChannels;
  const latents = g.input("latents", "float32", ["rows", channels, "height", "width"]);
  const noise = g.input("noise", "float32", ["rows", channels, "next_height", "next_width"]);
  const sigma = g.input("sigma", "float32", ["rows"]);
  const picture = autoencoder(g, vae, options, latents).decode(latents);
  const { factor } = vae.config;
  const pictureAxes = g.shapeOf(picture, 0, 2);
  const pixels = g.op("Mul", [g.shapeOf(noise, 2, 4), g.ints([factor, factor])]);
  const size = g.concat([pictureAxes, pixels], 0);
  const resized = g.op("Resize", [picture, null, null, size], {
    mode: "cubic",
    cubic_coeff_a: { float: -0.75 },
    coordinate_transformation_mode: "half_pixel",
  });
  const latentsAtSize = autoencoder(g, vae, options, resized).encode(resized);
  g.output("x", scaleNoise(g, latentsAtSize, noise, sigma), ["rows", channels, "next_height", "next_width"]);
  return g.build();
}
