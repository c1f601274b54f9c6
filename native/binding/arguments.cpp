#include "arguments.h"

#include <cmath>

namespace flowturbo::binding {
namespace {

Napi::Error wrongType(const Napi::Value& value, const char* what, const char* expected) {
  return Napi::TypeError::New(value.Env(), std::string("Expected ") + expected + " for " + what + ".");
}

}  // namespace

std::string readString(const Napi::Value& value, const char* what) {
  if (!value.IsString()) throw wrongType(value, what, "a string");
  std::string text = value.As<Napi::String>().Utf8Value();
  // The operating system would read a path with a zero character as a shorter path.
  if (text.find('\0') != std::string::npos) throw wrongType(value, what, "a string without zero characters");
  return text;
}

int64_t readInteger(const Napi::Value& value, const char* what, int64_t minimum, int64_t maximum) {
  if (!value.IsNumber()) throw wrongType(value, what, "a number");
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!(number >= static_cast<double>(minimum) && number <= static_cast<double>(maximum)) || std::trunc(number) != number)
    throw Napi::RangeError::New(value.Env(), std::string("Expected an integer from ") + std::to_string(minimum) +
                                                 " to " + std::to_string(maximum) + " for " + what + ".");
  return static_cast<int64_t>(number);
}

bool readBoolean(const Napi::Value& value, const char* what) {
  if (!value.IsBoolean()) throw wrongType(value, what, "a boolean");
  return value.As<Napi::Boolean>().Value();
}

std::vector<uint8_t> readBytes(const Napi::Value& value, const char* what) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array)
    throw wrongType(value, what, "a Uint8Array");
  const auto array = value.As<Napi::Uint8Array>();
  return std::vector<uint8_t>(array.Data(), array.Data() + array.ElementLength());
}

Napi::Object readObject(const Napi::Value& value, const char* what) {
  if (!value.IsObject() || value.IsFunction()) throw wrongType(value, what, "an object");
  return value.As<Napi::Object>();
}

Napi::Function readFunction(const Napi::Value& value, const char* what) {
  if (!value.IsFunction()) throw wrongType(value, what, "a function");
  return value.As<Napi::Function>();
}

Napi::Array readArray(const Napi::Value& value, const char* what) {
  if (!value.IsArray()) throw wrongType(value, what, "an array");
  return value.As<Napi::Array>();
}

}  // namespace flowturbo::binding
