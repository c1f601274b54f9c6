/**
 * The T5 encoder (transformers' T5EncoderModel): RMS norms, relative position buckets instead of position embeddings,
 * no scaling of the scores, no biases, and no padding mask, since SD3 was trained without one; another mask may be given.
 */

import type { Part, T5Config } from "../checkpoint/index.js";
import { type EmitOptions, GraphBuilder, type Value } from "../onnx/index.js";
import { Layers } from "./layers.js";
import { type LoraRank, LowRankBranch, type NetworkGraph } from "./low-rank.js";

/**
 * Inputs: ids int64 [B, T]; relative_buckets int64 [T, T] (see `relativeBuckets`); where masked, mask float32 [B, T], 0 for
 * tokens that none attends to; with `lora`, the rank of a branch beside the linear layers, those of `LowRankLayout`. Output, float32: hidden [B, T, dModel].
 */
export function emitT5(
  name: string,
  { weights, config }: Part<T5Config>,
  {
    masked = false,
    lora,
    ...options
  }: EmitOptions & { readonly masked?: boolean | undefined; readonly lora?: LoraRank | undefined },
): NetworkGraph {
  const g = new GraphBuilder(name);
  const { dModel, dFf, numHeads, dKv } = config;
  const inner = numHeads * dKv;
  const ids = g.input("ids", "int64", ["rows", "tokens"]);
  const buckets = g.input("relative_buckets", "int64", ["tokens", "tokens"]);
  const branch = lora ? new LowRankBranch(g, lora, options.compute) : null;
  const l = new Layers(g, weights, options, g.shapeOf(ids, 0, 1), branch);
  const linear = (x: Value, weight: string, from: number, to: number) => l.linear(x, weight, from, to, { bias: false });
  const norm = (x: Value, weight: string) => l.rmsNorm(x, `${weight}.weight`, dModel, config.layerNormEpsilon);
  const activate = {
    gelu_new: (x: Value) => l.gelu(x, "tanh"),
    gelu: (x: Value) => l.gelu(x, "none"),
    silu: (x: Value) => l.silu(x),
    relu: (x: Value) => g.op("Relu", [x]),
  }[config.activation];

  const table = l.has("shared.weight") ? "shared.weight" : "encoder.embed_tokens.weight";
  let x = l.rowsOf(table, [config.vocabSize, dModel], ids);

  // One bias for all layers, from the first: [T, T] → [1, heads, T, T], with a mask [B, heads, T, T].
  const biasTable = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
  const perPair = l.rowsOf(biasTable, [config.relativeAttentionNumBuckets, numHeads], buckets);
  const relative = g.op("Unsqueeze", [g.op("Transpose", [perPair], { perm: [2, 0, 1] }), g.ints([0])]);
  const bias = masked ? l.add(relative, l.maskBias(g.input("mask", "float32", ["rows", "tokens"]))) : relative;

  for (let index = 0; index < config.numLayers; index++) {
    const attention = `encoder.block.${index}.layer.0`;
    const normed = norm(x, `${attention}.layer_norm`);
    const project = (part: string) => linear(normed, `${attention}.SelfAttention.${part}`, dModel, inner);
    const mixed = l.attention(project("q"), project("k"), project("v"), numHeads, dKv, { scale: 1, bias });
    x = l.add(x, linear(mixed, `${attention}.SelfAttention.o`, inner, dModel));

    const forward = `encoder.block.${index}.layer.1`;
    const y = norm(x, `${forward}.layer_norm`);
    const dense = `${forward}.DenseReluDense`;
    const hidden = config.gated
      ? l.mul(activate(linear(y, `${dense}.wi_0`, dModel, dFf)), linear(y, `${dense}.wi_1`, dModel, dFf))
      : activate(linear(y, `${dense}.wi`, dModel, dFf));
    x = l.add(x, linear(hidden, `${dense}.wo`, dFf, dModel));
  }
  g.output("hidden", g.cast(norm(x, "encoder.final_layer_norm"), "float32"), ["rows", "tokens", dModel]);
  const lowRank = branch?.close();
  return Object.assign(g.build(), { lowRank });
}

/**
 * The bucket of each (query, key) pair, [length, length] row-major: half the buckets for keys before the query, half
 * for those after; exact for near ones, logarithmic up to the maximum distance (Raffel et al. 2020, as transformers'
 * `_relative_position_bucket` computes it).
 */
export function relativeBuckets(config: T5Config, length: number): BigInt64Array {
  const half = config.relativeAttentionNumBuckets >> 1;
  const exact = half >> 1;
  // In float32, as torch: at powers of two the logarithm decides between two buckets.
  const spread = Math.fround(Math.log(config.relativeAttentionMaxDistance / exact));
  const bucketOf = (distance: number): number => {
    if (distance < exact) return distance;
    const ratio = Math.fround(Math.fround(Math.log(Math.fround(distance / exact))) / spread);
    return Math.min(half - 1, exact + Math.trunc(Math.fround(ratio * (half - exact))));
  };
  const buckets = new BigInt64Array(length * length);
  for (let query = 0; query < length; query++)
    for (let key = 0; key < length; key++)
      buckets[query * length + key] = BigInt((key > query ? half : 0) + bucketOf(Math.abs(key - query)));
  return buckets;
}
