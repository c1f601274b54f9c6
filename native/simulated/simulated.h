// A simulated GPU, for tests only: two libraries that replace libcuda.so.1 and TensorRT's (or TensorRT-RTX's) library, so
// that the addons under test are the ones that are shipped. The driver keeps device memory where only its own copies and
// kernels can read it, and runs each stream on a thread of its own. It obeys the rules of cuda.h: what is forbidden in a
// capture by the thread's mode and makes it invalid, events that have no time, a context that stays lost. And it reports
// errors that a real driver may not notice: addresses outside any allocation, host memory that is not pinned, work on
// freed memory. There may be several GPUs, each with memory, a context and a speed of its own: an address of one is none
// of another, and its streams and events are for threads with its context. The engines compute formulas that their plan contains (tensorrt.cpp); they are built from graphs of the
// package, each with a file that says what it computes (builder.cpp).
// A third library, the stand-in, has the same engines for any driver, the simulated one (kernels.cpp) or a real one.
//
// These functions are exported by the simulated driver: for the other library, and for tests, which call them through
// control.cpp or by linking.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

extern "C" {

struct SimulatedCounts {
  // Calls of the driver and of TensorRT since the last reset.
  uint64_t calls;
  // Objects that exist now.
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
  // Events since the last reset.
  uint64_t kernels;
  uint64_t uploads;
  uint64_t downloads;
  uint64_t copies;
  uint64_t graphLaunches;
  uint64_t deserialised;
  uint64_t violations;
  // Captures that were begun.
  uint64_t captures;
  // Waits for events that keep a processor busy, and events that interrupt one when they happen.
  uint64_t spins;
  uint64_t interrupts;
};

// 1. For tests.

// As in a new process: nothing was counted, nothing fails, no device is lost. How many devices there are is as
// FLOWTURBO_SIMULATED_DEVICES says: a number for each, the microseconds that its kernels take besides their own work, divided
// by commas; one without it.
void simulatedReset();
SimulatedCounts simulatedCounts();
// Makes the `call`-th call from now on return `code` (for TensorRT: fail); 0 for none. After a code that makes a context
// unusable, all later calls return it too.
void simulatedFailAt(uint64_t call, int code);
// Makes the `kernel`-th kernel from now on fail on the device with `code`.
void simulatedFailKernel(uint64_t kernel, int code);
// Name of the call that was made to fail, or "".
const char* simulatedFailed();
// The same from now on, whatever the environment says. Those that are used must stay.
void simulatedDevices(const uint64_t* delays, size_t size);
// Kernels that one of them has begun since the last reset.
uint64_t simulatedKernelsOn(int device);
// One of them is lost, with this code.
void simulatedLoseDevice(int device, int code);
// Memory of each device.
void simulatedCapacity(uint64_t bytes);
// Kernels wait before they run; `simulatedLet` lets `count` more run, a negative number all of them.
void simulatedHold();
void simulatedLet(int64_t count);
// Launches in a capture do what is forbidden there.
void simulatedRefuseCaptures(bool refuse);
// A capture that has begun waits before anything is given to it.
void simulatedPauseCaptures(bool pause);
// Seconds of the monotonic clock at which kernels began, the newest last; returns how many there are.
size_t simulatedKernelTimes(double* times, size_t size);
// The first violation, or "".
const char* simulatedViolation();

// 2. For the other library.

// The code that the call has to fail with, or 0.
int simulatedEnter(const char* call);
void simulatedReportViolation(const char* what);
enum SimulatedObject { kSimulatedRuntime, kSimulatedEngine, kSimulatedExecutionContext };
void simulatedCount(SimulatedObject object, int change);
void simulatedDeserialised();
// The calling thread's device, or that of the stream whose thread it is, is lost, with this code.
void simulatedLose(int code);
// Whether the range lies within one allocation on that device.
bool simulatedIsDevice(const void* address, size_t bytes);
// Where the host finds what is at an address of the device: for kernels alone.
void* simulatedHost(const void* address);
bool simulatedIsCapturing(CUstream_st* stream);
// Queues work that is no kernel. `run` and `destroy` as below.
int simulatedQueue(CUstream_st* stream, void (*run)(void*), void* data, void (*destroy)(void*));
// Queues a kernel. `run` may be called several times (replays of a CUDA graph), then `destroy` once.
int simulatedLaunch(CUstream_st* stream, void (*run)(void*), void* data, void (*destroy)(void*));
}
