// The inside of an executor, which its parts share: executor.cpp (the queue, its two threads, what is released),
// issue.cpp (what is put on the stream for a submission), capture.cpp (programs as CUDA graphs), retire.cpp (what is done
// when the device is done).
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include "executor.h"

namespace flowturbo {

// Launches that may be queued on the device: one that runs, and the next.
constexpr size_t kLaunchesAhead = 2;
// Launches and ends of submissions together.
constexpr size_t kQueued = 6;

// TensorRT requires operands at multiples of this.
constexpr uint64_t kAlignment = 256;

constexpr unsigned kEventRecordDefault = 0;

// An output whose values are downloaded after its launch.
struct Watch {
  uint32_t tensor = 0;
  // Where it begins in the launch's host memory.
  uint64_t offset = 0;
  uint64_t bytes = 0;
  bool finite = false;
  bool reported = false;
};

// @param total grows by the host memory that they take
std::vector<Watch> watchesOf(const Launch& launch, const std::vector<uint64_t>& bytes, uint64_t& total);

struct CapturedLaunch {
  OwnedEvent start;
  OwnedEvent end;
  const Launch* launch = nullptr;
  std::vector<Watch> watches;
};

// A program that is to be one CUDA graph, from its first run on. That run is made launch by launch with the contexts that
// are then captured, since TensorRT requires a launch before.
struct CapturedProgram {
  CapturedProgram(const std::vector<Instruction>& of, uint64_t bytes) : instructions(of), constantsBytes(bytes) {}

  bool matches(const Submission& submission) const {
    return constantsBytes == submission.constants.size() && instructions == submission.instructions;
  }

  std::vector<Instruction> instructions;
  uint64_t constantsBytes;
  // Why it cannot be captured: then it is not tried again.
  std::string refused;
  // One for each engine and profile. A CUDA graph may refer to what its contexts held when it was captured, addresses of
  // operands among it, so no launch outside of the graph may use them.
  std::map<std::pair<const Engine*, size_t>, std::unique_ptr<Context>> contexts;
  // The memory that the graph's addresses refer to.
  DeviceMemoryPool::Shared constants;
  DeviceMemoryPool::Shared scratch;
  PinnedMemoryPool::Shared host;
  std::vector<CapturedLaunch> launches;
  // Absent before it has been captured.
  OwnedGraphExec graph;
  // Between a replay and its end; guarded by the executor's mutex.
  bool running = false;
};

// Work on the stream whose end has to be waited for.
struct InFlight {
  enum class Kind { kLaunch, kReplay, kEnd };

  Kind kind = Kind::kEnd;
  std::shared_ptr<Submission> submission;
  const Launch* launch = nullptr;
  uint32_t index = 0;
  OwnedEvent start;
  // Absent if it could not be recorded: then the whole stream is waited for.
  OwnedEvent end;
  std::vector<Watch> watches;
  PinnedMemoryPool::Shared host;
  // Where each result begins in `host`.
  std::vector<uint64_t> results;

  EventUse endUse() const { return kind == Kind::kLaunch ? EventUse::kTimedWait : EventUse::kWait; }
};

// A call of `close` that waits until everything submitted before has ended and everything released before is freed.
struct Closer {
  uint64_t id = 0;
  std::function<void()> done;
  // Number of the last submission before it.
  uint64_t after = 0;
  // Whether the handle has been destroyed.
  bool ready = false;
};

struct ExecutorState {
  ExecutorState(std::shared_ptr<const TensorRtLibrary> opened, int ordinal);

  const CudaDriver& driver() const { return device->driver(); }

  // 1. Threads (executor.cpp).

  static void start(const std::shared_ptr<ExecutorState>& state);
  void issueLoop();
  void retireLoop();
  bool useDevice(bool again = false);
  bool canProceed() const;
  bool isReady(const Closer& closer) const;
  bool hasReadyCloser() const;
  static bool mustStop(const Submission& submission) { return submission.cancelled_ || submission.failure_; }
  bool proceed(std::unique_lock<std::mutex>& lock);
  void free();

  // 2. What the issuing thread does for a submission (issue.cpp).

  void begin(const std::shared_ptr<Submission>& submission);
  void provideAll(Submission& submission);
  void provide(Registers& registers);
  void clear(const Registers& registers);
  void upload(Submission& submission);
  static Registers& blockOf(const Submission& submission, uint32_t block) {
    return block == 0 ? *submission.registers : *submission.others.at(block - 1);
  }
  static void noteUses(Submission& submission);
  static void refuseWithoutValue(const Submission& submission);
  static bool within(const Submission& submission, const Operand& operand, uint64_t bytes);
  void checkLaunch(const Submission& submission, const Launch& launch, int64_t index);
  static void checkCopy(const Submission& submission, const CopyBytes& copy);
  Context& contextOf(const Submission& submission, const Launch& launch);
  DevicePointer addressOf(const Submission& submission, const Operand& operand) const;
  void issue(const std::shared_ptr<Submission>& submission);
  void issueCopy(const Submission& submission, const CopyBytes& copy);
  void issueLaunch(const Submission& submission, const Launch& launch);
  void issueWatches(const Submission& submission, const Launch& launch, const std::vector<Watch>& watches,
                    const PinnedMemoryPool::Shared& host);
  void finish(const std::shared_ptr<Submission>& submission);
  void download(const Submission& submission, InFlight& flight);

  // 3. CUDA graphs (capture.cpp), on the issuing thread.

  void remember(const Submission& submission);
  void tryCapture(Submission& submission);
  void capture(const Submission& submission, CapturedProgram& captured);
  void replay(const std::shared_ptr<Submission>& submission);
  void discard(Registers& registers);

  // 4. What the retiring thread does (retire.cpp).

  void wait(const InFlight& flight);
  void retire(InFlight& flight);
  void report(const Submission& submission, uint32_t index, const Launch& launch, const OwnedEvent& start,
              const OwnedEvent& end, const std::vector<Watch>& watches, const PinnedMemoryPool::Shared& host);
  void end(Submission& submission, const InFlight& flight);

  // 5. Failures and ends (executor.cpp), on any thread.

  bool hasFailed(const Submission& submission) const;
  Error lostError() const;
  // What an error says of the device: a loss is remembered for all that comes after.
  void note(const Error& error);
  void fail(Submission& submission, const Error& error);
  void settle(Submission& submission, std::optional<Error> error, std::vector<std::vector<uint8_t>> results);

  // 6. Memory (executor.cpp).

  // On the issuing thread, outside of a capture: frees what nobody needs at present. That is what was released, CUDA
  // graphs that wait for their next run, but for those of `keep`, and what the pools keep. Waits for the device.
  void makeRoom(const Registers* keep);
  // The same from another thread; waits for it. Not to be called on the executor's own threads.
  void requestRoom();
  // Does `body`, and once more with more room if the device's memory did not suffice.
  template <typename Body>
  void withRoom(const Registers* keep, Body body) {
    try {
      body();
    } catch (const Error& error) {
      if (error.code() != "DEVICE_MEMORY") throw;
      makeRoom(keep);
      body();
    }
  }

  // 7. Events, engines and registers. The last two are released on any thread and freed on the issuing one.

  OwnedEvent takeEvent(EventUse use);
  void record(const OwnedEvent& event, unsigned flags);
  void release(std::shared_ptr<const void> thing);
  void release(std::unique_ptr<Registers> registers);
  void ready(uint64_t id);
  void addCommand(std::function<void()> command);

  const std::shared_ptr<const TensorRtLibrary> library;
  std::shared_ptr<const Device> device;
  OwnedStream stream;
  // Both take and free memory on the issuing thread alone: never during a capture.
  std::shared_ptr<DeviceMemoryPool> memory;
  std::shared_ptr<PinnedMemoryPool> pinned;
  const std::shared_ptr<EngineMemory> engineMemory = std::make_shared<EngineMemory>();

  // The issuing thread's own.
  DeviceMemoryPool::Shared scratch;
  std::vector<std::unique_ptr<InFlight>> held;
  // Those with a CUDA graph.
  std::set<Registers*> captured;

  mutable std::mutex mutex;
  std::condition_variable issuing;
  std::condition_variable retiring;
  std::deque<std::shared_ptr<Submission>> queue;
  std::deque<std::function<void()>> commands;
  std::deque<std::unique_ptr<InFlight>> inFlight;
  size_t launchesInFlight = 0;
  // Memory is reused in the order of the stream, so registers are given back while the device works.
  std::vector<std::unique_ptr<Registers>> returned;
  // Engines and CUDA graphs: they are destroyed when nothing runs.
  std::vector<std::shared_ptr<const void>> released;
  std::vector<Closer> closers;
  uint64_t closerCount = 0;
  uint64_t submitted = 0;
  std::array<std::vector<OwnedEvent>, kEventUses> events;
  std::optional<Error> lost;
  bool closing = false;
  bool retirerStops = false;

  // Held while the stream captures: who waits for the stream then breaks the capture, and is refused.
  std::mutex capturing;

  // Engines of this device by the identity of their plans.
  std::mutex enginesMutex;
  std::condition_variable engineLoaded;
  std::map<std::string, std::weak_ptr<Engine>> engines;
  std::set<std::string> loading;

  std::atomic<uint64_t> launches{0};
  std::atomic<uint64_t> submissions{0};
  std::atomic<uint64_t> replays{0};
  std::atomic<int64_t> busyNanoseconds{0};
};

Error hostMemory();

}  // namespace flowturbo
