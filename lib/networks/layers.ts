/**
 * The layers that the networks share, on top of the ONNX builder: weights looked up by the checkpoint's names and
 * checked against the shape that the config implies, linear and normalisation layers, attention.
 *
 * Element types: a network computes in one type (`compute`). Weights stored in another are cast where they are used,
 * which on the CPU means: 16-bit and 8-bit weights stay so in memory and are widened for the duration of one layer.
 */

import { elementCount, is8Bit, type StoredScale, type StoredTensor, type WeightSource } from "../common/tensor.js";
import { CheckpointError } from "../errors.js";
import type { EmitOptions, GraphBuilder, Value } from "../onnx/index.js";
import { Int8Products } from "./int8.js";
import type { LowRankBranch } from "./low-rank.js";
import { compareRounded, roundedLinear } from "./rounding.js";

/** @throws CheckpointError if the tensor is absent or has another shape */
export function requireTensor(weights: WeightSource, name: string, shape: readonly number[]): StoredTensor {
  const tensor = weights.find(name);
  if (tensor?.shape.join() === shape.join()) return tensor;
  const stored = weights.storedName?.(name) ?? name;
  // What has names of its own has no config.json: its configuration was read from the shapes.
  const [config, belong] = weights.storedName
    ? ["the shapes of its other tensors call", "are all of its tensors of one model"]
    : ["its config.json calls", "do config and weights belong together"];
  if (!tensor)
    throw new CheckpointError(
      weights.origin,
      `${weights.origin} has no tensor "${stored}", which ${config} for. Is the download complete, and ${belong}?`,
    );
  throw new CheckpointError(
    tensor.file,
    `Expected shape [${shape.join(", ")}] for tensor "${stored}" in ${tensor.file} but found [${tensor.shape.join(", ")}]. ` +
      (weights.storedName ? `The first is what ${config} for.` : "Its config.json belongs to other weights."),
  );
}

const isBlockwise = ({ scale }: StoredTensor) => scale?.tensor.shape.length === 2;

/** A value for each row, [B] → [B, 1, 1, 1]. */
export function perRow(g: GraphBuilder, value: Value): Value {
  return g.op("Unsqueeze", [value, g.ints([1, 2, 3])]);
}

/** u + g·(c − u) for the halves u (unconditional, first) and c (conditional) of a pair; g per row, [B, 1, 1, 1]. */
export function applyGuidance(g: GraphBuilder, pair: Value, scale: Value): Value {
  const [u, c] = g.ops("Split", [pair], 2, { axis: 0, num_outputs: 2 }) as [Value, Value];
  return g.op("Add", [u, g.op("Mul", [scale, g.op("Sub", [c, u])])]);
}

/**
 * CFG-Zero* (arXiv 2503.18886, equation 8): (k·u, c) in place of (u, c), k = ⟨u, c⟩ / (⟨u, u⟩ + 1e-8) of each picture, so that guidance is
 * k·u + g·(c − k·u). Whatever reuses the pair later reuses the same guided velocity.
 */
export function scaledPair(g: GraphBuilder, pair: Value): Value {
  const [u, c] = g.ops("Split", [pair], 2, { axis: 0, num_outputs: 2 }) as [Value, Value];
  const inner = (a: Value, b: Value) => g.op("ReduceSum", [g.op("Mul", [a, b]), g.ints([1, 2, 3])], { keepdims: 1 });
  const scale = g.op("Div", [inner(u, c), g.op("Add", [inner(u, u), g.scalar(1e-8, "float32")])]);
  return g.concat([g.op("Mul", [scale, u]), c], 0);
}

/** (1 − σ)·z + σ·ε, σ per row: the point of rectified flow between a picture and noise. */
export function scaleNoise(g: GraphBuilder, latents: Value, noise: Value, sigma: Value): Value {
  const level = perRow(g, sigma);
  const rest = g.op("Sub", [g.scalar(1, "float32"), level]);
  return g.op("Add", [g.op("Mul", [rest, latents]), g.op("Mul", [level, noise])]);
}

/** Large enough to mean "to the end" in Slice. */
const end = Number.MAX_SAFE_INTEGER;

/** See `Layers.attention`. */
interface AttentionOptions {
  readonly scale: number;
  readonly bias?: Value;
  readonly causal?: number;
}

/**
 * The most scores of a row that attention holds at once on the CPU, 64 MiB: those of 836 tokens with 24 heads. With more,
 * block by block is quicker too; with fewer it is up to a fifth slower, for it transposes queries, keys and values first.
 */
const mostScores = 2 ** 24;

/** The most tokens whose scores are held at once on the CPU. */
export const mostTokens = (heads: number) => Math.floor(Math.sqrt(mostScores / heads));

/** Channels that ONNX Runtime's layout of convolutions has side by side, at most. */
const channelBlock = 16;

/**
 * Options for a network with so many tokens at most: where they are always few, attention needs no branch, which takes 4 % of a
 * step of 64 × 64 of the embedded model.
 */
export function forTokens<Options extends EmitOptions>(options: Options, most: number, heads: number): Options {
  const isSmall = options.attention === "sized" && most <= mostTokens(heads);
  return isSmall ? { ...options, attention: "operator" } : options;
}

export class Layers {
  readonly compute: EmitOptions["compute"];
  readonly #shared = new Map<string, Value>();
  readonly #int8: Int8Products;

  constructor(
    readonly g: GraphBuilder,
    readonly weights: WeightSource,
    readonly options: EmitOptions,
    /** Number of rows of the network's inputs, as an int64 [1] value. */
    readonly batch: Value,
    /** Joins every linear layer; null for none. */
    readonly lowRank: LowRankBranch | null = null,
  ) {
    this.compute = options.compute;
    this.#int8 = new Int8Products(g);
  }

  has(name: string): boolean {
    return this.weights.find(name) !== undefined;
  }

  /** A weight in the type that the network computes in. @throws CheckpointError if it is absent or has another shape. */
  weight(name: string, shape: readonly number[]): Value {
    const tensor = requireTensor(this.weights, name, shape);
    return is8Bit(tensor.dtype) ? this.#dequantised(tensor) : this.g.cast(this.g.external(tensor), this.compute);
  }

  /** The rows `ids` of a weight, in the type that the network computes in. */
  rowsOf(name: string, shape: readonly number[], ids: Value): Value {
    const tensor = requireTensor(this.weights, name, shape);
    // A table of quantised values is widened as a whole: its rows may have scales of their own.
    const asStored = this.options.tables === "stored" && !is8Bit(tensor.dtype);
    const table = asStored ? this.g.external(tensor) : this.weight(name, shape);
    return this.g.cast(this.g.op("Gather", [table, ids]), this.compute);
  }

  scalar(value: number): Value {
    return this.g.scalar(value, this.compute);
  }

  /** y = x Wᵀ + b over the last axis, for x of [rows, in] or [rows, tokens, in]; with what a low-rank branch adds. */
  linear(x: Value, name: string, from: number, to: number, { rank = 3, bias = true } = {}): Value {
    const y = this.#linear(x, name, from, to, rank, bias);
    if (!this.lowRank) return y;
    return this.g.scoped(`${name}.lora`, () => this.add(y, this.lowRank!.beside(x, name, from, to, rank === 3)));
  }

  /** Two linear layers over the last axis of x [rows, tokens, size], GELU between them. */
  mlp(
    x: Value,
    [first, second]: readonly [string, string],
    size: number,
    inner: number,
    approximate: "none" | "tanh",
  ): Value {
    // Between two convolutions nothing is laid out anew.
    if (!this.lowRank && this.#isConvolution(first, size, inner) && this.#isConvolution(second, inner, size)) {
      const image = this.#convolution(this.#imageOf(x), first, size, inner, true);
      return this.#sequenceOf(this.#convolution(this.gelu(image, approximate), second, inner, size, true));
    }
    return this.linear(this.gelu(this.linear(x, first, size, inner), approximate), second, inner, size);
  }

  #isConvolution(name: string, from: number, to: number): boolean {
    if (this.options.linear !== "conv" || this.weights.rounding?.(name) || this.weights.int8?.(name)) return false;
    const { dtype } = requireTensor(this.weights, `${name}.weight`, [to, from]);
    return (dtype === "F16" || dtype === "BF16") && from % channelBlock === 0 && to % channelBlock === 0;
  }

  /** [rows, tokens, channels] → [rows, channels, tokens, 1] */
  #imageOf(x: Value): Value {
    const { g } = this;
    const image = () => g.op("Transpose", [g.op("Unsqueeze", [x, g.ints([2])])], { perm: [0, 3, 1, 2] });
    return this.#once(`image:${x.name}`, image);
  }

  /** [rows, channels, tokens, 1] → [rows, tokens, channels] */
  #sequenceOf(image: Value): Value {
    return this.g.op("Squeeze", [this.g.op("Transpose", [image], { perm: [0, 2, 3, 1] }), this.g.ints([2])]);
  }

  #convolution(image: Value, name: string, from: number, to: number, bias: boolean): Value {
    const { g } = this;
    const weight = g.op("Reshape", [this.weight(`${name}.weight`, [to, from]), g.ints([to, from, 1, 1])]);
    const addend = bias ? [this.weight(`${name}.bias`, [to])] : [];
    return g.scoped(name, () => g.op("Conv", [image, weight, ...addend], { kernel_shape: [1, 1] }));
  }

  #linear(x: Value, name: string, from: number, to: number, rank: number, bias: boolean): Value {
    if (rank === 3 && this.#isConvolution(name, from, to))
      return this.#sequenceOf(this.#convolution(this.#imageOf(x), name, from, to, bias));
    const rounding = this.weights.rounding?.(name);
    if (!rounding) return this.#product(x, name, from, to, rank, bias);
    const weight = this.weight(`${name}.weight`, [to, from]);
    const layer = { name, inputs: from, outputs: to, weight, bias: bias ? this.weight(`${name}.bias`, [to]) : null };
    if (rounding !== "compared") return this.g.scoped(name, () => roundedLinear(this, x, layer, rounding.smooth));
    const y = this.#product(x, name, from, to, rank, bias);
    this.g.scoped(name, () => compareRounded(this, x, y, layer));
    return y;
  }

  #product(x: Value, name: string, from: number, to: number, rank: number, bias: boolean): Value {
    const { g } = this;
    const tensor = requireTensor(this.weights, `${name}.weight`, [to, from]);
    const int8 = this.weights.int8?.(name);
    if (int8) {
      const addend = bias ? this.weight(`${name}.bias`, [to]) : null;
      // ONNX infers shapes behind its Attention that are not those of its results.
      const flat = rank === 2 ? x : this.#once(`flat:${x.name}`, () => g.op("Reshape", [x, g.ints([-1, from])]));
      const y = g.scoped(name, () => this.#int8.linear(flat, int8, addend));
      return rank === 2 ? y : this.rows(y, [-1, to]);
    }
    // A scale for the whole or for each output is the same on the product, which is smaller than the weight.
    const isLater = this.options.eightBit === "cast" && this.compute === "float32" && !isBlockwise(tensor);
    const later = isLater ? tensor.scale : undefined;
    const weight = later ? g.cast(g.external(tensor), this.compute) : this.weight(`${name}.weight`, [to, from]);
    const addend = bias ? this.weight(`${name}.bias`, [to]) : null;
    return g.scoped(name, () => {
      if (this.options.linear === "matmul") {
        const product = g.op("MatMul", [x, g.op("Transpose", [weight], { perm: [1, 0] })]);
        const scaled = later ? this.mul(product, this.#scale(later)) : product;
        return addend ? g.op("Add", [scaled, addend]) : scaled;
      }
      const flat = rank === 2 ? x : g.op("Reshape", [x, g.ints([-1, from])]);
      const inside = addend && !later && this.options.linear === "gemm";
      let y = g.op("Gemm", inside ? [flat, weight, addend] : [flat, weight], { transB: 1 });
      if (later) y = this.mul(y, this.#scale(later));
      if (addend && !inside) y = this.add(y, addend);
      return rank === 2 ? y : this.rows(y, [-1, to]);
    });
  }

  /** Reshapes to [rows, ...shape]. */
  rows(x: Value, shape: readonly number[]): Value {
    const target = this.#once(`rows:${shape}`, () => this.g.concat([this.batch, this.g.ints(shape)], 0));
    return this.g.op("Reshape", [x, target]);
  }

  /** Layer normalisation over the last axis; `name` is null for one without learnt scale and bias. */
  layerNorm(x: Value, name: string | null, size: number, epsilon: number): Value {
    const ones = () => this.g.tensor([size], new Array<number>(size).fill(1), this.compute);
    const learnt = name === null ? [this.#once(`ones:${size}`, ones)] : this.#weightAndBias(name, [size]);
    return this.g.op("LayerNormalization", [x, ...learnt], { axis: -1, epsilon: { float: epsilon } });
  }

  /** Root-mean-square normalisation over the last axis. */
  rmsNorm(x: Value, name: string, size: number, epsilon: number): Value {
    const type = this.options.rmsNorm === "operator" ? "RMSNormalization" : "SimplifiedLayerNormalization";
    return this.g.op(type, [x, this.weight(name, [size])], { axis: -1, epsilon: { float: epsilon } });
  }

  /** Group normalisation of [rows, channels, height, width]. */
  groupNorm(x: Value, name: string, channels: number, groups: number, epsilon: number): Value {
    const { g } = this;
    const [scale, shift] = this.#weightAndBias(name, [channels]);
    if (this.options.groupNorm === "operator")
      return g.op("GroupNormalization", [x, scale, shift], { num_groups: groups, epsilon: { float: epsilon } });
    const fill = (value: number) => g.tensor([groups], new Array<number>(groups).fill(value), this.compute);
    const grouped = g.op("Reshape", [x, g.ints([0, groups, -1])]);
    const normed = g.op("InstanceNormalization", [grouped, fill(1), fill(0)], { epsilon: { float: epsilon } });
    const perChannel = (vector: Value) => g.op("Unsqueeze", [vector, g.ints([1, 2])]);
    return this.add(this.mul(g.op("Reshape", [normed, g.op("Shape", [x])]), perChannel(scale)), perChannel(shift));
  }

  conv(
    x: Value,
    name: string,
    from: number,
    to: number,
    kernel: number,
    { bias = true, ...geometry }: { strides: readonly number[]; pads?: readonly number[]; bias?: boolean },
  ): Value {
    const shape = [to, from, kernel, kernel] as const;
    const learnt = bias ? this.#weightAndBias(name, shape) : [this.weight(`${name}.weight`, shape)];
    return this.g.op("Conv", [x, ...learnt], { kernel_shape: [kernel, kernel], ...geometry });
  }

  /** [rows, channels, height, width] → [rows, height · width, channels]. */
  tokensOf(image: Value, channels: number): Value {
    const flat = this.g.op("Reshape", [image, this.g.ints([0, channels, -1])]);
    return this.g.op("Transpose", [flat], { perm: [0, 2, 1] });
  }

  /** Twice the size, each pixel repeated. */
  enlarged(x: Value): Value {
    const scales = this.g.tensor([4], [1, 1, 2, 2], "float32");
    return this.g.op("Resize", [x, null, scales], {
      mode: "nearest",
      nearest_mode: "floor",
      coordinate_transformation_mode: "asymmetric",
    });
  }

  add(a: Value, b: Value): Value {
    return this.g.op("Add", [a, b]);
  }

  mul(a: Value, b: Value): Value {
    return this.g.op("Mul", [a, b]);
  }

  silu(x: Value): Value {
    return this.mul(x, this.g.op("Sigmoid", [x]));
  }

  gelu(x: Value, approximate: "none" | "tanh"): Value {
    return this.g.op("Gelu", [x], { approximate });
  }

  /** Slice along one axis; without `to`, to its end. Bounds are numbers or int64 [1] values. */
  slice(x: Value, axis: number, from: number | Value, to: number | Value = end): Value {
    const bound = (value: number | Value) => (typeof value === "number" ? this.g.ints([value]) : value);
    return this.g.op("Slice", [x, bound(from), bound(to), this.g.ints([axis])]);
  }

  /** Size of one axis as an int64 [1] value. */
  sizeOf(x: Value, axis: number): Value {
    return this.g.shapeOf(x, axis, axis + 1);
  }

  /** [rows, tokens, heads · headDim] → [rows, tokens, heads, headDim]. */
  splitHeads(x: Value, heads: number, headDim: number): Value {
    return this.g.op("Reshape", [x, this.g.ints([0, 0, heads, headDim])]);
  }

  /** [rows, tokens, heads, headDim] → [rows, tokens, heads · headDim]. */
  joinHeads(x: Value, heads: number, headDim: number): Value {
    return this.g.op("Reshape", [x, this.g.ints([0, 0, heads * headDim])]);
  }

  /**
   * Multi-head attention. q: [rows, N, heads · headDim], k and v: [rows, M, heads · headDim] → as q.
   * @param options.scale factor on the scores (1/√headDim, or 1 for T5)
   * @param options.bias added to the scores, broadcast to [rows, heads, N, M]
   * @param options.causal number of tokens N = M of which each attends only to itself and those before it
   */
  attention(q: Value, k: Value, v: Value, heads: number, headDim: number, options: AttentionOptions): Value {
    const { g } = this;
    const form = this.options.attention;
    const operator = () => this.#attentionOperator(q, k, v, heads, options);
    const contrib = () => this.#multiHeadAttention(q, k, v, heads, options);
    if (form === "contrib") return contrib();
    if (form === "matmul") return this.#attentionByProducts(q, k, v, heads, headDim, options);
    // With a bias or a mask MultiHeadAttention holds all scores, too.
    const isPlain = !options.bias && options.causal === undefined;
    return form === "sized" && isPlain ? g.either(this.#hasManyScores(q, heads), contrib, operator) : operator();
  }

  #attentionOperator(q: Value, k: Value, v: Value, heads: number, { scale, bias, causal }: AttentionOptions): Value {
    return this.g.op("Attention", bias ? [q, k, v, bias] : [q, k, v], {
      q_num_heads: heads,
      kv_num_heads: heads,
      scale: { float: scale },
      ...(causal !== undefined && { is_causal: 1 }),
    });
  }

  #multiHeadAttention(q: Value, k: Value, v: Value, heads: number, { scale, bias, causal }: AttentionOptions): Value {
    // Query, key, value; bias of the projections, padding mask; what is added to the scores.
    const inputs = bias ? [q, k, v, null, null, bias] : [q, k, v];
    return this.g.op("com.microsoft:MultiHeadAttention", inputs, {
      num_heads: heads,
      scale: { float: scale },
      ...(causal !== undefined && { unidirectional: 1 }),
    });
  }

  /**
   * Whether a row has more scores than are held at once. The first attention decides for all of a network, which are among
   * about as many tokens.
   */
  #hasManyScores(q: Value, heads: number): Value {
    const most = mostTokens(heads);
    return this.#once(`many:${most}`, () => this.g.op("Greater", [this.sizeOf(q, 1), this.g.ints([most])]));
  }

  #attentionByProducts(
    q: Value,
    k: Value,
    v: Value,
    heads: number,
    headDim: number,
    { scale, bias, causal }: AttentionOptions,
  ): Value {
    const { g } = this;
    const split = (x: Value, perm: readonly number[]) =>
      g.op("Transpose", [this.splitHeads(x, heads, headDim)], { perm });
    // Scaling q costs N·headDim products where scaling the scores would cost N·M.
    const queries = split(scale === 1 ? q : this.mul(q, this.scalar(scale)), [0, 2, 1, 3]);
    let scores = g.op("MatMul", [queries, split(k, [0, 2, 3, 1])]);
    if (bias) scores = this.add(scores, bias);
    if (causal !== undefined) scores = this.add(scores, this.#causalMask(causal));
    const mixed = g.op("MatMul", [g.op("Softmax", [scores], { axis: -1 }), split(v, [0, 2, 1, 3])]);
    return this.joinHeads(g.op("Transpose", [mixed], { perm: [0, 2, 1, 3] }), heads, headDim);
  }

  /**
   * What is added to scores so that no token attends to those whose mask is 0, nor, where there is a number of tokens, to
   * those after itself: [rows, 1, 1 or tokens, tokens].
   * @param mask [rows, tokens], 1 or 0, float32
   */
  maskBias(mask: Value, causal?: number): Value {
    const { g } = this;
    const scaled = g.op("Mul", [g.op("Sub", [mask, g.scalar(1, "float32")]), g.scalar(60000, "float32")]);
    const bias = g.cast(g.op("Unsqueeze", [scaled, g.ints([1, 2])]), this.compute);
    // Their sum would not be finite in float16.
    return causal === undefined ? bias : g.op("Min", [bias, this.#causalMask(causal)]);
  }

  /** [1, 1, tokens, tokens], added to scores. */
  #causalMask(tokens: number): Value {
    return this.#once(`causal:${tokens}`, () => {
      // -60000 stays finite in float16 and is as good as minus infinity behind a softmax.
      const mask = new Float32Array(tokens * tokens);
      for (let row = 0; row < tokens; row++) mask.fill(-60000, row * tokens + row + 1, (row + 1) * tokens);
      return this.g.tensor([1, 1, tokens, tokens], mask, this.compute);
    });
  }

  /**
   * A weight with a scale for each block of a row. On the CPU ONNX Runtime's MatMulNBits is quicker, and its embeddings are further off,
   * since it quantises activations too: 1.3 % for T5 as it is initialised, against 0.9 %.
   */
  #blockwise(tensor: StoredTensor, scales: StoredTensor): Value {
    const { g } = this;
    const blocks = elementCount(scales.shape);
    const shape = [blocks, elementCount(tensor.shape) / blocks];
    const scale = g.external({ ...scales, shape: [blocks, 1] });
    const values = this.mul(g.cast(g.external({ ...tensor, shape }), "float32"), scale);
    return g.cast(g.op("Reshape", [values, g.ints(tensor.shape)]), this.compute);
  }

  /** An 8-bit weight in the type that the network computes in, restored in float32, since a scale has that precision. */
  #dequantised(tensor: StoredTensor): Value {
    const { g } = this;
    const { scale, shape } = tensor;
    if (scale && isBlockwise(tensor)) return this.#blockwise(tensor, scale.tensor);
    const stored = g.external(tensor);
    if (this.options.eightBit === "dequantize") {
      const factors = scale ? g.cast(g.external(scale.tensor), "float32") : g.scalar(1, "float32");
      const attributes = scale && scale.tensor.shape.length > 0 ? { axis: 0 } : {};
      const restored: Value = { ...g.op("DequantizeLinear", [stored, factors], attributes), type: "float32" };
      const exact = scale && scale.factor !== 1 ? this.mul(restored, g.scalar(scale.factor, "float32")) : restored;
      return g.cast(exact, this.compute);
    }
    if (!scale) return g.cast(stored, this.compute);
    return g.cast(this.mul(g.cast(stored, "float32"), this.#scale(scale, shape.length)), this.compute);
  }

  /** The scale of a quantised weight in float32: a scalar, or [rows, 1, …] with as many dimensions as are asked for. */
  #scale({ tensor, factor }: StoredScale, dimensions = 1): Value {
    const { g } = this;
    const perRow = tensor.shape.length > 0 && dimensions > 1;
    const shape = perRow ? [...tensor.shape, ...new Array<number>(dimensions - 1).fill(1)] : tensor.shape;
    const stored = g.cast(g.external({ ...tensor, shape }), "float32");
    return factor === 1 ? stored : this.mul(stored, g.scalar(factor, "float32"));
  }

  #weightAndBias(name: string, shape: readonly [number, ...number[]]): [Value, Value] {
    return [this.weight(`${name}.weight`, shape), this.weight(`${name}.bias`, shape.slice(0, 1))];
  }

  /** A value of the graph that several layers share. */
  #once(key: string, make: () => Value): Value {
    const value = this.#shared.get(key) ?? make();
    this.#shared.set(key, value);
    return value;
  }
}
