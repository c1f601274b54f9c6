// TensorRT's builder and ONNX parser, so that everything that makes an engine runs in tests: a graph's inputs and outputs
// are read from the ONNX that the package emits, and what the engine computes from a file with the graph's name in
// the folder FLOWTURBO_SIMULATED_FORMS (predict.guidance.txt):
//
//   size image_height height 8 *        a dimension of an output that no input has, in postfix order
//   weights 65536                       these as in a plan: see tensorrt.cpp
//   microseconds 100
//   temporary t x
//   formula y x 2 *
//
// The plan says what the builder was asked for, in lines that begin with "built". Without that folder there is no builder,
// as with the real library where there is no driver. With FLOWTURBO_SIMULATED_BUILDER=no-resource it fails as the
// real one does without the library of kernels that it opens while it builds.

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "builder_stubs.h"
#include "machine.h"
#include "resource.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace nvinfer1 {
// Not anonymous: the library of the parser is another copy of this file, and the two have objects in common.
namespace simulated {

std::string setting(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

// A dimension is a number, or a name that every input of the graph uses for the same number.
struct Dimension {
  int64_t number = -1;
  std::string name;
};

struct Operand {
  std::string name;
  bool isInteger = false;
  std::vector<Dimension> shape;
};

struct Model {
  std::string name;
  std::vector<Operand> inputs;
  std::vector<Operand> outputs;
};

// The few fields of ONNX's protocol buffers that are needed.
class Message {
 public:
  Message(const uint8_t* begin, const uint8_t* end) : at_(begin), end_(end) {}

  // The next field; false at the end. Throws std::exception for what is no message.
  bool next() {
    if (at_ == end_) return false;
    const uint64_t key = varint();
    field = static_cast<uint32_t>(key >> 3);
    switch (key & 7) {
      case 0:
        number = varint();
        return true;
      case 1:
        return skip(8);
      case 2: {
        const uint64_t length = varint();
        begin = at_;
        return skip(length);
      }
      case 5:
        return skip(4);
      default:
        throw std::runtime_error("it is no ONNX model");
    }
  }

  Message message() const { return Message(begin, at_); }
  std::string text() const { return std::string(begin, at_); }

  uint32_t field = 0;
  uint64_t number = 0;
  const uint8_t* begin = nullptr;

 private:
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at_ == end_) throw std::runtime_error("it is no ONNX model");
      const uint8_t byte = *at_++;
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    throw std::runtime_error("it is no ONNX model");
  }

  bool skip(uint64_t bytes) {
    if (bytes > static_cast<uint64_t>(end_ - at_)) throw std::runtime_error("it is no ONNX model");
    at_ += bytes;
    return true;
  }

  const uint8_t* at_;
  const uint8_t* end_;
};

// ValueInfoProto: name = 1, type = 2; TypeProto: tensor_type = 1; its elem_type = 1, shape = 2; its dim = 1, with
// dim_value = 1 and dim_param = 2.
Operand operandOf(Message value) {
  Operand operand;
  while (value.next()) {
    if (value.field == 1) operand.name = value.text();
    if (value.field != 2) continue;
    Message type = value.message();
    while (type.next()) {
      if (type.field != 1) continue;
      Message tensor = type.message();
      while (tensor.next()) {
        if (tensor.field == 1) operand.isInteger = tensor.number == 7;
        if (tensor.field != 2) continue;
        Message shape = tensor.message();
        while (shape.next()) {
          if (shape.field != 1) continue;
          Dimension dimension;
          Message each = shape.message();
          while (each.next()) {
            if (each.field == 1) dimension.number = static_cast<int64_t>(each.number);
            if (each.field == 2) dimension.name = each.text();
          }
          operand.shape.push_back(dimension);
        }
      }
    }
  }
  return operand;
}

// ModelProto: graph = 7; GraphProto: name = 2, input = 11, output = 12.
Model modelOf(Message proto) {
  Model model;
  while (proto.next()) {
    if (proto.field != 7) continue;
    Message graph = proto.message();
    while (graph.next()) {
      if (graph.field == 2) model.name = graph.text();
      if (graph.field == 11) model.inputs.push_back(operandOf(graph.message()));
      if (graph.field == 12) model.outputs.push_back(operandOf(graph.message()));
    }
  }
  if (model.name.empty()) throw std::runtime_error("it is no ONNX model");
  return model;
}

using Shapes = std::map<std::string, std::vector<int64_t>>;

class HostMemory final : public HostMemoryStub {
 public:
  explicit HostMemory(std::string bytes) : bytes_(std::move(bytes)) {}
  void* data() const noexcept override { return const_cast<char*>(bytes_.data()); }
  std::size_t size() const noexcept override { return bytes_.size(); }

 private:
  const std::string bytes_;
};

class Tensor final : public TensorStub {
 public:
  explicit Tensor(Operand operand) : operand_(std::move(operand)) {}
  char const* getName() const noexcept override { return operand_.name.c_str(); }
  Dims getDimensions() const noexcept override {
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(operand_.shape.size());
    for (size_t axis = 0; axis < operand_.shape.size(); axis++) dims.d[axis] = operand_.shape[axis].number;
    return dims;
  }

 private:
  const Operand operand_;
};

class Network final : public NetworkDefinitionStub {
 public:
  int32_t getNbInputs() const noexcept override { return static_cast<int32_t>(inputs.size()); }
  ITensor* getInput(int32_t index) const noexcept override { return inputs[static_cast<size_t>(index)].get(); }

  Model model;
  std::vector<std::unique_ptr<Tensor>> inputs;
};

class Profile final : public OptimizationProfileStub {
 public:
  bool setDimensions(char const* input, OptProfileSelector, Dims const& dims) noexcept override {
    shapes[input] = std::vector<int64_t>(dims.d, dims.d + dims.nbDims);
    return true;
  }

  Shapes shapes;
};

#if !defined(TRT_MAJOR_RTX)
// What has been timed, a line each, behind a line that tells it from any other file.
class TimingCache final : public TimingCacheStub {
 public:
  static constexpr const char* kTitle = "flowturbo-simulated timings";

  IHostMemory* serialize() const noexcept override {
    std::string text = std::string(kTitle) + "\n";
    for (const std::string& each : timed) text += each + "\n";
    return new HostMemory(text);
  }

  bool combine(ITimingCache const& other, bool) noexcept override {
    const std::set<std::string>& more = static_cast<const TimingCache&>(other).timed;
    timed.insert(more.begin(), more.end());
    return true;
  }
  ~TimingCache() noexcept override {
    if (users > 0) machine::violate("a timing cache was destroyed before a builder that uses it");
  }

  std::set<std::string> timed;
  // Builders.
  mutable int users = 0;
};
#endif

class Builder;

class Config final : public BuilderConfigStub {
 public:
  explicit Config(Builder& builder) : builder_(builder) {}

  void setFlag(BuilderFlag flag) noexcept override { flags.insert(flag); }
  void clearFlag(BuilderFlag flag) noexcept override { flags.erase(flag); }
  void setBuilderOptimizationLevel(int32_t value) noexcept override { level = value; }
  void setMemoryPoolLimit(MemoryPoolType, std::size_t) noexcept override {}
  void setProfilingVerbosity(ProfilingVerbosity) noexcept override {}
  void setProgressMonitor(IProgressMonitor* value) noexcept override { monitor = value; }
  int32_t addOptimizationProfile(IOptimizationProfile const* profile) noexcept override {
    profiles.push_back(static_cast<const Profile*>(profile)->shapes);
    return static_cast<int32_t>(profiles.size()) - 1;
  }
#if defined(TRT_MAJOR_RTX)
  bool setNbComputeCapabilities(int32_t) noexcept override { return true; }
  bool setComputeCapability(ComputeCapability, int32_t) noexcept override { return true; }
#else
  // As the real one: a blob that is none of its own gives no cache.
  ITimingCache* createTimingCache(void const* blob, std::size_t size) const noexcept override {
    auto cache = std::make_unique<TimingCache>();
    std::istringstream lines(std::string(static_cast<const char*>(blob), size));
    std::string line;
    if (size > 0 && (!std::getline(lines, line) || line != TimingCache::kTitle)) return nullptr;
    while (std::getline(lines, line)) cache->timed.insert(line);
    return cache.release();
  }
  // The build adds to it, although it is const here.
  bool setTimingCache(ITimingCache const& cache, bool) noexcept override;
  TimingCache* timings = nullptr;
#endif

  // By default on, in the real library too.
  std::set<BuilderFlag> flags{BuilderFlag::kTF32};
  int32_t level = 3;
  IProgressMonitor* monitor = nullptr;
  std::vector<Shapes> profiles;

 private:
  Builder& builder_;
};

// Values of the dimensions' names in a profile, those that the form computes among them.
std::map<std::string, int64_t> sizesIn(const Model& model, const Shapes& shapes, const std::vector<std::string>& rules) {
  std::map<std::string, int64_t> sizes;
  for (const Operand& input : model.inputs)
    for (size_t axis = 0; axis < input.shape.size(); axis++)
      if (!input.shape[axis].name.empty()) sizes[input.shape[axis].name] = shapes.at(input.name).at(axis);
  for (const std::string& rule : rules) {
    std::istringstream words(rule);
    std::string name;
    words >> name;
    std::vector<int64_t> stack;
    for (std::string word; words >> word;) {
      if (word == "*" || word == "/") {
        const int64_t second = stack.back();
        stack.pop_back();
        stack.back() = word == "*" ? stack.back() * second : stack.back() / second;
      } else {
        const auto known = sizes.find(word);
        stack.push_back(known != sizes.end() ? known->second : std::stoll(word));
      }
    }
    sizes.emplace(name, stack.at(0));
  }
  return sizes;
}

std::string profileLine(const Model& model, const Shapes& shapes, const std::map<std::string, int64_t>& sizes) {
  std::string line = "profile";
  const auto add = [&](const Operand& operand) {
    line += " " + operand.name + "=";
    for (size_t axis = 0; axis < operand.shape.size(); axis++) {
      const Dimension& dimension = operand.shape[axis];
      line += (axis > 0 ? "," : "") +
              std::to_string(dimension.name.empty() ? dimension.number : sizes.at(dimension.name));
    }
  };
  for (const Operand& input : model.inputs) {
    Operand fixed = input;
    for (size_t axis = 0; axis < fixed.shape.size(); axis++) fixed.shape[axis] = {shapes.at(input.name).at(axis), ""};
    add(fixed);
  }
  for (const Operand& output : model.outputs) add(output);
  return line + "\n";
}

std::string formFile(const std::string& graph) { return setting("FLOWTURBO_SIMULATED_FORMS") + "/" + graph + ".txt"; }

std::string planOf(const Model& model, Config& config) {
  std::ifstream form(formFile(model.name));
  std::string lines;
  std::vector<std::string> rules;
  for (std::string line; std::getline(form, line);)
    if (line.rfind("size ", 0) == 0)
      rules.push_back(line.substr(5));
    else
      lines += line + "\n";
  std::string plan = "flowturbo-simulated 1\nname " + model.name + "\n";
  plan += "built tf32 " + std::to_string(config.flags.count(BuilderFlag::kTF32)) + "\n";
  plan += "built level " + std::to_string(config.level) + "\n";
  for (const Operand& input : model.inputs) plan += "input " + input.name + (input.isInteger ? " i64\n" : " f32\n");
  for (const Operand& output : model.outputs) plan += "output " + output.name + (output.isInteger ? " i64\n" : " f32\n");
  plan += lines;
  for (const Shapes& shapes : config.profiles) {
    const std::string line = profileLine(model, shapes, sizesIn(model, shapes, rules));
    plan += line;
#if !defined(TRT_MAJOR_RTX)
    if (config.timings != nullptr) {
      const bool fresh = config.timings->timed.insert(model.name + " " + line.substr(0, line.size() - 1)).second;
      plan += fresh ? "built by timing\n" : "built from timings\n";
    }
#endif
  }
  return plan;
}

class Builder final : public BuilderStub {
 public:
  explicit Builder(ILogger& logger) : logger_(logger) {}
#if !defined(TRT_MAJOR_RTX)
  ~Builder() noexcept override {
    for (const TimingCache* cache : timings_) cache->users--;
  }
  void use(const TimingCache& cache) {
    cache.users++;
    timings_.push_back(&cache);
  }
#endif

  INetworkDefinition* createNetworkV2(NetworkDefinitionCreationFlags) noexcept override { return new Network(); }
  IBuilderConfig* createBuilderConfig() noexcept override { return new Config(*this); }
  IOptimizationProfile* createOptimizationProfile() noexcept override {
    // They belong to the builder.
    profiles_.push_back(std::make_unique<Profile>());
    return profiles_.back().get();
  }

  bool buildSerializedNetworkToStream(INetworkDefinition& network, IBuilderConfig& config,
                                      IStreamWriter& writer) noexcept override {
    const auto refuse = [&](const std::string& why) {
      logger_.log(ILogger::Severity::kERROR, why.c_str());
      return false;
    };
    if (setting("FLOWTURBO_SIMULATED_BUILDER") == "no-resource")
      return refuse("Unable to load library: libnvinfer_builder_resource.so: cannot open shared object file");
    try {
      auto& mine = static_cast<Config&>(config);
      if (mine.monitor != nullptr) {
        mine.monitor->phaseStart("Building", nullptr, 1);
        const bool goesOn = mine.monitor->stepComplete("Building", 0);
        mine.monitor->phaseFinish("Building");
        if (!goesOn) return refuse("Error Code 7: BuildCanceled");
      }
      const std::string plan = planOf(static_cast<Network&>(network).model, mine);
      return writer.write(plan.data(), static_cast<int64_t>(plan.size())) == static_cast<int64_t>(plan.size());
    } catch (const std::exception& error) {
      return refuse(std::string("simulated: ") + error.what());
    }
  }

 private:
  ILogger& logger_;
  std::vector<std::unique_ptr<Profile>> profiles_;
#if !defined(TRT_MAJOR_RTX)
  std::vector<const TimingCache*> timings_;
#endif
};

#if !defined(TRT_MAJOR_RTX)
bool Config::setTimingCache(ITimingCache const& cache, bool) noexcept {
  timings = const_cast<TimingCache*>(static_cast<const TimingCache*>(&cache));
  builder_.use(*timings);
  return true;
}
#endif

}  // namespace simulated
using namespace simulated;
}  // namespace nvinfer1

namespace nvonnxparser {
namespace {

class Complaint final : public IParserError {
 public:
  Complaint(ErrorCode code, std::string words) : code_(code), words_(std::move(words)) {}
  ErrorCode code() const override { return code_; }
  char const* desc() const override { return words_.c_str(); }
  char const* file() const override { return ""; }
  int line() const override { return 0; }
  char const* func() const override { return ""; }
  int node() const override { return -1; }
  char const* nodeName() const override { return ""; }
  char const* nodeOperator() const override { return ""; }
  char const* const* localFunctionStack() const override { return nullptr; }
  int32_t localFunctionStackSize() const override { return 0; }

 private:
  const ErrorCode code_;
  const std::string words_;
};

class Parser final : public ParserStub {
 public:
  explicit Parser(nvinfer1::Network& network) : network_(network) {}

  bool loadModelProto(void const* bytes, size_t size, char const*) noexcept override {
    try {
      const auto* begin = static_cast<const uint8_t*>(bytes);
      network_.model = nvinfer1::modelOf(nvinfer1::Message(begin, begin + size));
      return true;
    } catch (const std::exception& error) {
      return refuse(ErrorCode::kMODEL_DESERIALIZE_FAILED, error.what());
    }
  }
  bool loadInitializer(char const*, void const*, size_t) noexcept override { return true; }
  bool parseModelProto() noexcept override {
    if (!std::ifstream(nvinfer1::formFile(network_.model.name)))
      return refuse(ErrorCode::kUNSUPPORTED_GRAPH, "the graph " + network_.model.name + " has no closed form");
    for (const nvinfer1::Operand& input : network_.model.inputs)
      network_.inputs.push_back(std::make_unique<nvinfer1::Tensor>(input));
    return true;
  }
  int getNbErrors() const noexcept override { return static_cast<int>(errors_.size()); }
  IParserError const* getError(int index) const noexcept override { return errors_[static_cast<size_t>(index)].get(); }

 private:
  bool refuse(ErrorCode code, const std::string& why) {
    errors_.push_back(std::make_unique<Complaint>(code, why));
    return false;
  }

  nvinfer1::Network& network_;
  std::vector<std::unique_ptr<Complaint>> errors_;
};

}  // namespace
}  // namespace nvonnxparser

EXPORT void* createInferBuilder_INTERNAL(void* logger, int32_t) noexcept {
  if (!hasBuilderResource(*static_cast<nvinfer1::ILogger*>(logger))) return nullptr;
  if (nvinfer1::setting("FLOWTURBO_SIMULATED_FORMS").empty()) return nullptr;
  return static_cast<nvinfer1::IBuilder*>(new nvinfer1::Builder(*static_cast<nvinfer1::ILogger*>(logger)));
}

EXPORT void* createNvOnnxParser_INTERNAL(void* network, void*, int) noexcept {
  if (nvinfer1::setting("FLOWTURBO_SIMULATED_FORMS").empty()) return nullptr;
  auto* mine = static_cast<nvinfer1::Network*>(static_cast<nvinfer1::INetworkDefinition*>(network));
  return static_cast<nvonnxparser::IParser*>(new nvonnxparser::Parser(*mine));
}
