// What the issuing thread puts on the stream for one submission: memory and constants, then its instructions one by one,
// then its results.
#include <algorithm>
#include <cstring>

#include "executor_state.h"

namespace flowturbo {
namespace {

bool within(uint64_t offset, uint64_t bytes, uint64_t size) { return offset <= size && bytes <= size - offset; }

}  // namespace

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

// Memory, contexts, zeros and constants, so that what can fail fails before the first launch.
void ExecutorState::begin(const std::shared_ptr<Submission>& submission) {
  Registers& registers = *submission->registers;
  noteUses(*submission);
  // With other registers this is known only when the earlier submissions have ended.
  if (submission->others.empty()) refuseWithoutValue(*submission);
  for (const Range& range : submission->results)
    if (!flowturbo::within(range.offset, range.bytes, blockOf(*submission, range.block).bytes_))
      throw Error("INVALID", "a result lies outside of the registers");
  submissions++;
  if (submission->capture) {
    remember(*submission);
    if (registers.captured_->graph) {
      replay(submission);
      return;
    }
    submission->notCaptured_ = registers.captured_->refused;
  }

  // 1. Memory and contexts. Every operand lies within its block.
  withRoom(&registers, [&] {
    provideAll(*submission);
    int64_t index = 0;
    for (const Instruction& instruction : submission->instructions) {
      if (const auto* launch = std::get_if<Launch>(&instruction))
        checkLaunch(*submission, *launch, index++);
      else
        checkCopy(*submission, std::get<CopyBytes>(instruction));
    }
  });

  // 2. Zeros and constants.
  if (submission->capture) clear(registers);
  upload(*submission);
}

// The registers, the constants, and scratch memory for the largest launch.
void ExecutorState::provideAll(Submission& submission) {
  Registers& registers = *submission.registers;
  uint64_t scratchBytes = 0;
  for (const Instruction& instruction : submission.instructions)
    if (const auto* launch = std::get_if<Launch>(&instruction))
      scratchBytes = std::max(scratchBytes, launch->engine->scratchBytes(launch->profile));
  uint64_t fresh = registers.block_ ? 0 : registers.bytes_;
  for (const auto& other : submission.others) fresh += other->block_ ? 0 : other->bytes_;
  try {
    provide(registers);
    for (const auto& other : submission.others) provide(*other);
    submission.constantsBlock_ = memory->take(submission.constants.size());
    if (!scratch || scratch->bytes < scratchBytes) {
      scratch.reset();
      scratch = memory->take(scratchBytes);
    }
  } catch (Error& error) {
    if (error.code() == "DEVICE_MEMORY") error.needed = fresh + submission.constants.size() + scratchBytes;
    throw;
  }
}

// Memory for registers that have none yet: zeros.
void ExecutorState::provide(Registers& registers) {
  if (registers.block_) return;
  registers.block_ = memory->take(registers.bytes_);
  try {
    clear(registers);
  } catch (const Error&) {
    registers.block_.reset();
    throw;
  }
}

void ExecutorState::clear(const Registers& registers) {
  driver().check(driver().cuMemsetD8Async(registers.block_->address(), 0, std::max<uint64_t>(registers.bytes_, 1),
                                          stream.get()),
                 "cuMemsetD8Async");
}

// Notes which of the other registers a submission reads before it writes them, and which it writes.
void ExecutorState::noteUses(Submission& submission) {
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

void ExecutorState::refuseWithoutValue(const Submission& submission) {
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

void ExecutorState::upload(Submission& submission) {
  const uint64_t bytes = submission.constants.size();
  if (bytes == 0) return;
  submission.upload_ = pinned->take(bytes);
  std::memcpy(submission.upload_->address(), submission.constants.data(), bytes);
  driver().check(driver().cuMemcpyHtoDAsync(submission.constantsBlock_->address(), submission.upload_->address(),
                                            bytes, stream.get()),
                 "cuMemcpyHtoDAsync");
}

bool ExecutorState::within(const Submission& submission, const Operand& operand, uint64_t bytes) {
  return flowturbo::within(operand.offset, bytes,
                operand.constant ? submission.constants.size() : blockOf(submission, operand.block).bytes_);
}

void ExecutorState::checkLaunch(const Submission& submission, const Launch& launch, int64_t index) {
  const auto wrong = [&](size_t operand, const char* why) {
    Error error("INVALID", "an operand of launch " + std::to_string(index) + " " + why);
    error.launch = index;
    error.operand = static_cast<int64_t>(operand);
    return error;
  };
  try {
    const Context& context = contextOf(submission, launch);
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

void ExecutorState::checkCopy(const Submission& submission, const CopyBytes& copy) {
  if (copy.to.constant || !within(submission, copy.from, copy.bytes) || !within(submission, copy.to, copy.bytes))
    throw Error("INVALID", "a copy reaches outside of its memory");
}

Context& ExecutorState::contextOf(const Submission& submission, const Launch& launch) {
  Engine& engine = *launch.engine;
  CapturedProgram* own = submission.capture ? submission.registers->captured_.get() : nullptr;
  if (own == nullptr || !own->refused.empty()) return engine.context(launch.profile, stream.get());
  std::unique_ptr<Context>& context = own->contexts[{&engine, launch.profile}];
  if (!context) context = engine.createContext(launch.profile, stream.get());
  return *context;
}

DevicePointer ExecutorState::addressOf(const Submission& submission, const Operand& operand) const {
  return (operand.constant ? submission.constantsBlock_ : blockOf(submission, operand.block).block_)->address() +
         operand.offset;
}

void ExecutorState::issue(const std::shared_ptr<Submission>& submission) {
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
    flight->watches = watchesOf(launch, contextOf(*submission, launch).bytes(), bytes);
    if (bytes > 0) flight->host = pinned->take(bytes);
    flight->start = takeEvent(EventUse::kTime);
    flight->end = takeEvent(EventUse::kTimedWait);
    record(flight->start, kEventRecordDefault);
    withRoom(submission->registers.get(), [&] { issueLaunch(*submission, launch); });
    issueWatches(*submission, launch, flight->watches, flight->host);
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

void ExecutorState::issueCopy(const Submission& submission, const CopyBytes& copy) {
  driver().check(driver().cuMemcpyDtoDAsync(addressOf(submission, copy.to), addressOf(submission, copy.from),
                                            copy.bytes, stream.get()),
                 "cuMemcpyDtoDAsync");
}

void ExecutorState::issueLaunch(const Submission& submission, const Launch& launch) {
  Context& context = contextOf(submission, launch);
  context.useScratch(scratch->address(), scratch->bytes);
  for (size_t tensor = 0; tensor < launch.operands.size(); tensor++)
    context.bind(tensor, addressOf(submission, launch.operands[tensor]));
  context.enqueue(stream.get());
}

void ExecutorState::issueWatches(const Submission& submission, const Launch& launch, const std::vector<Watch>& watches,
                                 const PinnedMemoryPool::Shared& host) {
  for (const Watch& watch : watches)
    driver().check(
        driver().cuMemcpyDtoHAsync(static_cast<uint8_t*>(host->address()) + watch.offset,
                                   addressOf(submission, launch.operands[watch.tensor]), watch.bytes, stream.get()),
        "cuMemcpyDtoHAsync");
}

// The end of a submission, failed or not: its results, and an event after all of its work.
void ExecutorState::finish(const std::shared_ptr<Submission>& submission) {
  auto flight = std::make_unique<InFlight>();
  flight->submission = submission;
  bool complete = false;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    complete = !mustStop(*submission);
  }
  try {
    if (complete) {
      if (submission->capture && !submission->replayed_ && submission->notCaptured_.empty()) tryCapture(*submission);
      download(*submission, *flight);
    }
    OwnedEvent end = takeEvent(EventUse::kWait);
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
void ExecutorState::download(const Submission& submission, InFlight& flight) {
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

}  // namespace flowturbo
