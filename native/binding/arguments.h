// Readers for arguments from JavaScript. lib/runtimes/tensorrt/addon.ts has typed and checked them already; what is
// checked again here is what could otherwise corrupt memory. All values are copied.
#pragma once

#include <napi.h>

#include <cstdint>
#include <string>
#include <vector>

namespace flowturbo::binding {

// Each throws a TypeError or RangeError that names `what`.
std::string readString(const Napi::Value& value, const char* what);
int64_t readInteger(const Napi::Value& value, const char* what, int64_t minimum, int64_t maximum);
bool readBoolean(const Napi::Value& value, const char* what);
std::vector<uint8_t> readBytes(const Napi::Value& value, const char* what);
Napi::Object readObject(const Napi::Value& value, const char* what);
Napi::Function readFunction(const Napi::Value& value, const char* what);
Napi::Array readArray(const Napi::Value& value, const char* what);

template <typename Item, typename Reader>
std::vector<Item> readList(const Napi::Value& value, const char* what, Reader read) {
  const Napi::Array array = readArray(value, what);
  // Nothing is reserved: an array without elements can claim any length.
  std::vector<Item> items;
  for (uint32_t index = 0; index < array.Length(); index++) items.push_back(read(array.Get(index)));
  return items;
}

}  // namespace flowturbo::binding
