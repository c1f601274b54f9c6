#include "engine.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <optional>

#include "files.h"

namespace flowturbo {
namespace {

std::vector<int64_t> dimensionsOf(const nvinfer1::Dims& dimensions) {
  if (dimensions.nbDims < 0) return {};
  return std::vector<int64_t>(dimensions.d, dimensions.d + dimensions.nbDims);
}

nvinfer1::Dims dimsOf(const std::vector<int64_t>& dimensions) {
  nvinfer1::Dims result{};
  result.nbDims = static_cast<int32_t>(dimensions.size());
  std::copy(dimensions.begin(), dimensions.end(), result.d);
  return result;
}

uint64_t elementsOf(const std::vector<int64_t>& dimensions) {
  uint64_t elements = 1;
  for (const int64_t dimension : dimensions) elements *= static_cast<uint64_t>(dimension);
  return elements;
}

// TensorRT gives its reasons as text only: "Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)", or CUDA's
// words. Null where the lines do not say that memory ran out; otherwise how much was asked for, or 0.
std::optional<uint64_t> outOfMemory(const std::vector<std::string>& lines) {
  std::optional<uint64_t> needed;
  for (const std::string& line : lines) {
    std::string lower;
    for (const char character : line) lower += static_cast<char>(std::tolower(static_cast<unsigned char>(character)));
    const auto has = [&](const char* words) { return lower.find(words) != std::string::npos; };
    if (!has("out of memory") && !has("outofmemory") && !has("cudaerrormemoryallocation")) continue;
    uint64_t bytes = 0;
    const std::string words = "size was ";
    const size_t at = lower.find(words);
    if (at != std::string::npos) bytes = std::strtoull(lower.c_str() + at + words.size(), nullptr, 10);
    needed = std::max(needed.value_or(0), bytes);
  }
  return needed;
}

// Free memory on the device; null if it cannot be told, which is no reason to fail.
std::optional<uint64_t> freeBytes(const Device& device) {
  try {
    return device.memory().free;
  } catch (const Error&) {
    return std::nullopt;
  }
}

Error unusable(const std::string& plan, const std::string& why) {
  Error error("PLAN", plan + " " + why);
  error.path = plan;
  return error;
}

std::unique_ptr<nvinfer1::IExecutionContext> createContext(nvinfer1::ICudaEngine& engine) {
  constexpr auto kUserManaged = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#if defined(TRT_MAJOR_RTX)
  // Kernels for a shape are compiled before its first launch, not replaced some time later: the same program gives the
  // same bytes, and can be captured.
  const std::unique_ptr<nvinfer1::IRuntimeConfig> config(engine.createRuntimeConfig());
  if (!config) return nullptr;
  config->setExecutionContextAllocationStrategy(kUserManaged);
  config->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
  return std::unique_ptr<nvinfer1::IExecutionContext>(engine.createExecutionContext(config.get()));
#else
  return std::unique_ptr<nvinfer1::IExecutionContext>(engine.createExecutionContext(kUserManaged));
#endif
}

}  // namespace

uint64_t bytesOf(ElementType type) { return type == ElementType::kFloat32 ? 4 : 8; }

Context::Context(const Engine& engine, int32_t profile, CUstream_st* stream) : engine_(engine) {
  measured([&] {
    context_ = flowturbo::createContext(*engine.engine_);
    if (!context_) throw refused("create an execution context");
    try {
      configure(profile, stream);
    } catch (const Error&) {
      // The profile's resources may still be copied to memory that is freed now.
      engine.device_->driver().cuStreamSynchronize(stream);
      throw;
    }
  });
}

Context::~Context() { engine_.memory_->contexts -= ownBytes_; }

template <typename Body>
void Context::measured(Body body) {
  const std::optional<uint64_t> before = freeBytes(*engine_.device_);
  body();
  const std::optional<uint64_t> after = freeBytes(*engine_.device_);
  if (!before || !after || *after >= *before) return;
  ownBytes_ += *before - *after;
  engine_.memory_->contexts += *before - *after;
}

void Context::configure(int32_t profile, CUstream_st* stream) {
  if (!context_->setOptimizationProfileAsync(profile, stream)) throw refused("set the profile");
  const std::vector<EngineTensor>& tensors = engine_.tensors_;
  const TensorShapes& inputs = engine_.profiles_[static_cast<size_t>(profile)];
  const size_t count = tensors.size();
  for (size_t index = 0; index < count; index++)
    if (tensors[index].input && !context_->setInputShape(tensors[index].name.c_str(), dimsOf(inputs[index])))
      throw refused("set the shape of " + tensors[index].name);
  shapes_.resize(count);
  bytes_.resize(count);
  bound_.resize(count);
  for (size_t index = 0; index < count; index++) {
    const EngineTensor& tensor = tensors[index];
    shapes_[index] = dimensionsOf(context_->getTensorShape(tensor.name.c_str()));
    for (const int64_t dimension : shapes_[index])
      if (dimension < 0) throw refused("give the shape of " + tensor.name);
    bytes_[index] = elementsOf(shapes_[index]) * bytesOf(tensor.type);
  }
}

void Context::bind(size_t tensor, DevicePointer address) {
  if (bound_[tensor] == address) return;
  if (!context_->setTensorAddress(engine_.tensors_[tensor].name.c_str(), reinterpret_cast<void*>(address)))
    throw refused("bind " + engine_.tensors_[tensor].name);
  bound_[tensor] = address;
}

void Context::useScratch(DevicePointer address, uint64_t bytes) {
  if (scratch_ == address && scratchBytes_ == bytes) return;
  context_->setDeviceMemoryV2(reinterpret_cast<void*>(address), static_cast<int64_t>(bytes));
  scratch_ = address;
  scratchBytes_ = bytes;
}

void Context::enqueue(CUstream_st* stream) {
  const auto launch = [&] {
    if (!context_->enqueueV3(stream)) throw refused("launch");
  };
  // The first launch may allocate.
  if (launched_)
    launch();
  else
    measured(launch);
  launched_ = true;
}

bool Context::capturable(CUstream_st* stream) const {
#if defined(TRT_MAJOR_RTX)
  return context_->isStreamCapturable(stream);
#else
  (void)stream;
  return true;
#endif
}

Error Context::refused(const std::string& what) const {
  std::vector<std::string> log = engine_.logger_->takeErrors();
  const std::optional<uint64_t> needed = outOfMemory(log);
  Error error = needed ? Error("DEVICE_MEMORY", "the device has too little memory: TensorRT could not " + what)
                       : Error("LAUNCH", "TensorRT refused to " + what);
  error.log = std::move(log);
  if (needed) {
    error.needed = *needed;
    error.available = freeBytes(*engine_.device_).value_or(0);
  }
  return engine_.device_->explain(std::move(error));
}

Engine::Engine(std::shared_ptr<const TensorRtLibrary> library, std::shared_ptr<const Device> device,
               std::shared_ptr<EngineMemory> memory, const std::string& plan, const std::string& identity)
    : library_(std::move(library)), device_(std::move(device)), memory_(std::move(memory)), logger_(Logger::take()) {
  // 1. The plan, mapped. Most of it is weights: one that cannot fit is refused before it is read.
  const MappedFile file(plan, identity, "PLAN_CHANGED");
  planBytes_ = file.size();
  const uint64_t available = device_->memory().free;
  if (planBytes_ > available) {
    Error error("DEVICE_MEMORY", "the engine does not fit into the device's memory");
    error.needed = planBytes_;
    error.available = available;
    throw error;
  }

  // 2. The engine.
  runtime_ = library_->createRuntime(*logger_);
  if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(file.range(0, planBytes_), planBytes_));
  if (!engine_) {
    std::vector<std::string> log = logger_->takeErrors();
    const bool lacksMemory = outOfMemory(log).has_value();
    Error error = lacksMemory ? Error("DEVICE_MEMORY", "the engine does not fit into the device's memory")
                  : runtime_  ? unusable(plan, "was refused by TensorRT")
                              : Error("LAUNCH", "TensorRT made no runtime");
    error.log = std::move(log);
    error.needed = lacksMemory ? planBytes_ : 0;
    error.available = lacksMemory ? available : 0;
    throw device_->explain(std::move(error));
  }

  // 3. Its inputs and outputs.
  for (int32_t index = 0; index < engine_->getNbIOTensors(); index++) {
    const char* name = engine_->getIOTensorName(index);
    EngineTensor tensor;
    tensor.name = name;
    tensor.input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
    switch (engine_->getTensorDataType(name)) {
      case nvinfer1::DataType::kFLOAT:
        tensor.type = ElementType::kFloat32;
        break;
      case nvinfer1::DataType::kINT64:
        tensor.type = ElementType::kInt64;
        break;
      default:
        throw unusable(plan, "has the tensor " + tensor.name + " of a type that is neither float32 nor int64");
    }
    if (engine_->getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE)
      throw unusable(plan, "requires the tensor " + tensor.name + " in the host's memory");
    tensors_.push_back(std::move(tensor));
  }
  for (int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); profile++) {
    TensorShapes shapes;
    for (const EngineTensor& tensor : tensors_) {
      const char* name = tensor.name.c_str();
      std::vector<int64_t> dimensions;
      if (engine_->getTensorFormat(name, profile) != nvinfer1::TensorFormat::kLINEAR)
        throw unusable(plan, "has the tensor " + tensor.name + " in a format that is not linear (row by row)");
      if (tensor.input) {
        dimensions = dimensionsOf(engine_->getProfileShape(name, profile, nvinfer1::OptProfileSelector::kMAX));
        if (dimensions != dimensionsOf(engine_->getProfileShape(name, profile, nvinfer1::OptProfileSelector::kMIN)))
          throw unusable(plan, "has a profile with several shapes of " + tensor.name);
      }
      shapes.push_back(std::move(dimensions));
    }
    profiles_.push_back(std::move(shapes));
    scratchBytes_.push_back(
        static_cast<uint64_t>(std::max<int64_t>(engine_->getDeviceMemorySizeForProfileV2(profile), 0)));
  }
  contexts_.resize(profiles_.size());
  const int64_t weights = engine_->getEngineStat(nvinfer1::EngineStat::kTOTAL_WEIGHTS_SIZE);
  weightBytes_ = weights >= 0 ? static_cast<uint64_t>(weights) : planBytes_;
  memory_->weights += weightBytes_;
}

Engine::~Engine() { memory_->weights -= weightBytes_; }

Context& Engine::context(size_t profile, CUstream_st* stream) {
  std::unique_ptr<Context>& context = contexts_.at(profile);
  if (!context) context = createContext(profile, stream);
  return *context;
}

std::unique_ptr<Context> Engine::createContext(size_t profile, CUstream_st* stream) const {
  return std::make_unique<Context>(*this, static_cast<int32_t>(profile), stream);
}

}  // namespace flowturbo
