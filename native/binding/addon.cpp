// What JavaScript sees of the core; lib/runtimes/tensorrt/addon.ts declares every function of it once. Compiled twice,
// against the headers of TensorRT and of TensorRT-RTX. Loading this file opens none of NVIDIA's libraries.

#include <napi.h>

#include <memory>

#include "arguments.h"
#include "cuda_driver.h"
#include "engine_builder.h"
#include "executor_binding.h"
#include "files.h"
#include "task.h"
#include "tensorrt_library.h"
#include "vulkan.h"

namespace flowturbo::binding {
namespace {

// No graph of this package exceeds these counts and sizes. They limit what a wrong argument can request.
constexpr int64_t kMaximumDimension = int64_t{1} << 31;
constexpr int64_t kMaximumBytes = int64_t{1} << 52;

Napi::Array versionArray(Napi::Env env, const Version& version) {
  Napi::Array array = Napi::Array::New(env, version.size());
  for (uint32_t index = 0; index < version.size(); index++) array[index] = Napi::Number::New(env, version[index]);
  return array;
}

Napi::Value describe(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  Napi::Object result = Napi::Object::New(env);
  result["kind"] = Napi::String::New(env, kLibraryKind);
  result["headers"] = versionArray(env, kHeaders);
  result["floor"] = versionArray(env, kFloor);
  result["ceiling"] = versionArray(env, kCeiling);
  const std::vector<std::string> names = builderFlagNames();
  Napi::Array flags = Napi::Array::New(env, names.size());
  for (uint32_t index = 0; index < names.size(); index++) flags[index] = Napi::String::New(env, names[index]);
  result["flags"] = flags;
  return result;
}

Napi::Value cuda(const Napi::CallbackInfo& info) {
  return Task::start(info.Env(), "flowturbo.cuda", Napi::Function(), [](Task&) -> Task::Answer {
    const CudaReport report = examineCuda();
    return [report](Napi::Env env) -> Napi::Value {
      Napi::Object result = Napi::Object::New(env);
      result["driverVersion"] = Napi::Number::New(env, report.driverVersion);
      Napi::Array devices = Napi::Array::New(env, report.devices.size());
      for (uint32_t index = 0; index < report.devices.size(); index++) {
        const CudaDevice& device = report.devices[index];
        Napi::Object entry = Napi::Object::New(env);
        entry["name"] = Napi::String::New(env, device.name);
        entry["memoryBytes"] = Napi::Number::New(env, static_cast<double>(device.memoryBytes));
        entry["major"] = Napi::Number::New(env, device.major);
        entry["minor"] = Napi::Number::New(env, device.minor);
        devices[index] = entry;
      }
      result["devices"] = devices;
      return result;
    };
  });
}

Napi::Value listGraphicsAdapters(const Napi::CallbackInfo& info) {
  return Task::start(info.Env(), "flowturbo.graphicsAdapters", Napi::Function(), [](Task&) -> Task::Answer {
    const std::vector<GraphicsAdapter> adapters = graphicsAdapters();
    return [adapters](Napi::Env env) -> Napi::Value {
      Napi::Array list = Napi::Array::New(env, adapters.size());
      for (uint32_t index = 0; index < adapters.size(); index++) {
        const GraphicsAdapter& adapter = adapters[index];
        Napi::Object entry = Napi::Object::New(env);
        entry["name"] = Napi::String::New(env, adapter.name);
        entry["vendorId"] = Napi::Number::New(env, adapter.vendorId);
        entry["deviceId"] = Napi::Number::New(env, adapter.deviceId);
        entry["type"] = Napi::String::New(env, adapter.type);
        entry["driverName"] = Napi::String::New(env, adapter.driverName);
        entry["driverInfo"] = Napi::String::New(env, adapter.driverInfo);
        entry["driverVersion"] = Napi::Number::New(env, adapter.driverVersion);
        Napi::Array version = Napi::Array::New(env, 3);
        for (uint32_t part = 0; part < 3; part++) version[part] = Napi::Number::New(env, adapter.apiVersion[part]);
        entry["apiVersion"] = version;
        entry["memoryBytes"] = Napi::Number::New(env, static_cast<double>(adapter.memoryBytes));
        entry["freeBytes"] = adapter.freeBytes < 0 ? env.Null() : Napi::Number::New(env, adapter.freeBytes);
        entry["float16"] = Napi::Boolean::New(env, adapter.float16);
        entry["maxStorageBufferRange"] = Napi::Number::New(env, adapter.maxStorageBufferRange);
        list[index] = entry;
      }
      return list;
    };
  });
}

Napi::Value open(const Napi::CallbackInfo& info) {
  const std::string library = readString(info[0], "library");
  const std::string parser = readString(info[1], "parser");
  return Task::start(info.Env(), "flowturbo.open", Napi::Function(), [library, parser](Task&) -> Task::Answer {
    const auto opened = TensorRtLibrary::open(library, parser);
    return [opened](Napi::Env env) -> Napi::Value {
      Napi::Object result = Napi::Object::New(env);
      result["version"] = versionArray(env, opened->version());
      result["library"] = Napi::String::New(env, opened->path());
      result["parser"] = Napi::String::New(env, opened->parserPath());
      return result;
    };
  });
}

BuildRequest readBuildRequest(const Napi::Value& value) {
  const Napi::Object object = readObject(value, "request");
  BuildRequest request;
  request.onnx = readBytes(object.Get("onnx"), "request.onnx");
  request.files = readList<WeightFile>(object.Get("files"), "request.files", [](const Napi::Value& item) {
    const Napi::Object file = readObject(item, "a weight file");
    return WeightFile{readString(file.Get("path"), "a weight file's path"),
                      readString(file.Get("identity"), "a weight file's identity")};
  });
  const auto files = static_cast<int64_t>(request.files.size());
  request.initializers =
      readList<Initializer>(object.Get("initializers"), "request.initializers", [files](const Napi::Value& item) {
        const Napi::Object initializer = readObject(item, "an initializer");
        Initializer result;
        result.name = readString(initializer.Get("name"), "an initializer's name");
        result.file = static_cast<size_t>(readInteger(initializer.Get("file"), "an initializer's file", 0, files - 1));
        result.offset =
            static_cast<uint64_t>(readInteger(initializer.Get("offset"), "an initializer's offset", 0, kMaximumBytes));
        result.length =
            static_cast<uint64_t>(readInteger(initializer.Get("length"), "an initializer's length", 0, kMaximumBytes));
        return result;
      });
  request.profiles = readList<ProfileShapes>(object.Get("profiles"), "request.profiles", [](const Napi::Value& item) {
    return readList<InputShape>(item, "a profile", [](const Napi::Value& entry) {
      const Napi::Object shape = readObject(entry, "an input's shape");
      return InputShape{readString(shape.Get("input"), "an input's name"),
                        readList<int64_t>(shape.Get("dimensions"), "an input's dimensions", [](const Napi::Value& size) {
                          return readInteger(size, "a dimension", 1, kMaximumDimension);
                        })};
    });
  });
  // nvinfer1::Dims holds eight.
  for (const ProfileShapes& profile : request.profiles)
    for (const InputShape& shape : profile)
      if (shape.dimensions.size() > nvinfer1::Dims::MAX_DIMS)
        throw Napi::RangeError::New(value.Env(), "Expected at most 8 dimensions for the input " + shape.input + ".");
  request.targets = readList<int>(object.Get("targets"), "request.targets", [](const Napi::Value& item) {
    return static_cast<int>(readInteger(item, "a target", 0, 10000));
  });
  if (object.Has("device")) request.device = static_cast<int>(readInteger(object.Get("device"), "request.device", -1, 1023));
  request.flags = readList<std::string>(object.Get("flags"), "request.flags",
                                        [](const Napi::Value& item) { return readString(item, "a flag"); });
  request.optimizationLevel =
      static_cast<int>(readInteger(object.Get("optimizationLevel"), "request.optimizationLevel", -1, 5));
  request.workspaceBytes =
      static_cast<uint64_t>(readInteger(object.Get("workspaceBytes"), "request.workspaceBytes", 0, kMaximumBytes));
  request.planPath = readString(object.Get("planPath"), "request.planPath");
  request.timingsPath = readString(object.Get("timingsPath"), "request.timingsPath");
  request.logPath = readString(object.Get("logPath"), "request.logPath");
  return request;
}

Napi::Value build(const Napi::CallbackInfo& info) {
  const std::string library = readString(info[0], "library");
  const std::string parser = readString(info[1], "parser");
  auto request = std::make_shared<const BuildRequest>(readBuildRequest(info[2]));
  const Napi::Function onProgress = readFunction(info[3], "onProgress");
  return Task::start(info.Env(), "flowturbo.build", onProgress, [library, parser, request](Task& task) -> Task::Answer {
    const auto opened = TensorRtLibrary::open(library, parser);
    Task::guardExit(opened->path());
    task.removeAtExit(request->planPath);
    const BuildResult built = buildEngine(*opened, *request, task.cancelled(), [&](const BuildProgress& progress) {
      task.report([progress](Napi::Env env, Napi::Function callback) {
        Napi::Object event = Napi::Object::New(env);
        event["phase"] = Napi::String::New(env, progress.phase);
        event["done"] = Napi::Number::New(env, progress.done);
        event["total"] = Napi::Number::New(env, progress.total);
        callback.Call({event});
      });
    });
    // The file is complete and belongs to the caller from now on.
    task.removeAtExit("");
    return [built](Napi::Env env) -> Napi::Value {
      Napi::Object result = Napi::Object::New(env);
      result["planBytes"] = Napi::Number::New(env, static_cast<double>(built.planBytes));
      result["parseSeconds"] = Napi::Number::New(env, built.parseSeconds);
      result["buildSeconds"] = Napi::Number::New(env, built.buildSeconds);
      Napi::Array warnings = Napi::Array::New(env, built.warnings.size());
      for (uint32_t index = 0; index < built.warnings.size(); index++)
        warnings[index] = Napi::String::New(env, built.warnings[index]);
      result["warnings"] = warnings;
      return result;
    };
  });
}

Napi::Value tryLock(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const std::string path = readString(info[0], "path");
  std::unique_ptr<FileLock> lock;
  try {
    lock = FileLock::tryLock(path);
  } catch (const Error& error) {
    throw toJavaScript(env, error);
  }
  if (!lock) return env.Null();
  // Released by the returned function, or when it is garbage collected, or when the process ends.
  const auto held = std::make_shared<std::unique_ptr<FileLock>>(std::move(lock));
  return Napi::Function::New(env, [held](const Napi::CallbackInfo&) { held->reset(); }, "release");
}

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
  exports["describe"] = Napi::Function::New(env, describe, "describe");
  exports["cuda"] = Napi::Function::New(env, cuda, "cuda");
  exports["graphicsAdapters"] = Napi::Function::New(env, listGraphicsAdapters, "graphicsAdapters");
  exports["open"] = Napi::Function::New(env, open, "open");
  exports["build"] = Napi::Function::New(env, build, "build");
  exports["openExecutor"] = Napi::Function::New(env, openExecutor, "openExecutor");
  exports["tryLock"] = Napi::Function::New(env, tryLock, "tryLock");
  return exports;
}

}  // namespace

// The macro requires a name without a namespace.
static Napi::Object flowturboInitialise(Napi::Env env, Napi::Object exports) { return initialise(env, exports); }

}  // namespace flowturbo::binding

using flowturbo::binding::flowturboInitialise;
NODE_API_MODULE(flowturbo, flowturboInitialise)
