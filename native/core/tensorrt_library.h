// TensorRT or TensorRT-RTX and its ONNX parser, opened at first use and checked before its classes are used. The
// headers are not vtable-compatible between the two (nor with versions below the floors given here), so this file is
// compiled for one of them; see CMakeLists.txt.
#pragma once

#include <NvInfer.h>
#include <NvOnnxParser.h>

#include <array>
#include <memory>
#include <string>

namespace flowturbo {

#if defined(TRT_MAJOR_RTX)
constexpr const char* kLibraryKind = "tensorrt-rtx";
constexpr bool kHasTargets = true;
#else
constexpr const char* kLibraryKind = "tensorrt";
constexpr bool kHasTargets = false;
#endif

// Major, minor, patch, build.
using Version = std::array<int, 4>;

// Below the floor the classes have other tables of functions (RTX 1.4 to 1.5 broke twelve under one SONAME); above
// the ceiling they may again.
#if defined(TRT_MAJOR_RTX)
constexpr Version kFloor{1, 5, 0, 0};
constexpr Version kCeiling{2, 0, 0, 0};
constexpr Version kHeaders{TRT_MAJOR_RTX, TRT_MINOR_RTX, TRT_PATCH_RTX, TRT_BUILD_RTX};
#else
constexpr Version kFloor{11, 0, 0, 0};
constexpr Version kCeiling{12, 0, 0, 0};
constexpr Version kHeaders{TRT_MAJOR_ENTERPRISE, TRT_MINOR_ENTERPRISE, TRT_PATCH_ENTERPRISE, TRT_BUILD_ENTERPRISE};
#endif

std::string versionText(const Version& version);

class TensorRtLibrary {
 public:
  // Opens the two files (paths, or bare names for the loader to find). The same pair is opened once in a process.
  // Throws Error LIBRARY_NOT_LOADED, or LIBRARY_VERSION for one outside [floor, ceiling). A library that is opened by its
  // path is told to look for the kernels that it builds with, in a library of their own, in the same folder.
  static std::shared_ptr<const TensorRtLibrary> open(const std::string& library, const std::string& parser);

  const Version& version() const noexcept { return version_; }
  const std::string& path() const noexcept { return path_; }
  const std::string& parserPath() const noexcept { return parserPath_; }

  // Null where the library refuses.
  std::unique_ptr<nvinfer1::IBuilder> createBuilder(nvinfer1::ILogger& logger) const;
  // A device has to be the calling thread's. Null where the library refuses.
  std::unique_ptr<nvinfer1::IRuntime> createRuntime(nvinfer1::ILogger& logger) const;
  std::unique_ptr<nvonnxparser::IParser> createParser(nvinfer1::INetworkDefinition& network,
                                                      nvinfer1::ILogger& logger) const;

 private:
  TensorRtLibrary() = default;

  Version version_{};
  std::string path_;
  std::string parserPath_;
  void* (*createBuilder_)(void*, int32_t) = nullptr;
  void* (*createRuntime_)(void*, int32_t) = nullptr;
  void* (*createParser_)(void*, void*, int) = nullptr;
};

}  // namespace flowturbo
