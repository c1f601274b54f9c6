#include "executor_binding.h"

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "arguments.h"
#include "executor.h"
#include "task.h"

namespace flowturbo::binding {
namespace {

// No program of this package exceeds these sizes. They limit what a wrong argument can request.
constexpr int64_t kMaximumBytes = int64_t{1} << 46;
constexpr int64_t kMaximumIndex = int64_t{1} << 31;

using Bytes = std::vector<uint8_t>;

// What the functions of one executor object share; touched on JavaScript's thread only.
struct Handle {
  std::shared_ptr<Executor> executor;
  std::map<int64_t, std::shared_ptr<Engine>> engines;
  std::map<int64_t, std::shared_ptr<Registers>> registers;
  int64_t count = 0;

  std::shared_ptr<Executor> require(Napi::Env env) const {
    if (!executor) throw Napi::Error::New(env, "This executor has been closed.");
    return executor;
  }

  std::shared_ptr<Engine> engine(const Napi::Value& value) const {
    const auto found = engines.find(readInteger(value, "an engine", 0, kMaximumIndex));
    if (found == engines.end()) throw Napi::RangeError::New(value.Env(), "Expected an engine that has not been released.");
    return found->second;
  }
};

Napi::Function function(Napi::Env env, const char* name, std::function<Napi::Value(const Napi::CallbackInfo&)> body) {
  return Napi::Function::New(env, std::move(body), name);
}

Napi::Number number(Napi::Env env, uint64_t value) { return Napi::Number::New(env, static_cast<double>(value)); }

// Memory that the garbage collector frees; copied where an environment does not accept external memory.
Napi::Value bufferOf(Napi::Env env, Bytes bytes) {
  auto* owned = new Bytes(std::move(bytes));
  return Napi::Buffer<uint8_t>::NewOrCopy(
      env, owned->data(), owned->size(), [](Napi::Env, uint8_t*, Bytes* unused) { delete unused; }, owned);
}

Napi::Array buffersOf(Napi::Env env, std::vector<Bytes> all) {
  Napi::Array array = Napi::Array::New(env, all.size());
  for (uint32_t index = 0; index < all.size(); index++) array[index] = bufferOf(env, std::move(all[index]));
  return array;
}

Napi::Array numbersOf(Napi::Env env, const std::vector<int64_t>& numbers) {
  Napi::Array array = Napi::Array::New(env, numbers.size());
  for (uint32_t index = 0; index < numbers.size(); index++)
    array[index] = Napi::Number::New(env, static_cast<double>(numbers[index]));
  return array;
}

Napi::Array shapesOf(Napi::Env env, const TensorShapes& shapes) {
  Napi::Array array = Napi::Array::New(env, shapes.size());
  for (uint32_t index = 0; index < shapes.size(); index++) array[index] = numbersOf(env, shapes[index]);
  return array;
}

// Index of registers: absent for the submission's own. The executor checks that they exist.
uint32_t readBlock(const Napi::Object& object) {
  const Napi::Value block = object.Get("block");
  return block.IsUndefined() ? 0 : static_cast<uint32_t>(readInteger(block, "block", 0, kMaximumIndex));
}

Operand readOperand(const Napi::Value& value) {
  const Napi::Object object = readObject(value, "an operand");
  return {readBoolean(object.Get("constant"), "an operand's constant"),
          static_cast<uint64_t>(readInteger(object.Get("offset"), "an operand's offset", 0, kMaximumBytes)),
          readBlock(object)};
}

std::vector<uint32_t> readOutputs(const Napi::Value& value, const char* what, const Engine& engine, bool floats) {
  const std::vector<EngineTensor>& tensors = engine.tensors();
  return readList<uint32_t>(value, what, [&](const Napi::Value& item) {
    const auto index = static_cast<size_t>(readInteger(item, what, 0, static_cast<int64_t>(tensors.size()) - 1));
    if (tensors[index].input || (floats && tensors[index].type != ElementType::kFloat32))
      throw Napi::RangeError::New(item.Env(), std::string("Expected the number of an output") +
                                                  (floats ? " of type float32" : "") + " for " + what + ".");
    return static_cast<uint32_t>(index);
  });
}

Instruction readInstruction(const Napi::Value& value, const Handle& handle) {
  const Napi::Object object = readObject(value, "an instruction");
  const std::string kind = readString(object.Get("op"), "an instruction's op");
  if (kind == "copy") {
    CopyBytes copy;
    copy.from = readOperand(object.Get("from"));
    copy.to = readOperand(object.Get("to"));
    copy.bytes = static_cast<uint64_t>(readInteger(object.Get("bytes"), "a copy's bytes", 1, kMaximumBytes));
    return copy;
  }
  if (kind != "launch") throw Napi::RangeError::New(value.Env(), "Expected \"launch\" or \"copy\" for an instruction's op.");
  Launch launch;
  launch.engine = handle.engine(object.Get("engine"));
  const auto profiles = static_cast<int64_t>(launch.engine->profiles().size());
  launch.profile = static_cast<size_t>(readInteger(object.Get("profile"), "a launch's profile", 0, profiles - 1));
  launch.operands = readList<Operand>(object.Get("operands"), "a launch's operands", readOperand);
  if (launch.operands.size() != launch.engine->tensors().size())
    throw Napi::RangeError::New(value.Env(), "Expected " + std::to_string(launch.engine->tensors().size()) +
                                                 " operands for a launch, one for each of the engine's tensors.");
  launch.finite = readOutputs(object.Get("finite"), "a launch's finite", *launch.engine, true);
  launch.reported = readOutputs(object.Get("reported"), "a launch's reported", *launch.engine, false);
  return launch;
}

// Reports that have not been passed to JavaScript yet.
struct PendingReports {
  std::mutex mutex;
  std::vector<LaunchReport> reports;
};

Napi::Value submit(const Napi::CallbackInfo& info, const std::shared_ptr<Handle>& handle,
                   const std::shared_ptr<Registers>& registers) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<Executor> executor = handle->require(env);
  if (!registers) throw Napi::Error::New(env, "These registers have been released.");
  const Napi::Object request = readObject(info[0], "a submission");
  auto submission = std::make_shared<Submission>();
  submission->registers = registers;
  submission->constants = readBytes(request.Get("constants"), "a submission's constants");
  submission->instructions = readList<Instruction>(
      request.Get("instructions"), "a submission's instructions",
      [&](const Napi::Value& item) { return readInstruction(item, *handle); });
  submission->results = readList<Range>(request.Get("results"), "a submission's results", [](const Napi::Value& item) {
    const Napi::Object range = readObject(item, "a result");
    return Range{static_cast<uint64_t>(readInteger(range.Get("offset"), "a result's offset", 0, kMaximumBytes)),
                 static_cast<uint64_t>(readInteger(range.Get("bytes"), "a result's bytes", 0, kMaximumBytes)),
                 readBlock(range)};
  });
  if (!request.Get("others").IsUndefined())
    submission->others = readList<std::shared_ptr<Registers>>(
        request.Get("others"), "a submission's others", [&](const Napi::Value& item) {
          const auto found = handle->registers.find(readInteger(item, "others", 0, kMaximumIndex));
          if (found == handle->registers.end())
            throw Napi::RangeError::New(env, "Expected registers that have not been released for a submission's others.");
          return found->second;
        });
  submission->capture = readBoolean(request.Get("capture"), "a submission's capture");
  const Napi::Function onReports = readFunction(info[1], "onReports");

  Napi::Object started = Task::begin(env, "flowturbo.submit", onReports, [&](const std::shared_ptr<Task>& task) {
    const auto pending = std::make_shared<PendingReports>();
    submission->onLaunch = [task, pending](LaunchReport report) {
      {
        const std::lock_guard<std::mutex> lock(pending->mutex);
        pending->reports.push_back(std::move(report));
      }
      task->report([pending](Napi::Env current, Napi::Function callback) {
        std::vector<LaunchReport> reports;
        {
          const std::lock_guard<std::mutex> lock(pending->mutex);
          reports.swap(pending->reports);
        }
        Napi::Array array = Napi::Array::New(current, reports.size());
        for (uint32_t index = 0; index < reports.size(); index++) {
          Napi::Object entry = Napi::Object::New(current);
          entry["launch"] = Napi::Number::New(current, reports[index].launch);
          entry["milliseconds"] = Napi::Number::New(current, reports[index].milliseconds);
          entry["values"] = buffersOf(current, std::move(reports[index].values));
          array[index] = entry;
        }
        callback.Call({array});
      });
    };
    submission->onDone = [task](Outcome outcome) {
      if (outcome.error) {
        task->finish(*outcome.error);
        return;
      }
      auto done = std::make_shared<Outcome>(std::move(outcome));
      task->finish([done](Napi::Env current) -> Napi::Value {
        Napi::Object result = Napi::Object::New(current);
        result["results"] = buffersOf(current, std::move(done->results));
        result["replayed"] = Napi::Boolean::New(current, done->replayed);
        result["notCaptured"] = Napi::String::New(current, done->notCaptured);
        return result;
      });
    };
    executor->submit(submission);
    return [executor, submission] { executor->cancel(submission); };
  });
  // Weak: an object that JavaScript keeps after the end must not keep anything on the device.
  const std::weak_ptr<Submission> weakSubmission = submission;
  const std::weak_ptr<Executor> weakExecutor = executor;
  started["withdraw"] = function(env, "withdraw", [weakExecutor, weakSubmission](const Napi::CallbackInfo& call) {
    const std::shared_ptr<Executor> existing = weakExecutor.lock();
    const std::shared_ptr<Submission> queued = weakSubmission.lock();
    return Napi::Boolean::New(call.Env(), existing && queued && existing->withdraw(queued));
  });
  return started;
}

Napi::Value createRegisters(const Napi::CallbackInfo& info, const std::shared_ptr<Handle>& handle) {
  const Napi::Env env = info.Env();
  const auto bytes = static_cast<uint64_t>(readInteger(info[0], "bytes", 0, kMaximumBytes));
  const auto held = std::make_shared<std::shared_ptr<Registers>>(handle->require(env)->createRegisters(bytes));
  const int64_t id = handle->count++;
  handle->registers.emplace(id, *held);
  Napi::Object result = Napi::Object::New(env);
  result["id"] = Napi::Number::New(env, static_cast<double>(id));
  result["submit"] =
      function(env, "submit", [handle, held](const Napi::CallbackInfo& call) { return submit(call, handle, *held); });
  result["release"] = function(env, "release", [handle, held, id](const Napi::CallbackInfo& call) {
    held->reset();
    handle->registers.erase(id);
    return call.Env().Undefined();
  });
  return result;
}

Napi::Value describeEngine(Napi::Env env, const std::shared_ptr<Handle>& handle, const std::shared_ptr<Engine>& engine) {
  const int64_t id = handle->count++;
  handle->engines.emplace(id, engine);
  Napi::Object result = Napi::Object::New(env);
  result["id"] = Napi::Number::New(env, static_cast<double>(id));
  const std::vector<EngineTensor>& tensors = engine->tensors();
  Napi::Array list = Napi::Array::New(env, tensors.size());
  for (uint32_t index = 0; index < tensors.size(); index++) {
    Napi::Object entry = Napi::Object::New(env);
    entry["name"] = Napi::String::New(env, tensors[index].name);
    entry["input"] = Napi::Boolean::New(env, tensors[index].input);
    entry["dtype"] = Napi::String::New(env, tensors[index].type == ElementType::kFloat32 ? "float32" : "int64");
    list[index] = entry;
  }
  result["tensors"] = list;
  Napi::Array profiles = Napi::Array::New(env, engine->profiles().size());
  Napi::Array scratch = Napi::Array::New(env, engine->profiles().size());
  for (uint32_t index = 0; index < engine->profiles().size(); index++) {
    profiles[index] = shapesOf(env, engine->profiles()[index]);
    scratch[index] = number(env, engine->scratchBytes(index));
  }
  result["profiles"] = profiles;
  result["scratchBytes"] = scratch;
  result["planBytes"] = number(env, engine->planBytes());
  result["weightBytes"] = number(env, engine->weightBytes());
  result["release"] = function(env, "release", [handle, id](const Napi::CallbackInfo& call) {
    handle->engines.erase(id);
    return call.Env().Undefined();
  });
  return result;
}

Napi::Value load(const Napi::CallbackInfo& info, const std::shared_ptr<Handle>& handle) {
  const std::string plan = readString(info[0], "plan");
  const std::string identity = readString(info[1], "identity");
  const std::shared_ptr<Executor> executor = handle->require(info.Env());
  return Task::start(info.Env(), "flowturbo.load", Napi::Function(), [=](Task&) -> Task::Answer {
    const std::shared_ptr<Engine> engine = executor->load(plan, identity);
    return [handle, engine](Napi::Env env) { return describeEngine(env, handle, engine); };
  });
}

Napi::Value prepare(const Napi::CallbackInfo& info, const std::shared_ptr<Handle>& handle) {
  const Napi::Env env = info.Env();
  const std::shared_ptr<Executor> executor = handle->require(env);
  std::shared_ptr<Engine> engine = handle->engine(info[0]);
  const auto profiles = static_cast<int64_t>(engine->profiles().size());
  const auto profile = static_cast<size_t>(readInteger(info[1], "profile", 0, profiles - 1));
  return Task::begin(env, "flowturbo.prepare", Napi::Function(), [&](const std::shared_ptr<Task>& task) {
    executor->prepare(std::move(engine), profile, [task](const std::optional<Error>& error, TensorShapes shapes) {
      if (error) return task->finish(*error);
      task->finish([shapes = std::move(shapes)](Napi::Env current) -> Napi::Value { return shapesOf(current, shapes); });
    });
    return nullptr;
  });
}

Napi::Value memory(const Napi::CallbackInfo& info, const std::shared_ptr<Handle>& handle) {
  const std::shared_ptr<Executor> executor = handle->require(info.Env());
  return Task::begin(info.Env(), "flowturbo.memory", Napi::Function(), [&](const std::shared_ptr<Task>& task) {
    executor->memory([task](const std::optional<Error>& error, DeviceMemoryInfo found) {
      if (error) return task->finish(*error);
      task->finish([found](Napi::Env env) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        result["free"] = number(env, found.free);
        result["total"] = number(env, found.total);
        return result;
      });
    });
    return nullptr;
  });
}

Napi::Value statistics(const Napi::CallbackInfo& info, const std::shared_ptr<Handle>& handle) {
  const Napi::Env env = info.Env();
  const ExecutorStatistics now = handle->require(env)->statistics();
  Napi::Object result = Napi::Object::New(env);
  result["launches"] = number(env, now.launches);
  result["submissions"] = number(env, now.submissions);
  result["replays"] = number(env, now.replays);
  result["engines"] = number(env, now.engines);
  result["deviceBytes"] = number(env, now.deviceBytes);
  result["weightBytes"] = number(env, now.weightBytes);
  result["contextBytes"] = number(env, now.contextBytes);
  result["pinnedBytes"] = number(env, now.pinnedBytes);
  result["busySeconds"] = Napi::Number::New(env, now.busySeconds);
  return result;
}

Napi::Value close(const Napi::CallbackInfo& info, const std::shared_ptr<Handle>& handle) {
  std::shared_ptr<Executor> executor = handle->require(info.Env());
  handle->executor.reset();
  handle->engines.clear();
  handle->registers.clear();
  return Task::begin(info.Env(), "flowturbo.close", Napi::Function(), [&](const std::shared_ptr<Task>& task) {
    Executor::close(std::move(executor), [task] {
      task->finish([](Napi::Env env) -> Napi::Value { return env.Undefined(); });
    });
    return nullptr;
  });
}

Napi::Value describeExecutor(Napi::Env env, std::shared_ptr<Executor> executor) {
  const CudaDevice& device = executor->device();
  Napi::Object result = Napi::Object::New(env);
  Napi::Object properties = Napi::Object::New(env);
  properties["name"] = Napi::String::New(env, device.name);
  properties["memoryBytes"] = number(env, device.memoryBytes);
  properties["major"] = Napi::Number::New(env, device.major);
  properties["minor"] = Napi::Number::New(env, device.minor);
  result["device"] = properties;
  const auto handle = std::make_shared<Handle>();
  handle->executor = std::move(executor);
  const auto add = [&](const char* name, auto body) {
    result[name] = function(env, name, [handle, body](const Napi::CallbackInfo& call) { return body(call, handle); });
  };
  add("load", load);
  add("prepare", prepare);
  add("registers", createRegisters);
  add("memory", memory);
  add("statistics", statistics);
  add("close", close);
  return result;
}

}  // namespace

Napi::Value openExecutor(const Napi::CallbackInfo& info) {
  const std::string library = readString(info[0], "library");
  const std::string parser = readString(info[1], "parser");
  const auto ordinal = static_cast<int>(readInteger(info[2], "ordinal", 0, 1023));
  return Task::start(info.Env(), "flowturbo.executor", Napi::Function(), [=](Task&) -> Task::Answer {
    const auto opened = TensorRtLibrary::open(library, parser);
    auto executor = std::make_shared<std::shared_ptr<Executor>>(Executor::open(opened, ordinal));
    Task::guardExit(opened->path());
    return [executor](Napi::Env env) { return describeExecutor(env, std::move(*executor)); };
  });
}

}  // namespace flowturbo::binding
