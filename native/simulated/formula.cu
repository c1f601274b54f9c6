// The kernel of the stand-in's engines: one formula. scripts/ptx.mjs compiles it, without fused multiply-add, to PTX for
// the oldest GPU that TensorRT 11 runs on, from which the driver makes code for the present one.
#include "formula.h"

static __device__ __forceinline__ unsigned long long nanosecondsNow() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

extern "C" __global__ void flowturbo_formula(const __grid_constant__ FormulaLaunch launch) {
  const unsigned long long thread = static_cast<unsigned long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const unsigned long long threads = static_cast<unsigned long long>(gridDim.x) * blockDim.x;
  if (thread == 0 && launch.nanoseconds > 0) {
    const unsigned long long start = nanosecondsNow();
    // Each turn sleeps for some hundred nanoseconds: it ends even if the timer stands still.
    for (unsigned long long turn = 0; turn < launch.nanoseconds; turn++) {
      if (nanosecondsNow() - start >= launch.nanoseconds) break;
      __nanosleep(500);
    }
  }
  formulaThread(launch, thread, threads);
}
