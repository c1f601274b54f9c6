/**
 * How graphs are emitted for ONNX Runtime's GPU providers, so that they have a kernel for every node but the arithmetic of
 * shapes, and the fastest: found with the providers of version 1.30 (test/runtimes/placement.test.ts).
 */

import type { StoredDType } from "../../common/tensor.js";
import type { EmitOptions, EmittedNetwork } from "../../onnx/index.js";
import type { CompilableGraph } from "../runtime.js";
import type { DeviceFeatures, Widening } from "./protocol.js";

/** Both providers have kernels for these; CUDA takes a GroupNormalization apart, and WebGPU has none. */
function written({ attention }: Pick<DeviceFeatures, "attention">) {
  const common = { linear: "gemm", groupNorm: "instance", rmsNorm: "simplified", eightBit: "cast" } as const;
  return { ...common, attention: attention ? "contrib" : "matmul" } as const;
}

/** 16-bit weights in float16, where the adapter computes in that, and nothing in bfloat16, which WebGPU does not have. */
export function webGpuEmitOptions(features: DeviceFeatures): (network: EmittedNetwork) => EmitOptions {
  const { float16 } = features;
  return ({ dtype, overflowsInFloat16 }) => ({
    ...written(features),
    sine: "polynomial",
    patches: "linear",
    compute: float16 && !overflowsInFloat16 && dtype !== null && dtype !== "F32" ? "float16" : "float32",
    tables: dtype === "F32" || (float16 && dtype === "F16") ? "stored" : "compute",
  });
}

/** A GPU that CUDA runs on. */
export interface CudaFeatures extends Pick<DeviceFeatures, "attention"> {
  /** Whether it has bfloat16 (SM 8.0 and later). */
  readonly bfloat16: boolean;
}

/**
 * Each network in the type of its weights. The autoencoder's convolutions and norms have no bfloat16 together: from such
 * weights it computes in float16.
 */
export function cudaEmitOptions(features: CudaFeatures): (network: EmittedNetwork) => EmitOptions {
  const { bfloat16 } = features;
  const computeOf = ({ dtype, overflowsInFloat16, isConvolutional }: EmittedNetwork): EmitOptions["compute"] => {
    if (dtype === null || dtype === "F32") return "float32";
    if (overflowsInFloat16) return bfloat16 ? "bfloat16" : "float32";
    return dtype === "BF16" && bfloat16 && !isConvolutional ? "bfloat16" : "float16";
  };
  return (network) => ({
    ...written(features),
    sine: "operator",
    patches: "conv",
    compute: computeOf(network),
    tables: network.dtype === "BF16" && !bfloat16 ? "compute" : "stored",
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
