// What the two tests of the executor without Node share: plans, programs with their results in closed form, and the tests
// that only look at results. executor_test.cpp runs on the simulated device, driver_test.cpp on whatever driver the
// machine has.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <mutex>
#include <thread>

#include "executor.h"
#include "files.h"

namespace flowturbo {

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::fflush(stderr);                                                      \
      _exit(1);                                                                 \
    }                                                                           \
  } while (false)

constexpr uint64_t kElements = 600;
constexpr uint64_t kBytes = kElements * 4;
constexpr uint64_t kRegisterBytes = 2560;

// y = t·2 with t = x + s, where s is one number: t goes through scratch memory.
inline std::string affinePlan(uint64_t weights, int microseconds, const std::string& extra = "") {
  return "flowturbo-simulated 1\nweights " + std::to_string(weights) + "\nmicroseconds " +
         std::to_string(microseconds) +
         "\ninput x f32\ninput s f32\noutput y f32\ntemporary t x\nformula t x s +\nformula y t 2 *\n" + extra +
         "profile x=2,300 s=1 y=2,300\nprofile x=1,300 s=1 y=1,300\n";
}

// y = (x + 1)·2, with more scratch memory than any other.
inline std::string widePlan() {
  return "flowturbo-simulated 1\ninput x f32\noutput y f32\ntemporary t x\nformula t x 1 +\nformula y t 2 *\n"
         "profile x=1,500000 y=1,500000\n";
}

struct Plan {
  std::string path;
  std::string identity;
};

inline Plan writePlan(const std::string& text) {
  char path[] = "/tmp/flowturbo-plan-XXXXXX";
  const int descriptor = mkstemp(path);
  CHECK(descriptor >= 0);
  CHECK(write(descriptor, text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  Plan plan{path, identityOf(descriptor, path)};
  close(descriptor);
  return plan;
}

// The library under test; each of the two tests has its own.
std::shared_ptr<const TensorRtLibrary> library();

inline std::shared_ptr<Executor> openExecutor() { return Executor::open(library(), 0); }

// As in a new process. A lost executor is lost for its process, and a thread that has just released the last thing of it may
// still hold it for a moment.
inline std::shared_ptr<Executor> openExecutorAnew() {
  for (int attempt = 0;; attempt++) {
    try {
      return openExecutor();
    } catch (const Error& error) {
      if (error.code() != "DEVICE_LOST" || attempt == 1000) throw;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
}

inline void closeExecutor(std::shared_ptr<Executor> executor) {
  std::promise<void> closed;
  Executor::close(std::move(executor), [&] { closed.set_value(); });
  closed.get_future().wait();
}

struct Run {
  std::promise<Outcome> promise;
  std::mutex mutex;
  std::vector<LaunchReport> reports;
  std::shared_ptr<Submission> submission = std::make_shared<Submission>();

  std::future<Outcome> start(Executor& executor) {
    submission->onLaunch = [this](LaunchReport report) {
      const std::lock_guard<std::mutex> lock(mutex);
      reports.push_back(std::move(report));
    };
    submission->onDone = [this](Outcome outcome) { promise.set_value(std::move(outcome)); };
    std::future<Outcome> future = promise.get_future();
    executor.submit(submission);
    return future;
  }
};

inline std::vector<uint8_t> bytesOf(const std::vector<float>& values) {
  std::vector<uint8_t> bytes(values.size() * 4);
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

inline std::vector<float> floatsOf(const std::vector<uint8_t>& bytes) {
  std::vector<float> values(bytes.size() / 4);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

// Constants: x, then one number for each launch. Two registers, which are input and output in turn.
inline void fill(Submission& submission, std::shared_ptr<Registers> registers, const std::shared_ptr<Engine>& engine,
          int launches, bool fromRegisters = false) {
  submission.registers = std::move(registers);
  submission.constants.assign(kRegisterBytes + static_cast<uint64_t>(launches) * 256, 0);
  std::vector<float> x(kElements);
  for (size_t index = 0; index < x.size(); index++) x[index] = static_cast<float>(index) / 8;
  const std::vector<uint8_t> bytes = bytesOf(x);
  std::copy(bytes.begin(), bytes.end(), submission.constants.begin());
  for (int launch = 0; launch < launches; launch++) {
    const float number = static_cast<float>(launch + 1) / 4;
    std::memcpy(submission.constants.data() + kRegisterBytes + launch * 256, &number, 4);
    Launch instruction;
    instruction.engine = engine;
    const uint64_t from = launch % 2 == 0 ? kRegisterBytes : 0;
    const uint64_t to = launch % 2 == 0 ? 0 : kRegisterBytes;
    instruction.operands = {Operand{launch == 0 && !fromRegisters, launch == 0 && !fromRegisters ? 0 : from},
                            Operand{true, kRegisterBytes + static_cast<uint64_t>(launch) * 256}, Operand{false, to}};
    instruction.finite = {2};
    submission.instructions.emplace_back(std::move(instruction));
  }
  submission.results = {{launches % 2 == 0 ? kRegisterBytes : 0, kBytes}};
}

inline std::vector<float> expected(int launches, std::vector<float> x = {}) {
  if (x.empty())
    for (size_t index = 0; index < kElements; index++) x.push_back(static_cast<float>(index) / 8);
  for (int launch = 0; launch < launches; launch++)
    for (float& value : x) value = (value + static_cast<float>(launch + 1) / 4) * 2;
  return x;
}

inline void checkGood(Executor& executor, const std::shared_ptr<Engine>& engine, int launches = 3) {
  Run run;
  fill(*run.submission, executor.createRegisters(2 * kRegisterBytes), engine, launches);
  const Outcome outcome = run.start(executor).get();
  if (outcome.error) std::fprintf(stderr, "%s: %s\n", outcome.error->code().c_str(), outcome.error->what());
  CHECK(!outcome.error);
  CHECK(floatsOf(outcome.results.at(0)) == expected(launches));
  CHECK(run.reports.size() == static_cast<size_t>(launches));
}

// So many submissions at once, which end in order, each with its own result.
inline void checkInOrder(Executor& executor, const std::shared_ptr<Engine>& engine, int count) {
  std::vector<std::unique_ptr<Run>> runs;
  std::vector<int> order;
  std::promise<void> last;
  for (int index = 0; index < count; index++) {
    runs.push_back(std::make_unique<Run>());
    Submission& submission = *runs.back()->submission;
    fill(submission, executor.createRegisters(2 * kRegisterBytes), engine, 1 + index % 4);
    submission.onDone = [&, index](Outcome outcome) {
      CHECK(!outcome.error);
      CHECK(floatsOf(outcome.results.at(0)) == expected(1 + index % 4));
      order.push_back(index);
      if (index == count - 1) last.set_value();
    };
    executor.submit(runs.back()->submission);
  }
  last.get_future().wait();
  for (int index = 0; index < count; index++) CHECK(order[static_cast<size_t>(index)] == index);
}

// An open executor with one engine; everything is freed at the end.
struct Fixture {
  explicit Fixture(const std::string& text = affinePlan(4096, 0))
      : plan(writePlan(text)), executor(openExecutor()), engine(executor->load(plan.path, plan.identity)) {}
  ~Fixture() {
    engine.reset();
    if (executor) closeExecutor(std::move(executor));
    unlink(plan.path.c_str());
  }

  Plan plan;
  std::shared_ptr<Executor> executor;
  std::shared_ptr<Engine> engine;
};

// What never comes is a failure, not a test that never ends.
template <typename Condition>
void waitUntil(Condition condition) {
  const auto latest = std::chrono::steady_clock::now() + std::chrono::minutes(2);
  while (!condition()) {
    CHECK(std::chrono::steady_clock::now() < latest);
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

// A run that is stopped before it begins is taken from the queue, at whatever moment the executor is about to begin it.
// Threads that contend for the executor's mutex make that moment long.
inline void withdrawsAtAnyMoment() {
  Fixture fixture(affinePlan(0, 0));
  Executor& executor = *fixture.executor;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; thread++)
    threads.emplace_back([&] {
      for (int round = 0; round < 2000; round++) {
        Run run;
        fill(*run.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 1);
        auto outcome = run.start(executor);
        executor.cancel(run.submission);
        CHECK(outcome.wait_for(std::chrono::minutes(1)) == std::future_status::ready);
        const Outcome done = outcome.get();
        CHECK(!done.error || done.error->code() == "CANCELLED");
      }
    });
  for (std::thread& thread : threads) thread.join();
  checkGood(executor, fixture.engine);
}

inline void copiesRows() {
  Fixture fixture;
  Run run;
  run.submission->registers = fixture.executor->createRegisters(2 * kRegisterBytes);
  std::vector<float> x(kElements);
  for (size_t index = 0; index < x.size(); index++) x[index] = static_cast<float>(index);
  run.submission->constants = bytesOf(x);
  // The second row to the first, and 100 numbers from there into another register, which is zeros otherwise.
  run.submission->instructions.emplace_back(CopyBytes{{true, 1200}, {false, 0}, 1200});
  run.submission->instructions.emplace_back(CopyBytes{{false, 400}, {false, kRegisterBytes + 40}, 400});
  run.submission->results = {{0, 1200}, {kRegisterBytes, kBytes}};
  const Outcome outcome = run.start(*fixture.executor).get();
  CHECK(!outcome.error);
  const std::vector<float> first = floatsOf(outcome.results.at(0));
  const std::vector<float> second = floatsOf(outcome.results.at(1));
  for (size_t index = 0; index < 300; index++) CHECK(first[index] == static_cast<float>(300 + index));
  for (size_t index = 0; index < kElements; index++)
    CHECK(second[index] == (index >= 10 && index < 110 ? static_cast<float>(400 + index - 10) : 0));
}

// Submissions over several registers: what one writes the next reads; what a failed one was to write has no value.
inline void keepsRegistersApart() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto own = executor.createRegisters(0);
  const auto a = executor.createRegisters(kRegisterBytes);
  const auto b = executor.createRegisters(kRegisterBytes);
  // y = (x + number)·2 from the constants (registers 0) or the first of the others, to the last of them.
  const auto start = [&](Run& run, bool fromConstants, float number, std::vector<std::shared_ptr<Registers>> others) {
    Submission& submission = *run.submission;
    submission.registers = own;
    submission.others = std::move(others);
    const auto last = static_cast<uint32_t>(submission.others.size());
    submission.constants.assign(kRegisterBytes + 256, 0);
    std::memcpy(submission.constants.data() + kRegisterBytes, &number, 4);
    Launch launch;
    launch.engine = fixture.engine;
    launch.operands = {fromConstants ? Operand{true, 0} : Operand{false, 0, 1}, Operand{true, kRegisterBytes},
                       Operand{false, 0, last}};
    launch.finite = {2};
    submission.instructions.emplace_back(std::move(launch));
    submission.results = {{0, kBytes, last}};
    return run.start(executor);
  };
  const auto check = [](std::future<Outcome> outcome, float value) {
    const Outcome done = outcome.get();
    CHECK(!done.error);
    CHECK(floatsOf(done.results.at(0)) == std::vector<float>(kElements, value));
  };
  for (int round = 0; round < 50; round++) {
    Run first, second, broken, reader, again, last;
    auto one = start(first, true, 1, {a});
    auto two = start(second, false, 1, {a, b});
    auto three = start(broken, true, INFINITY, {a});
    auto four = start(reader, false, 1, {a, b});
    auto five = start(again, true, 3, {a});
    auto six = start(last, false, 0, {a, b});
    check(std::move(one), 2);
    check(std::move(two), 6);
    CHECK(three.get().error->code() == "NOT_FINITE");
    const Outcome lacking = four.get();
    CHECK(lacking.error && lacking.error->code() == "NO_VALUE" && lacking.error->operand == 1);
    CHECK(reader.reports.empty());
    check(std::move(five), 6);
    check(std::move(six), 12);
  }
  // Registers that do not exist, and a capture over several.
  for (const bool capture : {false, true}) {
    Run run;
    run.submission->capture = capture;
    auto outcome = start(run, true, 1, capture ? std::vector{a} : std::vector<std::shared_ptr<Registers>>{});
    if (!capture) {
      CHECK(outcome.get().error.has_value());
      continue;
    }
    CHECK(outcome.get().error->code() == "INVALID");
  }
}

inline void seesWhatIsNotFinite() {
  Fixture fixture(affinePlan(0, 0));
  for (const float value : {INFINITY, -INFINITY, NAN, 3e38f}) {
    Run run;
    fill(*run.submission, fixture.executor->createRegisters(2 * kRegisterBytes), fixture.engine, 3);
    // Of the second launch.
    std::memcpy(run.submission->constants.data() + kRegisterBytes + 256, &value, 4);
    const Outcome outcome = run.start(*fixture.executor).get();
    CHECK(outcome.error && outcome.error->code() == "NOT_FINITE");
    CHECK(outcome.error->launch == 1 && outcome.error->operand == 2);
    CHECK(run.reports.size() == 1);
  }
  checkGood(*fixture.executor, fixture.engine);
}

}  // namespace flowturbo
