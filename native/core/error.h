// What the core throws. The code is stable and passed to JavaScript unchanged; the text describes the failure. The layer
// above (lib/runtimes/tensorrt) turns both into the package's own errors with a remedy.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace flowturbo {

// One error of the ONNX parser, field by field as IParserError has them.
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
  // Errors and warnings that the library had logged by then.
  std::vector<std::string> log;
  // Set where the operating system refused something.
  int systemError = 0;
  std::string path;
  // Bytes, where memory ran out.
  uint64_t needed = 0;
  uint64_t available = 0;
  // The launch that failed, by its number within its submission, and the operand meant; -1 for none.
  int64_t launch = -1;
  int64_t operand = -1;

 private:
  std::string code_;
};

// "No space left on device" and the like, from errno.
Error systemError(const std::string& code, int number, const std::string& what, const std::string& path);

}  // namespace flowturbo
