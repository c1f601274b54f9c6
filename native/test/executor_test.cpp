// The executor on the simulated device, without Node: what a sanitizer must see in full (threads, leaks at the end of the
// process) is tested here; programs of real schedules are tested through the addon (test/native). Prints a line for each
// test and ends with 1 after the first that fails.

#include <csignal>
#include <cstdio>
#include <fstream>
#include <set>

#include "programs.h"
#include "simulated.h"

namespace flowturbo {

std::shared_ptr<const TensorRtLibrary> library() { return TensorRtLibrary::open(LIBRARY, PARSER); }

namespace {

// Everything on the device was freed, and there was no violation.
void checkNothingLeft() {
  const SimulatedCounts counts = simulatedCounts();
  if (counts.violations > 0) std::fprintf(stderr, "violation: %s\n", simulatedViolation());
  CHECK(counts.violations == 0);
  CHECK(counts.deviceBlocks == 0 && counts.deviceBytes == 0);
  CHECK(counts.hostBlocks == 0);
  CHECK(counts.streams == 0 && counts.events == 0 && counts.graphs == 0);
  CHECK(counts.contexts == 0 && counts.runtimes == 0 && counts.engines == 0 && counts.executionContexts == 0);
}

void test(const char* name, const std::function<void()>& body) {
  simulatedReset();
  body();
  checkNothingLeft();
  std::printf("ok %s\n", name);
  std::fflush(stdout);
}

void runsInOrder() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  CHECK(executor.load(fixture.plan.path, fixture.plan.identity) == fixture.engine);
  CHECK(simulatedCounts().deserialised == 1);
  for (int launches = 1; launches < 8; launches++) checkGood(executor, fixture.engine, launches);

  // One upload, one download, and one for each value that is checked.
  simulatedReset();
  checkGood(executor, fixture.engine, 5);
  const SimulatedCounts counts = simulatedCounts();
  CHECK(counts.uploads == 1 && counts.kernels == 5 && counts.downloads == 1 + 5);

  // Several at once, which end in order.
  checkInOrder(executor, fixture.engine, 20);
}

void runsAhead() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  simulatedHold();
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  Run first;
  Run second;
  fill(*first.submission, registers, fixture.engine, 2);
  fill(*second.submission, registers, fixture.engine, 2, true);
  // Two launches end in the second register, which the second submission reads.
  auto one = first.start(executor);
  waitUntil([&] { return executor.statistics().launches == 2; });
  auto two = second.start(executor);
  CHECK(simulatedCounts().kernels == 0);
  // The next submission is queued on the device as soon as there is room, before the first has ended.
  simulatedLet(1);
  waitUntil([&] { return executor.statistics().launches == 3; });
  CHECK(one.wait_for(std::chrono::seconds(0)) == std::future_status::timeout);
  simulatedLet(-1);
  CHECK(floatsOf(one.get().results.at(0)) == expected(2));
  CHECK(floatsOf(two.get().results.at(0)) == expected(2, expected(2)));

  // Submissions after one that failed do not run on its values.
  Run failing;
  Run after;
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
  Fixture fixture;
  Executor& executor = *fixture.executor;
  for (int launches = 0; launches < 6; launches++) {
    simulatedReset();
    simulatedHold();
    Run run;
    fill(*run.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 6);
    auto outcome = run.start(executor);
    simulatedLet(launches);
    waitUntil([&] {
      const std::lock_guard<std::mutex> lock(run.mutex);
      return run.reports.size() == static_cast<size_t>(launches);
    });
    executor.cancel(run.submission);
    simulatedLet(-1);
    const Outcome done = outcome.get();
    CHECK(done.error && done.error->code() == "CANCELLED");
    // Launches that are queued on the device cannot be cancelled.
    CHECK(simulatedCounts().kernels <= static_cast<uint64_t>(launches) + 2);
    checkGood(executor, fixture.engine);
  }

  // One that waits behind another ends at once.
  simulatedReset();
  simulatedHold();
  Run running;
  Run waiting;
  fill(*running.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 6);
  fill(*waiting.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 6);
  auto first = running.start(executor);
  auto second = waiting.start(executor);
  executor.cancel(waiting.submission);
  CHECK(second.get().error->code() == "CANCELLED");
  CHECK(simulatedCounts().kernels == 0);
  simulatedLet(-1);
  CHECK(!first.get().error);
}

// Opens an executor, runs a program and closes it. Empty if all succeeded, otherwise the code of the first error.
std::string openRunClose(const Plan& plan, bool capture, bool anew = false) {
  std::string code;
  std::shared_ptr<Executor> executor;
  try {
    executor = anew ? openExecutorAnew() : openExecutor();
    const std::shared_ptr<Engine> engine = executor->load(plan.path, plan.identity);
    const auto registers = executor->createRegisters(2 * kRegisterBytes);
    for (int index = 0; index < (capture ? 2 : 1) && code.empty(); index++) {
      Run run;
      fill(*run.submission, registers, engine, 2);
      run.submission->capture = capture;
      const Outcome outcome = run.start(*executor).get();
      if (outcome.error) {
        code = outcome.error->code();
      } else {
        CHECK(floatsOf(outcome.results.at(0)) == expected(2));
        if (!outcome.notCaptured.empty()) code = "NOT_CAPTURED";
      }
    }
    // The same objects run again after an error, unless the device is lost.
    if (!code.empty() && code != "DEVICE_LOST") checkGood(*executor, engine);
  } catch (const Error& error) {
    code = error.code();
  }
  if (executor) closeExecutor(std::move(executor));
  return code;
}

void survivesErrors() {
  const Plan plan = writePlan(affinePlan(4096, 0));
  for (const bool capture : {false, true}) {
    simulatedReset();
    CHECK(openRunClose(plan, capture).empty());
    const uint64_t calls = simulatedCounts().calls;
    CHECK(calls > 50);
    std::set<std::string> silent;
    for (const int code : {1, 2, 719})
      for (uint64_t call = 1; call <= calls; call++) {
        simulatedReset();
        simulatedFailAt(call, code);
        const std::string answer = openRunClose(plan, capture);
        const std::string failed = simulatedFailed();
        simulatedFailAt(0, 0);
        // Where the device's memory ran out, the second attempt may succeed.
        const bool again = code == 2 && (failed == "cuMemsetD8Async" || failed == "cuGraphLaunch");
        if (answer.empty() && !failed.empty() && !again) silent.insert(failed);
        if (code == 719 && !answer.empty() && answer != "DEVICE_LOST" && answer != "CUDA" && answer != "PLAN" &&
            answer != "LAUNCH")
          std::fprintf(stderr, "call %d (%s) answered %s\n", static_cast<int>(call), failed.c_str(), answer.c_str());
        if (simulatedCounts().violations > 0)
          std::fprintf(stderr, "call %d (%s) failed with %d\n", static_cast<int>(call), failed.c_str(), code);
        checkNothingLeft();
        // Whatever failed, the next one runs; in a new process if the device is lost.
        simulatedReset();
        const std::string next = openRunClose(plan, capture, true);
        if (!next.empty())
          std::fprintf(stderr, "after call %d (%s) failed with %d, the next run answers %s\n", static_cast<int>(call),
                       failed.c_str(), code, next.c_str());
        CHECK(next.empty());
        checkNothingLeft();
      }
    // Failures to free are not reported, nor failures where the second attempt succeeded.
    const std::set<std::string> mayBeSilent{
        "cuEventDestroy", "cuStreamDestroy", "cuMemFree", "cuMemFreeHost", "cuGraphDestroy", "cuGraphExecDestroy",
        "cuDevicePrimaryCtxRelease", "cuMemAlloc", "cuMemAllocHost", "cuCtxSetCurrent", "cuStreamSynchronize",
        "cuThreadExchangeStreamCaptureMode",
        // Where it only measures.
        "cuMemGetInfo"};
    for (const std::string& name : silent) {
      if (mayBeSilent.count(name) == 0) std::fprintf(stderr, "%s failed without an error\n", name.c_str());
      CHECK(mayBeSilent.count(name) == 1);
    }
  }
  unlink(plan.path.c_str());
}

void losesTheDevice() {
  Fixture fixture;
  Run run;
  Run behind;
  fill(*run.submission, fixture.executor->createRegisters(2 * kRegisterBytes), fixture.engine, 4);
  fill(*behind.submission, fixture.executor->createRegisters(2 * kRegisterBytes), fixture.engine, 4);
  simulatedFailKernel(2, 700);
  auto first = run.start(*fixture.executor);
  auto second = behind.start(*fixture.executor);
  const Outcome outcome = first.get();
  CHECK(outcome.error && outcome.error->code() == "DEVICE_LOST");
  CHECK(second.get().error->code() == "DEVICE_LOST");
  // It stays lost, and can be closed.
  Run later;
  fill(*later.submission, fixture.executor->createRegisters(2 * kRegisterBytes), fixture.engine, 1);
  CHECK(later.start(*fixture.executor).get().error->code() == "DEVICE_LOST");
  later.submission.reset();
  run.submission.reset();
  behind.submission.reset();
  fixture.engine.reset();
  closeExecutor(std::move(fixture.executor));
  checkNothingLeft();
  // Nothing replaces it as long as the process lives: it is not asked.
  for (int attempt = 0; attempt < 2; attempt++) {
    const uint64_t streams = simulatedCounts().calls;
    try {
      openExecutor();
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.code() == "DEVICE_LOST");
      CHECK(std::string(error.what()) == outcome.error->what());
    }
    CHECK(simulatedCounts().calls - streams < 15);
  }
  simulatedReset();
  Fixture fresh;
  checkGood(*fresh.executor, fresh.engine);
}

void refusesWhatDoesNotFit() {
  Fixture fixture(affinePlan(100000, 0));
  Executor& executor = *fixture.executor;
  simulatedCapacity(1 << 20);
  Run large;
  fill(*large.submission, executor.createRegisters(2 << 20), fixture.engine, 1);
  const Outcome outcome = large.start(executor).get();
  CHECK(outcome.error && outcome.error->code() == "DEVICE_MEMORY");
  CHECK(outcome.error->needed >= (2 << 20) && outcome.error->available < (1 << 20));
  CHECK(simulatedCounts().kernels == 0);
  checkGood(executor, fixture.engine);

  const Plan heavy = writePlan(affinePlan(2 << 20, 0));
  try {
    executor.load(heavy.path, heavy.identity);
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.code() == "DEVICE_MEMORY");
  }
  unlink(heavy.path.c_str());
  checkGood(executor, fixture.engine);
}

void refusesWrongInstructions() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto refused = [&](const std::function<void(Submission&)>& spoil) {
    Run run;
    fill(*run.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 2);
    spoil(*run.submission);
    const Outcome outcome = run.start(executor).get();
    return outcome.error && outcome.error->code() == "INVALID";
  };
  const auto launch = [](Submission& submission) -> Launch& { return std::get<Launch>(submission.instructions[1]); };
  CHECK(refused([&](Submission& submission) { launch(submission).operands[0].offset = 2 * kRegisterBytes; }));
  CHECK(refused([&](Submission& submission) { launch(submission).operands[0].offset = UINT64_MAX - 255; }));
  CHECK(refused([&](Submission& submission) { launch(submission).operands[2].offset = 4; }));
  CHECK(refused([&](Submission& submission) { launch(submission).operands[2].constant = true; }));
  CHECK(refused([&](Submission& submission) { launch(submission).operands[1].offset = 1 << 20; }));
  CHECK(refused([&](Submission& submission) { submission.instructions.emplace_back(CopyBytes{{true, 0}, {false, 2 * kRegisterBytes}, 4}); }));
  CHECK(refused([&](Submission& submission) { submission.instructions.emplace_back(CopyBytes{{true, 1 << 20}, {false, 0}, 4}); }));
  CHECK(refused([&](Submission& submission) { submission.results = {{kRegisterBytes, 2 * kRegisterBytes}}; }));
  CHECK(simulatedCounts().kernels == 0);

  for (const std::string& text : {std::string("nonsense"), affinePlan(0, 0, "output z f16\n")}) {
    const Plan plan = writePlan(text);
    try {
      executor.load(plan.path, plan.identity);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.code() == "PLAN");
    }
    unlink(plan.path.c_str());
  }
  const Plan changed = writePlan(affinePlan(0, 0));
  std::ofstream(changed.path, std::ios::app) << "\n";
  try {
    executor.load(changed.path, changed.identity);
    CHECK(false);
  } catch (const Error& error) {
    CHECK(error.code() == "PLAN_CHANGED");
  }
  unlink(changed.path.c_str());
}

void leaksNothing() {
  Fixture fixture;
  uint64_t blocks = 0;
  uint64_t bytes = 0;
  uint64_t events = 0;
  for (int index = 0; index < 1000; index++) {
    checkGood(*fixture.executor, fixture.engine, 1 + index % 3);
    if (index != 50) continue;
    blocks = simulatedCounts().deviceBlocks + simulatedCounts().hostBlocks;
    bytes = simulatedCounts().deviceBytes;
    events = simulatedCounts().events;
  }
  CHECK(simulatedCounts().deviceBlocks + simulatedCounts().hostBlocks <= blocks + 1);
  CHECK(simulatedCounts().deviceBytes <= bytes + (64 << 10));
  CHECK(simulatedCounts().events <= events + 2);
}

void replaysAsOneGraph() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  for (int index = 0; index < 5; index++) {
    Run run;
    fill(*run.submission, registers, fixture.engine, 4);
    run.submission->capture = true;
    // The constants differ from run to run.
    const float number = static_cast<float>(index);
    std::memcpy(run.submission->constants.data() + kRegisterBytes, &number, 4);
    const Outcome outcome = run.start(executor).get();
    CHECK(!outcome.error);
    CHECK(outcome.replayed == (index > 0) && outcome.notCaptured.empty());
    std::vector<float> values(kElements);
    for (size_t at = 0; at < values.size(); at++) values[at] = (static_cast<float>(at) / 8 + number) * 2;
    for (int launch = 1; launch < 4; launch++)
      for (float& value : values) value = (value + static_cast<float>(launch + 1) / 4) * 2;
    CHECK(floatsOf(outcome.results.at(0)) == values);
    CHECK(run.reports.size() == 4);
  }
  CHECK(simulatedCounts().graphLaunches == 4);

  // Values that are not finite are found in a CUDA graph too.
  Run bad;
  fill(*bad.submission, registers, fixture.engine, 4);
  bad.submission->capture = true;
  const float infinite = INFINITY;
  std::memcpy(bad.submission->constants.data() + kRegisterBytes + 512, &infinite, 4);
  const Outcome outcome = bad.start(executor).get();
  CHECK(outcome.error && outcome.error->code() == "NOT_FINITE" && outcome.error->launch == 2);

  // Others that share the registers do not fail with one that is stopped or fails, whether they wait behind it or not.
  for (const bool stopped : {false, true}) {
    simulatedHold();
    Run failing;
    Run waiting;
    for (Run* run : {&failing, &waiting}) {
      fill(*run->submission, registers, fixture.engine, 4);
      run->submission->capture = true;
    }
    if (!stopped) std::memcpy(failing.submission->constants.data() + kRegisterBytes, &infinite, 4);
    const uint64_t before = executor.statistics().replays;
    auto one = failing.start(executor);
    auto two = waiting.start(executor);
    waitUntil([&] { return executor.statistics().replays > before; });
    if (stopped) executor.cancel(failing.submission);
    simulatedLet(-1);
    CHECK(one.get().error->code() == (stopped ? "CANCELLED" : "NOT_FINITE"));
    const Outcome good = two.get();
    CHECK(!good.error && floatsOf(good.results.at(0)) == expected(4));
  }

  // Other instructions in the same registers make another CUDA graph; several replays may wait at once.
  const auto others = executor.createRegisters(2 * kRegisterBytes);
  std::vector<std::unique_ptr<Run>> runs;
  std::vector<std::future<Outcome>> outcomes;
  for (int index = 0; index < 9; index++) {
    runs.push_back(std::make_unique<Run>());
    fill(*runs.back()->submission, others, fixture.engine, index < 4 ? 2 : 3);
    runs.back()->submission->capture = true;
    outcomes.push_back(runs.back()->start(executor));
  }
  for (int index = 0; index < 9; index++) {
    const Outcome done = outcomes[static_cast<size_t>(index)].get();
    CHECK(!done.error && done.replayed == (index != 0 && index != 4));
    CHECK(floatsOf(done.results.at(0)) == expected(index < 4 ? 2 : 3));
  }

  // A CUDA graph stays valid when another program needs larger scratch memory.
  const Plan wide = writePlan(widePlan());
  auto engine = executor.load(wide.path, wide.identity);
  Run run;
  run.submission->registers = executor.createRegisters(4096000);
  Launch instruction;
  instruction.engine = engine;
  instruction.operands = {Operand{false, 0}, Operand{false, 2048000}};
  run.submission->instructions.emplace_back(instruction);
  CHECK(!run.start(executor).get().error);
  Run again;
  fill(*again.submission, others, fixture.engine, 3);
  again.submission->capture = true;
  const Outcome replayed = again.start(executor).get();
  CHECK(replayed.replayed && floatsOf(replayed.results.at(0)) == expected(3));
  unlink(wide.path.c_str());
}

void waitsWhenClosed() {
  Plan plan = writePlan(affinePlan(4096, 0));
  auto executor = openExecutor();
  auto engine = executor->load(plan.path, plan.identity);
  simulatedHold();
  Run run;
  fill(*run.submission, executor->createRegisters(2 * kRegisterBytes), engine, 4);
  auto outcome = run.start(*executor);
  run.submission.reset();
  engine.reset();
  std::promise<void> closed;
  std::future<void> end = closed.get_future();
  Executor::close(std::move(executor), [&] { closed.set_value(); });
  CHECK(end.wait_for(std::chrono::milliseconds(50)) == std::future_status::timeout);
  simulatedLet(-1);
  CHECK(!outcome.get().error);
  end.wait();
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
  // The threads of executors end shortly after the last handle.
  waitUntil([] { return simulatedCounts().contexts == 0; });
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
  CHECK(simulatedCounts().deserialised == 1 && simulatedCounts().engines == 1);
  // Released, and loaded again where both together do not fit.
  simulatedCapacity(3 << 19);
  engines.clear();
  engines.push_back(two->load(plan.path, plan.identity));
  // The old engine's memory is free a moment before its destructor ends.
  waitUntil([] { return simulatedCounts().engines == 1; });
  engines.clear();
  closeExecutor(std::move(one));
  closeExecutor(std::move(two));
  unlink(plan.path.c_str());
}

}  // namespace
}  // namespace flowturbo

#include "rules.h"

int main() {
  using namespace flowturbo;
  test("the simulated driver obeys the rules of captures", driverRules);
  test("the simulated driver keeps devices apart", driverKeepsDevicesApart);
  test("runs programs in order", runsInOrder);
  test("works on several devices, and goes on without one", worksOnSeveralDevices);
  test("copies rows", copiesRows);
  test("runs submissions in turn, ahead of the device", runsAhead);
  test("keeps registers apart", keepsRegistersApart);
  test("stops between launches", stopsBetweenLaunches);
  test("withdraws at any moment", withdrawsAtAnyMoment);
  test("sees values that are not finite", seesWhatIsNotFinite);
  test("refuses what does not fit into memory, with numbers", refusesWhatDoesNotFit);
  test("refuses wrong instructions and plans before the first launch", refusesWrongInstructions);
  test("loses the device for good", losesTheDevice);
  test("replays a program as one CUDA graph", replaysAsOneGraph);
  test("does not mind captures of other threads", ignoresForeignCaptures);
  test("makes room outside of captures", makesRoomOutsideOfCaptures);
  test("has contexts of its own for each CUDA graph", keepsContextsApart);
  test("captures no launch that allocates", refusesLaunchesThatAllocate);
  test("launches on auxiliary streams", usesAuxiliaryStreams);
  test("makes room for execution contexts and first launches", makesRoomForContexts);
  test("tries a capture that failed once", remembersFailedCaptures);
  test("gives registers back while the device works", givesRegistersBack);
  test("waits without spinning, and interrupts for nothing else", waitsAsleep);
  test("counts what engines take", countsEngines);
  test("waits for its runs when it is closed", waitsWhenClosed);
  test("shares engines", sharesEngines);
  test("serves many threads", servesManyThreads);
  test("leaks nothing in 1000 runs", leaksNothing);
  test("survives an error of every call", survivesErrors);
  return 0;
}
