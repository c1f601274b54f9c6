/**
 * The autoencoder: latents to pixels and pixels to latents. Diffusers' AutoencoderKL is here, its AutoencoderTiny in tiny-vae.ts. Scale and shift of the latents
 * are part of the graphs: the rest of the package only ever sees the latents that the transformer works on.
 */

import type { KlVaeConfig, Part, VaeConfig } from "../checkpoint/index.js";
import { type EmitOptions, GraphBuilder, type OnnxGraph, type Value } from "../onnx/index.js";
import { Layers } from "./layers.js";
import { TinyAutoencoder } from "./tiny-vae.js";

const epsilon = 1e-6;

/** Inputs: latents [B, C, h, w]. Output: image [B, 3, H, W], nominally in [-1, 1], not clamped. float32. */
export function emitVaeDecoder(name: string, vae: Part<VaeConfig>, options: EmitOptions): OnnxGraph {
  const g = new GraphBuilder(name);
  const { latentChannels, outChannels } = vae.config;
  const latents = g.input("latents", "float32", ["rows", latentChannels, "height", "width"]);
  const image = autoencoder(g, vae, options, latents).decode(latents);
  g.output("image", image, ["rows", outChannels, "image_height", "image_width"]);
  return g.build();
}

/** Inputs: image [B, 3, H, W] in [-1, 1]. Output: latents [B, C, h, w], the mode of the posterior, scaled and shifted. */
export function emitVaeEncoder(name: string, vae: Part<VaeConfig>, options: EmitOptions): OnnxGraph {
  const g = new GraphBuilder(name);
  const { latentChannels, inChannels } = vae.config;
  const image = g.input("image", "float32", ["rows", inChannels, "image_height", "image_width"]);
  const latents = autoencoder(g, vae, options, image).encode(image);
  g.output("latents", latents, ["rows", latentChannels, "height", "width"]);
  return g.build();
}

/** The autoencoder of the config's kind. @param input whose rows are those of the activations */
export function autoencoder(
  g: GraphBuilder,
  { weights, config }: Part<VaeConfig>,
  options: EmitOptions,
  input: Value,
): { decode(latents: Value): Value; encode(image: Value): Value } {
  return config.kind === "tiny"
    ? new TinyAutoencoder(g, { weights, config }, options, input)
    : new Autoencoder(g, { weights, config }, options, input);
}

/** Both halves of AutoencoderKL, and the convolutional blocks that they are made of. */
class Autoencoder extends Layers {
  readonly #config: KlVaeConfig;

  /** @param input whose rows are those of the activations */
  constructor(g: GraphBuilder, { weights, config }: Part<KlVaeConfig>, options: EmitOptions, input: Value) {
    super(g, weights, options, g.shapeOf(input, 0, 1));
    this.#config = config;
  }

  /** x0 = decoder(z / scale + shift); float32 in and out. */
  decode(latents: Value): Value {
    const { g } = this;
    const { latentChannels, outChannels, layersPerBlock, scalingFactor, shiftFactor, usePostQuantConv } = this.#config;
    const channels = [...this.#config.blockOutChannels].reverse();
    const deepest = channels[0]!;
    const scaled = g.op("Div", [latents, g.scalar(scalingFactor, "float32")]);
    let x = g.cast(this.add(scaled, g.scalar(shiftFactor, "float32")), this.compute);
    if (usePostQuantConv) x = this.#conv(x, "post_quant_conv", latentChannels, latentChannels, 1);
    x = this.#conv(x, "decoder.conv_in", latentChannels, deepest, 3);
    x = this.#middle(x, "decoder.mid_block", deepest);
    let from = deepest;
    for (const [index, to] of channels.entries()) {
      const name = `decoder.up_blocks.${index}`;
      for (let layer = 0; layer <= layersPerBlock; layer++) {
        x = this.#resnet(x, `${name}.resnets.${layer}`, from, to);
        from = to;
      }
      if (index < channels.length - 1) x = this.#conv(this.enlarged(x), `${name}.upsamplers.0.conv`, to, to, 3);
    }
    x = this.silu(this.#norm(x, "decoder.conv_norm_out", from));
    return g.cast(this.#conv(x, "decoder.conv_out", from, outChannels, 3), "float32");
  }

  /** z = (mode of encoder(x) - shift) · scale; float32 in and out. */
  encode(image: Value): Value {
    const { g } = this;
    const { inChannels, latentChannels, layersPerBlock, scalingFactor, shiftFactor, useQuantConv } = this.#config;
    const channels = this.#config.blockOutChannels;
    const moments = 2 * latentChannels;
    let from = channels[0]!;
    let x = this.#conv(g.cast(image, this.compute), "encoder.conv_in", inChannels, from, 3);
    for (const [index, to] of channels.entries()) {
      const name = `encoder.down_blocks.${index}`;
      for (let layer = 0; layer < layersPerBlock; layer++) {
        x = this.#resnet(x, `${name}.resnets.${layer}`, from, to);
        from = to;
      }
      // Pads right and bottom only, as the reference does.
      if (index < channels.length - 1)
        x = this.conv(x, `${name}.downsamplers.0.conv`, to, to, 3, { strides: [2, 2], pads: [0, 0, 1, 1] });
    }
    x = this.#middle(x, "encoder.mid_block", from);
    x = this.silu(this.#norm(x, "encoder.conv_norm_out", from));
    x = this.#conv(x, "encoder.conv_out", from, moments, 3);
    if (useQuantConv) x = this.#conv(x, "quant_conv", moments, moments, 1);
    const mode = g.cast(this.slice(x, 1, 0, latentChannels), "float32");
    return this.mul(g.op("Sub", [mode, g.scalar(shiftFactor, "float32")]), g.scalar(scalingFactor, "float32"));
  }

  /** A convolution that keeps the size. */
  #conv(x: Value, name: string, from: number, to: number, kernel: number): Value {
    return this.conv(x, name, from, to, kernel, { strides: [1, 1], pads: new Array<number>(4).fill(kernel >> 1) });
  }

  #norm(x: Value, name: string, channels: number): Value {
    return this.groupNorm(x, name, channels, this.#config.normNumGroups, epsilon);
  }

  #resnet(x: Value, name: string, from: number, to: number): Value {
    const first = this.#conv(this.silu(this.#norm(x, `${name}.norm1`, from)), `${name}.conv1`, from, to, 3);
    const second = this.#conv(this.silu(this.#norm(first, `${name}.norm2`, to)), `${name}.conv2`, to, to, 3);
    return this.add(from === to ? x : this.#conv(x, `${name}.conv_shortcut`, from, to, 1), second);
  }

  #middle(x: Value, name: string, channels: number): Value {
    x = this.#resnet(x, `${name}.resnets.0`, channels, channels);
    if (this.#config.midBlockAddAttention) x = this.#pixelAttention(x, `${name}.attentions.0`, channels);
    return this.#resnet(x, `${name}.resnets.1`, channels, channels);
  }

  /** Self-attention over the pixels, one head. */
  #pixelAttention(x: Value, name: string, channels: number): Value {
    const { g } = this;
    const tokens = this.tokensOf(this.#norm(x, `${name}.group_norm`, channels), channels);
    const project = (part: string) => this.linear(tokens, `${name}.${part}`, channels, channels);
    const [q, k, v] = [project("to_q"), project("to_k"), project("to_v")];
    const mixed = this.attention(q, k, v, 1, channels, { scale: channels ** -0.5 });
    const out = this.linear(mixed, `${name}.to_out.0`, channels, channels);
    const image = g.op("Reshape", [g.op("Transpose", [out], { perm: [0, 2, 1] }), g.op("Shape", [x])]);
    return this.add(x, image);
  }
}
