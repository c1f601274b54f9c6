// The simulated driver below the simulated TensorRT: a launch is one kernel of the simulated device, which computes all
// formulas.
//
// The environment variable FLOWTURBO_SIMULATED_FAULT makes launches of a graph go wrong, all of them or the one of that
// number: "value predict 3" (one value of its first output is off by a thousandth of the largest), "nan predict 3",
// "hang predict 3" (it never ends), "lost predict 3" (the device is lost), "crash predict 3" (the process is). The driver
// knows more: see cuda.cpp and kernels.cpp.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <thread>

#include "machine.h"
#include "simulated.h"

struct CUevent_st;

extern "C" int cuMemAlloc_v2(unsigned long long*, size_t);
extern "C" int cuMemFree_v2(unsigned long long);
extern "C" int cuMemsetD8Async(unsigned long long, unsigned char, size_t, CUstream_st*);
extern "C" int cuStreamCreate(CUstream_st**, unsigned);
extern "C" int cuStreamDestroy_v2(CUstream_st*);
extern "C" int cuStreamWaitEvent(CUstream_st*, CUevent_st*, unsigned);
extern "C" int cuEventCreate(CUevent_st**, unsigned);
extern "C" int cuEventDestroy_v2(CUevent_st*);
extern "C" int cuEventRecordWithFlags(CUevent_st*, CUstream_st*, unsigned);

namespace machine {
namespace {

struct Launch {
  std::vector<FormulaLaunch> formulas;
  Graph graph;
};

// What is to go wrong with the launch of a graph that begins now, or "".
std::string faultOf(const std::string& graph) {
  struct Fault {
    std::string what;
    std::string graph;
    uint64_t launch = 0;
  };
  static const Fault fault = [] {
    Fault parsed;
    const char* text = std::getenv("FLOWTURBO_SIMULATED_FAULT");
    std::istringstream(text != nullptr ? text : "") >> parsed.what >> parsed.graph >> parsed.launch;
    return parsed;
  }();
  static std::atomic<uint64_t> launches{0};
  if (graph.empty() || graph != fault.graph) return "";
  return fault.launch == 0 || ++launches == fault.launch ? fault.what : "";
}

void goWrong(const std::string& fault, const Graph& graph) {
  if (fault == "lost") simulatedLose(719);
  if (fault == "crash") std::abort();
  while (fault == "hang") std::this_thread::sleep_for(std::chrono::hours(1));
  if (graph.output == nullptr) return;
  auto* values = static_cast<float*>(simulatedHost(graph.output));
  float largest = 0;
  for (uint64_t index = 0; index < graph.elements; index++) largest = std::max(largest, std::fabs(values[index]));
  if (fault == "value") values[0] += 1e-3f * largest;
  if (fault == "nan") values[0] = std::numeric_limits<float>::quiet_NaN();
}

void compute(const Launch& launch) {
  const auto start = std::chrono::steady_clock::now();
  uint64_t nanoseconds = 0;
  for (const FormulaLaunch& onDevice : launch.formulas) {
    const FormulaLaunch formula = formulaMapped(onDevice, simulatedHost);
    formulaThread(formula, 0, 1);
    if (formulaSpoiled(formula)) simulatedReportViolation("an engine's weights were overwritten");
    nanoseconds += formula.nanoseconds;
  }
  const std::string fault = faultOf(launch.graph.name);
  if (!fault.empty()) goWrong(fault, launch.graph);
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

int launch(CUstream_st* stream, std::vector<FormulaLaunch> formulas, const Graph& graph) {
  return simulatedLaunch(
      stream, [](void* data) { compute(*static_cast<Launch*>(data)); }, new Launch{std::move(formulas), graph},
      [](void* data) { delete static_cast<Launch*>(data); });
}

namespace {

struct Telling {
  std::shared_ptr<Bindings> bindings;
  uint64_t number;
};

int queue(CUstream_st* stream, void (*run)(void*), const std::shared_ptr<Bindings>& bindings, uint64_t number) {
  return simulatedQueue(stream, run, new Telling{bindings, number},
                        [](void* data) { delete static_cast<Telling*>(data); });
}

}  // namespace

int tell(CUstream_st* stream, const std::shared_ptr<Bindings>& bindings, uint64_t number) {
  return queue(
      stream,
      [](void* data) {
        const auto& telling = *static_cast<Telling*>(data);
        telling.bindings->known = telling.number;
      },
      bindings, number);
}

int expect(CUstream_st* stream, const std::shared_ptr<Bindings>& bindings, uint64_t number) {
  return queue(
      stream,
      [](void* data) {
        const auto& telling = *static_cast<Telling*>(data);
        if (telling.bindings->gone) simulatedReportViolation("a launch of a context that was destroyed");
        if (telling.bindings->known != telling.number)
          simulatedReportViolation("a launch with addresses that its context was told for another one");
      },
      bindings, number);
}

StreamCalls streamCalls() {
  return {cuStreamCreate,    cuStreamDestroy_v2,     cuEventCreate,
          cuEventDestroy_v2, cuEventRecordWithFlags, cuStreamWaitEvent};
}

}  // namespace machine
