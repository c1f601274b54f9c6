/**
 * What ONNX Runtime's messages say of a GPU: it has one class of errors for everything. After a lack of memory or the loss
 * of the device nothing that was there can be relied on, so the process that met it is replaced.
 */

import type { Failure } from "./protocol.js";

/** Of CUDA, cuBLAS and cuDNN, of Dawn, and of ONNX Runtime's allocators. */
const outOfMemory =
  /out of memory|out_of_memory|CUDA failure 2:|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|Failed to allocate|Available memory of \d+ is smaller than requested|VK_ERROR_OUT_OF_\w*MEMORY|E_OUTOFMEMORY|exceeds? the (max(imum)?|limit of) \w*buffer|larger than the maximum (storage )?buffer/i;
const lost =
  /device (is |was |has been )?lost|DeviceLost|DEVICE_LOST|DXGI_ERROR_DEVICE|CUDA failure (4|46|700|702|704|709|710|714|715|716|717|718|719|999):|device is (destroyed|invalid)/i;

/**
 * The failure that a message of ONNX Runtime tells of; null for one that has nothing to do with the device.
 * @param what the work that failed
 */
export function gpuFailure(what: string, message: string): Extract<Failure, { kind: "memory" | "lost" }> | null {
  const kind = outOfMemory.test(message) ? "memory" : lost.test(message) ? "lost" : null;
  return kind && { kind, message: `${what}: ${message}` };
}
