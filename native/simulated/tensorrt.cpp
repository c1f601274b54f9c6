// TensorRT's runtime, or TensorRT-RTX's: the three interfaces that the addon runs engines through, from the real
// headers, on the simulated driver or on a real one (machine.h). A plan is a text that defines what the engine computes, so
// that a test can compute the same:
//
//   flowturbo-simulated 1
//   name predict                        of the graph; may be left out
//   weights 65536                       bytes of device memory that the engine takes
//   microseconds 100                    that a launch takes at least
//   context 1024                        bytes of device memory that an execution context takes
//   first 512                           bytes that its first launch takes
//   each 64                             bytes that each launch takes and frees
//   auxiliary                           a launch computes the first formula on a stream of the library's own
//   input x f32                         in the order of the engine's tensors
//   input sigma f32
//   output y f32
//   temporary t x                       scratch memory of the shape of x
//   formula t x sigma 0.5 * +           in postfix order, element by element
//   formula y t 2 *
//   profile x=2,4,8,8 sigma=2 y=2,4,8,8
//
// An operand's element is that of the same row (the first dimension) and place in the row, both modulo what the operand
// has: a tensor with one value a row, or one row, is broadcast. `v.u` and `v.c` are the first and second half of the rows
// of v: the unconditional and the conditional velocities. Arithmetic is that of the output's type, rounded after each
// operation. Formulas are computed in their order. formula.h computes them.
//
// Without a real driver, faults can be asked for: see on_simulated.cpp.

#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "machine.h"
#include "side_stream.h"
#include "stubs.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace nvinfer1 {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr int kOutOfMemory = 2;

uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Tensor {
  std::string name;
  bool input = false;
  DataType type = DataType::kFLOAT;

  uint64_t elementBytes() const { return type == DataType::kINT64 ? 8 : 4; }
};

struct Token {
  FormulaKind kind = kFormulaNumber;
  // Of an operand.
  std::string name;
  double number = 0;
};

struct Formula {
  std::string to;
  std::vector<Token> tokens;
};

using Shapes = std::map<std::string, std::vector<int64_t>>;

struct Plan {
  std::string name;
  uint64_t weights = 0;
  int64_t microseconds = 0;
  uint64_t contextBytes = 1024;
  uint64_t firstBytes = 512;
  uint64_t eachBytes = 0;
  bool auxiliary = false;
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::string, std::string>> temporaries;
  std::vector<Formula> formulas;
  std::vector<Shapes> profiles;

  const Tensor* find(const std::string& name) const {
    for (const Tensor& tensor : tensors)
      if (tensor.name == name) return &tensor;
    return nullptr;
  }
};

uint64_t elements(const std::vector<int64_t>& shape) {
  uint64_t product = 1;
  for (const int64_t dimension : shape) product *= static_cast<uint64_t>(dimension);
  return product;
}

uint64_t scratchBytes(const Plan& plan, const Shapes& shapes) {
  uint64_t bytes = 0;
  for (const auto& [name, like] : plan.temporaries) bytes += aligned(elements(shapes.at(like)) * 4);
  return bytes;
}

Token tokenOf(const std::string& word) {
  Token token;
  if (word == "+") {
    token.kind = kFormulaAdd;
  } else if (word == "-") {
    token.kind = kFormulaSubtract;
  } else if (word == "*") {
    token.kind = kFormulaMultiply;
  } else {
    char* end = nullptr;
    token.number = std::strtod(word.c_str(), &end);
    if (*end == '\0') return token;
    token.kind = kFormulaOperand;
    token.name = word;
    if (word.size() > 2 && word[word.size() - 2] == '.' && (word.back() == 'u' || word.back() == 'c')) {
      token.kind = word.back() == 'u' ? kFormulaUnconditional : kFormulaConditional;
      token.name = word.substr(0, word.size() - 2);
    }
  }
  return token;
}

// Throws std::exception for a formula that leaves no single value, or is too long for a kernel.
void check(const Formula& formula) {
  int depth = 0;
  bool sound = formula.tokens.size() <= static_cast<size_t>(kFormulaTokens);
  for (const Token& token : formula.tokens) {
    depth += token.kind < kFormulaAdd ? 1 : -1;
    sound = sound && depth > 0 && depth <= kFormulaDepth;
  }
  if (!sound || depth != 1) throw std::runtime_error("the formula of " + formula.to + " cannot be computed");
}

// Throws std::exception for a text that is no plan.
Plan parse(const std::string& text) {
  std::istringstream lines(text);
  std::string line;
  if (!std::getline(lines, line) || line != "flowturbo-simulated 1") throw std::runtime_error("it is not a plan");
  Plan plan;
  while (std::getline(lines, line)) {
    std::istringstream words(line);
    std::string key;
    words >> key;
    if (key == "name") {
      words >> plan.name;
    } else if (key == "built") {
      // What the builder was asked for, for people and tests.
    } else if (key == "weights") {
      words >> plan.weights;
    } else if (key == "microseconds") {
      words >> plan.microseconds;
    } else if (key == "context") {
      words >> plan.contextBytes;
    } else if (key == "first") {
      words >> plan.firstBytes;
    } else if (key == "each") {
      words >> plan.eachBytes;
    } else if (key == "auxiliary") {
      plan.auxiliary = true;
    } else if (key == "input" || key == "output") {
      Tensor tensor;
      std::string type;
      words >> tensor.name >> type;
      tensor.input = key == "input";
      tensor.type = type == "i64" ? DataType::kINT64 : type == "f16" ? DataType::kHALF : DataType::kFLOAT;
      plan.tensors.push_back(tensor);
    } else if (key == "temporary") {
      std::string name;
      std::string like;
      words >> name >> like;
      plan.temporaries.emplace_back(name, like);
    } else if (key == "formula") {
      Formula formula;
      words >> formula.to;
      for (std::string word; words >> word;) formula.tokens.push_back(tokenOf(word));
      check(formula);
      plan.formulas.push_back(formula);
    } else if (key == "profile") {
      Shapes shapes;
      for (std::string word; words >> word;) {
        const size_t equals = word.find('=');
        std::vector<int64_t>& shape = shapes[word.substr(0, equals)];
        std::istringstream sizes(word.substr(equals + 1));
        for (std::string size; std::getline(sizes, size, ',');) shape.push_back(std::stoll(size));
      }
      for (const Tensor& tensor : plan.tensors) shapes.at(tensor.name);
      plan.profiles.push_back(shapes);
    } else if (!key.empty()) {
      throw std::runtime_error("unknown line " + key);
    }
  }
  return plan;
}

// A tensor in memory, bound for a launch.
struct View {
  DataType type = DataType::kFLOAT;
  void* data = nullptr;
  uint64_t rows = 1;
  uint64_t rowElements = 1;
};

View viewOf(DataType type, void* data, const std::vector<int64_t>& shape) {
  View view;
  view.type = type;
  view.data = data;
  view.rows = shape.empty() ? 1 : static_cast<uint64_t>(shape[0]);
  view.rowElements = elements(shape) / view.rows;
  return view;
}

FormulaLaunch launchOf(const Formula& formula, const std::map<std::string, View>& views) {
  const View& to = views.at(formula.to);
  FormulaLaunch launch{};
  launch.to = to.data;
  launch.rows = to.rows;
  launch.rowElements = to.rowElements;
  launch.integer = to.type == DataType::kINT64;
  for (const Token& token : formula.tokens) {
    FormulaToken& filled = launch.tokens[launch.count++];
    filled.kind = token.kind;
    filled.number = token.number;
    if (token.name.empty()) continue;
    const View& view = views.at(token.name);
    filled.integer = view.type == DataType::kINT64;
    filled.data = view.data;
    filled.rows = view.rows;
    filled.rowElements = view.rowElements;
  }
  return launch;
}

Dims dimsOf(const std::vector<int64_t>& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t axis = 0; axis < shape.size(); axis++) dims.d[axis] = shape[axis];
  return dims;
}

// As TensorRT reports that the device's memory does not suffice.
std::string outOfMemoryText(const std::string& where, uint64_t bytes) {
  return where + ": Error Code 2: OutOfMemory (Requested size was " + std::to_string(bytes) + " bytes.)";
}

class Engine;

class RuntimeConfig final : public RuntimeConfigStub {
 public:
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept override {
    strategy_ = strategy;
  }
  ExecutionContextAllocationStrategy getExecutionContextAllocationStrategy() const noexcept override {
    return strategy_;
  }
#if defined(TRT_MAJOR_RTX)
  void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy) noexcept override {}
#endif

 private:
  ExecutionContextAllocationStrategy strategy_ = ExecutionContextAllocationStrategy::kSTATIC;
};

class Context final : public ContextStub {
 public:
  Context(Engine& engine, unsigned long long memory);
  ~Context() noexcept override;

  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override;
  bool setInputShape(char const* name, Dims const& dims) noexcept override;
  Dims getTensorShape(char const* name) const noexcept override;
  bool setTensorAddress(char const* name, void* data) noexcept override;
  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
    if (reinterpret_cast<uintptr_t>(memory) % kAlignment != 0) machine::violate("scratch memory that is not aligned");
    scratch_ = memory;
    scratchBytes_ = size;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override;
#if defined(TRT_MAJOR_RTX)
  bool isStreamCapturable(cudaStream_t) const noexcept override { return true; }
#endif

 private:
  bool refuse(const std::string& why) const;
  bool takeOwnMemory();

  Engine& engine_;
  unsigned long long memory_;
  // Since the first launch.
  unsigned long long ownMemory_ = 0;
  std::unique_ptr<machine::SideStream> side_;
  // What the context's part of the device knows of the addresses. It is told when they change, in the order of the stream:
  // a CUDA graph repeats what it was told while it was captured, and reads whatever is there otherwise.
  const std::shared_ptr<machine::Bindings> bindings_ = std::make_shared<machine::Bindings>();
  std::vector<void*> told_;
  uint64_t tellings_ = 0;
  int32_t profile_ = 0;
  Shapes shapes_;
  std::map<std::string, void*> addresses_;
  void* scratch_ = nullptr;
  int64_t scratchBytes_ = 0;
  bool warm_ = false;
};

class Engine final : public EngineStub {
 public:
  Engine(ILogger& logger, std::shared_ptr<const Plan> plan, unsigned long long weights)
      : logger(logger), plan(std::move(plan)), weights(weights) {
    machine::count(machine::Object::kEngine, 1);
    machine::deserialised();
  }
  ~Engine() noexcept override {
    if (contexts > 0) machine::violate("an engine was destroyed before its contexts");
    if (weights != 0) machine::release(weights);
    machine::count(machine::Object::kEngine, -1);
  }

  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(plan->tensors.size()); }
  char const* getIOTensorName(int32_t index) const noexcept override {
    return plan->tensors[static_cast<size_t>(index)].name.c_str();
  }
  TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    return plan->find(name)->input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(char const* name) const noexcept override { return plan->find(name)->type; }
  TensorLocation getTensorLocation(char const*) const noexcept override { return TensorLocation::kDEVICE; }
  TensorFormat getTensorFormatV2(char const*, int32_t) const noexcept override { return TensorFormat::kLINEAR; }
  int32_t getNbOptimizationProfiles() const noexcept override { return static_cast<int32_t>(plan->profiles.size()); }
  Dims getProfileShape(char const* name, int32_t profile, OptProfileSelector) const noexcept override {
    return dimsOf(plan->profiles[static_cast<size_t>(profile)].at(name));
  }
  int64_t getDeviceMemorySizeForProfileV2(int32_t profile) const noexcept override {
    return static_cast<int64_t>(scratchBytes(*plan, plan->profiles[static_cast<size_t>(profile)]));
  }
  int64_t getEngineStat(EngineStat) const noexcept override { return static_cast<int64_t>(plan->weights); }
  int32_t getNbAuxStreams() const noexcept override { return plan->auxiliary ? 1 : 0; }
  IRuntimeConfig* createRuntimeConfig() noexcept override {
    return machine::enter("createRuntimeConfig") == 0 ? new RuntimeConfig() : nullptr;
  }
  IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig* config) noexcept override {
    return create(config->getExecutionContextAllocationStrategy());
  }
  IExecutionContext* createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept override {
    return create(strategy);
  }

  ILogger& logger;
  const std::shared_ptr<const Plan> plan;
  const unsigned long long weights;
  int contexts = 0;

 private:
  IExecutionContext* create(ExecutionContextAllocationStrategy strategy) {
    if (machine::enter("createExecutionContext") != 0) return nullptr;
    if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED)
      machine::violate("a context with scratch memory of its own");
    unsigned long long memory = 0;
    const int allocated = machine::allocate(&memory, plan->contextBytes);
    if (allocated == kOutOfMemory)
      logger.log(ILogger::Severity::kERROR, outOfMemoryText("createExecutionContext", plan->contextBytes).c_str());
    if (allocated != 0) return nullptr;
    return new Context(*this, memory);
  }
};

Context::Context(Engine& engine, unsigned long long memory) : engine_(engine), memory_(memory) {
  engine_.contexts++;
  machine::count(machine::Object::kExecutionContext, 1);
}

Context::~Context() noexcept {
  // Its kernels must have run by now.
  bindings_->gone = true;
  machine::release(memory_);
  if (ownMemory_ != 0) machine::release(ownMemory_);
  engine_.contexts--;
  machine::count(machine::Object::kExecutionContext, -1);
}

bool Context::refuse(const std::string& why) const {
  engine_.logger.log(ILogger::Severity::kERROR, ("simulated: " + why).c_str());
  return false;
}

bool Context::setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept {
  if (machine::enter("setOptimizationProfileAsync") != 0) return refuse("the profile could not be set");
  if (profile < 0 || profile >= engine_.getNbOptimizationProfiles()) return refuse("no such profile");
  profile_ = profile;
  // The upload of the profile's resources.
  return machine::fillAsync(memory_, 1, engine_.plan->contextBytes, stream) == 0;
}

bool Context::setInputShape(char const* name, Dims const& dims) noexcept {
  if (machine::enter("setInputShape") != 0) return refuse("the shape could not be set");
  const std::vector<int64_t> shape(dims.d, dims.d + dims.nbDims);
  if (shape != engine_.plan->profiles[static_cast<size_t>(profile_)].at(name))
    return refuse(std::string("the shape of ") + name + " is outside of the profile");
  shapes_[name] = shape;
  warm_ = false;
  return true;
}

Dims Context::getTensorShape(char const* name) const noexcept {
  const Tensor* tensor = engine_.plan->find(name);
  if (tensor->input) return dimsOf(shapes_.at(name));
  // Known once all inputs are.
  for (const Tensor& other : engine_.plan->tensors)
    if (other.input && shapes_.count(other.name) == 0) return Dims{-1, {}};
  return dimsOf(engine_.plan->profiles[static_cast<size_t>(profile_)].at(name));
}

bool Context::setTensorAddress(char const* name, void* data) noexcept {
  if (machine::enter("setTensorAddress") != 0) return refuse("the address could not be set");
  if (engine_.plan->find(name) == nullptr) return refuse(std::string("no tensor ") + name);
  if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0) return refuse(std::string(name) + " is not aligned");
  addresses_[name] = data;
  return true;
}

// The first launch allocates: not in a capture, where the driver forbids it.
bool Context::takeOwnMemory() {
  const Plan& plan = *engine_.plan;
  if (plan.auxiliary && !side_) side_ = machine::SideStream::open();
  if (plan.auxiliary && !side_) return refuse("no stream could be made");
  if (ownMemory_ != 0 || plan.firstBytes == 0) return true;
  const int allocated = machine::allocate(&ownMemory_, plan.firstBytes);
  if (allocated == 0) return true;
  ownMemory_ = 0;
  if (allocated == kOutOfMemory)
    engine_.logger.log(ILogger::Severity::kERROR, outOfMemoryText("enqueueV3", plan.firstBytes).c_str());
  else
    refuse("an allocation answered " + std::to_string(allocated));
  return false;
}

bool Context::enqueueV3(cudaStream_t stream) noexcept {
  if (machine::enter("enqueueV3") != 0) return refuse("the launch failed");
  const bool capturing = machine::isCapturing(stream);
  if (!takeOwnMemory()) return false;
  if (capturing && !warm_) return refuse("a context must have run with its shapes before it is captured");
  warm_ = true;
  const Plan& plan = *engine_.plan;
  if (plan.eachBytes > 0) {
    unsigned long long each = 0;
    const int allocated = machine::allocate(&each, plan.eachBytes);
    if (allocated != 0) return refuse("an allocation answered " + std::to_string(allocated));
    machine::release(each);
  }
  const Shapes& shapes = plan.profiles[static_cast<size_t>(profile_)];
  std::map<std::string, View> views;

  // 1. Every operand is bound and lies on the device, and no output overlaps another operand.
  struct Used {
    uintptr_t begin;
    uintptr_t end;
    bool written;
  };
  std::vector<Used> used;
  const auto use = [&](const std::string& name, void* address, uint64_t bytes, bool written) {
    if (!machine::isDevice(address, bytes, capturing)) machine::violate(("no device memory for " + name).c_str());
    const Used mine{reinterpret_cast<uintptr_t>(address), reinterpret_cast<uintptr_t>(address) + bytes, written};
    for (const Used& other : used)
      if ((mine.written || other.written) && mine.begin < other.end && other.begin < mine.end)
        machine::violate(("memory of " + name + " is used twice").c_str());
    used.push_back(mine);
  };
  for (const Tensor& tensor : plan.tensors) {
    const auto address = addresses_.find(tensor.name);
    if (address == addresses_.end()) return refuse(tensor.name + " has no address");
    const std::vector<int64_t>& shape = shapes.at(tensor.name);
    use(tensor.name, address->second, elements(shape) * tensor.elementBytes(), !tensor.input);
    views[tensor.name] = viewOf(tensor.type, address->second, shape);
  }

  // 2. Scratch memory.
  const uint64_t scratch = scratchBytes(plan, shapes);
  if (scratch > 0) {
    if (static_cast<uint64_t>(scratchBytes_) < scratch) return refuse("too little scratch memory");
    use("scratch", scratch_, scratch, true);
  }
  auto* at = static_cast<uint8_t*>(scratch_);
  for (const auto& [name, like] : plan.temporaries) {
    views[name] = viewOf(DataType::kFLOAT, at, shapes.at(like));
    at += aligned(elements(shapes.at(like)) * 4);
  }

  // 3. The launch.
  std::vector<FormulaLaunch> launches;
  for (const Formula& formula : plan.formulas) {
    launches.push_back(launchOf(formula, views));
    launches.back().weights = reinterpret_cast<const unsigned char*>(engine_.weights);
    launches.back().weightBytes = plan.weights;
  }
  if (!launches.empty()) launches[0].nanoseconds = static_cast<uint64_t>(plan.microseconds) * 1000;
  std::vector<void*> addresses{scratch_};
  for (const Tensor& tensor : plan.tensors) addresses.push_back(addresses_.at(tensor.name));
  machine::Graph graph;
  graph.name = plan.name;
  for (const Tensor& tensor : plan.tensors) {
    if (tensor.input || tensor.type != DataType::kFLOAT) continue;
    graph.output = addresses_.at(tensor.name);
    graph.elements = elements(shapes.at(tensor.name));
    break;
  }
  int result = 0;
  if (addresses != told_) {
    told_ = std::move(addresses);
    result = machine::tell(stream, bindings_, ++tellings_);
  }
  if (result == 0) result = machine::expect(stream, bindings_, tellings_);
  if (result == 0 && plan.auxiliary && !launches.empty()) {
    result = side_->fork(stream);
    if (result == 0) result = machine::launch(side_->stream(), {launches.front()});
    if (result == 0) result = side_->join(stream);
    launches.erase(launches.begin());
  }
  if (result == 0) result = machine::launch(stream, std::move(launches), graph);
  if (result == 0) return true;
  told_.clear();
  return refuse("the driver answered " + std::to_string(result));
}

class Runtime final : public RuntimeStub {
 public:
  explicit Runtime(ILogger& logger) : logger_(logger) { machine::count(machine::Object::kRuntime, 1); }
  ~Runtime() noexcept override { machine::count(machine::Object::kRuntime, -1); }

  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    const auto refuse = [&](const std::string& why) {
      logger_.log(ILogger::Severity::kERROR, ("simulated: the plan was refused: " + why).c_str());
      return nullptr;
    };
    if (machine::enter("deserializeCudaEngine") != 0) return refuse("it was to fail");
    try {
      auto plan = std::make_shared<const Plan>(parse(std::string(static_cast<const char*>(blob), size)));
      unsigned long long weights = 0;
      const int allocated = plan->weights > 0 ? machine::allocate(&weights, plan->weights) : 0;
      if (allocated != 0)
        return refuse(allocated == kOutOfMemory ? outOfMemoryText("deserializeCudaEngine", plan->weights)
                                                : "its weights have no memory");
      if (weights != 0 && machine::fill(weights, kFormulaWeight, plan->weights) != 0) {
        machine::release(weights);
        return refuse("its weights could not be copied");
      }
      return new Engine(logger_, std::move(plan), weights);
    } catch (const std::exception& error) {
      return refuse(error.what());
    }
  }

 private:
  ILogger& logger_;
};

}  // namespace
}  // namespace nvinfer1

#if defined(TRT_MAJOR_RTX)
EXPORT int32_t getInferLibMajorVersion() noexcept { return TRT_MAJOR_RTX; }
EXPORT int32_t getInferLibMinorVersion() noexcept { return TRT_MINOR_RTX; }
EXPORT int32_t getInferLibPatchVersion() noexcept { return TRT_PATCH_RTX; }
EXPORT int32_t getInferLibBuildVersion() noexcept { return TRT_BUILD_RTX; }
#else
EXPORT int32_t getInferLibMajorVersion() noexcept { return TRT_MAJOR_ENTERPRISE; }
EXPORT int32_t getInferLibMinorVersion() noexcept { return TRT_MINOR_ENTERPRISE; }
EXPORT int32_t getInferLibPatchVersion() noexcept { return TRT_PATCH_ENTERPRISE; }
EXPORT int32_t getInferLibBuildVersion() noexcept { return TRT_BUILD_ENTERPRISE; }
#endif

EXPORT void* createInferRuntime_INTERNAL(void* logger, int32_t) noexcept {
  // As TensorRT 11.2 answers without a driver: a base class's offset, added to null.
  if (machine::enter("createInferRuntime") != 0) return reinterpret_cast<void*>(0x228);
  auto& log = *static_cast<nvinfer1::ILogger*>(logger);
  const std::string why = machine::open();
  if (!why.empty()) log.log(nvinfer1::ILogger::Severity::kERROR, ("simulated: " + why).c_str());
  return why.empty() ? static_cast<nvinfer1::IRuntime*>(new nvinfer1::Runtime(log)) : nullptr;
}
