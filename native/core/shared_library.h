// A library opened with dlopen at first use, since the addon must load on machines that have none of NVIDIA's. One that
// was used is never closed: CUDA and TensorRT start threads and register exit handlers that outlive any handle of ours.
#pragma once

#include <string>

namespace flowturbo {

class SharedLibrary {
 public:
  // A path, or a bare name that the loader looks up. Throws Error LIBRARY_NOT_LOADED with the loader's words.
  explicit SharedLibrary(const std::string& name);

  // Null where the library has no such symbol.
  void* find(const char* symbol) const noexcept;

  // Throws Error LIBRARY_NOT_LOADED where the library has no such symbol.
  template <typename Function>
  Function require(const char* symbol) const {
    return reinterpret_cast<Function>(requireAddress(symbol));
  }

  // For one that turned out not to be what is wanted: while it is open, the loader answers with it whenever another file
  // is asked for by the same name. Nothing of it may be used any more.
  void close() noexcept;

  const std::string& name() const noexcept { return name_; }
  // The file that the loader found, as far as it tells.
  std::string pathOf(const char* symbol) const;

 private:
  void* requireAddress(const char* symbol) const;

  std::string name_;
  void* handle_ = nullptr;
};

}  // namespace flowturbo
