// The executor on whatever driver the machine has, without Node: `verify:gpu -- --driver` runs it on a GPU, and the tests on
// the simulated driver. The engines are the stand-in's, from the folder of this program, or the one that is named. It
// prints a line for each test and ends with 1 after the first that fails. Unlike executor_test.cpp it cannot stop the
// device or make a call fail; it looks at results, and at what the executor and the device say of their memory.

#include <chrono>
#include <cstdio>

#include "programs.h"

namespace flowturbo {
namespace {

std::string folder;

}  // namespace

std::shared_ptr<const TensorRtLibrary> library() {
  return TensorRtLibrary::open(folder + "/libnvinfer.so.11", folder + "/libnvonnxparser.so.11");
}

namespace {

DeviceMemoryInfo memoryOf(Executor& executor) {
  std::promise<DeviceMemoryInfo> promise;
  executor.memory([&](std::optional<Error> error, DeviceMemoryInfo memory) {
    CHECK(!error);
    promise.set_value(memory);
  });
  return promise.get_future().get();
}

void test(const char* name, void (*body)()) {
  body();
  std::printf("ok %s\n", name);
  std::fflush(stdout);
}

// Of `launches` launches, the first with that number.
std::vector<float> expectedFrom(float number, int launches) {
  std::vector<float> values(kElements);
  for (size_t at = 0; at < values.size(); at++) values[at] = (static_cast<float>(at) / 8 + number) * 2;
  for (int launch = 1; launch < launches; launch++)
    for (float& value : values) value = (value + static_cast<float>(launch + 1) / 4) * 2;
  return values;
}

void runsInOrder() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  CHECK(executor.load(fixture.plan.path, fixture.plan.identity) == fixture.engine);
  for (int launches = 1; launches < 8; launches++) checkGood(executor, fixture.engine, launches);
  checkInOrder(executor, fixture.engine, 200);
}

void runsAhead() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  for (int round = 0; round < 50; round++) {
    Run first, second;
    fill(*first.submission, registers, fixture.engine, 2);
    // Two launches end in the second register, which this one reads.
    fill(*second.submission, registers, fixture.engine, 2, true);
    auto one = first.start(executor);
    auto two = second.start(executor);
    CHECK(floatsOf(one.get().results.at(0)) == expected(2));
    CHECK(floatsOf(two.get().results.at(0)) == expected(2, expected(2)));
  }
  // Submissions after one that failed do not run on its values.
  Run failing, after;
  fill(*failing.submission, registers, fixture.engine, 1);
  fill(*after.submission, registers, fixture.engine, 1, true);
  failing.submission->results = {{2 * kRegisterBytes, 4}};
  auto bad = failing.start(executor);
  auto good = after.start(executor);
  CHECK(bad.get().error->code() == "INVALID");
  CHECK(good.get().error->code() == "CANCELLED");
  checkGood(executor, fixture.engine);
}

void stopsBetweenLaunches() {
  // Launches of 5 ms: a second in all, of which little is left after a stop.
  Fixture fixture(affinePlan(4096, 5000));
  Executor& executor = *fixture.executor;
  for (int launches = 0; launches < 4; launches++) {
    const uint64_t before = executor.statistics().launches;
    Run run;
    fill(*run.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 200);
    auto outcome = run.start(executor);
    waitUntil([&] {
      const std::lock_guard<std::mutex> lock(run.mutex);
      return run.reports.size() >= static_cast<size_t>(launches);
    });
    executor.cancel(run.submission);
    const Outcome done = outcome.get();
    CHECK(done.error && done.error->code() == "CANCELLED");
    CHECK(executor.statistics().launches - before < 100);
    // The kernel's timer may advance in steps of a millisecond.
    for (const LaunchReport& report : run.reports) CHECK(report.milliseconds > 3);
  }
  Fixture quick;
  checkGood(*quick.executor, quick.engine);
}

void replaysAsOneGraph() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  const auto start = [&](Run& run, int launches, float number) {
    fill(*run.submission, registers, fixture.engine, launches);
    run.submission->capture = true;
    // The constants differ from run to run.
    std::memcpy(run.submission->constants.data() + kRegisterBytes, &number, 4);
    return run.start(executor);
  };
  const uint64_t replays = executor.statistics().replays;
  for (int index = 0; index < 50; index++) {
    Run run;
    const float number = static_cast<float>(index) / 3;
    const Outcome outcome = start(run, 4, number).get();
    if (!outcome.notCaptured.empty()) std::fprintf(stderr, "not captured: %s\n", outcome.notCaptured.c_str());
    CHECK(!outcome.error && outcome.notCaptured.empty());
    CHECK(outcome.replayed == (index > 0));
    CHECK(floatsOf(outcome.results.at(0)) == expectedFrom(number, 4));
    CHECK(run.reports.size() == 4);
  }
  CHECK(executor.statistics().replays == replays + 49);
  Run bad;
  const Outcome infinite = start(bad, 4, INFINITY).get();
  CHECK(infinite.error && infinite.error->code() == "NOT_FINITE" && infinite.error->launch == 0);

  // Other instructions in the same registers make another CUDA graph; several replays may wait at once.
  std::vector<std::unique_ptr<Run>> runs;
  std::vector<std::future<Outcome>> outcomes;
  for (int index = 0; index < 9; index++) {
    runs.push_back(std::make_unique<Run>());
    outcomes.push_back(start(*runs.back(), index < 4 ? 2 : 3, static_cast<float>(index)));
  }
  for (int index = 0; index < 9; index++) {
    const Outcome done = outcomes[static_cast<size_t>(index)].get();
    CHECK(!done.error && done.replayed == (index != 0 && index != 4));
    CHECK(floatsOf(done.results.at(0)) == expectedFrom(static_cast<float>(index), index < 4 ? 2 : 3));
  }

  // A CUDA graph stays valid when another program needs larger scratch memory, and runs plain in the same engine.
  const Plan wide = writePlan(widePlan());
  const auto engine = executor.load(wide.path, wide.identity);
  Run run;
  run.submission->registers = executor.createRegisters(4096000);
  Launch instruction;
  instruction.engine = engine;
  instruction.operands = {Operand{false, 0}, Operand{false, 2048000}};
  run.submission->instructions.emplace_back(instruction);
  run.submission->results = {{2048000, 2000000}};
  const Outcome wideOutcome = run.start(executor).get();
  CHECK(!wideOutcome.error && floatsOf(wideOutcome.results.at(0)) == std::vector<float>(500000, 2));
  checkGood(executor, fixture.engine);
  Run again;
  const Outcome replayed = start(again, 3, 7).get();
  CHECK(!replayed.error && replayed.replayed && floatsOf(replayed.results.at(0)) == expectedFrom(7, 3));
  unlink(wide.path.c_str());
}

// As TensorRT may, an engine computes on a stream of its own beside the executor's, in captures too.
void usesAuxiliaryStreams() {
  Fixture fixture(affinePlan(4096, 0, "auxiliary\n"));
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  for (int index = 0; index < 100; index++) {
    checkGood(executor, fixture.engine, 1 + index % 4);
    Run run;
    fill(*run.submission, registers, fixture.engine, 4);
    run.submission->capture = true;
    const Outcome outcome = run.start(executor).get();
    if (!outcome.notCaptured.empty()) std::fprintf(stderr, "not captured: %s\n", outcome.notCaptured.c_str());
    CHECK(!outcome.error && outcome.notCaptured.empty() && outcome.replayed == (index > 0));
    CHECK(floatsOf(outcome.results.at(0)) == expected(4));
  }
}

void refusesWhatDoesNotFit() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const uint64_t total = memoryOf(executor).total;
  Run large;
  fill(*large.submission, executor.createRegisters(2 * total), fixture.engine, 1);
  const Outcome outcome = large.start(executor).get();
  CHECK(outcome.error && outcome.error->code() == "DEVICE_MEMORY");
  CHECK(outcome.error->needed >= 2 * total && outcome.error->available <= total);
  checkGood(executor, fixture.engine);
  for (const std::string& text : {affinePlan(2 * total, 0), std::string("nonsense")}) {
    const Plan plan = writePlan(text);
    try {
      executor.load(plan.path, plan.identity);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.code() == (text == "nonsense" ? "PLAN" : "DEVICE_MEMORY"));
    }
    unlink(plan.path.c_str());
  }
  checkGood(executor, fixture.engine);
}

void waitsWhenClosed() {
  const Plan plan = writePlan(affinePlan(4096, 20000));
  auto executor = openExecutor();
  auto engine = executor->load(plan.path, plan.identity);
  Run run;
  fill(*run.submission, executor->createRegisters(2 * kRegisterBytes), engine, 4);
  auto outcome = run.start(*executor);
  run.submission.reset();
  engine.reset();
  closeExecutor(std::move(executor));
  CHECK(outcome.wait_for(std::chrono::seconds(0)) == std::future_status::ready);
  CHECK(!outcome.get().error);
  unlink(plan.path.c_str());
}

void sharesEngines() {
  const Plan plan = writePlan(affinePlan(1 << 20, 0));
  auto one = openExecutor();
  auto two = openExecutor();
  CHECK(one == two);
  std::vector<std::thread> threads;
  std::vector<std::shared_ptr<Engine>> engines(8);
  for (auto& engine : engines) threads.emplace_back([&] { engine = one->load(plan.path, plan.identity); });
  for (std::thread& thread : threads) thread.join();
  for (const auto& engine : engines) CHECK(engine == engines[0]);
  CHECK(one->statistics().engines == 1);
  checkGood(*one, engines[0]);
  engines.clear();
  closeExecutor(std::move(one));
  closeExecutor(std::move(two));
  unlink(plan.path.c_str());
}

void servesManyThreads() {
  const Plan plan = writePlan(affinePlan(4096, 0));
  std::vector<std::thread> threads;
  for (int index = 0; index < 10; index++)
    threads.emplace_back([&] {
      for (int round = 0; round < 5; round++) {
        auto executor = openExecutor();
        auto engine = executor->load(plan.path, plan.identity);
        checkGood(*executor, engine, 3);
        engine.reset();
        closeExecutor(std::move(executor));
      }
    });
  for (std::thread& thread : threads) thread.join();
  unlink(plan.path.c_str());
}

// Engines are loaded on other threads while programs are captured on the executor's.
void loadsDuringCaptures() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  std::atomic<bool> ended{false};
  std::thread loader([&] {
    for (int index = 0; !ended; index++) {
      const Plan plan = writePlan(affinePlan(1 << 16, 0, std::string(static_cast<size_t>(1 + index % 7), '\n')));
      checkGood(executor, executor.load(plan.path, plan.identity), 1);
      unlink(plan.path.c_str());
    }
  });
  for (int index = 0; index < 100; index++) {
    // New registers each time, and so a new capture.
    const auto registers = executor.createRegisters(2 * kRegisterBytes);
    for (int time = 0; time < 2; time++) {
      Run run;
      fill(*run.submission, registers, fixture.engine, 3);
      run.submission->capture = true;
      const Outcome outcome = run.start(executor).get();
      if (!outcome.notCaptured.empty()) std::fprintf(stderr, "not captured: %s\n", outcome.notCaptured.c_str());
      CHECK(!outcome.error && outcome.notCaptured.empty() && outcome.replayed == (time > 0));
      CHECK(floatsOf(outcome.results.at(0)) == expected(3));
    }
  }
  ended = true;
  loader.join();
}

void leaksNothing() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  uint64_t bytes = 0;
  uint64_t free = 0;
  for (int index = 0; index < 1000; index++) {
    if (index % 2 == 0) {
      checkGood(executor, fixture.engine, 1 + index % 3);
    } else {
      Run run;
      fill(*run.submission, registers, fixture.engine, 4);
      run.submission->capture = true;
      const Outcome outcome = run.start(executor).get();
      CHECK(!outcome.error && outcome.replayed == (index > 1));
      CHECK(floatsOf(outcome.results.at(0)) == expected(4));
    }
    if (index != 100) continue;
    bytes = executor.statistics().deviceBytes + executor.statistics().pinnedBytes;
    free = memoryOf(executor).free;
  }
  CHECK(executor.statistics().deviceBytes + executor.statistics().pinnedBytes <= bytes + (1 << 20));
  // Other processes may use the device.
  CHECK(memoryOf(executor).free + (32 << 20) >= free);
}

}  // namespace
}  // namespace flowturbo

int main(int count, char** arguments) {
  using namespace flowturbo;
  char self[4096] = {};
  if (count > 1) {
    folder = arguments[1];
  } else if (readlink("/proc/self/exe", self, sizeof self - 1) > 0) {
    folder = self;
    folder.resize(folder.rfind('/'));
  }
  try {
    test("runs programs in order", runsInOrder);
    test("copies rows", copiesRows);
    test("runs submissions in turn, ahead of the device", runsAhead);
    test("keeps registers apart", keepsRegistersApart);
    test("stops between launches", stopsBetweenLaunches);
    test("withdraws at any moment", withdrawsAtAnyMoment);
    test("sees values that are not finite", seesWhatIsNotFinite);
    test("refuses what does not fit into memory, with numbers", refusesWhatDoesNotFit);
    test("replays a program as one CUDA graph", replaysAsOneGraph);
    test("loads engines while programs are captured", loadsDuringCaptures);
    test("runs engines that use streams of their own", usesAuxiliaryStreams);
    test("waits for its runs when it is closed", waitsWhenClosed);
    test("shares engines", sharesEngines);
    test("serves many threads", servesManyThreads);
    test("leaks nothing in 1000 runs, captured and plain", leaksNothing);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s: %s\n", error.code().c_str(), error.what());
    return 1;
  }
  return 0;
}
