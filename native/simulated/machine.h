// What the simulated TensorRT (tensorrt.cpp) asks of the driver below it. There are two: on_simulated.cpp, for tests
// without a GPU, where calls can be made to fail and everything is counted; and on_driver.cpp, for a real one.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "formula.h"

struct CUstream_st;
struct CUevent_st;

namespace machine {

enum class Object { kRuntime, kEngine, kExecutionContext };

// What a runtime needs before anything else, on the calling thread's device. Why it cannot be had, or "".
std::string open();
// Other than 0: the call has to fail.
int enter(const char* call);
// Reports what the caller must never do.
void violate(const char* what);
void count(Object object, int change);
void deserialised();

int allocate(unsigned long long* address, size_t bytes);
void release(unsigned long long address);
// Returns when it is done.
int fill(unsigned long long address, unsigned char value, size_t bytes);
int fillAsync(unsigned long long address, unsigned char value, size_t bytes, CUstream_st* stream);
bool isCapturing(CUstream_st* stream);
// Whether the range lies on the device. A real driver is not asked during a capture, where few calls are allowed.
bool isDevice(const void* address, size_t bytes, bool capturing);
// What a launch is of, and its first output of numbers: for faults that are asked for.
struct Graph {
  std::string name;
  void* output = nullptr;
  uint64_t elements = 0;
};
// Queues formulas, one after the other.
int launch(CUstream_st* stream, std::vector<FormulaLaunch> formulas, const Graph& graph = {});

// A context's memory of the addresses of its operands, by the number of the telling. A real driver is not asked: there it
// is the library's own affair.
struct Bindings {
  std::atomic<uint64_t> known{0};
  std::atomic<bool> gone{false};
};
// In the order of the stream: the context is told new addresses; what is launched next was bound when it had been told so
// often, and runs with other addresses if that is not so by then.
int tell(CUstream_st* stream, const std::shared_ptr<Bindings>& bindings, uint64_t number);
int expect(CUstream_st* stream, const std::shared_ptr<Bindings>& bindings, uint64_t number);

// The driver's functions of streams and events.
struct StreamCalls {
  int (*createStream)(CUstream_st**, unsigned flags);
  int (*destroyStream)(CUstream_st*);
  int (*createEvent)(CUevent_st**, unsigned flags);
  int (*destroyEvent)(CUevent_st*);
  int (*record)(CUevent_st*, CUstream_st*, unsigned flags);
  int (*wait)(CUstream_st*, CUevent_st*, unsigned flags);
};
StreamCalls streamCalls();

}  // namespace machine
