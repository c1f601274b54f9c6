// The GPUs of this machine, asked from NVIDIA's driver (libcuda.so.1) alone: no CUDA toolkit is needed to build or to
// run this package. Memory and architecture decide which engines fit and which targets an engine is built for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flowturbo {

struct CudaDevice {
  std::string name;
  uint64_t memoryBytes = 0;
  // Compute capability: SM 8.9 is {8, 9}.
  int major = 0;
  int minor = 0;
};

struct CudaReport {
  // The newest CUDA version that the driver serves: 13.0 is 13000.
  int driverVersion = 0;
  std::vector<CudaDevice> devices;
};

// Throws Error NO_DRIVER where libcuda.so.1 cannot be opened, NO_DEVICE where it finds no GPU, CUDA otherwise.
CudaReport examineCuda();

}  // namespace flowturbo
