#include "executor.h"

#include <time.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <future>
#include <map>
#include <mutex>
#include <set>
#include <thread>

namespace flowturbo {
namespace {

// Processor time of the calling thread: time that other threads of a busy machine take does not count.
int64_t threadNanoseconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{1000000000} * now.tv_sec + now.tv_nsec;
}

// Launches that may be queued on the device: one that runs, and the next.
constexpr size_t kLaunchesAhead = 2;
// Launches and ends of submissions together.
constexpr size_t kQueued = 6;

constexpr unsigned kEventRecordDefault = 0;
// In a capture: the event is recorded whenever the CUDA graph runs.
constexpr unsigned kEventRecordExternal = 1;
constexpr int kCaptureThreadLocal = 1;

// TensorRT requires operands at multiples of this.
constexpr uint64_t kAlignment = 256;

// While the process exits, threads that are not inside NVIDIA's libraries must not enter them any more.
struct Quiescence {
  std::mutex mutex;
  std::condition_variable changed;
  int busy = 0;
  bool ending = false;
};

Quiescence& quiescence() {
  static auto* instance = new Quiescence();
  return *instance;
}

// Around everything that a thread of an executor does on the device.
class Busy {
 public:
  Busy() {
    std::unique_lock<std::mutex> lock(quiescence().mutex);
    quiescence().changed.wait(lock, [] { return !quiescence().ending; });
    quiescence().busy++;
  }
  ~Busy() {
    const std::lock_guard<std::mutex> lock(quiescence().mutex);
    quiescence().busy--;
    quiescence().changed.notify_all();
  }
};

Error hostMemory() { return Error("OUT_OF_MEMORY", "the machine has too little memory"); }

// A call of `close` that waits until everything submitted before has ended and everything released before is freed.
struct Closer {
  uint64_t id = 0;
  std::function<void()> done;
  // Number of the last submission before it.
  uint64_t after = 0;
  // Whether the handle has been destroyed.
  bool ready = false;
};

// An output whose values are downloaded after its launch.
struct Watch {
  uint32_t tensor = 0;
  // Where it begins in the launch's host memory.
  uint64_t offset = 0;
  uint64_t bytes = 0;
  bool finite = false;
  bool reported = false;
};

// Whether there is no NaN and no infinity among float32 values: their exponent has all bits set.
bool allFinite(const uint8_t* data, uint64_t bytes) {
  bool finite = true;
  for (uint64_t at = 0; at + 4 <= bytes; at += 4) {
    uint32_t bits = 0;
    std::memcpy(&bits, data + at, 4);
    finite = finite && (bits & 0x7f800000u) != 0x7f800000u;
  }
  return finite;
}

std::vector<Watch> watchesOf(const Launch& launch, const std::vector<uint64_t>& bytes, uint64_t& total) {
  std::vector<Watch> watches;
  const auto watch = [&](uint32_t tensor) -> Watch& {
    for (Watch& known : watches)
      if (known.tensor == tensor) return known;
    watches.push_back({tensor, total, bytes[tensor], false, false});
    total += (bytes[tensor] + kAlignment - 1) / kAlignment * kAlignment;
    return watches.back();
  };
  for (const uint32_t tensor : launch.finite) watch(tensor).finite = true;
  for (const uint32_t tensor : launch.reported) watch(tensor).reported = true;
  return watches;
}

struct CapturedLaunch {
  OwnedEvent start;
  OwnedEvent end;
  const Launch* launch = nullptr;
  std::vector<Watch> watches;
};

}  // namespace

// A program as one CUDA graph, with the memory that its addresses refer to.
struct CapturedProgram {
  std::vector<Instruction> instructions;
  DeviceMemoryPool::Shared constants;
  uint64_t constantsBytes = 0;
  DeviceMemoryPool::Shared scratch;
  PinnedMemoryPool::Shared host;
  std::vector<CapturedLaunch> launches;
  OwnedGraphExec graph;
  // Between a replay and its end; guarded by the executor's mutex.
  bool running = false;
};

namespace {

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
};

}  // namespace

Registers::Registers(uint64_t bytes) : bytes_(bytes) {}
Registers::~Registers() = default;

struct ExecutorState {
  ExecutorState(std::shared_ptr<const TensorRtLibrary> opened, int ordinal)
      : library(std::move(opened)),
        device(Device::open(ordinal)),
        stream(createStream(*device)),
        memory(std::make_shared<DeviceMemoryPool>(device, stream.get())),
        pinned(std::make_shared<PinnedMemoryPool>(device, stream.get())) {}

  const CudaDriver& driver() const { return device->driver(); }

  // 1. Threads.

  static void start(const std::shared_ptr<ExecutorState>& state) {
    std::thread([state] { state->issueLoop(); }).detach();
  }

  void issueLoop() {
    std::thread retirer([this] { retireLoop(); });
    bool current = useDevice();
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      issuing.wait(lock, [&] { return canProceed(); });
      lock.unlock();
      if (!current) current = useDevice(true);
      {
        const Busy busy;
        const int64_t woken = threadNanoseconds();
        lock.lock();
        // It still can proceed: only this thread removes work.
        if (!proceed(lock)) break;
        busyNanoseconds += threadNanoseconds() - woken;
      }
      lock.lock();
    }
    retirerStops = true;
    retiring.notify_one();
    lock.unlock();
    retirer.join();
    if (!current) useDevice();
    {
      const Busy busy;
      free();
    }
    std::vector<Closer> last;
    {
      const std::lock_guard<std::mutex> guard(mutex);
      last.swap(closers);
    }
    for (const Closer& closer : last) closer.done();
  }

  // Makes the device the calling thread's. A device that fails at the second attempt is lost.
  bool useDevice(bool again = false) {
    try {
      const Busy busy;
      device->makeCurrent();
      return true;
    } catch (const Error& error) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (again && !lost) lost = Error("DEVICE_LOST", error.what());
      return false;
    }
  }

  // Holding the mutex.
  bool canProceed() const {
    if (!commands.empty()) return true;
    if (!released.empty()) return inFlight.empty();
    if (hasReadyCloser()) return true;
    if (queue.empty()) return closing && inFlight.empty();
    const Submission& next = *queue.front();
    if (!next.begun_) {
      if (lost) return true;
      const CapturedProgram* captured = next.registers->captured_.get();
      return (captured == nullptr || !captured->running) && inFlight.size() < kQueued;
    }
    if (mustStop(next)) return true;
    if (inFlight.size() >= kQueued) return false;
    return next.next_ == next.instructions.size() || launchesInFlight < kLaunchesAhead;
  }

  bool isReady(const Closer& closer) const {
    return closer.ready && (queue.empty() || queue.front()->number_ > closer.after) &&
           (inFlight.empty() || inFlight.front()->submission->number_ > closer.after);
  }

  bool hasReadyCloser() const {
    return !closing &&
           std::any_of(closers.begin(), closers.end(), [&](const Closer& closer) { return isReady(closer); });
  }

  static bool mustStop(const Submission& submission) { return submission.cancelled_ || submission.failure_; }

  // Does one thing. Returns true with the mutex released, since destructors of what is done with may lock it; false with
  // the mutex held when nothing is left to do and nothing can be added.
  bool proceed(std::unique_lock<std::mutex>& lock) {
    if (!commands.empty()) {
      const auto command = std::move(commands.front());
      commands.pop_front();
      lock.unlock();
      command();
      return true;
    }
    if (!released.empty()) {
      std::vector<std::shared_ptr<const void>> freed;
      freed.swap(released);
      lock.unlock();
      // The upload of a profile's resources by `prepare` may still run. Errors here are not reported to anyone, but a
      // lost device is recorded for all.
      const CudaResult rest = driver().cuStreamSynchronize(stream.get());
      if (rest != kCudaSuccess) {
        const Error error = driver().failure(rest, "cuStreamSynchronize");
        const std::lock_guard<std::mutex> guard(mutex);
        if (error.code() == "DEVICE_LOST" && !lost) lost = error;
      }
      return true;
    }
    if (hasReadyCloser()) {
      std::vector<Closer> done;
      std::vector<Closer> later;
      for (Closer& closer : closers) (isReady(closer) ? done : later).push_back(std::move(closer));
      closers = std::move(later);
      lock.unlock();
      for (const Closer& closer : done) closer.done();
      return true;
    }
    if (queue.empty()) return false;
    const std::shared_ptr<Submission> submission = queue.front();
    if (!submission->begun_ && lost) {
      queue.pop_front();
      const Error error = *lost;
      lock.unlock();
      settle(*submission, error, {});
      return true;
    }
    const bool first = !submission->begun_;
    submission->begun_ = true;
    const bool stop = mustStop(*submission);
    lock.unlock();
    try {
      if (stop || (!first && submission->next_ == submission->instructions.size()))
        finish(submission);
      else if (first)
        begin(submission);
      else
        issue(submission);
    } catch (const Error& error) {
      fail(*submission, error);
    } catch (const std::bad_alloc&) {
      fail(*submission, hostMemory());
    }
    if (submission->stopped_) {
      const std::lock_guard<std::mutex> guard(mutex);
      queue.pop_front();
    }
    return true;
  }

  void retireLoop() {
    bool current = useDevice();
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      retiring.wait(lock, [&] { return !inFlight.empty() || retirerStops; });
      if (inFlight.empty()) break;
      InFlight& flight = *inFlight.front();
      lock.unlock();
      {
        if (!current) current = useDevice(true);
        const Busy busy;
        if (current)
          wait(flight);
        else
          fail(*flight.submission, lostError());
        const int64_t woken = threadNanoseconds();
        retire(flight);
        busyNanoseconds += threadNanoseconds() - woken;
      }
      lock.lock();
      std::unique_ptr<InFlight> done = std::move(inFlight.front());
      inFlight.pop_front();
      if (done->kind == InFlight::Kind::kLaunch) launchesInFlight--;
      if (done->start) events.push_back(std::move(done->start));
      if (done->end) events.push_back(std::move(done->end));
      issuing.notify_one();
      lock.unlock();
      // This may destroy the last references, whose destructors lock the mutex.
      done.reset();
      lock.lock();
    }
  }

  // On the issuing thread, when nothing is left to do.
  void free() {
    scratch.reset();
    events.clear();
    memory.reset();
    pinned.reset();
    stream.reset();
    device.reset();
  }

  // 2. What the issuing thread does for a submission.

  // Memory, contexts, zeros and constants, so that what can fail fails before the first launch.
  void begin(const std::shared_ptr<Submission>& submission) {
    Registers& registers = *submission->registers;
    noteUses(*submission);
    // With other registers this is known only when the earlier submissions have ended.
    if (submission->others.empty()) refuseWithoutValue(*submission);
    for (const Range& range : submission->results)
      if (!within(range.offset, range.bytes, blockOf(*submission, range.block).bytes_))
        throw Error("INVALID", "a result lies outside of the registers");
    submissions++;
    if (submission->capture && registers.captured_ &&
        registers.captured_->constantsBytes == submission->constants.size() &&
        registers.captured_->instructions == submission->instructions) {
      replay(submission);
      return;
    }
    registers.captured_.reset();

    // 1. Scratch memory of the largest launch, and the constants.
    uint64_t scratchBytes = 0;
    for (const Instruction& instruction : submission->instructions)
      if (const auto* launch = std::get_if<Launch>(&instruction))
        scratchBytes = std::max(scratchBytes, launch->engine->scratchBytes(launch->profile));
    uint64_t fresh = registers.block_ ? 0 : registers.bytes_;
    for (const auto& other : submission->others) fresh += other->block_ ? 0 : other->bytes_;
    try {
      provide(registers);
      for (const auto& other : submission->others) provide(*other);
      submission->constantsBlock_ = memory->take(submission->constants.size());
      if (!scratch || scratch->bytes < scratchBytes) {
        scratch.reset();
        scratch = memory->take(scratchBytes);
      }
    } catch (Error& error) {
      if (error.code() == "DEVICE_MEMORY")
        error.needed = fresh + submission->constants.size() + scratchBytes;
      throw;
    }

    // 2. Every operand lies within its block.
    int64_t index = 0;
    for (const Instruction& instruction : submission->instructions) {
      if (const auto* launch = std::get_if<Launch>(&instruction))
        checkLaunch(*submission, *launch, index++);
      else
        checkCopy(*submission, std::get<CopyBytes>(instruction));
    }

    // 3. Zeros and constants.
    if (submission->capture) clear(registers);
    upload(*submission);
  }

  static Registers& blockOf(const Submission& submission, uint32_t block) {
    return block == 0 ? *submission.registers : *submission.others.at(block - 1);
  }

  // Memory for registers that have none yet: zeros.
  void provide(Registers& registers) {
    if (registers.block_) return;
    registers.block_ = memory->take(registers.bytes_);
    try {
      clear(registers);
    } catch (const Error&) {
      registers.block_.reset();
      throw;
    }
  }

  void clear(const Registers& registers) {
    driver().check(driver().cuMemsetD8Async(registers.block_->address(), 0, std::max<uint64_t>(registers.bytes_, 1),
                                            stream.get()),
                   "cuMemsetD8Async");
  }

  // Notes which of the other registers a submission reads before it writes them, and which it writes.
  static void noteUses(Submission& submission) {
    submission.reads_.assign(submission.others.size(), false);
    submission.writes_.assign(submission.others.size(), false);
    const auto check = [&](uint32_t block) {
      if (block > submission.others.size()) throw Error("INVALID", "an operand is in registers that do not exist");
    };
    const auto read = [&](const Operand& operand) {
      check(operand.block);
      if (!operand.constant && operand.block > 0 && !submission.writes_[operand.block - 1])
        submission.reads_[operand.block - 1] = true;
    };
    const auto write = [&](const Operand& operand) {
      check(operand.block);
      if (operand.block > 0) submission.writes_[operand.block - 1] = true;
    };
    for (const Instruction& instruction : submission.instructions) {
      if (const auto* copy = std::get_if<CopyBytes>(&instruction)) {
        read(copy->from);
        write(copy->to);
        continue;
      }
      const Launch& launch = std::get<Launch>(instruction);
      const std::vector<EngineTensor>& tensors = launch.engine->tensors();
      for (size_t tensor = 0; tensor < tensors.size() && tensor < launch.operands.size(); tensor++)
        if (tensors[tensor].input) read(launch.operands[tensor]);
      for (size_t tensor = 0; tensor < tensors.size() && tensor < launch.operands.size(); tensor++)
        if (!tensors[tensor].input) write(launch.operands[tensor]);
    }
    for (const Range& range : submission.results) {
      Operand operand;
      operand.block = range.block;
      read(operand);
    }
    if (submission.capture && !submission.others.empty())
      throw Error("INVALID", "a program over several registers cannot be captured");
  }

  static void refuseWithoutValue(const Submission& submission) {
    // It begins with zeros, so earlier failures in these registers do not matter.
    if (submission.capture) return;
    const bool alone = submission.others.empty();
    if (alone && submission.registers->failed_)
      throw Error("CANCELLED", "an earlier submission to these registers did not finish");
    for (size_t other = 0; other < submission.reads_.size(); other++)
      if (submission.reads_[other] && submission.others[other]->failed_) {
        Error error("NO_VALUE", "a register has no value, since the submission that was to write it failed");
        error.operand = static_cast<int64_t>(other) + 1;
        throw error;
      }
  }

  void upload(Submission& submission) {
    const uint64_t bytes = submission.constants.size();
    if (bytes == 0) return;
    submission.upload_ = pinned->take(bytes);
    std::memcpy(submission.upload_->address(), submission.constants.data(), bytes);
    driver().check(driver().cuMemcpyHtoDAsync(submission.constantsBlock_->address(), submission.upload_->address(),
                                              bytes, stream.get()),
                   "cuMemcpyHtoDAsync");
  }

  static bool within(uint64_t offset, uint64_t bytes, uint64_t size) { return offset <= size && bytes <= size - offset; }

  static bool within(const Submission& submission, const Operand& operand, uint64_t bytes) {
    return within(operand.offset, bytes,
                  operand.constant ? submission.constants.size() : blockOf(submission, operand.block).bytes_);
  }

  void checkLaunch(const Submission& submission, const Launch& launch, int64_t index) {
    const auto wrong = [&](size_t operand, const char* why) {
      Error error("INVALID", "an operand of launch " + std::to_string(index) + " " + why);
      error.launch = index;
      error.operand = static_cast<int64_t>(operand);
      return error;
    };
    try {
      const Context& context = launch.engine->context(launch.profile, stream.get());
      const std::vector<EngineTensor>& tensors = launch.engine->tensors();
      for (size_t tensor = 0; tensor < tensors.size(); tensor++) {
        const Operand& operand = launch.operands.at(tensor);
        if (operand.offset % kAlignment != 0) throw wrong(tensor, "is not aligned");
        if (operand.constant && !tensors[tensor].input) throw wrong(tensor, "would write to a constant");
        if (!within(submission, operand, context.bytes()[tensor])) throw wrong(tensor, "lies outside of its memory");
      }
    } catch (Error& error) {
      error.launch = index;
      throw;
    }
  }

  static void checkCopy(const Submission& submission, const CopyBytes& copy) {
    if (copy.to.constant || !within(submission, copy.from, copy.bytes) || !within(submission, copy.to, copy.bytes))
      throw Error("INVALID", "a copy reaches outside of its memory");
  }

  DevicePointer addressOf(const Submission& submission, const Operand& operand) const {
    return (operand.constant ? submission.constantsBlock_ : blockOf(submission, operand.block).block_)->address() +
           operand.offset;
  }

  void issue(const std::shared_ptr<Submission>& submission) {
    const Instruction& instruction = submission->instructions[submission->next_++];
    if (const auto* copy = std::get_if<CopyBytes>(&instruction)) {
      issueCopy(*submission, *copy);
      return;
    }
    const Launch& launch = std::get<Launch>(instruction);
    auto flight = std::make_unique<InFlight>();
    flight->kind = InFlight::Kind::kLaunch;
    flight->submission = submission;
    flight->launch = &launch;
    flight->index = submission->launches_++;
    try {
      uint64_t bytes = 0;
      flight->watches = watchesOf(launch, launch.engine->context(launch.profile, stream.get()).bytes(), bytes);
      if (bytes > 0) flight->host = pinned->take(bytes);
      flight->start = takeEvent();
      flight->end = takeEvent();
      record(flight->start, kEventRecordDefault);
      issueLaunch(*submission, launch, flight->watches, flight->host);
      record(flight->end, kEventRecordDefault);
    } catch (Error& error) {
      error.launch = flight->index;
      // The device may still write there.
      flight->end.reset();
      flight->kind = InFlight::Kind::kEnd;
      held.push_back(std::move(flight));
      throw;
    }
    launches++;
    const std::lock_guard<std::mutex> lock(mutex);
    launchesInFlight++;
    inFlight.push_back(std::move(flight));
    retiring.notify_one();
  }

  void issueCopy(const Submission& submission, const CopyBytes& copy) {
    driver().check(driver().cuMemcpyDtoDAsync(addressOf(submission, copy.to), addressOf(submission, copy.from),
                                              copy.bytes, stream.get()),
                   "cuMemcpyDtoDAsync");
  }

  void issueLaunch(const Submission& submission, const Launch& launch, const std::vector<Watch>& watches,
                   const PinnedMemoryPool::Shared& host) {
    Context& context = launch.engine->context(launch.profile, stream.get());
    context.useScratch(scratch->address(), scratch->bytes);
    for (size_t tensor = 0; tensor < launch.operands.size(); tensor++)
      context.bind(tensor, addressOf(submission, launch.operands[tensor]));
    context.enqueue(stream.get());
    for (const Watch& watch : watches)
      driver().check(
          driver().cuMemcpyDtoHAsync(static_cast<uint8_t*>(host->address()) + watch.offset,
                                     addressOf(submission, launch.operands[watch.tensor]), watch.bytes, stream.get()),
          "cuMemcpyDtoHAsync");
  }

  // The end of a submission, failed or not: its results, and an event after all of its work.
  void finish(const std::shared_ptr<Submission>& submission) {
    auto flight = std::make_unique<InFlight>();
    flight->submission = submission;
    bool complete = false;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      complete = !mustStop(*submission);
    }
    try {
      if (complete) {
        if (submission->capture && !submission->replayed_) tryCapture(*submission);
        download(*submission, *flight);
      }
      OwnedEvent end = takeEvent();
      record(end, kEventRecordDefault);
      flight->end = std::move(end);
    } catch (const Error& error) {
      fail(*submission, error);
    } catch (const std::bad_alloc&) {
      fail(*submission, hostMemory());
    }
    const std::lock_guard<std::mutex> lock(mutex);
    submission->stopped_ = true;
    inFlight.push_back(std::move(flight));
    // The work of a failed launch has ended when this end has.
    for (auto& left : held) inFlight.push_back(std::move(left));
    held.clear();
    retiring.notify_one();
  }

  // Results that lie beside each other, apart from their alignment, are downloaded in one transfer. The layout of
  // registers (lib/runtimes/tensorrt) places them so.
  void download(const Submission& submission, InFlight& flight) {
    uint64_t bytes = 0;
    for (const Range& range : submission.results) bytes += range.bytes + kAlignment;
    if (bytes == 0) return;
    flight.host = pinned->take(bytes);
    uint64_t at = 0;
    const std::vector<Range>& ranges = submission.results;
    for (size_t index = 0; index < ranges.size();) {
      const uint64_t begin = ranges[index].offset;
      const uint32_t block = ranges[index].block;
      uint64_t end = begin;
      for (; index < ranges.size() && ranges[index].block == block && ranges[index].offset >= end &&
             ranges[index].offset - end < kAlignment;
           index++) {
        flight.results.push_back(at + ranges[index].offset - begin);
        end = ranges[index].offset + ranges[index].bytes;
      }
      if (end > begin)
        driver().check(driver().cuMemcpyDtoHAsync(static_cast<uint8_t*>(flight.host->address()) + at,
                                                  blockOf(submission, block).block_->address() + begin, end - begin,
                                                  stream.get()),
                       "cuMemcpyDtoHAsync");
      at += end - begin;
    }
  }

  // 3. CUDA graphs.

  // Everything has been launched once by now, which TensorRT requires before a capture. A program that cannot be
  // captured runs launch by launch as before.
  void tryCapture(Submission& submission) {
    try {
      submission.registers->captured_ = capture(submission);
    } catch (const Error& error) {
      if (error.code() == "DEVICE_LOST") throw;
      submission.notCaptured_ = error.what();
    }
  }

  std::unique_ptr<CapturedProgram> capture(const Submission& submission) {
    auto captured = std::make_unique<CapturedProgram>();
    captured->instructions = submission.instructions;
    captured->constants = submission.constantsBlock_;
    captured->constantsBytes = submission.constants.size();
    captured->scratch = scratch;

    // 1. Events and host memory, which cannot be made during a capture.
    uint64_t bytes = 0;
    for (const Instruction& instruction : captured->instructions) {
      const auto* launch = std::get_if<Launch>(&instruction);
      if (launch == nullptr) continue;
      const Context& context = launch->engine->context(launch->profile, stream.get());
      if (!context.capturable(stream.get())) throw Error("LAUNCH", "TensorRT does not let a launch be captured");
      CapturedLaunch entry;
      entry.launch = launch;
      entry.watches = watchesOf(*launch, context.bytes(), bytes);
      entry.start = createEvent(*device);
      entry.end = createEvent(*device);
      captured->launches.push_back(std::move(entry));
    }
    captured->host = pinned->take(bytes);

    // 2. The instructions again, recorded into a CUDA graph.
    driver().check(driver().cuStreamBeginCapture(stream.get(), kCaptureThreadLocal), "cuStreamBeginCapture");
    CUgraph_st* recorded = nullptr;
    try {
      auto entry = captured->launches.begin();
      for (const Instruction& instruction : captured->instructions) {
        if (const auto* copy = std::get_if<CopyBytes>(&instruction)) {
          issueCopy(submission, *copy);
          continue;
        }
        record(entry->start, kEventRecordExternal);
        issueLaunch(submission, *entry->launch, entry->watches, captured->host);
        record(entry->end, kEventRecordExternal);
        ++entry;
      }
    } catch (const Error&) {
      driver().cuStreamEndCapture(stream.get(), &recorded);
      const OwnedGraph dropped(driver(), recorded);
      throw;
    }
    driver().check(driver().cuStreamEndCapture(stream.get(), &recorded), "cuStreamEndCapture");
    const OwnedGraph graph(driver(), recorded);
    CUgraphExec_st* executable = nullptr;
    driver().check(driver().cuGraphInstantiateWithFlags(&executable, recorded, 0), "cuGraphInstantiateWithFlags");
    captured->graph = OwnedGraphExec(driver(), executable);
    return captured;
  }

  void replay(const std::shared_ptr<Submission>& submission) {
    Registers& registers = *submission->registers;
    CapturedProgram& captured = *registers.captured_;
    submission->replayed_ = true;
    submission->constantsBlock_ = captured.constants;
    submission->next_ = submission->instructions.size();
    clear(registers);
    upload(*submission);
    auto flight = std::make_unique<InFlight>();
    flight->kind = InFlight::Kind::kReplay;
    flight->submission = submission;
    OwnedEvent end = takeEvent();
    driver().check(driver().cuGraphLaunch(captured.graph.get(), stream.get()), "cuGraphLaunch");
    std::optional<Error> unrecorded;
    try {
      record(end, kEventRecordDefault);
      flight->end = std::move(end);
    } catch (const Error& error) {
      unrecorded = error;
    }
    replays++;
    launches += captured.launches.size();
    {
      const std::lock_guard<std::mutex> lock(mutex);
      captured.running = true;
      inFlight.push_back(std::move(flight));
      retiring.notify_one();
    }
    if (unrecorded) throw *unrecorded;
  }

  // 4. What the retiring thread does.

  void wait(const InFlight& flight) {
    const CudaResult result = flight.end ? driver().cuEventSynchronize(flight.end.get())
                                         : driver().cuStreamSynchronize(stream.get());
    if (result == kCudaSuccess) return;
    Error error = driver().failure(result, flight.end ? "cuEventSynchronize" : "cuStreamSynchronize");
    // Whatever the error is: the device must have ended its work before anything else is done.
    if (error.code() != "DEVICE_LOST") {
      const CudaResult rest = driver().cuStreamSynchronize(stream.get());
      if (rest != kCudaSuccess)
        error = Error("DEVICE_LOST", driver().failure(rest, "cuStreamSynchronize").what());
    }
    if (flight.kind == InFlight::Kind::kLaunch) error.launch = flight.index;
    fail(*flight.submission, error);
  }

  void retire(InFlight& flight) {
    Submission& submission = *flight.submission;
    const bool failed = hasFailed(submission);
    switch (flight.kind) {
      case InFlight::Kind::kLaunch:
        if (!failed)
          guarded(submission, flight.index, [&] {
            refuseWithoutValue(submission);
            report(submission, flight.index, *flight.launch, flight.start, flight.end, flight.watches, flight.host);
          });
        break;
      case InFlight::Kind::kReplay: {
        CapturedProgram& captured = *submission.registers->captured_;
        for (uint32_t index = 0; index < captured.launches.size() && !hasFailed(submission); index++) {
          const CapturedLaunch& entry = captured.launches[index];
          guarded(submission, index, [&] {
            report(submission, index, *entry.launch, entry.start, entry.end, entry.watches, captured.host);
          });
        }
        const std::lock_guard<std::mutex> lock(mutex);
        captured.running = false;
        break;
      }
      case InFlight::Kind::kEnd:
        if (submission.settled_) break;
        end(submission, flight);
        break;
    }
  }

  template <typename Body>
  void guarded(Submission& submission, uint32_t launch, Body body) {
    try {
      body();
    } catch (Error& error) {
      error.launch = launch;
      fail(submission, error);
    } catch (const std::bad_alloc&) {
      fail(submission, hostMemory());
    }
  }

  void report(const Submission& submission, uint32_t index, const Launch& launch, const OwnedEvent& start,
              const OwnedEvent& end, const std::vector<Watch>& watches, const PinnedMemoryPool::Shared& host) {
    float milliseconds = 0;
    driver().check(driver().cuEventElapsedTime(&milliseconds, start.get(), end.get()), "cuEventElapsedTime");
    const auto dataOf = [&](const Watch& watch) { return static_cast<const uint8_t*>(host->address()) + watch.offset; };
    for (const Watch& watch : watches)
      if (watch.finite && !allFinite(dataOf(watch), watch.bytes)) {
        Error error("NOT_FINITE", "a value that must be finite is not");
        error.operand = watch.tensor;
        throw error;
      }
    if (!submission.onLaunch) return;
    LaunchReport done;
    done.launch = index;
    done.milliseconds = static_cast<double>(milliseconds);
    for (const uint32_t tensor : launch.reported)
      for (const Watch& watch : watches)
        if (watch.tensor == tensor) done.values.emplace_back(dataOf(watch), dataOf(watch) + watch.bytes);
    submission.onLaunch(std::move(done));
  }

  void end(Submission& submission, const InFlight& flight) {
    std::optional<Error> error;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      error = submission.failure_;
    }
    if (!error && submission.cancelled_) error = Error("CANCELLED", "the run was stopped");
    // An earlier submission may have failed since this one began.
    try {
      if (!error) refuseWithoutValue(submission);
    } catch (const Error& without) {
      error = without;
    }
    std::vector<std::vector<uint8_t>> results;
    if (!error && flight.host) {
      const auto* data = static_cast<const uint8_t*>(flight.host->address());
      for (size_t index = 0; index < submission.results.size(); index++) {
        const uint8_t* from = data + flight.results[index];
        results.emplace_back(from, from + submission.results[index].bytes);
      }
    }
    settle(submission, std::move(error), std::move(results));
  }

  // 5. Failures and ends.

  bool hasFailed(const Submission& submission) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return submission.failure_.has_value();
  }

  Error lostError() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return *lost;
  }

  void fail(Submission& submission, const Error& error) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!submission.failure_) submission.failure_ = error;
    if (error.code() == "DEVICE_LOST" && !lost) {
      lost = Error("DEVICE_LOST", error.what());
    }
    issuing.notify_one();
  }

  void settle(Submission& submission, std::optional<Error> error, std::vector<std::vector<uint8_t>> results) {
    if (error && submission.others.empty()) submission.registers->failed_ = true;
    // Called in the order of submission: later ones read these flags.
    if (submission.writes_.size() != submission.others.size()) {
      try {
        noteUses(submission);
      } catch (const Error&) {
        submission.writes_.assign(submission.others.size(), true);
      }
    }
    for (size_t other = 0; other < submission.others.size(); other++)
      if (submission.writes_[other]) submission.others[other]->failed_ = error.has_value();
    submission.settled_ = true;
    // Released before `onDone` is called: a `close` after it then waits until all of this is freed.
    submission.constantsBlock_.reset();
    submission.upload_.reset();
    submission.instructions.clear();
    submission.registers.reset();
    submission.others.clear();
    Outcome outcome;
    outcome.error = std::move(error);
    outcome.results = std::move(results);
    outcome.replayed = submission.replayed_;
    outcome.notCaptured = std::move(submission.notCaptured_);
    const auto done = std::move(submission.onDone);
    submission.onDone = nullptr;
    if (done) done(std::move(outcome));
  }

  // 6. Events.

  OwnedEvent takeEvent() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!events.empty()) {
        OwnedEvent event = std::move(events.back());
        events.pop_back();
        return event;
      }
    }
    return createEvent(*device);
  }

  void record(const OwnedEvent& event, unsigned flags) {
    driver().check(driver().cuEventRecordWithFlags(event.get(), stream.get(), flags), "cuEventRecord");
  }

  // 7. Engines and registers, which are released on any thread and freed on the issuing one.

  void release(std::shared_ptr<const void> thing) {
    const std::lock_guard<std::mutex> lock(mutex);
    released.push_back(std::move(thing));
    issuing.notify_one();
  }

  void ready(uint64_t id) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (Closer& closer : closers)
      if (closer.id == id) closer.ready = true;
    issuing.notify_one();
  }

  // Waits until what was released has been freed. Not to be called on the executor's own threads.
  void flush() {
    auto freed = std::make_shared<std::promise<void>>();
    const std::future<void> done = freed->get_future();
    {
      const std::lock_guard<std::mutex> lock(mutex);
      closers.push_back({++closerCount, [freed] { freed->set_value(); }, 0, true});
      issuing.notify_one();
    }
    done.wait();
  }

  void addCommand(std::function<void()> command) {
    const std::lock_guard<std::mutex> lock(mutex);
    commands.push_back(std::move(command));
    issuing.notify_one();
  }

  const std::shared_ptr<const TensorRtLibrary> library;
  std::shared_ptr<const Device> device;
  OwnedStream stream;
  std::shared_ptr<DeviceMemoryPool> memory;
  std::shared_ptr<PinnedMemoryPool> pinned;

  // The issuing thread's own.
  DeviceMemoryPool::Shared scratch;
  std::vector<std::unique_ptr<InFlight>> held;

  mutable std::mutex mutex;
  std::condition_variable issuing;
  std::condition_variable retiring;
  std::deque<std::shared_ptr<Submission>> queue;
  std::deque<std::function<void()>> commands;
  std::deque<std::unique_ptr<InFlight>> inFlight;
  size_t launchesInFlight = 0;
  std::vector<std::shared_ptr<const void>> released;
  std::vector<Closer> closers;
  uint64_t closerCount = 0;
  uint64_t submitted = 0;
  std::vector<OwnedEvent> events;
  std::optional<Error> lost;
  bool closing = false;
  bool retirerStops = false;

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

std::shared_ptr<Executor> Executor::open(std::shared_ptr<const TensorRtLibrary> library, int ordinal) {
  // Weak references only: nothing here has to be destroyed when the process exits.
  static auto* mutex = new std::mutex();
  static auto* opened = new std::map<std::pair<std::string, int>, std::weak_ptr<Executor>>();
  const std::lock_guard<std::mutex> lock(*mutex);
  std::weak_ptr<Executor>& known = (*opened)[{library->path(), ordinal}];
  if (std::shared_ptr<Executor> existing = known.lock()) {
    const std::lock_guard<std::mutex> state(existing->state_->mutex);
    if (!existing->state_->lost) return existing;
  }
  const Busy busy;
  const auto state = std::make_shared<ExecutorState>(std::move(library), ordinal);
  ExecutorState::start(state);
  const std::shared_ptr<Executor> executor(new Executor(state));
  known = executor;
  return executor;
}

Executor::~Executor() {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->closing = true;
  state_->issuing.notify_one();
}

bool Executor::quiesce(std::chrono::milliseconds timeout) {
  Quiescence& all = quiescence();
  std::unique_lock<std::mutex> lock(all.mutex);
  all.ending = true;
  return all.changed.wait_for(lock, timeout, [&] { return all.busy == 0; });
}

const CudaDevice& Executor::device() const noexcept { return state_->device->properties(); }

std::shared_ptr<Engine> Executor::load(const std::string& plan, const std::string& identity) {
  ExecutorState& state = *state_;
  std::unique_lock<std::mutex> lock(state.enginesMutex);
  for (;;) {
    if (std::shared_ptr<Engine> known = state.engines[identity].lock()) return known;
    if (state.loading.count(identity) == 0) break;
    state.engineLoaded.wait(lock);
  }
  for (auto known = state.engines.begin(); known != state.engines.end();)
    known = known->second.expired() ? state.engines.erase(known) : std::next(known);
  state.loading.insert(identity);
  lock.unlock();
  std::shared_ptr<Engine> engine;
  std::optional<Error> failure;
  try {
    const Busy busy;
    state.device->makeCurrent();
    const auto create = [&] { return new Engine(state.library, state.device, plan, identity); };
    Engine* created = nullptr;
    // Read before the attempt: what was released may be freed at any time during it.
    const uint64_t before = state.device->memory().free;
    try {
      created = create();
    } catch (const Error&) {
      // Freeing what was released and what the pool keeps may make room.
      state.flush();
      state.memory->trim();
      if (state.device->memory().free <= before) throw;
      created = create();
    }
    engine = std::shared_ptr<Engine>(created, [executor = shared_from_this()](Engine* unused) mutable {
      // The weak references above keep this function, but must not keep the executor.
      const std::shared_ptr<Executor> last = std::move(executor);
      last->state_->release(std::shared_ptr<const void>(unused));
    });
  } catch (const Error& error) {
    failure = error;
  } catch (const std::bad_alloc&) {
    failure = Error("OUT_OF_MEMORY", "the machine has too little memory for the engine");
  }
  lock.lock();
  if (engine) state.engines[identity] = engine;
  state.loading.erase(identity);
  state.engineLoaded.notify_all();
  if (failure) throw *failure;
  return engine;
}

std::shared_ptr<Registers> Executor::createRegisters(uint64_t bytes) {
  return std::shared_ptr<Registers>(new Registers(bytes), [executor = shared_from_this()](Registers* unused) {
    executor->state_->release(std::shared_ptr<const void>(unused));
  });
}

void Executor::submit(std::shared_ptr<Submission> submission) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  submission->number_ = ++state_->submitted;
  state_->queue.push_back(std::move(submission));
  state_->issuing.notify_one();
}

void Executor::cancel(const std::shared_ptr<Submission>& submission) {
  if (withdraw(submission)) return;
  const std::lock_guard<std::mutex> lock(state_->mutex);
  submission->cancelled_ = true;
  state_->issuing.notify_one();
}

bool Executor::withdraw(const std::shared_ptr<Submission>& submission) {
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    auto& queue = state_->queue;
    const auto waiting = std::find(queue.begin(), queue.end(), submission);
    // With other registers it has to fail in the order of submission.
    if (waiting == queue.end() || submission->begun_ || !submission->others.empty()) return false;
    submission->cancelled_ = true;
    queue.erase(waiting);
    state_->issuing.notify_one();
  }
  state_->settle(*submission, Error("CANCELLED", "the run was stopped"), {});
  return true;
}

void Executor::prepare(std::shared_ptr<Engine> engine, size_t profile,
                       std::function<void(std::optional<Error>, TensorShapes)> onDone) {
  ExecutorState* state = state_.get();
  state->addCommand([state, engine = std::move(engine), profile, onDone = std::move(onDone)] {
    std::optional<Error> failure;
    TensorShapes shapes;
    try {
      shapes = engine->context(profile, state->stream.get()).shapes();
    } catch (const Error& error) {
      failure = error;
    }
    onDone(std::move(failure), std::move(shapes));
  });
}

void Executor::memory(std::function<void(std::optional<Error>, DeviceMemoryInfo)> onDone) {
  ExecutorState* state = state_.get();
  state->addCommand([state, onDone = std::move(onDone)] {
    std::optional<Error> failure;
    DeviceMemoryInfo info;
    try {
      info = state->device->memory();
    } catch (const Error& error) {
      failure = error;
    }
    onDone(std::move(failure), info);
  });
}

void Executor::close(std::shared_ptr<Executor> executor, std::function<void()> onDone) {
  const std::shared_ptr<ExecutorState> state = executor->state_;
  uint64_t id = 0;
  {
    const std::lock_guard<std::mutex> lock(state->mutex);
    id = ++state->closerCount;
    state->closers.push_back({id, std::move(onDone), state->submitted, false});
  }
  // With the last handle the executor ends and calls all closers.
  executor.reset();
  state->ready(id);
}

ExecutorStatistics Executor::statistics() const {
  ExecutorStatistics result;
  result.launches = state_->launches;
  result.submissions = state_->submissions;
  result.replays = state_->replays;
  result.deviceBytes = state_->memory->bytes();
  result.pinnedBytes = state_->pinned->bytes();
  result.busySeconds = static_cast<double>(state_->busyNanoseconds.load()) * 1e-9;
  const std::lock_guard<std::mutex> lock(state_->enginesMutex);
  for (const auto& [identity, engine] : state_->engines)
    if (!engine.expired()) result.engines++;
  return result;
}

}  // namespace flowturbo
