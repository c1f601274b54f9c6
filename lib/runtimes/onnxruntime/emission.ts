/**
 * How graphs are emitted for ONNX Runtime's GPU providers, so that they have a kernel for every node but the arithmetic of
 * shapes, and the fastest: found with the providers of version 1.30 (test/runtimes/placement.test.ts).
 */

import type { StoredDType } from "../../common/tensor.js";
import type { EmitOptions, EmittedNetwork } from "../../onnx/index.js";
import type { CompilableGraph } from "../runtime.js";
import type { Widening } from "./protocol.js";

/** Both providers have kernels for these; CUDA takes a GroupNormalization apart, and WebGPU has none. */
const written = { linear: "gemm", groupNorm: "instance", attention: "contrib", rmsNorm: "simplified" } as const;

/** 16-bit weights in float16, where the adapter computes in that, and nothing in bfloat16, which WebGPU does not have. */
export function webGpuEmitOptions(float16: boolean): (network: EmittedNetwork) => EmitOptions {
  return ({ dtype, overflowsInFloat16 }) => ({
    ...written,
    compute: float16 && !overflowsInFloat16 && dtype !== null && dtype !== "F32" ? "float16" : "float32",
    tables: dtype === "F32" || (float16 && dtype === "F16") ? "stored" : "compute",
  });
}

/**
 * Each network in the type of its weights. The autoencoder's convolutions and norms have no bfloat16 together: from such
 * weights it computes in float16.
 * @param bfloat16 whether the GPU has it (SM 8.0 and later)
 */
export function cudaEmitOptions(bfloat16: boolean): (network: EmittedNetwork) => EmitOptions {
  return ({ dtype, overflowsInFloat16, isConvolutional }) => ({
    ...written,
    compute:
      dtype === null || dtype === "F32"
        ? "float32"
        : overflowsInFloat16
          ? bfloat16
            ? "bfloat16"
            : "float32"
          : dtype === "BF16" && bfloat16 && !isConvolutional
            ? "bfloat16"
            : "float16",
    tables: dtype === "BF16" && !bfloat16 ? "compute" : "stored",
  });
}

/**
 * On a GPU weights stay in 16 bits where it can hold them and only widens them (T5 takes half the memory). All other casts
 * are done once: those between 16-bit types cost no memory, and a type that the device lacks it cannot even hold.
 * @param held 16-bit types that the device has
 */
export function gpuWidening(held: readonly StoredDType[]): (graph: CompilableGraph) => Widening {
  return ({ widened }) =>
    widened && widened.size > 0 && [...widened].every((dtype) => held.includes(dtype)) ? "lazy" : "folded";
}
