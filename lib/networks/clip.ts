/**
 * The CLIP text encoder with projection (transformers' CLIPTextModelWithProjection), as SD3 uses it: the hidden states
 * of the last layer but one, or of one before it, without the final norm, and the pooled projection of the end-of-text
 * token. The mask is causal only, unless one is given: padding takes part, as in the models' training.
 */

import type { ClipConfig, Part } from "../checkpoint/index.js";
import { type EmitOptions, GraphBuilder, type Value } from "../onnx/index.js";
import { Layers } from "./layers.js";
import { type LoraRank, LowRankBranch, type NetworkGraph } from "./low-rank.js";

/** The eos_token_id in the configs of the public checkpoints, which is not the id that their tokenizers emit. */
const legacyEos = 2;

/** How the encoder of one graph differs. */
export interface ClipVariant {
  /** Has an input `skip`: the hidden states are those so many layers before the last but one, hidden_states[−(skip + 2)]. Default: false. */
  readonly skip?: boolean | undefined;
  /** Has an input `mask`, 0 for tokens that none attends to. Default: false. */
  readonly masked?: boolean | undefined;
  /** Rank of a branch beside the linear layers, with its inputs: see `LowRankLayout`. Default: none. */
  readonly lora?: LoraRank | undefined;
}

/**
 * Inputs: ids int64 [B, length]; with `skip`, skip float32 [B], whole numbers from 0 to one less than the layers; where masked, mask float32
 * [B, length]. Outputs, float32: hidden [B, length, hiddenSize],
 * pooled [B, projectionDim].
 * @param length number of tokens, fixed by the tokenizer (77)
 */
export function emitClip(
  name: string,
  { weights, config }: Part<ClipConfig>,
  length: number,
  { skip = false, masked = false, lora, ...options }: EmitOptions & ClipVariant,
): NetworkGraph {
  const g = new GraphBuilder(name);
  const { hiddenSize: size, numAttentionHeads: heads } = config;
  const ids = g.input("ids", "int64", ["rows", length]);
  const branch = lora ? new LowRankBranch(g, lora, options.compute) : null;
  const l = new Layers(g, weights, options, g.shapeOf(ids, 0, 1), branch);
  const headDim = size / heads;

  const embeddings = "text_model.embeddings";
  const tokens = l.rowsOf(`${embeddings}.token_embedding.weight`, [config.vocabSize, size], ids);
  const table = l.weight(`${embeddings}.position_embedding.weight`, [config.maxPositionEmbeddings, size]);
  const positions = l.slice(table, 0, 0, length);
  let x = l.add(tokens, positions);

  const attended = masked
    ? { bias: l.maskBias(g.input("mask", "float32", ["rows", length]), length) }
    : { causal: length };
  const skipped = skip ? g.op("Unsqueeze", [g.input("skip", "float32", ["rows"]), g.ints([1, 2])]) : null;
  let hidden: Value | null = null;
  for (let index = 0; index < config.numHiddenLayers; index++) {
    const left = config.numHiddenLayers - 1 - index;
    if (skipped) {
      // One graph for all values of `skip`: the sum of all layers, of which each but one counts 0.
      const counts = g.cast(g.op("Equal", [skipped, g.scalar(left, "float32")]), l.compute);
      const part = l.mul(x, counts);
      hidden = hidden === null ? part : l.add(hidden, part);
    } else if (left === 0) hidden = x;
    const prefix = `text_model.encoder.layers.${index}`;
    const norm1 = l.layerNorm(x, `${prefix}.layer_norm1`, size, config.layerNormEps);
    const project = (part: string) => l.linear(norm1, `${prefix}.self_attn.${part}_proj`, size, size);
    const mixed = l.attention(project("q"), project("k"), project("v"), heads, headDim, {
      scale: headDim ** -0.5,
      ...attended,
    });
    x = l.add(x, l.linear(mixed, `${prefix}.self_attn.out_proj`, size, size));
    const norm2 = l.layerNorm(x, `${prefix}.layer_norm2`, size, config.layerNormEps);
    const inner = l.linear(norm2, `${prefix}.mlp.fc1`, size, config.intermediateSize);
    const activated =
      config.hiddenAct === "gelu"
        ? l.gelu(inner, "none")
        : l.mul(inner, g.op("Sigmoid", [l.mul(inner, l.scalar(1.702))]));
    x = l.add(x, l.linear(activated, `${prefix}.mlp.fc2`, config.intermediateSize, size));
  }
  g.output("hidden", g.cast(hidden!, "float32"), ["rows", length, size]);

  const final = l.layerNorm(x, "text_model.final_layer_norm", size, config.layerNormEps);
  const last = g.op("Squeeze", [g.op("MatMul", [endOfText(l, config, ids, length), final]), g.ints([1])]);
  const projection = "text_projection";
  const pooled = weights.identities?.has(projection)
    ? last
    : l.linear(last, projection, size, config.projectionDim, { rank: 2, bias: false });
  g.output("pooled", g.cast(pooled, "float32"), ["rows", config.projectionDim]);
  const lowRank = branch?.close();
  return Object.assign(g.build(), { lowRank });
}

/**
 * The end-of-text token, as [rows, 1, length] with a one at its position: the largest id in vocabularies of the public
 * checkpoints, else the eos; the first one, where padding is the same token. An earlier position counts for more, and less
 * than any difference of ids, so that there is one largest score, which float32 holds exactly. No index is made of it: of
 * several maxima ArgMax takes one or the other (TensorRT promises none), and few devices compute with 64-bit integers.
 */
function endOfText(l: Layers, config: ClipConfig, ids: Value, length: number): Value {
  const { g } = l;
  const numbers = g.cast(ids, "float32");
  const isEos = () => g.cast(g.op("Equal", [numbers, g.scalar(config.eosTokenId, "float32")]), "float32");
  const marked = config.eosTokenId === legacyEos ? numbers : isEos();
  const earlier = Array.from({ length }, (_, index) => length - 1 - index);
  const score = g.op("Add", [
    g.op("Mul", [marked, g.scalar(length, "float32")]),
    g.tensor([length], earlier, "float32"),
  ]);
  const largest = g.op("ReduceMax", [score, g.ints([1])], { keepdims: 1 });
  return g.op("Unsqueeze", [g.cast(g.op("Equal", [score, largest]), l.compute), g.ints([1])]);
}
