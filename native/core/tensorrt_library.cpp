#include "tensorrt_library.h"

#include <dirent.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "error.h"
#include "shared_library.h"

namespace flowturbo {
namespace {

// What a factory of the library returned. Where it fails, a pointer to a base class may be an offset added to null
// (TensorRT 11.2 without a driver answers 0x228); nothing lies in the first page.
template <typename Interface>
std::unique_ptr<Interface> made(void* object) {
  return std::unique_ptr<Interface>(reinterpret_cast<uintptr_t>(object) < 4096 ? nullptr
                                                                              : static_cast<Interface*>(object));
}

// TensorRT's builder opens libnvinfer_builder_resource, by name. An unpacked archive is not among the loader's folders.
void findBuilderResource(const SharedLibrary& core, const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return;
  const std::string folder = path.substr(0, std::max<size_t>(slash, 1));
  bool present = false;
  if (DIR* entries = opendir(folder.c_str())) {
    while (const dirent* entry = readdir(entries))
      present = present || std::strncmp(entry->d_name, "libnvinfer_builder_resource", 27) == 0;
    closedir(entries);
  }
  // Where it lies elsewhere, the loader may find it as it finds everything else.
  if (!present) return;
  auto* tell = reinterpret_cast<bool (*)(const char*)>(core.find("setInternalLibraryPath"));
  // Absolute, since the process may change its folder before it builds.
  const std::unique_ptr<char, void (*)(void*)> absolute(realpath(folder.c_str(), nullptr), std::free);
  if (tell != nullptr && absolute) tell(absolute.get());
}

}  // namespace

std::string versionText(const Version& version) {
  return std::to_string(version[0]) + "." + std::to_string(version[1]) + "." + std::to_string(version[2]) + "." +
         std::to_string(version[3]);
}

std::shared_ptr<const TensorRtLibrary> TensorRtLibrary::open(const std::string& library, const std::string& parser) {
  // Function pointers and strings only: nothing here has to be torn down when the process exits.
  static std::mutex mutex;
  static auto* opened = new std::map<std::pair<std::string, std::string>, std::shared_ptr<const TensorRtLibrary>>();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(library, parser);
  const auto known = opened->find(key);
  if (known != opened->end()) return known->second;

  SharedLibrary core(library);
  std::shared_ptr<TensorRtLibrary> result(new TensorRtLibrary());
  try {
    const auto number = [&](const char* symbol) { return core.require<int32_t (*)()>(symbol)(); };
    // The version that the factories take is no check (TensorRT-RTX accepts any), so the library's own version is read.
    result->version_ = {number("getInferLibMajorVersion"), number("getInferLibMinorVersion"),
                        number("getInferLibPatchVersion"), number("getInferLibBuildVersion")};
    result->path_ = core.pathOf("getInferLibMajorVersion");
    if (result->version_ < kFloor || !(result->version_ < kCeiling)) {
      Error error("LIBRARY_VERSION", result->path_ + " is version " + versionText(result->version_) + "; needed is " +
                                         versionText(kFloor) + " or later, below " + versionText(kCeiling));
      error.path = result->path_;
      throw error;
    }
    if (library.find('/') != std::string::npos) findBuilderResource(core, result->path_);
    result->createBuilder_ = core.require<void* (*)(void*, int32_t)>("createInferBuilder_INTERNAL");
    result->createRuntime_ = core.require<void* (*)(void*, int32_t)>("createInferRuntime_INTERNAL");

    const SharedLibrary onnx(parser);
    result->createParser_ = onnx.require<void* (*)(void*, void*, int)>("createNvOnnxParser_INTERNAL");
    result->parserPath_ = onnx.pathOf("createNvOnnxParser_INTERNAL");
  } catch (...) {
    core.close();
    throw;
  }
  opened->emplace(key, result);
  return result;
}

std::unique_ptr<nvinfer1::IBuilder> TensorRtLibrary::createBuilder(nvinfer1::ILogger& logger) const {
  return made<nvinfer1::IBuilder>(createBuilder_(&logger, NV_TENSORRT_VERSION));
}

std::unique_ptr<nvinfer1::IRuntime> TensorRtLibrary::createRuntime(nvinfer1::ILogger& logger) const {
  return made<nvinfer1::IRuntime>(createRuntime_(&logger, NV_TENSORRT_VERSION));
}

std::unique_ptr<nvonnxparser::IParser> TensorRtLibrary::createParser(nvinfer1::INetworkDefinition& network,
                                                                     nvinfer1::ILogger& logger) const {
  return made<nvonnxparser::IParser>(createParser_(&network, &logger, NV_ONNX_PARSER_VERSION));
}

}  // namespace flowturbo
