/**
 * The multimodal diffusion transformer of SD3 and SD3.5 (diffusers' SD3Transformer2DModel): image and text tokens have
 * weights of their own and attend to each other jointly. One function, read as the paper (Esser et al. 2024, section 4):
 * predictor and refiner are the same network with other sizes.
 */

import type { TransformerConfig } from "../checkpoint/index.js";
import type { StoredTensor, WeightSource } from "../common/tensor.js";
import type { EmitOptions, GraphBuilder, Value } from "../onnx/index.js";
import { Layers, requireTensor } from "./layers.js";
import type { LowRankBranch } from "./low-rank.js";

export interface MmditInputs {
  /** [rows, inChannels, h, w] in the compute type. */
  readonly latent: Value;
  /** [rows] float32, 1000·σ for SD3. */
  readonly timestep: Value;
  /** [rows, tokens, jointAttentionDim] float32. */
  readonly context: Value;
  /** [rows, pooledProjectionDim] float32. */
  readonly pooled: Value;
  /** [1, h/p · w/p, width] float32: the centre crop of the table of positions. */
  readonly positionEmbedding: Value;
}

const epsilon = 1e-6;
/** Width of the sinusoidal embedding of the timestep. */
const timestepChannels = 256;

/** What a transformer's blocks are made of: those of a ControlNet, too. */
export type BlockConfig = Pick<
  TransformerConfig,
  "numAttentionHeads" | "attentionHeadDim" | "dualAttentionLayers" | "qkNorm" | "numLayers"
>;

/** Number of values a token of the transformer holds. */
export function mmditWidth(config: Pick<TransformerConfig, "numAttentionHeads" | "attentionHeadDim">): number {
  return config.numAttentionHeads * config.attentionHeadDim;
}

/** The table of positions, [1, posEmbedMaxSize², width]; graphs take the centre crop for their size as an input. */
export function positionTable(weights: WeightSource, config: TransformerConfig): StoredTensor {
  return tableOfPositions(weights, config, config.posEmbedMaxSize);
}

/** A table of positions with `side` rows and columns, [1, side², width]. */
export function tableOfPositions(
  weights: WeightSource,
  config: Parameters<typeof mmditWidth>[0],
  side: number,
): StoredTensor {
  return requireTensor(weights, "pos_embed.pos_embed", [1, side ** 2, mmditWidth(config)]);
}

/** What may be added to the network. */
export interface MmditAdditions {
  /**
   * What is added to the picture's tokens after a block, [rows, h/p · w/p, width], or null for nothing.
   * @param tokens of the picture, with their positions, before the first block
   */
  readonly residuals: (tokens: Value) => (block: number) => Value | null;
  /** Blocks that only the first `rows` of all rows (int64 [1]) run through; null where there are none. The others pass them by. */
  readonly skipped: { readonly blocks: readonly number[]; readonly rows: Value | null };
  /** Joins every linear layer; null for none. */
  readonly lowRank: LowRankBranch | null;
}

/** @returns the velocity, [rows, outChannels, h, w] in the compute type. */
export function mmdit(
  g: GraphBuilder,
  weights: WeightSource,
  config: TransformerConfig,
  options: EmitOptions,
  inputs: MmditInputs,
  { residuals, skipped, lowRank }: MmditAdditions,
): Value {
  const l = new Layers(g, weights, options, g.shapeOf(inputs.latent, 0, 1), lowRank);
  const width = mmditWidth(config);
  const patch = config.patchSize;

  // 1. Patches to tokens, with their positions.
  const h = inPatches(g, inputs.latent, 2, patch);
  const w = inPatches(g, inputs.latent, 3, patch);
  let x = l.add(patchTokens(l, config, inputs.latent, h, w), g.cast(inputs.positionEmbedding, l.compute));

  // 2. Text tokens, and the vector that conditions every block: timestep + pooled text.
  let context = l.linear(g.cast(inputs.context, l.compute), "context_embedder", config.jointAttentionDim, width);
  const activated = conditioningOf(l, config, inputs);

  // 3. The joint blocks.
  const residualAfter = residuals(x);
  const block = (layers: Layers, index: number, x: Value, context: Value, activated: Value) =>
    g.scoped(`transformer_blocks.${index}`, () =>
      jointBlock(layers, config, index, x, context, activated, index === config.numLayers - 1),
    );
  const first = skipped.rows && new Layers(g, weights, options, skipped.rows, lowRank);
  for (let index = 0; index < config.numLayers; index++) {
    const result =
      first && skipped.blocks.includes(index)
        ? onFirstRows(first, [x, context, activated], (...values) => block(first, index, ...values))
        : block(l, index, x, context, activated);
    const residual = residualAfter(index);
    x = residual ? l.add(result.x, residual) : result.x;
    if (result.context) context = result.context;
  }

  // 4. Tokens back to a latent.
  const { scale, shift } = modulation(l, activated, "norm_out.linear", width, ["scale", "shift"]);
  const final = modulate(l, norm(l, x, width), shift, scale);
  const channels = config.outChannels;
  const out = l.linear(final, "proj_out", width, patch * patch * channels);
  // [rows, h·w, p, q, c] → [rows, c, h, p, w, q]
  const cells = g.op("Reshape", [out, g.concat([l.batch, h, w, g.ints([patch, patch, channels])], 0)]);
  const spread = g.op("Transpose", [cells], { perm: [0, 5, 1, 3, 2, 4] });
  const side = g.ints([patch]);
  const shape = g.concat([l.batch, g.ints([channels]), g.op("Mul", [h, side]), g.op("Mul", [w, side])], 0);
  return g.op("Reshape", [spread, shape]);
}

/** Runs a block on the first rows of its values, as many as `first` has; the others stay as they are. */
function onFirstRows(
  first: Layers,
  values: readonly [x: Value, context: Value, activated: Value],
  block: (...values: [Value, Value, Value]) => { x: Value; context: Value | null },
): { x: Value; context: Value | null } {
  const { g, batch } = first;
  const [x, context, activated] = values.map((value) => first.slice(value, 0, 0, batch)) as [Value, Value, Value];
  const result = block(x, context, activated);
  const joined = (computed: Value, whole: Value) => g.concat([computed, first.slice(whole, 0, batch)], 0);
  return { x: joined(result.x, values[0]), context: result.context && joined(result.context, values[1]) };
}

/** The vector that conditions every block, timestep + pooled text, activated: [rows, width]. Pooled text of one row is that of all. */
export function conditioningOf(
  l: Layers,
  config: Parameters<typeof mmditWidth>[0] & Pick<TransformerConfig, "pooledProjectionDim">,
  inputs: Pick<MmditInputs, "timestep" | "pooled">,
): Value {
  const width = mmditWidth(config);
  const mlp = (value: Value, name: string, from: number) => {
    const inner = l.silu(l.linear(value, `${name}.linear_1`, from, width, { rank: 2 }));
    return l.linear(inner, `${name}.linear_2`, width, width, { rank: 2 });
  };
  const conditioning = l.add(
    mlp(timestepEmbedding(l, inputs.timestep), "time_text_embed.timestep_embedder", timestepChannels),
    mlp(l.g.cast(inputs.pooled, l.compute), "time_text_embed.text_embedder", config.pooledProjectionDim),
  );
  return l.silu(conditioning);
}

/** Number of patches along an axis of a latent, as an int64 [1] value. */
export function inPatches(g: GraphBuilder, latent: Value, axis: number, patch: number): Value {
  return g.op("Div", [g.shapeOf(latent, axis, axis + 1), g.ints([patch])]);
}

/** [rows, channels, height, width] → [rows, h · w, width of a token], without positions. */
export function patchTokens(
  l: Layers,
  config: Parameters<typeof mmditWidth>[0] & Pick<TransformerConfig, "inChannels" | "patchSize">,
  latent: Value,
  h: Value,
  w: Value,
  name = "pos_embed.proj",
): Value {
  const { g } = l;
  const { inChannels: channels, patchSize: patch } = config;
  const width = mmditWidth(config);
  if (l.options.patches === "conv")
    return l.tokensOf(l.conv(latent, name, channels, width, patch, { strides: [patch, patch] }), width);
  // [rows, c, h, p, w, q] → [rows · h · w, c · p · q], in the order of the kernel's values.
  const side = g.ints([patch]);
  const cells = g.op("Reshape", [latent, g.concat([l.batch, g.ints([channels]), h, side, w, side], 0)]);
  const values = channels * patch * patch;
  const flat = g.op("Reshape", [g.op("Transpose", [cells], { perm: [0, 2, 4, 1, 3, 5] }), g.ints([-1, values])]);
  const kernel = g.op("Reshape", [
    l.weight(`${name}.weight`, [width, channels, patch, patch]),
    g.ints([width, values]),
  ]);
  const tokens = g.op("Gemm", [flat, kernel, l.weight(`${name}.bias`, [width])], { transB: 1 });
  return g.op("Reshape", [tokens, g.concat([l.batch, g.op("Mul", [h, w]), g.ints([width])], 0)]);
}

/** Sinusoidal embedding, cosines first (diffusers' Timesteps with flip_sin_to_cos): [rows] → [rows, 256]. */
function timestepEmbedding(l: Layers, timestep: Value): Value {
  const { g } = l;
  const half = timestepChannels / 2;
  // Rounded step by step as torch does in float32: at 1000·σ one unit in the last place is a visible phase.
  const frequencies = Float32Array.from({ length: half }, (_, i) =>
    Math.exp(Math.fround(Math.fround(-Math.log(10000)) * i) / half),
  );
  const angles = g.op("Mul", [g.op("Unsqueeze", [timestep, g.ints([1])]), g.tensor([1, half], frequencies, "float32")]);
  const [cosine, sine] =
    l.options.sine === "operator" ? [g.op("Cos", [angles]), g.op("Sin", [angles])] : cosineAndSine(g, angles);
  return g.cast(g.concat([cosine, sine], 1), l.compute);
}

/** Coefficients of sin(h)/h and cos(h) in h², the highest first: those of Taylor, right to 6e-9 for |h| ≤ π/2. */
const sineTerms = [13, 11, 9, 7, 5, 3, 1].map((n) => (n % 4 === 1 ? 1 : -1) / factorial(n));
const cosineTerms = [12, 10, 8, 6, 4, 2, 0].map((n) => (n % 4 === 0 ? 1 : -1) / factorial(n));

function factorial(n: number): number {
  return n < 2 ? 1 : n * factorial(n - 1);
}

/**
 * Cosine and sine of [rows, n] by additions and products, which every device has right. Whole turns are subtracted first, in
 * two parts (Cody and Waite 1980): the first has so few bits that its multiples, up to 2^13 turns, are exact. Then
 * sin(2h) = 2·sin(h)·cos(h) and cos(2h) = 1 − 2·sin²(h), with both polynomials side by side.
 */
function cosineAndSine(g: GraphBuilder, angles: Value): [Value, Value] {
  const scalar = (value: number) => g.scalar(value, "float32");
  const times = (a: Value, b: Value) => g.op("Mul", [a, b]);
  const minus = (a: Value, b: Value) => g.op("Sub", [a, b]);
  const coarse = 6.28125;
  const turns = g.op("Floor", [g.op("Add", [times(angles, scalar(1 / (2 * Math.PI))), scalar(0.5)])]);
  const rest = minus(minus(angles, times(turns, scalar(coarse))), times(turns, scalar(2 * Math.PI - coarse)));
  const half = g.op("Unsqueeze", [times(rest, scalar(0.5)), g.ints([0])]);
  const square = times(half, half);
  const terms = sineTerms.map((term, index) => g.tensor([2, 1, 1], [term, cosineTerms[index]!], "float32"));
  const both = terms.reduce((sum, term) => g.op("Add", [times(sum, square), term]));
  const [ratio, cosine] = g.ops("Split", [both], 2, { axis: 0, num_outputs: 2 }) as [Value, Value];
  const sine = times(ratio, half);
  const flat = (value: Value) => g.op("Squeeze", [value, g.ints([0])]);
  const twice = times(sine, scalar(2));
  return [flat(minus(scalar(1), times(twice, sine))), flat(times(twice, cosine))];
}

/** Projects the conditioning to vectors of [rows, 1, width], by name in the order of the weights. */
export function modulation<Name extends string>(
  l: Layers,
  activated: Value,
  name: string,
  width: number,
  names: readonly Name[],
): Record<Name, Value> {
  const parts = names.length;
  const all = l.g.op("Unsqueeze", [l.linear(activated, name, width, parts * width, { rank: 2 }), l.g.ints([1])]);
  const vectors = l.g.ops("Split", [all], parts, { axis: -1, num_outputs: parts });
  const order = l.weights.reversedHalves?.has(name) ? [...names].reverse() : names;
  return Object.fromEntries(order.map((each, index) => [each, vectors[index]])) as Record<Name, Value>;
}

/** Vectors of a block for one stream; for the image tokens with attention of their own, three more. */
export const streamVectors = ["shift", "scale", "gate", "shiftFf", "scaleFf", "gateFf"] as const;
const dualVectors = [...streamVectors, "shift2", "scale2", "gate2"] as const;

/** x · (1 + scale) + shift */
export function modulate(l: Layers, x: Value, shift: Value, scale: Value): Value {
  return l.add(l.mul(x, l.add(scale, l.scalar(1))), shift);
}

/** Layer normalisation without learnt scale and bias. */
export function norm(l: Layers, x: Value, width: number): Value {
  return l.layerNorm(x, null, width, epsilon);
}

export function feedForward(l: Layers, tokens: Value, name: string, width: number): Value {
  return l.mlp(tokens, [`${name}.net.0.proj`, `${name}.net.2`], width, 4 * width, "tanh");
}

/** @param last whether the text tokens end with it: then it makes none */
export function jointBlock(
  l: Layers,
  config: BlockConfig,
  index: number,
  x: Value,
  context: Value,
  activated: Value,
  last = false,
): { x: Value; context: Value | null } {
  const { g } = l;
  const name = `transformer_blocks.${index}`;
  const width = mmditWidth(config);
  const heads = config.numAttentionHeads;
  const headDim = config.attentionHeadDim;
  const dual = config.dualAttentionLayers.includes(index);

  const project = (tokens: Value, linear: string, norm: string | null): Value => {
    const y = l.linear(tokens, `${name}.${linear}`, width, width);
    if (!norm || !config.qkNorm) return y;
    const normed = l.rmsNorm(l.splitHeads(y, heads, headDim), `${name}.${norm}.weight`, headDim, epsilon);
    return l.joinHeads(normed, heads, headDim);
  };
  const attend = (q: Value, k: Value, v: Value) => l.attention(q, k, v, heads, headDim, { scale: headDim ** -0.5 });
  const both = (a: Value, b: Value) => g.concat([a, b], 1);

  // Modulation of both streams. The last block has no context output and orders its two vectors (scale, shift).
  const ofX = modulation(l, activated, `${name}.norm1.linear`, width, dual ? dualVectors : streamVectors);
  const contextVectors = last ? (["scale", "shift"] as const) : streamVectors;
  const ofC = modulation(l, activated, `${name}.norm1_context.linear`, width, contextVectors);
  const normX = norm(l, x, width);
  const tokensX = modulate(l, normX, ofX.shift, ofX.scale);
  const tokensC = modulate(l, norm(l, context, width), ofC.shift, ofC.scale);

  // Joint attention, image tokens first. In the last block the result of the text tokens has no reader.
  const qX = project(tokensX, "attn.to_q", "attn.norm_q");
  const q = last ? qX : both(qX, project(tokensC, "attn.add_q_proj", "attn.norm_added_q"));
  const k = both(
    project(tokensX, "attn.to_k", "attn.norm_k"),
    project(tokensC, "attn.add_k_proj", "attn.norm_added_k"),
  );
  const v = both(project(tokensX, "attn.to_v", null), project(tokensC, "attn.add_v_proj", null));
  const gathered = attend(q, k, v);
  const imageTokens = l.sizeOf(x, 1);
  const gatheredX = last ? gathered : l.slice(gathered, 1, 0, imageTokens);

  // Image stream.
  x = l.add(x, l.mul(ofX.gate, l.linear(gatheredX, `${name}.attn.to_out.0`, width, width)));
  if (dual) {
    const tokens = modulate(l, normX, ofX.shift2, ofX.scale2);
    const own = attend(
      project(tokens, "attn2.to_q", "attn2.norm_q"),
      project(tokens, "attn2.to_k", "attn2.norm_k"),
      project(tokens, "attn2.to_v", null),
    );
    x = l.add(x, l.mul(ofX.gate2, l.linear(own, `${name}.attn2.to_out.0`, width, width)));
  }
  const tokensFf = modulate(l, norm(l, x, width), ofX.shiftFf, ofX.scaleFf);
  x = l.add(x, l.mul(ofX.gateFf, feedForward(l, tokensFf, `${name}.ff`, width)));
  if (last) return { x, context: null };

  // Text stream.
  const gatheredC = l.slice(gathered, 1, imageTokens);
  context = l.add(context, l.mul(ofC.gate, l.linear(gatheredC, `${name}.attn.to_add_out`, width, width)));
  const contextFf = modulate(l, norm(l, context, width), ofC.shiftFf, ofC.scaleFf);
  return { x, context: l.add(context, l.mul(ofC.gateFf, feedForward(l, contextFf, `${name}.ff_context`, width))) };
}
