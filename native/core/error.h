// What the core throws. The code is stable and goes to JavaScript as it is; the text says what happened, and the layer
// above (lib/runtimes/tensorrt/addon.ts) turns both into the package's own errors with a remedy.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace flowturbo {

// One complaint of the ONNX parser, field by field as IParserError has them.
struct ParserComplaint {
  std::string code;
  int node = -1;
  std::string nodeName;
  std::string nodeOperator;
  std::string description;
};

class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message) : std::runtime_error(message), code_(std::move(code)) {}

  const std::string& code() const noexcept { return code_; }

  std::vector<ParserComplaint> complaints;
  // What the library logged as errors or warnings up to then.
  std::vector<std::string> log;
  // Set where the operating system refused something.
  int systemError = 0;
  std::string path;

 private:
  std::string code_;
};

// "No space left on device" and the like, from errno.
Error systemError(const std::string& code, int number, const std::string& what, const std::string& path);

}  // namespace flowturbo
