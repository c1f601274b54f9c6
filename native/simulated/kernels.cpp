// The simulated driver's modules and kernels, for the stand-in (on_driver.cpp). It knows one kernel, by its name, and
// computes on the host what formula.cu computes on a GPU, thread by thread, in the order of the stream. The text of the
// module is checked as far as a driver would refuse it: its version, its target and the size of the kernel's parameter.
//
// The environment variable FLOWTURBO_SIMULATED_FAULT makes a kernel go wrong, for tests of what has to notice: "bit kernel 3"
// (the last element of the third differs in its lowest bit), "lost kernel 3" (the device is lost there), "hang kernel 3"
// (it never ends), "capture kernel" (none can be captured).

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <regex>
#include <sstream>
#include <string>
#include <thread>

#include "formula.h"
#include "simulated.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct CUfunc_st {
  std::string name;
};

struct CUmod_st {
  std::map<std::string, CUfunc_st> functions;
};

namespace {

constexpr int kSuccess = 0;
constexpr int kInvalidValue = 1;
constexpr int kInvalidPtx = 218;
constexpr int kUnsupportedPtxVersion = 222;
constexpr int kNotFound = 500;
constexpr int kCaptureUnsupported = 900;
constexpr int kLaunchFailed = 719;
constexpr int kPointerMemoryType = 2;
constexpr unsigned kMemoryOfDevice = 2;
// Of CUDA 13.0, whose driver this one is.
constexpr double kNewestPtx = 9.0;

class Faults {
 public:
  Faults() {
    const char* text = std::getenv("FLOWTURBO_SIMULATED_FAULT");
    std::string of;
    std::istringstream(text != nullptr ? text : "") >> what_ >> of >> kernel_;
    if (of != "kernel") what_.clear();
    if (what_ == "lost") simulatedFailKernel(kernel_, kLaunchFailed);
  }

  bool refusesCaptures() const { return what_ == "capture"; }
  // Whether this goes wrong with the kernel that runs.
  bool happensNow(const char* what) const { return what_ == what && simulatedCounts().kernels == kernel_; }

 private:
  std::string what_;
  uint64_t kernel_ = 0;
};

const Faults& faults() {
  static const Faults read;
  return read;
}

struct Launched {
  FormulaLaunch formula;
  uint64_t threads;
};

uint64_t bytesOf(uint64_t rows, uint64_t rowElements, int integer) { return rows * rowElements * (integer ? 8 : 4); }

// Whether everything that the kernel touches lies on the device.
bool isSound(const FormulaLaunch& formula) {
  const auto on = [](const void* data, uint64_t bytes) { return bytes > 0 && simulatedIsDevice(data, bytes); };
  bool sound = on(formula.to, bytesOf(formula.rows, formula.rowElements, formula.integer)) && formula.count > 0 &&
               formula.count <= kFormulaTokens;
  if (formula.weightBytes > 0) sound = sound && on(formula.weights, formula.weightBytes);
  for (int index = 0; sound && index < formula.count; index++) {
    const FormulaToken& token = formula.tokens[index];
    if (token.kind == kFormulaNumber || token.kind >= kFormulaAdd) continue;
    sound = on(token.data, bytesOf(token.rows, token.rowElements, token.integer));
  }
  return sound;
}

void compute(const Launched& launched) {
  if (!isSound(launched.formula)) return simulatedReportViolation("a kernel on memory that was freed");
  const FormulaLaunch formula = formulaMapped(launched.formula, simulatedHost);
  if (formula.nanoseconds > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(formula.nanoseconds));
  while (faults().happensNow("hang")) std::this_thread::sleep_for(std::chrono::hours(1));
  const uint64_t elements = formula.rows * formula.rowElements;
  for (uint64_t thread = 0; thread < std::min(launched.threads, elements); thread++)
    formulaThread(formula, thread, launched.threads);
  if (formulaSpoiled(formula)) simulatedReportViolation("an engine's weights were overwritten");
  if (faults().happensNow("bit"))
    static_cast<uint8_t*>(formula.to)[bytesOf(elements - 1, 1, formula.integer)] ^= 1;
}

}  // namespace

EXPORT int cuModuleLoadData(CUmod_st** module, const void* image) {
  const int result = simulatedEnter("cuModuleLoadData");
  if (result != kSuccess) return result;
  const std::string text = static_cast<const char*>(image);
  std::smatch match;
  if (!std::regex_search(text, match, std::regex(R"(\n\.version (\d+\.\d+)\s+\.target sm_\d+\s)"))) return kInvalidPtx;
  if (std::stod(match[1]) > kNewestPtx) return kUnsupportedPtxVersion;
  auto loaded = std::make_unique<CUmod_st>();
  const std::regex entry(R"(\.entry (\w+)\(\s*\.param \.align 8 \.b8 \w+\[(\d+)\]\s*\))");
  for (auto found = std::sregex_iterator(text.begin(), text.end(), entry); found != std::sregex_iterator(); ++found) {
    const std::string name = (*found)[1];
    // A driver would not notice, and read beyond what it is given.
    if (name == FORMULA_KERNEL && std::stoul((*found)[2]) != sizeof(FormulaLaunch)) return kInvalidValue;
    loaded->functions[name] = CUfunc_st{name};
  }
  // For the life of the process, as the stand-in keeps it.
  *module = loaded.release();
  return kSuccess;
}

EXPORT int cuModuleGetFunction(CUfunc_st** function, CUmod_st* module, const char* name) {
  const int result = simulatedEnter("cuModuleGetFunction");
  if (result != kSuccess) return result;
  const auto found = module->functions.find(name);
  if (found == module->functions.end()) return kNotFound;
  *function = &found->second;
  return kSuccess;
}

EXPORT int cuLaunchKernel(CUfunc_st* function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
                          unsigned blockY, unsigned blockZ, unsigned, CUstream_st* stream, void** parameters, void**) {
  const int result = simulatedEnter("cuLaunchKernel");
  if (result != kSuccess) return result;
  if (faults().refusesCaptures() && simulatedIsCapturing(stream)) return kCaptureUnsupported;
  const bool isLine = gridX > 0 && blockX > 0 && blockX <= 1024 && gridY == 1 && gridZ == 1 && blockY == 1 && blockZ == 1;
  const auto* formula = static_cast<const FormulaLaunch*>(parameters[0]);
  if (!isLine || function->name != FORMULA_KERNEL || !isSound(*formula)) {
    simulatedReportViolation("cuLaunchKernel");
    return kInvalidValue;
  }
  return simulatedLaunch(
      stream, [](void* data) { compute(*static_cast<Launched*>(data)); },
      new Launched{*formula, uint64_t{gridX} * blockX}, [](void* data) { delete static_cast<Launched*>(data); });
}

EXPORT int cuPointerGetAttribute(void* value, int attribute, unsigned long long address) {
  const int result = simulatedEnter("cuPointerGetAttribute");
  if (result != kSuccess) return result;
  if (attribute != kPointerMemoryType || !simulatedIsDevice(reinterpret_cast<const void*>(address), 1)) return kInvalidValue;
  std::memcpy(value, &kMemoryOfDevice, sizeof kMemoryOfDevice);
  return kSuccess;
}
