/**
 * The autoencoder (diffusers' AutoencoderKL): latents to pixels and pixels to latents. Scale and shift of the latents
 * are part of the graphs: the rest of the package only ever sees the latents that the transformer works on.
 */

import type { VaeConfig } from "../checkpoint/index.js";
import type { WeightSource } from "../common/tensor.js";
import { type EmitOptions, GraphBuilder, type OnnxGraph, type Value } from "../onnx/index.js";
import { Layers } from "./layers.js";

const epsilon = 1e-6;

/** Inputs: latents [B, C, h, w]. Output: image [B, 3, H, W], nominally in [-1, 1], not clamped. float32. */
export function emitVaeDecoder(
  name: string,
  weights: WeightSource,
  config: VaeConfig,
  options: EmitOptions,
): OnnxGraph {
  const g = new GraphBuilder(name);
  const latents = g.input("latents", "float32", ["rows", config.latentChannels, "height", "width"]);
  const image = decode(g, weights, config, latents, options);
  g.output("image", image, ["rows", config.outChannels, "image_height", "image_width"]);
  return g.build();
}

/** Inputs: image [B, 3, H, W] in [-1, 1]. Output: latents [B, C, h, w], the mode of the posterior, scaled and shifted. */
export function emitVaeEncoder(
  name: string,
  weights: WeightSource,
  config: VaeConfig,
  options: EmitOptions,
): OnnxGraph {
  const g = new GraphBuilder(name);
  const image = g.input("image", "float32", ["rows", config.inChannels, "image_height", "image_width"]);
  const latents = encode(g, weights, config, image, options);
  g.output("latents", latents, ["rows", config.latentChannels, "height", "width"]);
  return g.build();
}

/** x0 = decoder(z / scale + shift); float32 in and out. */
export function decode(
  g: GraphBuilder,
  weights: WeightSource,
  config: VaeConfig,
  latents: Value,
  options: EmitOptions,
): Value {
  const b = new Blocks(g, weights, config, options, latents);
  const channels = [...config.blockOutChannels].reverse();
  const deepest = channels[0]!;
  const raw = g.op("Add", [
    g.op("Div", [latents, g.scalar(config.scalingFactor, "float32")]),
    g.scalar(config.shiftFactor, "float32"),
  ]);
  let x = g.cast(raw, options.compute);
  if (config.usePostQuantConv) x = b.conv(x, "post_quant_conv", config.latentChannels, config.latentChannels, 1);
  x = b.conv(x, "decoder.conv_in", config.latentChannels, deepest, 3);
  x = b.middle(x, "decoder.mid_block", deepest);
  let from = deepest;
  for (const [index, to] of channels.entries()) {
    const name = `decoder.up_blocks.${index}`;
    for (let layer = 0; layer <= config.layersPerBlock; layer++) {
      x = b.resnet(x, `${name}.resnets.${layer}`, from, to);
      from = to;
    }
    if (index < channels.length - 1) x = b.conv(b.enlarge(x), `${name}.upsamplers.0.conv`, to, to, 3);
  }
  x = b.layers.silu(b.groupNorm(x, "decoder.conv_norm_out", from));
  return g.cast(b.conv(x, "decoder.conv_out", from, config.outChannels, 3), "float32");
}

/** z = (mode of encoder(x) - shift) · scale; float32 in and out. */
export function encode(
  g: GraphBuilder,
  weights: WeightSource,
  config: VaeConfig,
  image: Value,
  options: EmitOptions,
): Value {
  const b = new Blocks(g, weights, config, options, image);
  const channels = config.blockOutChannels;
  const moments = 2 * config.latentChannels;
  let from = channels[0]!;
  let x = b.conv(g.cast(image, options.compute), "encoder.conv_in", config.inChannels, from, 3);
  for (const [index, to] of channels.entries()) {
    const name = `encoder.down_blocks.${index}`;
    for (let layer = 0; layer < config.layersPerBlock; layer++) {
      x = b.resnet(x, `${name}.resnets.${layer}`, from, to);
      from = to;
    }
    // Pads right and bottom only, as the reference does.
    if (index < channels.length - 1)
      x = b.conv(x, `${name}.downsamplers.0.conv`, to, to, 3, { strides: [2, 2], pads: [0, 0, 1, 1] });
  }
  x = b.middle(x, "encoder.mid_block", from);
  x = b.layers.silu(b.groupNorm(x, "encoder.conv_norm_out", from));
  x = b.conv(x, "encoder.conv_out", from, moments, 3);
  if (config.useQuantConv) x = b.conv(x, "quant_conv", moments, moments, 1);
  const mode = g.cast(b.layers.slice(x, 1, 0, config.latentChannels), "float32");
  return g.op("Mul", [
    g.op("Sub", [mode, g.scalar(config.shiftFactor, "float32")]),
    g.scalar(config.scalingFactor, "float32"),
  ]);
}

/** The convolutional blocks of both halves. */
class Blocks {
  readonly layers: Layers;
  readonly #groups: number;
  readonly #attention: boolean;

  constructor(
    readonly g: GraphBuilder,
    weights: WeightSource,
    config: VaeConfig,
    options: EmitOptions,
    input: Value,
  ) {
    this.layers = new Layers(g, weights, options, g.op("Shape", [input], { start: 0, end: 1 }));
    this.#groups = config.normNumGroups;
    this.#attention = config.midBlockAddAttention;
  }

  conv(
    x: Value,
    name: string,
    from: number,
    to: number,
    kernel: number,
    geometry: { strides: number[]; pads: number[] } = { strides: [1, 1], pads: new Array<number>(4).fill(kernel >> 1) },
  ): Value {
    return this.g.op(
      "Conv",
      [x, this.layers.weight(`${name}.weight`, [to, from, kernel, kernel]), this.layers.weight(`${name}.bias`, [to])],
      { kernel_shape: [kernel, kernel], ...geometry },
    );
  }

  groupNorm(x: Value, name: string, channels: number): Value {
    return this.layers.groupNorm(x, name, channels, this.#groups, epsilon);
  }

  resnet(x: Value, name: string, from: number, to: number): Value {
    const { layers } = this;
    const first = this.conv(layers.silu(this.groupNorm(x, `${name}.norm1`, from)), `${name}.conv1`, from, to, 3);
    const second = this.conv(layers.silu(this.groupNorm(first, `${name}.norm2`, to)), `${name}.conv2`, to, to, 3);
    return layers.add(from === to ? x : this.conv(x, `${name}.conv_shortcut`, from, to, 1), second);
  }

  middle(x: Value, name: string, channels: number): Value {
    x = this.resnet(x, `${name}.resnets.0`, channels, channels);
    if (this.#attention) x = this.attention(x, `${name}.attentions.0`, channels);
    return this.resnet(x, `${name}.resnets.1`, channels, channels);
  }

  /** Self-attention over the pixels, one head. */
  attention(x: Value, name: string, channels: number): Value {
    const { g, layers } = this;
    const normed = this.groupNorm(x, `${name}.group_norm`, channels);
    const tokens = g.op("Transpose", [g.op("Reshape", [normed, g.ints([0, channels, -1])])], { perm: [0, 2, 1] });
    const project = (part: string) => layers.linear(tokens, `${name}.${part}`, channels, channels);
    const mixed = layers.attention(project("to_q"), project("to_k"), project("to_v"), 1, channels, {
      scale: channels ** -0.5,
    });
    const out = layers.linear(mixed, `${name}.to_out.0`, channels, channels);
    const image = g.op("Reshape", [g.op("Transpose", [out], { perm: [0, 2, 1] }), g.op("Shape", [x])]);
    return layers.add(x, image);
  }

  /** Twice the size, each pixel repeated. */
  enlarge(x: Value): Value {
    const scales = this.g.tensor([4], [1, 1, 2, 2], "float32");
    return this.g.op("Resize", [x, null, scales], {
      mode: "nearest",
      nearest_mode: "floor",
      coordinate_transformation_mode: "asymmetric",
    });
  }
}
