// ONNX bytes and mapped weights in, a plan on disk out. One call builds one engine: one network, one optimisation
// profile for each shape asked for (weights are stored once whatever their number), strongly typed, so that the types
// of the graph are the types of the engine. Blocks for seconds to minutes: to be called on a thread of its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "error.h"
#include "tensorrt_library.h"

namespace flowturbo {

struct Initializer {
  std::string name;
  // Index into BuildRequest::files.
  size_t file = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
};

struct WeightFile {
  std::string path;
  // See identityOf in files.h.
  std::string identity;
};

struct InputShape {
  std::string input;
  std::vector<int64_t> dimensions;
};

// The dimensions of every input: minimum, optimum and maximum are the same.
using ProfileShapes = std::vector<InputShape>;

struct BuildRequest {
  std::vector<uint8_t> onnx;
  std::vector<WeightFile> files;
  std::vector<Initializer> initializers;
  std::vector<ProfileShapes> profiles;
  // SM numbers (86 for 8.6), TensorRT-RTX only; empty means the present GPU.
  std::vector<int> targets;
  // Number of the GPU that is the present one, or -1 for CUDA's first. Of no account with targets.
  int device = -1;
  // BuilderFlag by name ("kTF32"), since the numbers differ between the two libraries.
  std::vector<std::string> flags;
  // 0 to 5, or -1 for the library's default.
  int optimizationLevel = -1;
  // Limit of scratch memory on the GPU, or 0 for the library's default.
  uint64_t workspaceBytes = 0;
  // Where the plan goes; must not exist. Removed again if the build fails.
  std::string planPath;
  // What kernels took, measured in earlier builds on this GPU, which this one need not measure again; written anew with
  // what this build has measured. Empty for none: always with TensorRT-RTX, which measures nothing.
  std::string timingsPath;
  // Everything that the library logs goes into this file too, unless it is empty.
  std::string logPath;
};

struct BuildResult {
  uint64_t planBytes = 0;
  double parseSeconds = 0;
  double buildSeconds = 0;
  std::vector<std::string> warnings;
};

// `done` never decreases and never exceeds `total`, which is constant.
struct BuildProgress {
  std::string phase;
  uint32_t done = 0;
  uint32_t total = 0;
};

// Throws Error: INVALID, WEIGHTS_CHANGED, IO, PARSE, BUILD, CANCELLED; with a device what Device::open throws. `progress` is called on TensorRT's threads.
BuildResult buildEngine(const TensorRtLibrary& library, const BuildRequest& request,
                        const std::atomic<bool>& cancelled, const std::function<void(const BuildProgress&)>& progress);

// Names that BuildRequest::flags takes.
std::vector<std::string> builderFlagNames();

}  // namespace flowturbo
