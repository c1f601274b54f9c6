// Collects the messages that TensorRT logs. TensorRT keeps the first logger that it is given until the process ends, and
// calls it from threads of its own. So loggers are never freed: one is taken from a pool and returned to it, and a logger
// in the pool ignores messages.
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
  struct ReturnToPool {
    void operator()(Logger* logger) const { logger->returnToPool(); }
  };
  using Taken = std::unique_ptr<Logger, ReturnToPool>;

  // Every message is also written to a new file, unless `logPath` is empty.
  static Taken take(const std::string& logPath = "");

  void log(Severity severity, const char* message) noexcept override;

  std::vector<std::string> errors();
  std::vector<std::string> warnings();
  // The errors since the last call of this function.
  std::vector<std::string> takeErrors();

 private:
  Logger() = default;
  void start(const std::string& logPath);
  void returnToPool();

  std::mutex mutex_;
  bool active_ = false;
  std::FILE* file_ = nullptr;
  std::vector<std::string> errors_;
  std::vector<std::string> warnings_;
};

}  // namespace flowturbo
