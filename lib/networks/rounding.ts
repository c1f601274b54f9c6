/**
 * What linear layers in 8 bits would compute (int8.ts), in float32 from rounded values: for trials, before any weight is quantised. A graph
 * in which layers are compared has two more outputs for each, by the layer's name.
 */

import type { Value } from "../onnx/index.js";
import type { Layers } from "./layers.js";

/** Below it, largest magnitudes count as this much: channels that are all zeros have to be divided by something. */
const leastPeak = 1e-5;

/** A linear layer by its name without ".weight", with its weight [out, in] and bias [out], float32. */
interface Linear {
  readonly name: string;
  readonly inputs: number;
  readonly outputs: number;
  readonly weight: Value;
  readonly bias: Value | null;
}

/** An output of a graph in which layers are compared. */
export interface ComparisonOutput {
  readonly layer: string;
  /**
   * `errors`: [3], sums of squares over all tokens: of the difference that rounding makes, of that with smoothing, and of the results.
   * `smooth`: [in], what smoothing multiplies each channel by: √(max|w| / max|x|), SmoothQuant with α = 0.5 (arXiv 2211.10438, equation 4).
   */
  readonly holds: "errors" | "smooth";
}

const separator = "/int8/";

/** Null for an output of another kind. */
export function comparisonOutput(output: string): ComparisonOutput | null {
  const [layer, holds] = output.split(separator);
  return holds === "errors" || holds === "smooth" ? { layer: layer!, holds } : null;
}

/** The layer's result from input and weight that are rounded as products of 8 bits round them. @param x [rows, tokens, in] */
export function roundedLinear(l: Layers, x: Value, layer: Linear, smooth: Float32Array | null): Value {
  const factors = smooth && l.g.tensor([smooth.length], smooth, "float32");
  return l.rows(product(l, flat(l, x, layer.inputs), layer, factors), [-1, layer.outputs]);
}

/** Adds the outputs of a comparison. @param y the layer's result in float32 */
export function compareRounded(l: Layers, x: Value, y: Value, layer: Linear): void {
  const { g } = l;
  const { name, inputs, outputs } = layer;
  const input = flat(l, x, inputs);
  const result = flat(l, y, outputs);
  const peaks = (value: Value) => g.op("Max", [magnitude(l, value, 0, 0), g.scalar(leastPeak, "float32")]);
  const smooth = g.op("Sqrt", [g.op("Div", [peaks(layer.weight), peaks(input)])]);
  const square = (value: Value) => g.op("ReduceSumSquare", [g.op("Reshape", [value, g.ints([-1])])], { keepdims: 1 });
  const off = (factors: Value | null) => square(g.op("Sub", [product(l, input, layer, factors), result]));
  g.output(`${name}${separator}errors`, g.concat([off(null), off(smooth), square(result)], 0), [3]);
  g.output(`${name}${separator}smooth`, smooth, [inputs]);
}

/** All tokens of all rows: [rows, tokens, size] → [rows · tokens, size]. */
function flat({ g }: Layers, value: Value, size: number): Value {
  return g.op("Reshape", [value, g.ints([-1, size])]);
}

/** @param x [tokens, in] */
function product(l: Layers, x: Value, { weight, bias }: Linear, smooth: Value | null): Value {
  const { g } = l;
  const input = rounded(l, smooth ? l.mul(x, smooth) : x);
  const factors = rounded(l, smooth ? g.op("Div", [weight, smooth]) : weight);
  return g.op("Gemm", bias ? [input, factors, bias] : [input, factors], { transB: 1 });
}

/** Values in whole units of 1/127 of the largest magnitude along the last axis. */
function rounded(l: Layers, value: Value): Value {
  const { g } = l;
  const peak = g.op("Max", [magnitude(l, value, -1, 1), g.scalar(1e-30, "float32")]);
  const unit = l.mul(peak, g.scalar(1 / 127, "float32"));
  return l.mul(g.op("Round", [g.op("Div", [value, unit])]), unit);
}

function magnitude({ g }: Layers, value: Value, axis: number, keepdims: 0 | 1): Value {
  const reduced = (type: string) => g.op(type, [value, g.ints([axis])], { keepdims });
  return g.op("Max", [reduced("ReduceMax"), g.op("Neg", [reduced("ReduceMin")])]);
}
