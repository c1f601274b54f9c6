/** Which of several ways to write the same arithmetic in ONNX: each runtime says what it wants. */

import type { ComputedDType, StoredDType } from "../common/tensor.js";

/** How graphs are emitted for a runtime. */
export interface EmitOptions {
  /** The type that networks compute in; states, inputs and outputs are float32 whatever it is. */
  readonly compute: "float32" | "float16" | "bfloat16";
  /**
   * `gemm`: y = Gemm(x, W, b) with transB, which reads the stored [out, in] layout as it is (ONNX Runtime's GPU providers).
   * `gemm-add`: y = Gemm(x, W) + b, for ONNX Runtime on the CPU: inside, the bias is what the sums start from, which have to be
   * read then, 2 % of a step at real widths.
   * `conv`: `gemm-add`, and a convolution of 1 × 1 for layers of whole sequences whose weights are 16-bit: on Intel's processors
   * with AVX-512 ONNX Runtime's kernel for those is quicker (0.87 of the time); elsewhere it was not measured.
   * Only for weights that are folded: others are not laid out for it.
   * `matmul`: x · Transpose(W) + b, which TensorRT fuses for projections that share an input.
   */
  readonly linear: "gemm" | "gemm-add" | "conv" | "matmul";
  /**
   * `operator`: GroupNormalization (TensorRT). `instance`: InstanceNormalization over the groups, then scale and shift,
   * for ONNX Runtime, which has a kernel for that one and takes the other apart (a fifth of the decoder's time).
   */
  readonly groupNorm: "operator" | "instance";
  /**
   * `operator`: Attention, for which ONNX Runtime has a kernel on the CPU that needs no transposes and holds all scores.
   * `contrib`: ONNX Runtime's own MultiHeadAttention, which computes the scores block by block where it can (at 1024 × 1024
   * they are gigabytes), for its GPU providers. `sized`: both, of which the number of tokens decides as the graph runs.
   * `matmul`: MatMul, Softmax, MatMul, the pattern that TensorRT fuses; its own Attention refuses to build where it has no
   * kernel for the shape (CLIP's causal one).
   */
  readonly attention: "operator" | "contrib" | "sized" | "matmul";
  /**
   * `operator`: RMSNormalization of opset 23. `simplified`: ONNX Runtime's own name for it, which leaves the graph at an
   * older opset: its GPU providers lack kernels for what later ones define anew (Sin, Cos, InstanceNormalization).
   */
  readonly rmsNorm: "operator" | "simplified";
  /**
   * Tables of which rows are taken (embeddings): `stored` takes them in the type of the checkpoint and casts them then;
   * `compute` casts the table, for a device that does not have that type. 8-bit tables are always cast.
   */
  readonly tables: "stored" | "compute";
  /**
   * 8-bit weights: `cast` widens them by Cast, for which ONNX Runtime has the quicker kernel, and multiplies by the scale;
   * `dequantize` by DequantizeLinear, the only operator that TensorRT takes float8 and int8 weights from.
   */
  readonly eightBit: "cast" | "dequantize";
  /**
   * Sine and cosine of angles up to a thousand: the operators, or a `polynomial`, for WebGPU, whose own may be wrong by half a
   * thousandth within half a turn, and by any amount beyond.
   */
  readonly sine: "operator" | "polynomial";
  /**
   * A picture's patches to tokens: a convolution (`conv`), or the same as a linear layer, for WebGPU, whose convolutions are
   * wrong for 6 input channels (ONNX Runtime 1.30), as a refiner has for latents of 3.
   */
  readonly patches: "conv" | "linear";
}

/** ONNX Runtime on the CPU computes in float32 only. */
export const cpuEmitOptions: EmitOptions = {
  compute: "float32",
  linear: "gemm-add",
  groupNorm: "instance",
  attention: "sized",
  rmsNorm: "operator",
  tables: "stored",
  eightBit: "cast",
  sine: "operator",
  patches: "conv",
};

/** A network as far as it matters to how it is emitted. */
export interface EmittedNetwork {
  readonly name: string;
  /** Type that most of its weights are stored in, of those that are not 8-bit; null for one without weights. */
  readonly dtype: ComputedDType | null;
  /** Types of its 8-bit weights. */
  readonly eightBit: readonly StoredDType[];
  /** Whether it must not be computed in float16. */
  readonly overflowsInFloat16: boolean;
  /** Bytes of its 16-bit weights. */
  readonly bytesOf16Bit: number;
  /** Whether it goes through the autoencoder: convolutions and group norms. */
  readonly isConvolutional: boolean;
  /** Whether it is evaluated at each step. */
  readonly isOfSteps: boolean;
}
