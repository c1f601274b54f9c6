#include "engine_builder.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "device.h"
#include "files.h"
#include "logger.h"

namespace flowturbo {
namespace {

// The library announces phases as a tree with a number of steps each, but not how many trees there will be nor how
// long a step takes. What is reported is the share of a fixed scale, `kTotal`: parsing, the steps of the outermost
// phases, and the plan's bytes each advance it, never backwards.
class ProgressMonitor final : public nvinfer1::IProgressMonitor {
 public:
  static constexpr uint32_t kTotal = 1000;

  ProgressMonitor(const std::atomic<bool>& cancelled, const std::function<void(const BuildProgress&)>& report)
      : cancelled_(cancelled), report_(report) {}

  // The values of the scale where parsing and building end; writing takes the rest.
  static constexpr uint32_t kParsed = 20;
  static constexpr uint32_t kBuilt = 900;

  void phaseStart(const char* name, const char* parent, int32_t steps) noexcept override {
    guarded([&] {
      phases_.push_back({name != nullptr ? name : "", std::max(steps, 1), 0});
      (void)parent;
      advance();
    });
  }

  bool stepComplete(const char* name, int32_t step) noexcept override {
    guarded([&] {
      const auto phase = find(name);
      if (phase == phases_.end()) return;
      phase->done = std::clamp(step + 1, phase->done, phase->steps);
      advance();
    });
    return !cancelled_.load(std::memory_order_relaxed);
  }

  void phaseFinish(const char* name) noexcept override {
    guarded([&] {
      const auto phase = find(name);
      if (phase == phases_.end()) return;
      const bool outermost = phase == phases_.begin();
      phases_.erase(phase, phases_.end());
      if (outermost) finishedTrees_++;
      advance();
    });
  }

  void at(const std::string& phase, uint32_t done) noexcept {
    guarded([&] { set(phase, done); });
  }

 private:
  struct Phase {
    std::string name;
    int32_t steps;
    int32_t done;
  };

  template <typename Body>
  void guarded(Body body) noexcept {
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      body();
    } catch (...) {
      // The build does not depend on progress reports.
    }
  }

  std::vector<Phase>::iterator find(const char* name) {
    // Names are unique within one hierarchy only; the innermost is meant.
    for (auto phase = phases_.end(); phase != phases_.begin();)
      if (name != nullptr && (--phase)->name == name) return phase;
    return phases_.end();
  }

  void advance() {
    // Each phase divides one step of its parent.
    double share = 0;
    double width = 1;
    for (const Phase& phase : phases_) {
      share += width * phase.done / phase.steps;
      width /= phase.steps;
    }
    // Each further tree halves what is left, since their number is not known.
    double left = 1;
    for (int tree = 0; tree < finishedTrees_; tree++) left /= 2;
    const double done = 1 - left + left / 2 * std::min(share, 1.0);
    set(phases_.empty() ? phase_ : phases_.front().name, kParsed + static_cast<uint32_t>(done * (kBuilt - kParsed)));
  }

  void set(const std::string& phase, uint32_t done) {
    done = std::clamp(done, done_, kTotal);
    if (done == done_ && phase == phase_) return;
    done_ = done;
    phase_ = phase;
    report_({phase_, done_, kTotal});
  }

  const std::atomic<bool>& cancelled_;
  const std::function<void(const BuildProgress&)>& report_;
  std::mutex mutex_;
  std::vector<Phase> phases_;
  int finishedTrees_ = 0;
  uint32_t done_ = 0;
  std::string phase_;
};

class PlanWriter final : public nvinfer1::IStreamWriter {
 public:
  PlanWriter(NewFile& file, const std::atomic<bool>& cancelled, ProgressMonitor& monitor)
      : file_(file), cancelled_(cancelled), monitor_(monitor) {}

  int64_t write(const void* data, int64_t length) override {
    if (length < 0 || cancelled_.load(std::memory_order_relaxed)) return -1;
    monitor_.at("Writing the plan", ProgressMonitor::kBuilt);
    return file_.write(data, static_cast<uint64_t>(length)) ? length : -1;
  }

 private:
  NewFile& file_;
  const std::atomic<bool>& cancelled_;
  ProgressMonitor& monitor_;
};

struct FlagName {
  const char* name;
  nvinfer1::BuilderFlag flag;
};

// Those that make sense for this package's engines and exist in both libraries; others are refused by name.
constexpr FlagName kFlags[] = {
    {"kTF32", nvinfer1::BuilderFlag::kTF32},
    {"kDEBUG", nvinfer1::BuilderFlag::kDEBUG},
    {"kSTRICT_NANS", nvinfer1::BuilderFlag::kSTRICT_NANS},
    {"kDISTRIBUTIVE_INDEPENDENCE", nvinfer1::BuilderFlag::kDISTRIBUTIVE_INDEPENDENCE},
    {"kWEIGHT_STREAMING", nvinfer1::BuilderFlag::kWEIGHT_STREAMING},
#if defined(TRT_MAJOR_RTX)
    {"kREQUIRE_USER_ALLOCATION", nvinfer1::BuilderFlag::kREQUIRE_USER_ALLOCATION},
#endif
};

const char* parserCode(nvonnxparser::ErrorCode code) {
  switch (code) {
    case nvonnxparser::ErrorCode::kSUCCESS: return "kSUCCESS";
    case nvonnxparser::ErrorCode::kINTERNAL_ERROR: return "kINTERNAL_ERROR";
    case nvonnxparser::ErrorCode::kMEM_ALLOC_FAILED: return "kMEM_ALLOC_FAILED";
    case nvonnxparser::ErrorCode::kMODEL_DESERIALIZE_FAILED: return "kMODEL_DESERIALIZE_FAILED";
    case nvonnxparser::ErrorCode::kINVALID_VALUE: return "kINVALID_VALUE";
    case nvonnxparser::ErrorCode::kINVALID_GRAPH: return "kINVALID_GRAPH";
    case nvonnxparser::ErrorCode::kINVALID_NODE: return "kINVALID_NODE";
    case nvonnxparser::ErrorCode::kUNSUPPORTED_GRAPH: return "kUNSUPPORTED_GRAPH";
    case nvonnxparser::ErrorCode::kUNSUPPORTED_NODE: return "kUNSUPPORTED_NODE";
    case nvonnxparser::ErrorCode::kUNSUPPORTED_NODE_ATTR: return "kUNSUPPORTED_NODE_ATTR";
    case nvonnxparser::ErrorCode::kUNSUPPORTED_NODE_INPUT: return "kUNSUPPORTED_NODE_INPUT";
    case nvonnxparser::ErrorCode::kUNSUPPORTED_NODE_DATATYPE: return "kUNSUPPORTED_NODE_DATATYPE";
    case nvonnxparser::ErrorCode::kUNSUPPORTED_NODE_DYNAMIC: return "kUNSUPPORTED_NODE_DYNAMIC";
    case nvonnxparser::ErrorCode::kUNSUPPORTED_NODE_SHAPE: return "kUNSUPPORTED_NODE_SHAPE";
    case nvonnxparser::ErrorCode::kREFIT_FAILED: return "kREFIT_FAILED";
  }
  return "unknown";
}

std::string text(const char* characters) { return characters != nullptr ? characters : ""; }

Error parserError(const nvonnxparser::IParser& parser) {
  Error error("PARSE", "the ONNX parser refused the graph");
  for (int index = 0; index < parser.getNbErrors(); index++) {
    const nvonnxparser::IParserError* complaint = parser.getError(index);
    error.complaints.push_back({parserCode(complaint->code()), complaint->node(), text(complaint->nodeName()),
                                text(complaint->nodeOperator()), text(complaint->desc())});
  }
  return error;
}

double secondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void configure(nvinfer1::IBuilderConfig& config, const BuildRequest& request) {
  for (const std::string& name : request.flags) {
    const auto* flag = std::find_if(std::begin(kFlags), std::end(kFlags),
                                    [&](const FlagName& known) { return name == known.name; });
    if (flag == std::end(kFlags))
      throw Error("INVALID", "no builder flag is named " + name + " in " + kLibraryKind);
    config.setFlag(flag->flag);
  }
  if (std::find(request.flags.begin(), request.flags.end(), "kTF32") == request.flags.end())
    config.clearFlag(nvinfer1::BuilderFlag::kTF32);
  if (request.optimizationLevel >= 0) config.setBuilderOptimizationLevel(request.optimizationLevel);
  if (request.workspaceBytes > 0)
    config.setMemoryPoolLimit(nvinfer1::MemoryPoolType::kWORKSPACE, request.workspaceBytes);
  // Full layer names, so that an engine inspector can show each layer of the network.
  config.setProfilingVerbosity(nvinfer1::ProfilingVerbosity::kDETAILED);
#if defined(TRT_MAJOR_RTX)
  if (request.targets.empty()) {
    if (!config.setNbComputeCapabilities(1) ||
        !config.setComputeCapability(nvinfer1::ComputeCapability::kCURRENT, 0))
      throw Error("INVALID", "the present GPU was refused as a target");
  } else {
    if (!config.setNbComputeCapabilities(static_cast<int32_t>(request.targets.size())))
      throw Error("INVALID", "the number of targets was refused");
    for (size_t index = 0; index < request.targets.size(); index++)
      if (!config.setComputeCapability(static_cast<nvinfer1::ComputeCapability>(request.targets[index]),
                                       static_cast<int32_t>(index)))
        throw Error("INVALID", "the target SM " + std::to_string(request.targets[index]) + " was refused");
  }
#else
  if (!request.targets.empty()) throw Error("INVALID", "TensorRT builds for the present GPU only");
#endif
}

#if !defined(TRT_MAJOR_RTX)
// The bytes of a plain file of this user's; none for any other, or where there is no file.
std::vector<char> readOwn(const std::string& path) {
  std::vector<char> bytes;
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0) return bytes;
  struct stat status {};
  if (fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && status.st_uid == geteuid() &&
      (status.st_mode & 022) == 0) {
    bytes.resize(static_cast<size_t>(status.st_size));
    size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t count = ::read(descriptor, bytes.data() + done, bytes.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) break;
      done += static_cast<size_t>(count);
    }
    if (done < bytes.size()) bytes.clear();
  }
  ::close(descriptor);
  return bytes;
}

// What a file holds; nothing where the library does not take it, such as one of another GPU or version.
std::unique_ptr<nvinfer1::ITimingCache> timingsIn(const nvinfer1::IBuilderConfig& config, const std::string& path) {
  const std::vector<char> bytes = readOwn(path);
  std::unique_ptr<nvinfer1::ITimingCache> timings(config.createTimingCache(bytes.data(), bytes.size()));
  if (!timings) timings.reset(config.createTimingCache(nullptr, 0));
  return timings;
}

// Builds share their measurements through a file. It is worth time only: whatever goes wrong with it, the engine is the same.
// What is returned has to outlive the builder.
std::unique_ptr<nvinfer1::ITimingCache> useTimings(nvinfer1::IBuilderConfig& config, const std::string& path) {
  if (path.empty()) return nullptr;
  auto timings = timingsIn(config, path);
  if (timings && config.setTimingCache(*timings, false)) return timings;
  // Of another GPU or version, though its name says otherwise.
  std::unique_ptr<nvinfer1::ITimingCache> none(config.createTimingCache(nullptr, 0));
  if (none) config.setTimingCache(*none, false);
  return none;
}

void keepTimings(const nvinfer1::IBuilderConfig& config, const nvinfer1::ITimingCache* mine,
                 const std::string& path) noexcept {
  if (mine == nullptr) return;
  try {
    // Other builds of this process may have written meanwhile: theirs are kept too. Those of other processes may be lost.
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto all = timingsIn(config, path);
    if (!all || !all->combine(*mine, false)) return;
    const std::unique_ptr<nvinfer1::IHostMemory> bytes(all->serialize());
    if (!bytes) return;
    const std::string temporary = path + "." + std::to_string(getpid()) + ".tmp";
    ::unlink(temporary.c_str());
    NewFile file(temporary);
    file.write(bytes->data(), bytes->size());
    file.finish();
    if (::rename(temporary.c_str(), path.c_str()) == 0) file.keep();
  } catch (...) {
  }
}
#endif

void addProfile(nvinfer1::IBuilder& builder, nvinfer1::INetworkDefinition& network, nvinfer1::IBuilderConfig& config,
                const ProfileShapes& shapes) {
  nvinfer1::IOptimizationProfile* profile = builder.createOptimizationProfile();
  if (profile == nullptr) throw Error("BUILD", "no optimisation profile could be made");
  for (int32_t index = 0; index < network.getNbInputs(); index++) {
    const nvinfer1::ITensor* input = network.getInput(index);
    const std::string name = input->getName();
    const auto shape =
        std::find_if(shapes.begin(), shapes.end(), [&](const InputShape& candidate) { return candidate.input == name; });
    if (shape == shapes.end()) throw Error("INVALID", "a profile lacks the input " + name);
    const nvinfer1::Dims declared = input->getDimensions();
    nvinfer1::Dims dimensions{};
    dimensions.nbDims = static_cast<int32_t>(shape->dimensions.size());
    bool fits = declared.nbDims == dimensions.nbDims;
    for (int32_t axis = 0; fits && axis < dimensions.nbDims; axis++) {
      dimensions.d[axis] = shape->dimensions[static_cast<size_t>(axis)];
      fits = dimensions.d[axis] > 0 && (declared.d[axis] < 0 || declared.d[axis] == dimensions.d[axis]);
    }
    if (!fits) throw Error("INVALID", "a profile's dimensions do not fit the input " + name);
    for (const auto selector :
         {nvinfer1::OptProfileSelector::kMIN, nvinfer1::OptProfileSelector::kOPT, nvinfer1::OptProfileSelector::kMAX})
      if (!profile->setDimensions(name.c_str(), selector, dimensions))
        throw Error("INVALID", "a profile's dimensions were refused for the input " + name);
  }
  if (config.addOptimizationProfile(profile) < 0) throw Error("INVALID", "a profile was refused");
}

}  // namespace

std::vector<std::string> builderFlagNames() {
  std::vector<std::string> names;
  for (const FlagName& known : kFlags) names.emplace_back(known.name);
  return names;
}

BuildResult buildEngine(const TensorRtLibrary& library, const BuildRequest& request,
                        const std::atomic<bool>& cancelled, const std::function<void(const BuildProgress&)>& progress) {
  const auto logger = Logger::take(request.logPath);
  const auto failed = [&](Error error) {
    error.log = logger->errors();
    return error;
  };
  const auto stopIfCancelled = [&] {
    if (cancelled.load()) throw Error("CANCELLED", "the build was cancelled");
  };

  ProgressMonitor monitor(cancelled, progress);
  BuildResult result;
  try {
    // 1. The weights, mapped. They outlive the parser and the network, which point into them.
    monitor.at("Reading the graph", 0);
    std::vector<std::unique_ptr<MappedFile>> files;
    for (const WeightFile& file : request.files) files.push_back(std::make_unique<MappedFile>(file.path, file.identity));

    // 2. The graph.
    const auto parseStart = std::chrono::steady_clock::now();
#if !defined(TRT_MAJOR_RTX)
    std::unique_ptr<nvinfer1::ITimingCache> timings;
#endif
    // The library builds for the calling thread's device.
    const auto device = request.device >= 0 ? Device::open(request.device) : nullptr;
    const auto builder = library.createBuilder(*logger);
    if (!builder) throw Error("BUILD", "no builder could be made");
    const std::unique_ptr<nvinfer1::INetworkDefinition> network(builder->createNetworkV2(0));
    const std::unique_ptr<nvinfer1::IBuilderConfig> config(builder->createBuilderConfig());
    if (!network || !config) throw Error("BUILD", "no network could be made");
    const auto parser = library.createParser(*network, *logger);
    if (!parser) throw Error("BUILD", "no ONNX parser could be made");
    if (!parser->loadModelProto(request.onnx.data(), request.onnx.size())) throw parserError(*parser);
    for (const Initializer& initializer : request.initializers) {
      const void* data = files.at(initializer.file)->range(initializer.offset, initializer.length);
      if (!parser->loadInitializer(initializer.name.c_str(), data, initializer.length)) throw parserError(*parser);
    }
    if (!parser->parseModelProto()) throw parserError(*parser);
    result.parseSeconds = secondsSince(parseStart);
    monitor.at("Reading the graph", ProgressMonitor::kParsed);
    stopIfCancelled();

    // 3. The engine.
    configure(*config, request);
#if !defined(TRT_MAJOR_RTX)
    timings = useTimings(*config, request.timingsPath);
#endif
    for (const ProfileShapes& profile : request.profiles) addProfile(*builder, *network, *config, profile);
    config->setProgressMonitor(&monitor);
    const auto buildStart = std::chrono::steady_clock::now();
    NewFile plan(request.planPath);
    PlanWriter writer(plan, cancelled, monitor);
    const bool built = builder->buildSerializedNetworkToStream(*network, *config, writer);
#if !defined(TRT_MAJOR_RTX)
    // After a build that failed or was cancelled as well: what it has measured is right.
    keepTimings(*config, timings.get(), request.timingsPath);
#endif
    stopIfCancelled();
    plan.finish();
    if (!built || plan.written() == 0) throw Error("BUILD", "the engine could not be built");
    for (const auto& file : files) file->verifyUnchanged();
    plan.keep();
    result.planBytes = plan.written();
    result.buildSeconds = secondsSince(buildStart);
    monitor.at("Writing the plan", ProgressMonitor::kTotal);
  } catch (const Error& error) {
    throw failed(error);
  } catch (const std::bad_alloc&) {
    throw failed(Error("OUT_OF_MEMORY", "the machine has too little memory for this build"));
  }
  result.warnings = logger->warnings();
  return result;
}

}  // namespace flowturbo
