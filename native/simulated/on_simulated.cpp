// The simulated driver below the simulated TensorRT: a launch is one kernel of the simulated device, which computes all
// formulas.

#include <chrono>
#include <cstring>
#include <thread>

#include "machine.h"
#include "simulated.h"

extern "C" int cuMemAlloc_v2(unsigned long long*, size_t);
extern "C" int cuMemFree_v2(unsigned long long);
extern "C" int cuMemsetD8Async(unsigned long long, unsigned char, size_t, CUstream_st*);

namespace machine {
namespace {

using Formulas = std::vector<FormulaLaunch>;

void compute(const Formulas& formulas) {
  const auto start = std::chrono::steady_clock::now();
  uint64_t nanoseconds = 0;
  for (const FormulaLaunch& onDevice : formulas) {
    const FormulaLaunch formula = formulaMapped(onDevice, simulatedHost);
    formulaThread(formula, 0, 1);
    if (formulaSpoiled(formula)) simulatedReportViolation("an engine's weights were overwritten");
    nanoseconds += formula.nanoseconds;
  }
  if (nanoseconds > 0) std::this_thread::sleep_until(start + std::chrono::nanoseconds(nanoseconds));
}

}  // namespace

std::string open() { return ""; }
int enter(const char* call) { return simulatedEnter(call); }
void violate(const char* what) { simulatedReportViolation(what); }

void count(Object object, int change) {
  simulatedCount(object == Object::kRuntime  ? kSimulatedRuntime
                 : object == Object::kEngine ? kSimulatedEngine
                                             : kSimulatedExecutionContext,
                 change);
}

void deserialised() { simulatedDeserialised(); }

int allocate(unsigned long long* address, size_t bytes) { return cuMemAlloc_v2(address, bytes); }
void release(unsigned long long address) { cuMemFree_v2(address); }

int fill(unsigned long long address, unsigned char value, size_t bytes) {
  std::memset(simulatedHost(reinterpret_cast<void*>(address)), value, bytes);
  return 0;
}

int fillAsync(unsigned long long address, unsigned char value, size_t bytes, CUstream_st* stream) {
  return cuMemsetD8Async(address, value, bytes, stream);
}

bool isCapturing(CUstream_st* stream) { return simulatedIsCapturing(stream); }
bool isDevice(const void* address, size_t bytes, bool) { return simulatedIsDevice(address, bytes); }

int launch(CUstream_st* stream, std::vector<FormulaLaunch> formulas) {
  return simulatedLaunch(
      stream, [](void* data) { compute(*static_cast<Formulas*>(data)); }, new Formulas(std::move(formulas)),
      [](void* data) { delete static_cast<Formulas*>(data); });
}

}  // namespace machine
