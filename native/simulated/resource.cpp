#include "resource.h"

#include <dirent.h>

#include <cstring>
#include <string>

namespace {

std::string& internalPath() {
  static auto* path = new std::string();
  return *path;
}

}  // namespace

bool hasBuilderResource(nvinfer1::ILogger& logger) {
#if defined(TRT_MAJOR_RTX)
  (void)logger;
  return true;
#else
  bool found = false;
  if (DIR* entries = internalPath().empty() ? nullptr : opendir(internalPath().c_str())) {
    while (const dirent* entry = readdir(entries))
      found = found || std::strncmp(entry->d_name, "libnvinfer_builder_resource", 27) == 0;
    closedir(entries);
  }
  if (!found)
    logger.log(nvinfer1::ILogger::Severity::kERROR,
               "createInferBuilder: Error Code 6: API Usage Error (Unable to load library: "
               "libnvinfer_builder_resource.so.11: cannot open shared object file: No such file or directory)");
  return found;
#endif
}

// True for a folder, as TensorRT 11.2 answers.
extern "C" __attribute__((visibility("default"))) bool setInternalLibraryPath(char const* path) noexcept {
  DIR* entries = path == nullptr ? nullptr : opendir(path);
  if (entries == nullptr) return false;
  closedir(entries);
  internalPath() = path;
  return true;
}
