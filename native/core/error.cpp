#include "error.h"

#include <system_error>

namespace flowturbo {

Error systemError(const std::string& code, int number, const std::string& what, const std::string& path) {
  Error error(code, what + " " + path + ": " + std::generic_category().message(number));
  error.systemError = number;
  error.path = path;
  return error;
}

}  // namespace flowturbo
