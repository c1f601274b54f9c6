#include "shared_library.h"

#include <dlfcn.h>

#include "error.h"

namespace flowturbo {

SharedLibrary::SharedLibrary(const std::string& name) : name_(name) {
  handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle_ == nullptr) {
    const char* reason = dlerror();
    throw Error("LIBRARY_NOT_LOADED", reason != nullptr ? reason : "dlopen failed without a reason");
  }
}

void SharedLibrary::close() noexcept {
  dlclose(handle_);
  handle_ = nullptr;
}

void* SharedLibrary::find(const char* symbol) const noexcept { return dlsym(handle_, symbol); }

std::string SharedLibrary::pathOf(const char* symbol) const {
  Dl_info info{};
  void* address = find(symbol);
  if (address == nullptr || dladdr(address, &info) == 0 || info.dli_fname == nullptr) return name_;
  return info.dli_fname;
}

void* SharedLibrary::requireAddress(const char* symbol) const {
  void* address = find(symbol);
  if (address == nullptr) {
    Error error("LIBRARY_NOT_LOADED", name_ + " has no function " + symbol);
    error.path = name_;
    throw error;
  }
  return address;
}

}  // namespace flowturbo
