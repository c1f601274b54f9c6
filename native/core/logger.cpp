#include "logger.h"

namespace flowturbo {
namespace {

constexpr size_t kKeptMessages = 200;

std::mutex& poolMutex() {
  static auto* mutex = new std::mutex();
  return *mutex;
}

std::vector<Logger*>& pool() {
  static auto* loggers = new std::vector<Logger*>();
  return *loggers;
}

}  // namespace

Logger::Taken Logger::take(const std::string& logPath) {
  const std::lock_guard<std::mutex> lock(poolMutex());
  Logger* logger = nullptr;
  if (pool().empty()) {
    logger = new Logger();
  } else {
    logger = pool().back();
    pool().pop_back();
  }
  logger->start(logPath);
  return Taken(logger);
}

void Logger::returnToPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    active_ = false;
    if (file_ != nullptr) std::fclose(file_);
    file_ = nullptr;
  }
  const std::lock_guard<std::mutex> lock(poolMutex());
  pool().push_back(this);
}

void Logger::start(const std::string& logPath) {
  const std::lock_guard<std::mutex> lock(mutex_);
  active_ = true;
  errors_.clear();
  warnings_.clear();
  if (!logPath.empty()) file_ = std::fopen(logPath.c_str(), "wxe");
}

void Logger::log(Severity severity, const char* message) noexcept {
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!active_) return;
    if (file_ != nullptr) std::fprintf(file_, "%c %s\n", "FEWIV"[static_cast<int>(severity)], message);
    if (severity <= Severity::kERROR && errors_.size() < kKeptMessages) errors_.emplace_back(message);
    if (severity == Severity::kWARNING && warnings_.size() < kKeptMessages) warnings_.emplace_back(message);
  } catch (...) {
    // A message that does not fit into memory is lost.
  }
}

std::vector<std::string> Logger::errors() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return errors_;
}

std::vector<std::string> Logger::warnings() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return warnings_;
}

std::vector<std::string> Logger::takeErrors() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::string> taken;
  taken.swap(errors_);
  return taken;
}

}  // namespace flowturbo
