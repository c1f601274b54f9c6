// A GPU that is none, for tests only: two libraries that take the places of libcuda.so.1 and of TensorRT's (or
// TensorRT-RTX's), so that the addons under test are the very ones that are shipped. The driver keeps device memory in
// the host's, works on each stream with a thread of its own and checks what a real one would not say: addresses outside
// of any allocation, host memory that is not pinned, work on memory that is freed already. The engines compute a closed
// form that their plan spells out (tensorrt.cpp).
//
// These functions are exported by the simulated driver: for the other library, and for tests, which reach them through
// control.cpp or by linking.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

extern "C" {

struct SimulatedCounts {
  // Calls of the driver and of TensorRT since the last reset.
  uint64_t calls;
  // What exists now.
  uint64_t deviceBlocks;
  uint64_t deviceBytes;
  uint64_t hostBlocks;
  uint64_t streams;
  uint64_t events;
  uint64_t graphs;
  uint64_t contexts;
  uint64_t runtimes;
  uint64_t engines;
  uint64_t executionContexts;
  // What has happened since the last reset.
  uint64_t kernels;
  uint64_t uploads;
  uint64_t downloads;
  uint64_t copies;
  uint64_t graphLaunches;
  uint64_t deserialised;
  uint64_t violations;
};

// 1. For tests.

void simulatedReset();
SimulatedCounts simulatedCounts();
// The call of that number from now on answers `code` (for TensorRT: fails); 0 for none. Those codes after which a
// context cannot be used any more stay with it.
void simulatedFailAt(uint64_t call, int code);
// The kernel of that number from now on fails on the device with `code`.
void simulatedFailKernel(uint64_t kernel, int code);
// Name of the call that was made to fail, or "".
const char* simulatedFailed();
void simulatedCapacity(uint64_t bytes);
// Kernels wait before they run, until `count` more are let through; a negative number lets all through.
void simulatedHold();
void simulatedLet(int64_t count);
// Seconds of the monotonic clock at which kernels began, the newest last; returns how many there are.
size_t simulatedKernelTimes(double* times, size_t size);
// What went wrong first, or "".
const char* simulatedViolation();

// 2. For the other library.

// The code that the call has to fail with, or 0.
int simulatedEnter(const char* call);
void simulatedReportViolation(const char* what);
enum SimulatedObject { kSimulatedRuntime, kSimulatedEngine, kSimulatedExecutionContext };
void simulatedCount(SimulatedObject object, int change);
void simulatedDeserialised();
// Whether the range lies within one allocation on the device.
bool simulatedIsDevice(const void* address, size_t bytes);
bool simulatedIsCapturing(CUstream_st* stream);
// Queues a kernel, whatever the stream does with it: `run` may be called several times, then `destroy` once.
int simulatedLaunch(CUstream_st* stream, void (*run)(void*), void* data, void (*destroy)(void*));
}
