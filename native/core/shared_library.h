// A library opened with dlopen at first use, since the addon must load on machines that have none of NVIDIA's. One that
// was used is never closed: CUDA and TensorRT start threads and register exit handlers that outlive any handle held here.
#pragma once

#include <string>

namespace flowturbo {

class SharedLibrary {
 public:
  // A path, or a bare name that the loader looks up. Throws Error LIBRARY_NOT_LOADED with the loader's message.
  explicit SharedLibrary(const std::string& name);

  // Null where the library has no such symbol.
  void* find(const char* symbol) const noexcept;

  // Throws Error LIBRARY_NOT_LOADED where the library has no such symbol.
  template <typename Function>
  Function require(const char* symbol) const {
    return reinterpret_cast<Function>(requireAddress(symbol));
  }

  // For a library that is not the right one: while it is open, the loader returns it for every other file of the same
  // name. Nothing of it may be used after this call.
  void close() noexcept;

  const std::string& name() const noexcept { return name_; }
  // The file that the loader found, where the loader reports it.
  std::string pathOf(const char* symbol) const;

 private:
  void* requireAddress(const char* symbol) const;

  std::string name_;
  void* handle_ = nullptr;
};

}  // namespace flowturbo
