// A real driver below the simulated TensorRT: the stand-in. Formulas are computed by a kernel (formula.cu), whose PTX lies
// beside this library as formula.ptx. As TensorRT does, it uses the context that is current, keeps the primary context for
// as long as the process lives, and launches on the stream that it is given. The driver is opened by its name, as the
// addon opens it: no part of CUDA's toolkit is needed.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <sstream>

#include "machine.h"

struct CUctx_st;
struct CUevent_st;
struct CUfunc_st;
struct CUmod_st;

namespace machine {
namespace {

constexpr unsigned kStreamNonBlocking = 1;
constexpr int kPointerMemoryType = 2;
constexpr unsigned kMemoryOfDevice = 2;
constexpr int kUninitialised = 3;

struct Driver {
  int (*cuCtxGetCurrent)(CUctx_st**) = nullptr;
  int (*cuCtxGetDevice)(int*) = nullptr;
  int (*cuDevicePrimaryCtxRetain)(CUctx_st**, int) = nullptr;
  int (*cuModuleLoadData)(CUmod_st**, const void*) = nullptr;
  int (*cuModuleGetFunction)(CUfunc_st**, CUmod_st*, const char*) = nullptr;
  int (*cuLaunchKernel)(CUfunc_st*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream_st*,
                        void**, void**) = nullptr;
  int (*cuMemAlloc)(unsigned long long*, size_t) = nullptr;
  int (*cuMemFree)(unsigned long long) = nullptr;
  int (*cuMemsetD8Async)(unsigned long long, unsigned char, size_t, CUstream_st*) = nullptr;
  int (*cuPointerGetAttribute)(void*, int, unsigned long long) = nullptr;
  int (*cuStreamCreate)(CUstream_st**, unsigned) = nullptr;
  int (*cuStreamDestroy)(CUstream_st*) = nullptr;
  int (*cuStreamIsCapturing)(CUstream_st*, int*) = nullptr;
  int (*cuStreamSynchronize)(CUstream_st*) = nullptr;
  int (*cuStreamWaitEvent)(CUstream_st*, CUevent_st*, unsigned) = nullptr;
  int (*cuEventCreate)(CUevent_st**, unsigned) = nullptr;
  int (*cuEventDestroy)(CUevent_st*) = nullptr;
  int (*cuEventRecordWithFlags)(CUevent_st*, CUstream_st*, unsigned) = nullptr;
  int (*cuGetErrorString)(int, const char**) = nullptr;
  // What is missing, or "".
  std::string lacks;
};

Driver load() {
  Driver table;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    table.lacks = dlerror();
    return table;
  }
  const auto find = [&](auto& function, const char* symbol) {
    void* found = dlsym(library, symbol);
    if (found == nullptr) table.lacks = std::string("libcuda.so.1 has no ") + symbol;
    std::memcpy(&function, &found, sizeof found);
  };
  find(table.cuCtxGetCurrent, "cuCtxGetCurrent");
  find(table.cuCtxGetDevice, "cuCtxGetDevice");
  find(table.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  find(table.cuModuleLoadData, "cuModuleLoadData");
  find(table.cuModuleGetFunction, "cuModuleGetFunction");
  find(table.cuLaunchKernel, "cuLaunchKernel");
  find(table.cuMemAlloc, "cuMemAlloc_v2");
  find(table.cuMemFree, "cuMemFree_v2");
  find(table.cuMemsetD8Async, "cuMemsetD8Async");
  find(table.cuPointerGetAttribute, "cuPointerGetAttribute");
  find(table.cuStreamCreate, "cuStreamCreate");
  find(table.cuStreamDestroy, "cuStreamDestroy_v2");
  find(table.cuStreamIsCapturing, "cuStreamIsCapturing");
  find(table.cuStreamSynchronize, "cuStreamSynchronize");
  find(table.cuStreamWaitEvent, "cuStreamWaitEvent");
  find(table.cuEventCreate, "cuEventCreate");
  find(table.cuEventDestroy, "cuEventDestroy_v2");
  find(table.cuEventRecordWithFlags, "cuEventRecordWithFlags");
  find(table.cuGetErrorString, "cuGetErrorString");
  return table;
}

const Driver& driver() {
  static const Driver table = load();
  return table;
}

// The rest of the process's life: as in TensorRT, nothing unloads the kernel, and no violation is forgotten.
struct State {
  std::mutex mutex;
  std::map<CUctx_st*, CUfunc_st*> kernels;
  std::string violation;
};

State& state() {
  static auto* instance = new State();
  return *instance;
}

std::string answered(const char* call, int result) {
  const char* words = nullptr;
  driver().cuGetErrorString(result, &words);
  return std::string(call) + " answered " + std::to_string(result) + " (" + (words ? words : "unknown") + ")";
}

std::string besideThis(const char* name) {
  Dl_info information{};
  dladdr(reinterpret_cast<const void*>(&besideThis), &information);
  const std::string library = information.dli_fname;
  return library.substr(0, library.rfind('/') + 1) + name;
}

// The kernel in the current context; null with a reason where it cannot be had.
CUfunc_st* kernel(std::string& why) {
  CUctx_st* context = nullptr;
  if (driver().cuCtxGetCurrent(&context) != 0 || context == nullptr) {
    why = "no context is current";
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(state().mutex);
  const auto known = state().kernels.find(context);
  if (known != state().kernels.end()) return known->second;
  // 1. The primary context, for good: it is not destroyed while this library lives, even if it is lost.
  int device = 0;
  CUctx_st* primary = nullptr;
  int result = driver().cuCtxGetDevice(&device);
  if (result == 0) result = driver().cuDevicePrimaryCtxRetain(&primary, device);
  if (result != 0) {
    why = answered("cuDevicePrimaryCtxRetain", result);
    return nullptr;
  }
  // 2. The kernel. The driver makes code for this GPU.
  const std::string path = besideThis("formula.ptx");
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!(text << file.rdbuf())) {
    why = path + " cannot be read: `npm run build:native -- --simulated` makes it, where pip or nvcc is";
    return nullptr;
  }
  CUmod_st* module = nullptr;
  CUfunc_st* function = nullptr;
  result = driver().cuModuleLoadData(&module, text.str().c_str());
  if (result == 0) result = driver().cuModuleGetFunction(&function, module, FORMULA_KERNEL);
  if (result != 0) {
    why = answered("loading the kernel", result);
    return nullptr;
  }
  state().kernels[context] = function;
  return function;
}

}  // namespace

std::string open() {
  if (!driver().lacks.empty()) return driver().lacks;
  std::string why;
  kernel(why);
  return why;
}

// Once something has been violated, nothing works any more: no test passes by.
int enter(const char*) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return state().violation.empty() ? 0 : kUninitialised;
}

void violate(const char* what) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  if (!state().violation.empty()) return;
  state().violation = what;
  std::fprintf(stderr, "stand-in for TensorRT: not allowed: %s\n", what);
}

void count(Object, int) {}
void deserialised() {}

int allocate(unsigned long long* address, size_t bytes) { return driver().cuMemAlloc(address, bytes); }
void release(unsigned long long address) { driver().cuMemFree(address); }

int fill(unsigned long long address, unsigned char value, size_t bytes) {
  // On a stream of its own: the default one would wait for others, and is forbidden while they are captured.
  CUstream_st* stream = nullptr;
  int result = driver().cuStreamCreate(&stream, kStreamNonBlocking);
  if (result != 0) return result;
  result = driver().cuMemsetD8Async(address, value, bytes, stream);
  const int waited = driver().cuStreamSynchronize(stream);
  driver().cuStreamDestroy(stream);
  return result != 0 ? result : waited;
}

int fillAsync(unsigned long long address, unsigned char value, size_t bytes, CUstream_st* stream) {
  return driver().cuMemsetD8Async(address, value, bytes, stream);
}

bool isCapturing(CUstream_st* stream) {
  int status = 0;
  return driver().cuStreamIsCapturing(stream, &status) == 0 && status != 0;
}

bool isDevice(const void* address, size_t bytes, bool capturing) {
  if (capturing) return true;
  const auto first = reinterpret_cast<unsigned long long>(address);
  for (const unsigned long long at : {first, first + bytes - 1}) {
    unsigned type = 0;
    if (driver().cuPointerGetAttribute(&type, kPointerMemoryType, at) != 0 || type != kMemoryOfDevice) return false;
  }
  return true;
}

int launch(CUstream_st* stream, std::vector<FormulaLaunch> formulas, const Graph&) {
  std::string why;
  CUfunc_st* function = kernel(why);
  if (function == nullptr) return kUninitialised;
  for (FormulaLaunch& formula : formulas) {
    // Copied by the driver before it returns, also into a graph.
    void* parameters[] = {&formula};
    const int result = driver().cuLaunchKernel(function, formulaBlocks(formula), 1, 1, kFormulaBlock, 1, 1, 0, stream,
                                               parameters, nullptr);
    if (result != 0) return result;
  }
  return 0;
}

int tell(CUstream_st*, const std::shared_ptr<Bindings>&, uint64_t) { return 0; }
int expect(CUstream_st*, const std::shared_ptr<Bindings>&, uint64_t) { return 0; }

StreamCalls streamCalls() {
  const auto& table = driver();
  return {table.cuStreamCreate, table.cuStreamDestroy,        table.cuEventCreate,
          table.cuEventDestroy, table.cuEventRecordWithFlags, table.cuStreamWaitEvent};
}

}  // namespace machine
