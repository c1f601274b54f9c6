// Programs as CUDA graphs: recorded at the end of their first run, replayed with one call after that. A program that
// cannot be captured runs launch by launch, and is not tried again as long as its registers exist.
#include "executor_state.h"

namespace flowturbo {
namespace {

// In a capture: the event is recorded whenever the CUDA graph runs.
constexpr unsigned kEventRecordExternal = 1;
constexpr int kCaptureThreadLocal = 1;

}  // namespace

// Makes the registers remember this program, unless they do. Another one that they remember is given up.
void ExecutorState::remember(const Submission& submission) {
  Registers& registers = *submission.registers;
  if (registers.captured_ && registers.captured_->matches(submission)) return;
  discard(registers);
  registers.captured_ = std::make_unique<CapturedProgram>(submission.instructions, submission.constants.size());
}

// Its contexts and its graph are destroyed when nothing runs: its first run may be on the stream.
void ExecutorState::discard(Registers& registers) {
  captured.erase(&registers);
  if (registers.captured_) release(std::shared_ptr<const void>(std::move(registers.captured_)));
}

// At the end of the first run: everything has been launched once by now, with the contexts of the program.
void ExecutorState::tryCapture(Submission& submission) {
  Registers& registers = *submission.registers;
  try {
    capture(submission, *registers.captured_);
    captured.insert(&registers);
  } catch (const Error& error) {
    if (error.code() == "DEVICE_LOST") throw;
    submission.notCaptured_ = error.what();
    if (!error.log.empty()) submission.notCaptured_ += ": " + error.log.front();
    // Only the reason is kept.
    discard(registers);
    registers.captured_ = std::make_unique<CapturedProgram>(submission.instructions, submission.constants.size());
    registers.captured_->refused = submission.notCaptured_;
  }
}

void ExecutorState::capture(const Submission& submission, CapturedProgram& program) {
  program.constants = submission.constantsBlock_;
  program.scratch = scratch;

  // 1. Events and host memory, which cannot be made during a capture. These events are never waited for.
  uint64_t bytes = 0;
  program.launches.clear();
  for (const Instruction& instruction : program.instructions) {
    const auto* launch = std::get_if<Launch>(&instruction);
    if (launch == nullptr) continue;
    const Context& context = contextOf(submission, *launch);
    if (!context.capturable(stream.get())) throw Error("LAUNCH", "TensorRT does not let a launch be captured");
    CapturedLaunch entry;
    entry.launch = launch;
    entry.watches = watchesOf(*launch, context.bytes(), bytes);
    entry.start = createEvent(*device, EventUse::kTime);
    entry.end = createEvent(*device, EventUse::kTime);
    program.launches.push_back(std::move(entry));
  }
  program.host = pinned->take(bytes);

  // 2. The instructions again, recorded into a CUDA graph.
  CUgraph_st* recorded = nullptr;
  {
    // A launch that allocates or waits would make a graph that does not do so when it runs: it has to fail.
    const std::lock_guard<std::mutex> alone(capturing);
    const StrictCapture strict(*device);
    driver().check(driver().cuStreamBeginCapture(stream.get(), kCaptureThreadLocal), "cuStreamBeginCapture");
    try {
      auto entry = program.launches.begin();
      for (const Instruction& instruction : program.instructions) {
        if (const auto* copy = std::get_if<CopyBytes>(&instruction)) {
          issueCopy(submission, *copy);
          continue;
        }
        record(entry->start, kEventRecordExternal);
        issueLaunch(submission, *entry->launch);
        issueWatches(submission, *entry->launch, entry->watches, program.host);
        record(entry->end, kEventRecordExternal);
        ++entry;
      }
    } catch (...) {
      // Whatever happened: the stream must not go on capturing.
      driver().cuStreamEndCapture(stream.get(), &recorded);
      const OwnedGraph dropped(driver(), recorded);
      throw;
    }
    driver().check(driver().cuStreamEndCapture(stream.get(), &recorded), "cuStreamEndCapture");
  }
  const OwnedGraph graph(driver(), recorded);
  CUgraphExec_st* executable = nullptr;
  driver().check(driver().cuGraphInstantiateWithFlags(&executable, recorded, 0), "cuGraphInstantiateWithFlags");
  program.graph = OwnedGraphExec(driver(), executable);
}

void ExecutorState::replay(const std::shared_ptr<Submission>& submission) {
  Registers& registers = *submission->registers;
  CapturedProgram& program = *registers.captured_;
  submission->replayed_ = true;
  submission->constantsBlock_ = program.constants;
  submission->next_ = submission->instructions.size();
  clear(registers);
  upload(*submission);
  auto flight = std::make_unique<InFlight>();
  flight->kind = InFlight::Kind::kReplay;
  flight->submission = submission;
  OwnedEvent end = takeEvent(EventUse::kWait);
  // The first run of a graph may take memory for it.
  withRoom(&registers,
           [&] { driver().check(driver().cuGraphLaunch(program.graph.get(), stream.get()), "cuGraphLaunch"); });
  std::optional<Error> unrecorded;
  try {
    record(end, kEventRecordDefault);
    flight->end = std::move(end);
  } catch (const Error& error) {
    unrecorded = error;
  }
  replays++;
  launches += program.launches.size();
  {
    const std::lock_guard<std::mutex> lock(mutex);
    program.running = true;
    inFlight.push_back(std::move(flight));
    retiring.notify_one();
  }
  if (unrecorded) throw *unrecorded;
}

}  // namespace flowturbo
