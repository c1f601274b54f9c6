// What TensorRT says while it works. It keeps the first logger it is given for as long as the process lives, and calls it
// from threads of its own. So loggers are never freed: one is taken from a pool and given back, and hears nothing in
// between.
#pragma once

#include <NvInferRuntime.h>

#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace flowturbo {

class Logger final : public nvinfer1::ILogger {
 public:
  struct GiveBack {
    void operator()(Logger* logger) const { logger->giveBack(); }
  };
  using Taken = std::unique_ptr<Logger, GiveBack>;

  // Everything goes into a new file too, unless `logPath` is empty.
  static Taken take(const std::string& logPath = "");

  void log(Severity severity, const char* message) noexcept override;

  std::vector<std::string> errors();
  std::vector<std::string> warnings();
  // The errors since the last call of this function.
  std::vector<std::string> takeErrors();

 private:
  Logger() = default;
  void start(const std::string& logPath);
  void giveBack();

  std::mutex mutex_;
  bool active_ = false;
  std::FILE* file_ = nullptr;
  std::vector<std::string> errors_;
  std::vector<std::string> warnings_;
};

}  // namespace flowturbo
