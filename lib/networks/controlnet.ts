/**
 * The ControlNets of SD3 and SD3.5 (diffusers' SD3ControlNetModel): blocks like the transformer's own, over the same tokens to
 * which those of a control are added. What each block makes is what the transformer's blocks get added to their image tokens.
 * With text the blocks are the joint ones; without (Stability's for SD3.5-large) they have image tokens alone.
 */

import type { ControlNet, ControlNetConfig } from "../checkpoint/index.js";
import type { StoredTensor, WeightSource } from "../common/tensor.js";
import type { EmitOptions, GraphBuilder, Value } from "../onnx/index.js";
import { Layers } from "./layers.js";
import {
  conditioningOf,
  feedForward,
  inPatches,
  jointBlock,
  type MmditInputs,
  mmditWidth,
  modulate,
  modulation,
  norm,
  patchTokens,
  streamVectors,
  tableOfPositions,
} from "./mmdit.js";

export interface ControlInputs extends Pick<MmditInputs, "latent" | "timestep" | "context" | "pooled"> {
  /** [rows, channels and those of a mask, h, w] in the compute type: see `controlLatents`. */
  readonly control: Value;
  /** [rows, patches, width]: the transformer's own image tokens, with their positions. */
  readonly tokens: Value;
  /** [1, patches, width] float32, of the ControlNet's own table; null for one that has none. */
  readonly positionEmbedding: Value | null;
}

/** The table of positions of a ControlNet that has one of its own, [1, posEmbedMaxSize², width]; else null. */
export function controlPositionTable({ weights, config }: Pick<ControlNet, "weights" | "config">): StoredTensor | null {
  return config.positions === "own" ? tableOfPositions(weights, config, config.posEmbedMaxSize!) : null;
}

/** Channels of a control: those of latents, and 1 where it has a mask. */
export function controlChannels({ inChannels, extraConditioningChannels }: ControlNetConfig): number {
  return inChannels + extraConditioningChannels;
}

/**
 * A control's latents as a ControlNet was trained on them: from some the shift was not subtracted.
 * @param control [rows, channels, h, w] float32, (mode − shift)·factor
 * @param shift shift·factor of the autoencoder
 */
export function controlLatents(
  g: GraphBuilder,
  { config }: Pick<ControlNet, "config">,
  control: Value,
  shift: number,
): Value {
  return config.shiftsControl || shift === 0 ? control : g.op("Add", [control, g.scalar(shift, "float32")]);
}

/** Which of a ControlNet's n residuals is added after block `index` of as many as there are: int(index / (blocks / n)), as diffusers rounds. */
export function residualOf(index: number, blocks: number, residuals: number): number {
  return Math.trunc(index / (blocks / residuals));
}

/** @returns for each block of the ControlNet what it adds to the image tokens, [rows, patches, width] in the compute type, not scaled */
export function controlResiduals(
  g: GraphBuilder,
  { id, weights, config }: ControlNet,
  options: EmitOptions,
  inputs: ControlInputs,
): Value[] {
  const l = new Layers(g, named(weights, id), options, g.shapeOf(inputs.latent, 0, 1));
  const width = mmditWidth(config);
  const [h, w] = [2, 3].map((axis) => inPatches(g, inputs.latent, axis, config.patchSize)) as [Value, Value];

  // 1. Tokens of the latents, and on top of them those of the control.
  let x = inputs.tokens;
  if (config.positions !== "transformer") {
    x = patchTokens(l, config, inputs.latent, h, w);
    if (inputs.positionEmbedding) x = l.add(x, g.cast(inputs.positionEmbedding, l.compute));
  }
  const control = { ...config, inChannels: controlChannels(config) };
  x = l.add(x, patchTokens(l, control, inputs.control, h, w, "pos_embed_input.proj"));

  // 2. What conditions every block, and the text.
  const none = () => g.tensor([1, config.pooledProjectionDim], new Float32Array(config.pooledProjectionDim), l.compute);
  const pooled = config.zeroPooled ? none() : inputs.pooled;
  const activated = conditioningOf(l, config, { timestep: inputs.timestep, pooled });
  let context =
    config.jointAttentionDim === null
      ? null
      : l.linear(g.cast(inputs.context, l.compute), "context_embedder", config.jointAttentionDim, width);

  // 3. The blocks. None is the last one of a transformer: all of them keep their text tokens.
  return Array.from({ length: config.numLayers }, (_, index) => {
    g.scoped(`transformer_blocks.${index}`, () => {
      if (context) ({ x, context } = jointBlock(l, config, index, x, context, activated));
      else x = imageBlock(l, config, index, x, activated);
    });
    return l.linear(x, `controlnet_blocks.${index}`, width, width);
  });
}

/** A block of image tokens alone (diffusers' SD3SingleTransformerBlock). */
function imageBlock(l: Layers, config: ControlNetConfig, index: number, x: Value, activated: Value): Value {
  const name = `transformer_blocks.${index}`;
  const width = mmditWidth(config);
  const { numAttentionHeads: heads, attentionHeadDim: headDim } = config;
  const vectors = modulation(l, activated, `${name}.norm1.linear`, width, streamVectors);
  const tokens = modulate(l, norm(l, x, width), vectors.shift, vectors.scale);
  const [q, k, v] = ["to_q", "to_k", "to_v"].map((part) => l.linear(tokens, `${name}.attn.${part}`, width, width));
  const mixed = l.attention(q!, k!, v!, heads, headDim, { scale: headDim ** -0.5 });
  x = l.add(x, l.mul(vectors.gate, l.linear(mixed, `${name}.attn.to_out.0`, width, width)));
  const tokensFf = modulate(l, norm(l, x, width), vectors.shiftFf, vectors.scaleFf);
  return l.add(x, l.mul(vectors.gateFf, feedForward(l, tokensFf, `${name}.ff`, width)));
}

/** Weights whose tensors have names of their own in a graph, beside those of the transformer, which are called alike. */
function named(weights: WeightSource, id: string): WeightSource {
  const renamed = (tensor: StoredTensor): StoredTensor => ({
    ...tensor,
    name: `controlnet_${id}.${tensor.name}`,
    ...(tensor.scale && { scale: { ...tensor.scale, tensor: renamed(tensor.scale.tensor) } }),
  });
  return {
    origin: weights.origin,
    find: (name) => {
      const tensor = weights.find(name);
      return tensor && renamed(tensor);
    },
    int8: (layer) => {
      const found = weights.int8?.(layer);
      if (!found) return undefined;
      const { codes, scales, smooth } = found;
      return { codes: renamed(codes), scales: renamed(scales), smooth: smooth && renamed(smooth) };
    },
    rounding: (layer) => weights.rounding?.(layer),
  };
}
