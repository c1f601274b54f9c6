// What the simulated TensorRT (tensorrt.cpp) asks of the driver below it. There are two: on_simulated.cpp, for tests
// without a GPU, where calls can be made to fail and everything is counted; and on_driver.cpp, for a real one.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "formula.h"

struct CUstream_st;

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
// Queues formulas, one after the other.
int launch(CUstream_st* stream, std::vector<FormulaLaunch> formulas);

}  // namespace machine
