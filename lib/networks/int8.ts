/**
 * Linear layers as products of 8-bit integers, for ONNX Runtime on the CPU. The weight has a scale for each output, made once; the input
 * gets one for each token as the graph runs (DynamicQuantizeLinear would give all rows one scale, and a picture would depend on those
 * that it is drawn beside). Both are symmetric: 127 is the largest magnitude.
 */

import type { Int8Linear } from "../common/tensor.js";
import type { GraphBuilder, Value } from "../onnx/index.js";

/** Largest magnitude of a token that is all zeros: 0 / 0 would not be. */
const leastPeak = 1e-30;
/** What stands for zero in the unsigned 8 bits that the kernels take inputs in. */
const zeroPoint = 128;

interface QuantisedTokens {
  readonly codes: Value;
  /** [tokens, 1] */
  readonly scale: Value;
}

export class Int8Products {
  readonly #g: GraphBuilder;
  /** Layers that read the same value share its codes. */
  readonly #quantised = new Map<string, QuantisedTokens>();

  constructor(g: GraphBuilder) {
    this.#g = g;
  }

  /**
   * y = x Wᵀ + b, float32: x is rounded to 1/127 of each token's largest magnitude, W as it was stored.
   * @param x [tokens, in]
   * @param bias [out]; null for none
   */
  linear(x: Value, { codes, scales, smooth }: Int8Linear, bias: Value | null): Value {
    const g = this.#g;
    const input = this.#quantise(x, smooth ? g.external(smooth) : null);
    const inputs = [input.codes, g.external(codes), g.scalar(1, "float32"), g.external(scales)];
    // ONNX Runtime makes weights unsigned, with their zeros, and refuses to do so with a zero that two layers share.
    const zeros = [g.scalar(zeroPoint, "uint8"), g.tensor([], [0], "int8")];
    // The sums are exact in 32 bits for some 130,000 inputs of a layer.
    const product: Value = { ...g.op("com.microsoft:MatMulIntegerToFloat", [...inputs, ...zeros]), type: "float32" };
    const y = g.op("Mul", [product, input.scale]);
    return bias ? g.op("Add", [y, bias]) : y;
  }

  #quantise(x: Value, smooth: Value | null): QuantisedTokens {
    const g = this.#g;
    const key = `${x.name} ${smooth?.name ?? ""}`;
    const known = this.#quantised.get(key);
    if (known) return known;
    const value = smooth ? g.op("Mul", [x, smooth]) : x;
    const last = g.ints([-1]);
    const most = g.op("ReduceMax", [value, last], { keepdims: 1 });
    const least = g.op("Neg", [g.op("ReduceMin", [value, last], { keepdims: 1 })]);
    const peak = g.op("Max", [most, least, g.scalar(leastPeak, "float32")]);
    const scale = g.op("Mul", [peak, g.scalar(1 / 127, "float32")]);
    // A scale for each token: with one for all, and a division before, the values would be written once more.
    const scales = g.op("Squeeze", [scale, last]);
    const zeros = g.op("Expand", [g.scalar(zeroPoint, "uint8"), g.shapeOf(scales, 0, 1)]);
    const rounded = g.op("QuantizeLinear", [value, scales, { ...zeros, type: "uint8" }], { axis: 0 });
    const result = { codes: { ...rounded, type: "uint8" as const }, scale };
    this.#quantised.set(key, result);
    return result;
  }
}
