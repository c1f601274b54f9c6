// The simulated device's controls for tests in JavaScript. Loading this addon loads the simulated libcuda.so.1 into the
// process under that name, and the addon under test finds it as it would find the driver.

#include <napi.h>

#include <vector>

#include "simulated.h"

namespace {

Napi::Value counts(const Napi::CallbackInfo& info) {
  const SimulatedCounts now = simulatedCounts();
  Napi::Object result = Napi::Object::New(info.Env());
  const auto set = [&](const char* name, uint64_t value) {
    result[name] = Napi::Number::New(info.Env(), static_cast<double>(value));
  };
  set("calls", now.calls);
  set("deviceBlocks", now.deviceBlocks);
  set("deviceBytes", now.deviceBytes);
  set("hostBlocks", now.hostBlocks);
  set("streams", now.streams);
  set("events", now.events);
  set("graphs", now.graphs);
  set("contexts", now.contexts);
  set("runtimes", now.runtimes);
  set("engines", now.engines);
  set("executionContexts", now.executionContexts);
  set("kernels", now.kernels);
  set("uploads", now.uploads);
  set("downloads", now.downloads);
  set("copies", now.copies);
  set("graphLaunches", now.graphLaunches);
  set("deserialised", now.deserialised);
  set("violations", now.violations);
  set("captures", now.captures);
  set("spins", now.spins);
  set("interrupts", now.interrupts);
  return result;
}

Napi::Value kernelTimes(const Napi::CallbackInfo& info) {
  std::vector<double> times(simulatedKernelTimes(nullptr, 0));
  times.resize(std::min(times.size(), simulatedKernelTimes(times.data(), times.size())));
  Napi::Array result = Napi::Array::New(info.Env(), times.size());
  for (uint32_t index = 0; index < times.size(); index++) result[index] = Napi::Number::New(info.Env(), times[index]);
  return result;
}

int64_t number(const Napi::CallbackInfo& info, size_t index) { return info[index].As<Napi::Number>().Int64Value(); }

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
  const auto add = [&](const char* name, auto function) { exports[name] = Napi::Function::New(env, function, name); };
  add("counts", counts);
  add("kernelTimes", kernelTimes);
  add("reset", [](const Napi::CallbackInfo&) { simulatedReset(); });
  add("failAt", [](const Napi::CallbackInfo& info) {
    simulatedFailAt(static_cast<uint64_t>(number(info, 0)), static_cast<int>(number(info, 1)));
  });
  add("failKernel", [](const Napi::CallbackInfo& info) {
    simulatedFailKernel(static_cast<uint64_t>(number(info, 0)), static_cast<int>(number(info, 1)));
  });
  add("failed", [](const Napi::CallbackInfo& info) -> Napi::Value {
    return Napi::String::New(info.Env(), simulatedFailed());
  });
  add("violation", [](const Napi::CallbackInfo& info) -> Napi::Value {
    return Napi::String::New(info.Env(), simulatedViolation());
  });
  add("capacity", [](const Napi::CallbackInfo& info) { simulatedCapacity(static_cast<uint64_t>(number(info, 0))); });
  add("refuseCaptures",
      [](const Napi::CallbackInfo& info) { simulatedRefuseCaptures(info[0].As<Napi::Boolean>().Value()); });
  add("devices", [](const Napi::CallbackInfo& info) {
    const auto list = info[0].As<Napi::Array>();
    std::vector<uint64_t> delays;
    for (uint32_t index = 0; index < list.Length(); index++)
      delays.push_back(static_cast<uint64_t>(list.Get(index).As<Napi::Number>().Int64Value()));
    simulatedDevices(delays.data(), delays.size());
  });
  add("kernelsOn", [](const Napi::CallbackInfo& info) -> Napi::Value {
    const uint64_t kernels = simulatedKernelsOn(static_cast<int>(number(info, 0)));
    return Napi::Number::New(info.Env(), static_cast<double>(kernels));
  });
  add("loseDevice", [](const Napi::CallbackInfo& info) {
    simulatedLoseDevice(static_cast<int>(number(info, 0)), static_cast<int>(number(info, 1)));
  });
  add("hold", [](const Napi::CallbackInfo&) { simulatedHold(); });
  add("let", [](const Napi::CallbackInfo& info) { simulatedLet(number(info, 0)); });
  return exports;
}

}  // namespace

NODE_API_MODULE(simulated, initialise)
