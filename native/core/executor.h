// Programs on one GPU: a queue of instructions (launches of engines, copies of rows) that a thread of its own hands to
// one stream, at most two launches ahead of the device, so that the device never waits for JavaScript and a run can still
// be stopped between launches. A second thread waits for what the first has queued: it reports launches, checks values and
// delivers results. All programs of a process on one device share one executor, its memory and its engines.
//
// Nothing here blocks the caller but `open` and `load`, which belong on a thread of their own.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "device.h"
#include "engine.h"
#include "error.h"
#include "tensorrt_library.h"

namespace flowturbo {

// A place in the registers, or in the constants of the submission.
struct Operand {
  bool constant = false;
  uint64_t offset = 0;
  // Which registers: 0 for the submission's own, then its others.
  uint32_t block = 0;

  bool operator==(const Operand& other) const {
    return constant == other.constant && offset == other.offset && block == other.block;
  }
};

struct Launch {
  std::shared_ptr<Engine> engine;
  size_t profile = 0;
  // One for each of the engine's tensors, in its order.
  std::vector<Operand> operands;
  // Indices of outputs whose values must be finite, and of those that go with the report.
  std::vector<uint32_t> finite;
  std::vector<uint32_t> reported;

  bool operator==(const Launch& other) const {
    return engine == other.engine && profile == other.profile && operands == other.operands &&
           finite == other.finite && reported == other.reported;
  }
};

// Always into the registers.
struct CopyBytes {
  Operand from;
  Operand to;
  uint64_t bytes = 0;

  bool operator==(const CopyBytes& other) const { return from == other.from && to == other.to && bytes == other.bytes; }
};

using Instruction = std::variant<Launch, CopyBytes>;

// Bytes of the registers.
struct Range {
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint32_t block = 0;
};

struct LaunchReport {
  uint32_t launch = 0;
  // By the device's clock.
  double milliseconds = 0;
  // Of the outputs in `reported`.
  std::vector<std::vector<uint8_t>> values;
};

struct Outcome {
  std::optional<Error> error;
  std::vector<std::vector<uint8_t>> results;
  // Whether it ran as one CUDA graph.
  bool replayed = false;
  // Why it could not be captured, for a submission that asked for it.
  std::string notCaptured;
};

class Executor;
struct CapturedProgram;
struct ExecutorState;

// Device memory that outlives a submission: zeros before the first. Freed when its last owner is destroyed.
class Registers {
 public:
  explicit Registers(uint64_t bytes);
  ~Registers();

  uint64_t bytes() const noexcept { return bytes_; }

 private:
  friend struct ExecutorState;

  const uint64_t bytes_;
  // The rest belongs to the issuing thread, but for `failed_` and what the executor's mutex guards.
  DeviceMemoryPool::Shared block_;
  std::unique_ptr<CapturedProgram> captured_;
  std::atomic<bool> failed_{false};
};

// Instructions that run in order after those of earlier submissions, without a pause in between.
struct Submission {
  std::shared_ptr<Registers> registers;
  // More registers, each with a lifetime of its own. With any, a failure does not make later submissions to `registers`
  // fail: instead, submissions that read one of the others that this one was to write fail with NO_VALUE.
  std::vector<std::shared_ptr<Registers>> others;
  // Uploaded at once before the first instruction.
  std::vector<uint8_t> constants;
  std::vector<Instruction> instructions;
  // Downloaded at once after the last.
  std::vector<Range> results;
  // Turns the instructions into one CUDA graph, which later submissions of the same instructions replay. Its registers
  // are cleared first: it does not read what earlier submissions wrote.
  bool capture = false;
  // Both are called on the executor's threads, and must not throw. `onDone` is called exactly once.
  std::function<void(LaunchReport)> onLaunch;
  std::function<void(Outcome)> onDone;

 private:
  friend class Executor;
  friend struct ExecutorState;

  uint64_t number_ = 0;
  bool begun_ = false;
  std::atomic<bool> cancelled_{false};
  std::optional<Error> failure_;
  bool stopped_ = false;
  bool settled_ = false;
  size_t next_ = 0;
  uint32_t launches_ = 0;
  DeviceMemoryPool::Shared constantsBlock_;
  PinnedMemoryPool::Shared upload_;
  bool replayed_ = false;
  std::string notCaptured_;
  // Of `others`: whether it reads what was there before, and whether it writes.
  std::vector<bool> reads_;
  std::vector<bool> writes_;
};

struct ExecutorStatistics {
  uint64_t launches = 0;
  uint64_t submissions = 0;
  uint64_t replays = 0;
  uint64_t engines = 0;
  // On the device: registers, constants and scratch memory; the engines' weights; what execution contexts keep, as far as
  // it could be measured.
  uint64_t deviceBytes = 0;
  uint64_t weightBytes = 0;
  uint64_t contextBytes = 0;
  uint64_t pinnedBytes = 0;
  // Processor time of the two threads, for all launches.
  double busySeconds = 0;
};

class Executor : public std::enable_shared_from_this<Executor> {
 public:
  // The process's executor for a device and library, started if there is none. Throws Error: NO_DRIVER, NO_DEVICE,
  // INVALID, CUDA; DEVICE_LOST for a device that was ever lost in this process (Device::lose).
  static std::shared_ptr<Executor> open(std::shared_ptr<const TensorRtLibrary> library, int ordinal);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // Keeps all executors of this process out of NVIDIA's libraries while the process exits. False if one is still inside
  // when the time is over.
  static bool quiesce(std::chrono::milliseconds timeout);

  const CudaDevice& device() const noexcept;

  // The engine of a plan, loaded once for all its users. Throws what Engine does.
  std::shared_ptr<Engine> load(const std::string& plan, const std::string& identity);
  std::shared_ptr<Registers> createRegisters(uint64_t bytes);

  void submit(std::shared_ptr<Submission> submission);
  // Stops a submission before its next launch; its outcome is then the Error CANCELLED.
  void cancel(const std::shared_ptr<Submission>& submission);
  // The same for one that has not begun; false for every other.
  bool withdraw(const std::shared_ptr<Submission>& submission);

  // Shapes of all tensors of an engine in a profile, whose context is made where there is none yet.
  void prepare(std::shared_ptr<Engine> engine, size_t profile,
               std::function<void(std::optional<Error>, TensorShapes)> onDone);
  void memory(std::function<void(std::optional<Error>, DeviceMemoryInfo)> onDone);

  // Releases a handle. `onDone` is called when everything submitted before has ended and everything released before has
  // been freed.
  static void close(std::shared_ptr<Executor> executor, std::function<void()> onDone);

  ExecutorStatistics statistics() const;

 private:
  explicit Executor(std::shared_ptr<ExecutorState> state) : state_(std::move(state)) {}

  std::shared_ptr<ExecutorState> state_;
};

}  // namespace flowturbo
