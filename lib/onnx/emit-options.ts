/** Which of several ways to write the same arithmetic in ONNX: each runtime says what it wants. */

import type { StoredDType } from "../common/tensor.js";

/** How graphs are emitted for a runtime. */
export interface EmitOptions {
  /** The type that networks compute in; states, inputs and outputs are float32 whatever it is. */
  readonly compute: "float32" | "float16" | "bfloat16";
  /**
   * `gemm`: y = Gemm(x, W, b) with transB, which reads the stored [out, in] layout as it is (ONNX Runtime on the CPU).
   * `matmul`: x · Transpose(W) + b, which TensorRT fuses for projections that share an input.
   */
  readonly linear: "gemm" | "matmul";
  /**
   * `operator`: GroupNormalization (TensorRT). `instance`: InstanceNormalization over the groups, then scale and shift,
   * for ONNX Runtime, which has a kernel for that one and takes the other apart (a fifth of the decoder's time).
   */
  readonly groupNorm: "operator" | "instance";
  /**
   * `operator`: Attention, for which ONNX Runtime has a kernel. `matmul`: MatMul, Softmax, MatMul, the pattern that
   * TensorRT fuses; its own Attention refuses to build where it has no kernel for the shape (CLIP's causal one).
   */
  readonly attention: "operator" | "matmul";
}

/** ONNX Runtime on the CPU computes in float32 only. */
export const cpuEmitOptions: EmitOptions = {
  compute: "float32",
  linear: "gemm",
  groupNorm: "instance",
  attention: "operator",
};

/** A network as far as it matters to how it is emitted. */
export interface EmittedNetwork {
  readonly name: string;
  /** Type that most of its weights are stored in; null for one without weights. */
  readonly dtype: StoredDType | null;
  /** Whether it must not be computed in float16. */
  readonly overflowsInFloat16: boolean;
}
