// TensorRT's runtime, or TensorRT-RTX's: the three interfaces that the addon runs engines through, from the real
// headers. A plan is a text that defines what the engine computes, so that a test can compute the same:
//
//   flowturbo-simulated 1
//   name predict                        of the graph; may be left out
//   weights 65536                       bytes of device memory that the engine takes
//   microseconds 100                    that a launch takes at least
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
// operation. Formulas are computed in their order.
//
// The environment variable FLOWTURBO_SIMULATED_FAULT makes launches of a graph go wrong, all of them or the one of that
// number: "value predict 3" (one value of its first output is off by a thousandth of the largest), "nan predict 3",
// "hang predict 3" (it never ends), "lost predict 3" (the device is lost), "crash predict 3" (the process is). The driver knows two more: see cuda.cpp.

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "simulated.h"
#include "stubs.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// From the simulated driver.
extern "C" int cuMemAlloc_v2(unsigned long long*, size_t);
extern "C" int cuMemFree_v2(unsigned long long);
extern "C" int cuMemsetD8Async(unsigned long long, unsigned char, size_t, CUstream_st*);

namespace nvinfer1 {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr size_t kContextBytes = 1024;

uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Tensor {
  std::string name;
  bool input = false;
  DataType type = DataType::kFLOAT;

  uint64_t elementBytes() const { return type == DataType::kINT64 ? 8 : 4; }
};

struct Token {
  enum class Kind { kOperand, kUnconditional, kConditional, kNumber, kAdd, kSubtract, kMultiply };
  Kind kind = Kind::kNumber;
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
    token.kind = Token::Kind::kAdd;
  } else if (word == "-") {
    token.kind = Token::Kind::kSubtract;
  } else if (word == "*") {
    token.kind = Token::Kind::kMultiply;
  } else {
    char* end = nullptr;
    token.number = std::strtod(word.c_str(), &end);
    if (*end == '\0') return token;
    token.kind = Token::Kind::kOperand;
    token.name = word;
    if (word.size() > 2 && word[word.size() - 2] == '.' && (word.back() == 'u' || word.back() == 'c')) {
      token.kind = word.back() == 'u' ? Token::Kind::kUnconditional : Token::Kind::kConditional;
      token.name = word.substr(0, word.size() - 2);
    }
  }
  return token;
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

// A tensor in memory while a kernel runs.
struct View {
  DataType type = DataType::kFLOAT;
  void* data = nullptr;
  uint64_t rows = 1;
  uint64_t rowElements = 1;

  template <typename Number>
  Number at(uint64_t index) const {
    if (type == DataType::kINT64) return static_cast<Number>(static_cast<const int64_t*>(data)[index]);
    return static_cast<Number>(static_cast<const float*>(data)[index]);
  }
};

View viewOf(DataType type, void* data, const std::vector<int64_t>& shape) {
  View view;
  view.type = type;
  view.data = data;
  view.rows = shape.empty() ? 1 : static_cast<uint64_t>(shape[0]);
  view.rowElements = elements(shape) / view.rows;
  return view;
}

struct Kernel {
  std::shared_ptr<const Plan> plan;
  std::map<std::string, View> views;
  uint8_t* weights = nullptr;

  void run() const {
    const auto start = std::chrono::steady_clock::now();
    for (const Formula& formula : plan->formulas) {
      const View& to = views.at(formula.to);
      if (to.type == DataType::kINT64)
        compute<int64_t>(formula, to);
      else
        compute<float>(formula, to);
    }
    const std::string fault = faultOf(plan->name);
    if (!fault.empty()) goWrong(fault);
    if (plan->weights > 0 && (weights[0] != 0x5a || weights[plan->weights - 1] != 0x5a))
      simulatedReportViolation("an engine's weights were overwritten");
    if (plan->microseconds > 0)
      std::this_thread::sleep_until(start + std::chrono::microseconds(plan->microseconds));
  }

  void goWrong(const std::string& fault) const {
    if (fault == "lost") simulatedLose(719);
    if (fault == "crash") std::abort();
    while (fault == "hang") std::this_thread::sleep_for(std::chrono::hours(1));
    for (const Tensor& tensor : plan->tensors) {
      if (tensor.input || tensor.type != DataType::kFLOAT) continue;
      const View& output = views.at(tensor.name);
      auto* values = static_cast<float*>(output.data);
      float largest = 0;
      for (uint64_t index = 0; index < output.rows * output.rowElements; index++)
        largest = std::max(largest, std::fabs(values[index]));
      if (fault == "value") values[0] += 1e-3f * largest;
      if (fault == "nan") values[0] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
  }

  template <typename Number>
  void compute(const Formula& formula, const View& to) const {
    std::vector<const View*> operands;
    for (const Token& token : formula.tokens)
      operands.push_back(token.name.empty() ? nullptr : &views.at(token.name));
    std::vector<Number> stack;
    for (uint64_t row = 0; row < to.rows; row++)
      for (uint64_t place = 0; place < to.rowElements; place++) {
        stack.clear();
        for (size_t index = 0; index < formula.tokens.size(); index++) {
          const Token& token = formula.tokens[index];
          const View* view = operands[index];
          switch (token.kind) {
            case Token::Kind::kNumber:
              stack.push_back(static_cast<Number>(token.number));
              continue;
            case Token::Kind::kOperand:
              stack.push_back(view->at<Number>(row % view->rows * view->rowElements + place % view->rowElements));
              continue;
            case Token::Kind::kUnconditional:
            case Token::Kind::kConditional: {
              const uint64_t half = view->rows / 2;
              const uint64_t from = row % half + (token.kind == Token::Kind::kConditional ? half : 0);
              stack.push_back(view->at<Number>(from * view->rowElements + place % view->rowElements));
              continue;
            }
            default:
              break;
          }
          const Number second = stack.back();
          stack.pop_back();
          Number& first = stack.back();
          if (token.kind == Token::Kind::kAdd) first = static_cast<Number>(first + second);
          if (token.kind == Token::Kind::kSubtract) first = static_cast<Number>(first - second);
          if (token.kind == Token::Kind::kMultiply) first = static_cast<Number>(first * second);
        }
        static_cast<Number*>(to.data)[row * to.rowElements + place] = stack.back();
      }
  }
};

Dims dimsOf(const std::vector<int64_t>& shape) {
  Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  for (size_t axis = 0; axis < shape.size(); axis++) dims.d[axis] = shape[axis];
  return dims;
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
    scratch_ = memory;
    scratchBytes_ = size;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override;
#if defined(TRT_MAJOR_RTX)
  bool isStreamCapturable(cudaStream_t) const noexcept override { return true; }
#endif

 private:
  bool refuse(const std::string& why) const;

  Engine& engine_;
  unsigned long long memory_;
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
    simulatedCount(kSimulatedEngine, 1);
    simulatedDeserialised();
  }
  ~Engine() noexcept override {
    if (contexts > 0) simulatedReportViolation("an engine was destroyed before its contexts");
    if (weights != 0) cuMemFree_v2(weights);
    simulatedCount(kSimulatedEngine, -1);
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
  IRuntimeConfig* createRuntimeConfig() noexcept override {
    return simulatedEnter("createRuntimeConfig") == 0 ? new RuntimeConfig() : nullptr;
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
    if (simulatedEnter("createExecutionContext") != 0) return nullptr;
    if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED)
      simulatedReportViolation("a context with scratch memory of its own");
    unsigned long long memory = 0;
    if (cuMemAlloc_v2(&memory, kContextBytes) != 0) return nullptr;
    return new Context(*this, memory);
  }
};

Context::Context(Engine& engine, unsigned long long memory) : engine_(engine), memory_(memory) {
  engine_.contexts++;
  simulatedCount(kSimulatedExecutionContext, 1);
}

Context::~Context() noexcept {
  cuMemFree_v2(memory_);
  engine_.contexts--;
  simulatedCount(kSimulatedExecutionContext, -1);
}

bool Context::refuse(const std::string& why) const {
  engine_.logger.log(ILogger::Severity::kERROR, ("simulated: " + why).c_str());
  return false;
}

bool Context::setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept {
  if (simulatedEnter("setOptimizationProfileAsync") != 0) return refuse("the profile could not be set");
  if (profile < 0 || profile >= engine_.getNbOptimizationProfiles()) return refuse("no such profile");
  profile_ = profile;
  // The upload of the profile's resources.
  return cuMemsetD8Async(memory_, 1, kContextBytes, stream) == 0;
}

bool Context::setInputShape(char const* name, Dims const& dims) noexcept {
  if (simulatedEnter("setInputShape") != 0) return refuse("the shape could not be set");
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
  if (simulatedEnter("setTensorAddress") != 0) return refuse("the address could not be set");
  if (engine_.plan->find(name) == nullptr) return refuse(std::string("no tensor ") + name);
  if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0) return refuse(std::string(name) + " is not aligned");
  addresses_[name] = data;
  return true;
}

bool Context::enqueueV3(cudaStream_t stream) noexcept {
  if (simulatedEnter("enqueueV3") != 0) return refuse("the launch failed");
  const bool capturing = simulatedIsCapturing(stream);
  if (capturing && !warm_) return refuse("a context must have run before it is captured");
  warm_ = true;
  const Plan& plan = *engine_.plan;
  const Shapes& shapes = plan.profiles[static_cast<size_t>(profile_)];
  auto kernel = std::make_unique<Kernel>();
  kernel->plan = engine_.plan;
  kernel->weights = reinterpret_cast<uint8_t*>(engine_.weights);

  // 1. Every operand is bound and lies on the device, and no output overlaps another operand.
  struct Used {
    uintptr_t begin;
    uintptr_t end;
    bool written;
  };
  std::vector<Used> used;
  const auto use = [&](const std::string& name, void* address, uint64_t bytes, bool written) {
    if (!simulatedIsDevice(address, bytes)) simulatedReportViolation(("no device memory for " + name).c_str());
    const Used mine{reinterpret_cast<uintptr_t>(address), reinterpret_cast<uintptr_t>(address) + bytes, written};
    for (const Used& other : used)
      if ((mine.written || other.written) && mine.begin < other.end && other.begin < mine.end)
        simulatedReportViolation(("memory of " + name + " is used twice").c_str());
    used.push_back(mine);
  };
  for (const Tensor& tensor : plan.tensors) {
    const auto address = addresses_.find(tensor.name);
    if (address == addresses_.end()) return refuse(tensor.name + " has no address");
    const std::vector<int64_t>& shape = shapes.at(tensor.name);
    use(tensor.name, address->second, elements(shape) * tensor.elementBytes(), !tensor.input);
    kernel->views[tensor.name] = viewOf(tensor.type, address->second, shape);
  }

  // 2. Scratch memory.
  const uint64_t scratch = scratchBytes(plan, shapes);
  if (scratch > 0) {
    if (static_cast<uint64_t>(scratchBytes_) < scratch) return refuse("too little scratch memory");
    use("scratch", scratch_, scratch, true);
  }
  auto* at = static_cast<uint8_t*>(scratch_);
  for (const auto& [name, like] : plan.temporaries) {
    kernel->views[name] = viewOf(DataType::kFLOAT, at, shapes.at(like));
    at += aligned(elements(shapes.at(like)) * 4);
  }
  return simulatedLaunch(
             stream, [](void* data) { static_cast<Kernel*>(data)->run(); }, kernel.release(),
             [](void* data) { delete static_cast<Kernel*>(data); }) == 0;
}

class Runtime final : public RuntimeStub {
 public:
  explicit Runtime(ILogger& logger) : logger_(logger) { simulatedCount(kSimulatedRuntime, 1); }
  ~Runtime() noexcept override { simulatedCount(kSimulatedRuntime, -1); }

  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    const auto refuse = [&](const std::string& why) {
      logger_.log(ILogger::Severity::kERROR, ("simulated: the plan was refused: " + why).c_str());
      return nullptr;
    };
    if (simulatedEnter("deserializeCudaEngine") != 0) return refuse("it was to fail");
    try {
      auto plan = std::make_shared<const Plan>(parse(std::string(static_cast<const char*>(blob), size)));
      unsigned long long weights = 0;
      if (plan->weights > 0 && cuMemAlloc_v2(&weights, plan->weights) != 0) return refuse("out of memory");
      if (weights != 0) std::memset(reinterpret_cast<void*>(weights), 0x5a, plan->weights);
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
  if (simulatedEnter("createInferRuntime") != 0) return nullptr;
  return static_cast<nvinfer1::IRuntime*>(new nvinfer1::Runtime(*static_cast<nvinfer1::ILogger*>(logger)));
}
