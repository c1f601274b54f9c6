// What the retiring thread does with work that the device has ended: it reports launches, looks for values that are not
// finite, and delivers results.
#include <cstring>

#include "executor_state.h"

namespace flowturbo {
namespace {

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

// Does `body`; an error that it throws is the submission's, at that launch.
template <typename Body>
void guarded(ExecutorState& state, Submission& submission, uint32_t launch, Body body) {
  try {
    body();
  } catch (Error& error) {
    error.launch = launch;
    state.fail(submission, error);
  } catch (const std::bad_alloc&) {
    state.fail(submission, hostMemory());
  }
}

}  // namespace

void ExecutorState::wait(const InFlight& flight) {
  // Another submission may be captured on the stream meanwhile, which must not be waited for then.
  const auto waitForStream = [&] {
    const std::lock_guard<std::mutex> alone(capturing);
    return driver().cuStreamSynchronize(stream.get());
  };
  const CudaResult result = flight.end ? driver().cuEventSynchronize(flight.end.get()) : waitForStream();
  if (result == kCudaSuccess) return;
  Error error = driver().failure(result, flight.end ? "cuEventSynchronize" : "cuStreamSynchronize");
  // Whatever the error is: the device must have ended its work before anything else is done.
  if (error.code() != "DEVICE_LOST") {
    const CudaResult rest = waitForStream();
    if (rest != kCudaSuccess)
      error = Error("DEVICE_LOST", driver().failure(rest, "cuStreamSynchronize").what());
  }
  if (flight.kind == InFlight::Kind::kLaunch) error.launch = flight.index;
  fail(*flight.submission, error);
}

void ExecutorState::retire(InFlight& flight) {
  Submission& submission = *flight.submission;
  const bool failed = hasFailed(submission);
  switch (flight.kind) {
    case InFlight::Kind::kLaunch:
      if (!failed)
        guarded(*this, submission, flight.index, [&] {
          refuseWithoutValue(submission);
          report(submission, flight.index, *flight.launch, flight.start, flight.end, flight.watches, flight.host);
        });
      break;
    case InFlight::Kind::kReplay: {
      CapturedProgram& program = *submission.registers->captured_;
      for (uint32_t index = 0; index < program.launches.size() && !hasFailed(submission); index++) {
        const CapturedLaunch& entry = program.launches[index];
        guarded(*this, submission, index, [&] {
          report(submission, index, *entry.launch, entry.start, entry.end, entry.watches, program.host);
        });
      }
      const std::lock_guard<std::mutex> lock(mutex);
      program.running = false;
      break;
    }
    case InFlight::Kind::kEnd:
      if (submission.settled_) break;
      end(submission, flight);
      break;
  }
}

void ExecutorState::report(const Submission& submission, uint32_t index, const Launch& launch, const OwnedEvent& start,
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

void ExecutorState::end(Submission& submission, const InFlight& flight) {
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

}  // namespace flowturbo
