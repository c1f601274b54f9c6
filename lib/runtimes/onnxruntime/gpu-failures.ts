/**
 * What ONNX Runtime's messages say of a GPU: it has one class of errors for everything. After a lack of memory or the loss
 * of the device nothing that was there can be relied on, so the process that met it is replaced.
 *
 * The CUDA provider writes "CUDA failure 719: unspecified launch failure ; GPU=0 ; …", and the same for CUBLAS, CUDNN and
 * CUDNN_FE, with the number that the library gave (cuda_call.cc). The WebGPU provider gives Dawn's words on: a buffer that
 * could not be made is only invalid, and fails whatever reads it later; why it could not be made is in the log alone
 * (webgpu_context.cc, buffer_manager.cc).
 */

import type { Failure } from "./protocol.js";

const any = (...patterns: RegExp[]) => new RegExp(patterns.map(({ source }) => source).join("|"), "i");

const outOfMemory = any(
  /out of memory/,
  // cudaErrorMemoryAllocation; CUBLAS_STATUS_ALLOC_FAILED; CUDNN_STATUS_ALLOC_FAILED of cuDNN 8, and of cuDNN 9 on the host and the device.
  /CUDA failure 2:|CUBLAS failure 3:|CUDNN failure (4|4003|4004):/,
  /CU(BLAS|DNN)_STATUS_\w*ALLOC(ATION)?_FAILED/,
  // ONNX Runtime's arena (bfc_arena.cc).
  /Failed to allocate memory for requested buffer|Available memory of \d+ is smaller than requested|Failed to find a free memory block/,
  /Failed to create GPU buffer/,
  /\[Invalid Buffer[^\]]*\] is invalid|exceeds the max(imum)? \w*buffer/,
  /VK_ERROR_OUT_OF_\w*MEMORY|E_OUTOFMEMORY/,
);

const lost = any(
  // Of CUDA's runtime: errors that leave the context unusable. 4 and 46: it is gone, or never came.
  /CUDA failure (4|46|214|220|700|702|709|710|714|715|716|717|718|719|721|999):/,
  // What the other libraries make of such an error: a mapping, an execution or the library itself failed.
  /CUBLAS failure (11|13|14):|CUDNN failure (8|4000|500\d):/,
  // Dawn says "[Device] is lost."; MapAsyncStatus 2 and 4: the read was cancelled, or aborted.
  /\bdevice( "[^"]*")?\]? (is |was |has been )?(lost|destroyed)|DeviceLost|Instance reference no longer exists/,
  /MapAsyncStatus value: [24]\b/,
  /VK_ERROR_DEVICE_LOST|DXGI_ERROR_DEVICE_/,
);

/** Messages with numbers: bytes that were wanted, and those that there are. */
const numbers = [
  /Available memory of (?<available>\d+) is smaller than requested bytes of (?<needed>\d+)/,
  /Buffer size \((?<needed>\d+)\) exceeds the max buffer size limit \((?<available>\d+)\)/,
  /requested buffer of size (?<needed>\d+)/,
  /Failed to create GPU buffer: size=(?<needed>\d+)/,
];

/**
 * The failure that a message of ONNX Runtime tells of; null for one that has nothing to do with the device.
 * @param what the work that failed
 */
export function gpuFailure(what: string, message: string): Extract<Failure, { kind: "memory" | "lost" }> | null {
  const text = `${what}: ${message}`;
  if (outOfMemory.test(message)) {
    const found = numbers.map((pattern) => message.match(pattern)?.groups).find((groups) => groups !== undefined);
    return { kind: "memory", message: text, needed: Number(found?.needed), available: Number(found?.available) };
  }
  return lost.test(message) ? { kind: "lost", message: text } : null;
}
