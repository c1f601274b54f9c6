// CUDA's driver API, from NVIDIA's driver (libcuda.so.1) alone: no CUDA toolkit is needed to build or to run this
// package. The functions are looked up at first use; what is here is the table of them, the errors that they return, and
// a report on the GPUs of this machine. device.h calls them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "error.h"

struct CUctx_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct CUstream_st;

namespace flowturbo {

using CudaResult = int;
using CudaDeviceNumber = int;
// CUdeviceptr.
using DevicePointer = unsigned long long;

constexpr CudaResult kCudaSuccess = 0;
constexpr CudaResult kCudaOutOfMemory = 2;
constexpr CudaResult kCudaNotReady = 600;

struct CudaDriver {
  // The table, filled on the first call in a process and never closed. Throws Error NO_DRIVER where libcuda.so.1 cannot
  // be opened or lacks a function.
  static const CudaDriver& open();

  // Throws an Error that names `call`: NO_DEVICE, DEVICE_MEMORY (the device's memory ran out), DEVICE_LOST (the context
  // cannot be used any more), CUDA for every other failure.
  void check(CudaResult result, const char* call) const {
    if (result != kCudaSuccess) throw failure(result, call);
  }
  Error failure(CudaResult result, const char* call) const;

  CudaResult (*cuInit)(unsigned);
  CudaResult (*cuDriverGetVersion)(int*);
  CudaResult (*cuGetErrorString)(CudaResult, const char**);
  CudaResult (*cuDeviceGetCount)(int*);
  CudaResult (*cuDeviceGet)(CudaDeviceNumber*, int);
  CudaResult (*cuDeviceGetName)(char*, int, CudaDeviceNumber);
  CudaResult (*cuDeviceTotalMem)(size_t*, CudaDeviceNumber);
  CudaResult (*cuDeviceGetAttribute)(int*, int, CudaDeviceNumber);
  CudaResult (*cuDevicePrimaryCtxRetain)(CUctx_st**, CudaDeviceNumber);
  CudaResult (*cuDevicePrimaryCtxRelease)(CudaDeviceNumber);
  CudaResult (*cuCtxSetCurrent)(CUctx_st*);
  CudaResult (*cuThreadExchangeStreamCaptureMode)(int*);
  CudaResult (*cuMemGetInfo)(size_t*, size_t*);
  CudaResult (*cuMemAlloc)(DevicePointer*, size_t);
  CudaResult (*cuMemFree)(DevicePointer);
  CudaResult (*cuMemAllocHost)(void**, size_t);
  CudaResult (*cuMemFreeHost)(void*);
  CudaResult (*cuMemcpyHtoDAsync)(DevicePointer, const void*, size_t, CUstream_st*);
  CudaResult (*cuMemcpyDtoHAsync)(void*, DevicePointer, size_t, CUstream_st*);
  CudaResult (*cuMemcpyDtoDAsync)(DevicePointer, DevicePointer, size_t, CUstream_st*);
  CudaResult (*cuMemsetD8Async)(DevicePointer, unsigned char, size_t, CUstream_st*);
  CudaResult (*cuStreamCreate)(CUstream_st**, unsigned);
  CudaResult (*cuStreamDestroy)(CUstream_st*);
  CudaResult (*cuStreamSynchronize)(CUstream_st*);
  CudaResult (*cuStreamBeginCapture)(CUstream_st*, int);
  CudaResult (*cuStreamEndCapture)(CUstream_st*, CUgraph_st**);
  CudaResult (*cuEventCreate)(CUevent_st**, unsigned);
  CudaResult (*cuEventDestroy)(CUevent_st*);
  CudaResult (*cuEventRecordWithFlags)(CUevent_st*, CUstream_st*, unsigned);
  CudaResult (*cuEventSynchronize)(CUevent_st*);
  CudaResult (*cuEventElapsedTime)(float*, CUevent_st*, CUevent_st*);
  CudaResult (*cuGraphInstantiateWithFlags)(CUgraphExec_st**, CUgraph_st*, unsigned long long);
  CudaResult (*cuGraphLaunch)(CUgraphExec_st*, CUstream_st*);
  CudaResult (*cuGraphExecDestroy)(CUgraphExec_st*);
  CudaResult (*cuGraphDestroy)(CUgraph_st*);
};

struct CudaDevice {
  std::string name;
  uint64_t memoryBytes = 0;
  // Compute capability: SM 8.9 is {8, 9}.
  int major = 0;
  int minor = 0;
};

struct CudaReport {
  // The newest CUDA version that the driver supports: 13.0 is 13000.
  int driverVersion = 0;
  std::vector<CudaDevice> devices;
};

// Throws Error NO_DRIVER where libcuda.so.1 cannot be opened, NO_DEVICE where it finds no GPU, CUDA otherwise.
CudaReport examineCuda();

// One GPU by its number. Throws as examineCuda does, INVALID for a number that is none.
CudaDevice examineCudaDevice(int ordinal);

}  // namespace flowturbo
