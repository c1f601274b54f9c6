// The executor under the rules of a real driver that no single program meets: captures of several threads, contexts that
// CUDA graphs refer to, memory that runs out inside of TensorRT, what waiting costs. First the rules of the simulated
// driver themselves, as cuda.h has them. A part of executor_test.cpp.
#pragma once

#include <sys/wait.h>

#include "programs.h"
#include "simulated.h"

struct CUctx_st;
struct CUevent_st;
struct CUgraph_st;
extern "C" {
int cuDevicePrimaryCtxRetain(CUctx_st**, int);
int cuDevicePrimaryCtxRelease_v2(int);
int cuCtxSetCurrent(CUctx_st*);
int cuThreadExchangeStreamCaptureMode(int*);
int cuMemAlloc_v2(unsigned long long*, size_t);
int cuMemFree_v2(unsigned long long);
int cuMemsetD8Async(unsigned long long, unsigned char, size_t, CUstream_st*);
int cuStreamCreate(CUstream_st**, unsigned);
int cuStreamDestroy_v2(CUstream_st*);
int cuStreamSynchronize(CUstream_st*);
int cuStreamWaitEvent(CUstream_st*, CUevent_st*, unsigned);
int cuStreamBeginCapture_v2(CUstream_st*, int);
int cuStreamEndCapture(CUstream_st*, CUgraph_st**);
int cuGraphDestroy(CUgraph_st*);
int cuEventCreate(CUevent_st**, unsigned);
int cuEventDestroy_v2(CUevent_st*);
int cuEventRecordWithFlags(CUevent_st*, CUstream_st*, unsigned);
int cuEventSynchronize(CUevent_st*);
int cuEventElapsedTime(float*, CUevent_st*, CUevent_st*);
}

namespace flowturbo {
namespace {

constexpr int kGlobal = 0;
constexpr int kThreadLocal = 1;
constexpr int kRelaxed = 2;

// The primary context on the calling thread, with two streams.
struct Streams {
  Streams() {
    CUctx_st* context = nullptr;
    CHECK(cuDevicePrimaryCtxRetain(&context, 0) == 0 && cuCtxSetCurrent(context) == 0);
    for (CUstream_st*& stream : {std::ref(one), std::ref(two)}) CHECK(cuStreamCreate(&stream, 1) == 0);
  }
  ~Streams() {
    CHECK(cuStreamDestroy_v2(one) == 0 && cuStreamDestroy_v2(two) == 0);
    CHECK(cuDevicePrimaryCtxRelease_v2(0) == 0);
  }
  int end(CUstream_st* stream) {
    CUgraph_st* graph = nullptr;
    const int result = cuStreamEndCapture(stream, &graph);
    CHECK((graph != nullptr) == (result == 0));
    if (graph != nullptr) CHECK(cuGraphDestroy(graph) == 0);
    return result;
  }
  CUstream_st* one = nullptr;
  CUstream_st* two = nullptr;
};

template <typename Body>
void onAnotherThread(Body body) {
  std::thread(body).join();
}

void driverRules() {
  Streams streams;
  unsigned long long memory = 0;
  CHECK(cuMemAlloc_v2(&memory, 4096) == 0);

  // 1. What a capture forbids: by its own mode and that of the thread. It is invalid afterwards.
  const auto allocates = [&](int captured, bool ownThread, int threadMode) {
    CHECK(cuStreamBeginCapture_v2(streams.one, captured) == 0);
    int result = 0;
    const auto allocate = [&] {
      CUctx_st* context = nullptr;
      CHECK(cuDevicePrimaryCtxRetain(&context, 0) == 0 && cuCtxSetCurrent(context) == 0);
      int mode = threadMode;
      CHECK(cuThreadExchangeStreamCaptureMode(&mode) == 0);
      unsigned long long other = 0;
      result = cuMemAlloc_v2(&other, 64);
      if (result == 0) CHECK(cuMemFree_v2(other) == 0);
      CHECK(cuThreadExchangeStreamCaptureMode(&mode) == 0 && mode == threadMode);
      CHECK(cuDevicePrimaryCtxRelease_v2(0) == 0);
    };
    if (ownThread)
      allocate();
    else
      onAnotherThread(allocate);
    CHECK(streams.end(streams.one) == (result == 0 ? 0 : 901));
    return result;
  };
  for (const int threadMode : {kGlobal, kThreadLocal, kRelaxed}) {
    for (const int captured : {kGlobal, kThreadLocal, kRelaxed})
      CHECK(allocates(captured, true, threadMode) == (captured == kRelaxed || threadMode == kRelaxed ? 0 : 900));
    for (const int captured : {kGlobal, kThreadLocal, kRelaxed})
      CHECK(allocates(captured, false, threadMode) == (captured == kGlobal && threadMode == kGlobal ? 900 : 0));
  }

  // 2. What conflicts with it in any mode; what is given to one that is invalid; another thread that ends it.
  CHECK(cuStreamBeginCapture_v2(streams.one, kRelaxed) == 0);
  CHECK(cuStreamSynchronize(streams.two) == 0);
  CHECK(cuStreamSynchronize(streams.one) == 900);
  CHECK(cuMemsetD8Async(memory, 0, 16, streams.one) == 901);
  CHECK(streams.end(streams.one) == 901);
  CHECK(cuStreamBeginCapture_v2(streams.one, kThreadLocal) == 0);
  onAnotherThread([&] {
    CUctx_st* context = nullptr;
    CHECK(cuDevicePrimaryCtxRetain(&context, 0) == 0 && cuCtxSetCurrent(context) == 0);
    CHECK(streams.end(streams.one) == 908);
    CHECK(cuDevicePrimaryCtxRelease_v2(0) == 0);
  });
  CHECK(streams.end(streams.one) == 901);

  // 3. Streams that join: the first has to wait for what they were given.
  CUevent_st* event = nullptr;
  CUevent_st* outside = nullptr;
  CHECK(cuEventCreate(&event, 2) == 0 && cuEventCreate(&outside, 0) == 0);
  CHECK(cuEventRecordWithFlags(outside, streams.two, 0) == 0);
  for (const bool joins : {false, true}) {
    CHECK(cuStreamBeginCapture_v2(streams.one, kThreadLocal) == 0);
    CHECK(cuEventRecordWithFlags(event, streams.one, 0) == 0);
    CHECK(cuStreamWaitEvent(streams.two, event, 0) == 0);
    CHECK(cuMemsetD8Async(memory, 0, 16, streams.two) == 0);
    CHECK(cuEventRecordWithFlags(event, streams.two, 0) == 0);
    if (joins) CHECK(cuStreamWaitEvent(streams.one, event, 0) == 0);
    CHECK(streams.end(streams.one) == (joins ? 0 : 904));
  }
  CHECK(cuEventSynchronize(event) == 907);
  CHECK(cuStreamBeginCapture_v2(streams.one, kThreadLocal) == 0);
  CHECK(cuStreamWaitEvent(streams.one, outside, 0) == 905);
  CHECK(streams.end(streams.one) == 901);

  // 4. Times of events that have none.
  CUevent_st* timed = nullptr;
  float milliseconds = 0;
  CHECK(cuEventCreate(&timed, 0) == 0 && cuEventSynchronize(outside) == 0);
  CHECK(cuEventElapsedTime(&milliseconds, outside, timed) == 400);
  CHECK(cuEventElapsedTime(&milliseconds, outside, event) == 400);
  simulatedHold();
  CHECK(simulatedLaunch(streams.two, [](void*) {}, nullptr, [](void*) {}) == 0);
  CHECK(cuEventRecordWithFlags(timed, streams.two, 0) == 0);
  CHECK(cuEventElapsedTime(&milliseconds, outside, timed) == 600);
  simulatedLet(-1);
  CHECK(cuEventSynchronize(timed) == 0 && cuEventElapsedTime(&milliseconds, outside, timed) == 0);
  for (CUevent_st* each : {event, outside, timed}) CHECK(cuEventDestroy_v2(each) == 0);

  // 5. The host cannot read what is on the device.
  const pid_t child = fork();
  if (child == 0) {
    for (const int number : {SIGSEGV, SIGABRT}) std::signal(number, SIG_DFL);
    const auto* bytes = reinterpret_cast<const volatile uint8_t*>(memory);
    _exit(*bytes == 0 ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
  CHECK(cuMemFree_v2(memory) == 0);
}

// One captures in the global mode, as a library's builder may: everything works meanwhile, and does not spoil it.
// Several devices: an address, a stream and an event are of one of them alone.
void driverKeepsDevicesApart() {
  const uint64_t delays[] = {0, 0};
  simulatedDevices(delays, 2);
  CUctx_st* contexts[2] = {};
  CUstream_st* streams[2] = {};
  CUevent_st* events[2] = {};
  unsigned long long memory[2] = {};
  const auto use = [&](int device) { CHECK(cuCtxSetCurrent(contexts[device]) == 0); };
  for (const int device : {0, 1}) {
    CHECK(cuDevicePrimaryCtxRetain(&contexts[device], device) == 0);
    use(device);
    CHECK(cuStreamCreate(&streams[device], 1) == 0 && cuEventCreate(&events[device], 0) == 0);
    CHECK(cuMemAlloc_v2(&memory[device], 4096) == 0);
  }
  CHECK(contexts[0] != contexts[1]);
  for (const int device : {0, 1}) {
    use(device);
    const int other = 1 - device;
    CHECK(cuMemsetD8Async(memory[device], 0, 16, streams[device]) == 0);
    CHECK(cuMemsetD8Async(memory[other], 0, 16, streams[device]) == 1);
    CHECK(cuMemsetD8Async(memory[other], 0, 16, streams[other]) == 400);
    CHECK(cuEventRecordWithFlags(events[device], streams[device], 0) == 0);
    CHECK(cuEventRecordWithFlags(events[other], streams[device], 0) == 400);
    CHECK(cuStreamSynchronize(streams[device]) == 0);
  }
  // One that is lost is lost alone.
  simulatedLoseDevice(1, 700);
  use(0);
  CHECK(cuStreamSynchronize(streams[0]) == 0);
  use(1);
  CHECK(cuStreamSynchronize(streams[1]) == 700);
  for (const int device : {0, 1}) {
    use(device);
    const int result = device == 0 ? 0 : 700;
    CHECK(cuMemFree_v2(memory[device]) == result && cuEventDestroy_v2(events[device]) == result);
    CHECK(cuStreamDestroy_v2(streams[device]) == result && cuDevicePrimaryCtxRelease_v2(device) == 0);
  }
  CHECK(simulatedCounts().violations == 4);
  simulatedReset();
}

// Two executors in one process, each with its device, its engines and its threads. One is lost, the other goes on.
void worksOnSeveralDevices() {
  const uint64_t delays[] = {0, 0};
  simulatedDevices(delays, 2);
  const Plan plan = writePlan(affinePlan(4096, 0));
  std::shared_ptr<Executor> executors[2];
  std::shared_ptr<Engine> engines[2];
  for (const int device : {0, 1}) {
    executors[device] = Executor::open(library(), device);
    engines[device] = executors[device]->load(plan.path, plan.identity);
  }
  CHECK(executors[0] != executors[1] && engines[0] != engines[1]);
  CHECK(simulatedCounts().contexts == 2 && simulatedCounts().engines == 2);
  std::vector<std::thread> threads;
  for (const int device : {0, 1})
    threads.emplace_back([&, device] {
      for (int run = 0; run < 20; run++) checkGood(*executors[device], engines[device], 4);
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(simulatedKernelsOn(0) == 80 && simulatedKernelsOn(1) == 80);
  CHECK(simulatedCounts().violations == 0);
  simulatedLoseDevice(1, 700);
  Run run;
  fill(*run.submission, executors[1]->createRegisters(2 * kRegisterBytes), engines[1], 2);
  CHECK(run.start(*executors[1]).get().error->code() == "DEVICE_LOST");
  checkGood(*executors[0], engines[0], 4);
  run.submission.reset();
  for (const int device : {1, 0}) {
    engines[device].reset();
    closeExecutor(std::move(executors[device]));
  }
  waitUntil([] { return simulatedCounts().contexts == 0; });
  unlink(plan.path.c_str());
  simulatedReset();
}

void ignoresForeignCaptures() {
  const Plan plan = writePlan(affinePlan(4096, 0));
  std::promise<void> begun;
  std::promise<void> done;
  int ended = -1;
  std::thread foreign([&] {
    Streams streams;
    CHECK(cuStreamBeginCapture_v2(streams.one, kGlobal) == 0);
    begun.set_value();
    done.get_future().wait();
    ended = streams.end(streams.one);
  });
  begun.get_future().wait();
  onAnotherThread([&] {
    for (const bool capture : {false, true}) CHECK(openRunClose(plan, capture).empty());
  });
  done.set_value();
  foreign.join();
  CHECK(ended == 0);
  unlink(plan.path.c_str());
}

Outcome runCaptured(Executor& executor, const std::shared_ptr<Registers>& registers,
                    const std::shared_ptr<Engine>& engine, int launches, uint64_t constants = 0) {
  Run run;
  fill(*run.submission, registers, engine, launches);
  run.submission->constants.resize(std::max<uint64_t>(constants, run.submission->constants.size()));
  run.submission->capture = true;
  Outcome outcome = run.start(executor).get();
  if (!outcome.error) CHECK(floatsOf(outcome.results.at(0)) == expected(launches));
  return outcome;
}

// An engine that is loaded where memory is short, while a program is captured: the capture must not notice.
void makesRoomOutsideOfCaptures() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  checkGood(executor, fixture.engine);
  const Plan heavy = writePlan(affinePlan(2 << 20, 0) + std::string(2 << 20, ' '));
  simulatedCapacity(simulatedCounts().deviceBytes + (1 << 20));
  simulatedPauseCaptures(true);
  Run run;
  fill(*run.submission, registers, fixture.engine, 3);
  run.submission->capture = true;
  auto first = run.start(executor);
  waitUntil([] { return simulatedCounts().captures == 1; });
  std::thread loading([&] {
    try {
      executor.load(heavy.path, heavy.identity);
      CHECK(false);
    } catch (const Error& error) {
      CHECK(error.code() == "DEVICE_MEMORY");
    }
  });
  // Long enough for it to do what it must not do.
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  simulatedPauseCaptures(false);
  loading.join();
  const Outcome captured = first.get();
  CHECK(!captured.error && captured.notCaptured.empty());
  unlink(heavy.path.c_str());
}

// Plain runs and several graphs of the same engine, each with addresses of its own.
void keepsContextsApart() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto one = executor.createRegisters(2 * kRegisterBytes);
  const auto two = executor.createRegisters(2 * kRegisterBytes);
  for (int round = 0; round < 4; round++) {
    for (const auto& registers : {one, two}) {
      const Outcome outcome = runCaptured(executor, registers, fixture.engine, registers == one ? 1 : 3);
      CHECK(!outcome.error && outcome.notCaptured.empty() && outcome.replayed == (round > 0));
    }
    checkGood(executor, fixture.engine, 1 + round % 2);
    CHECK(simulatedCounts().violations == 0);
  }
}

// A launch that allocates each time cannot be part of a graph, which would not do so.
void refusesLaunchesThatAllocate() {
  Fixture fixture(affinePlan(4096, 0, "each 64\n"));
  const auto registers = fixture.executor->createRegisters(2 * kRegisterBytes);
  for (int round = 0; round < 2; round++) {
    const Outcome outcome = runCaptured(*fixture.executor, registers, fixture.engine, 3);
    CHECK(!outcome.error && !outcome.replayed);
    CHECK(outcome.notCaptured.find("an allocation answered 900") != std::string::npos);
  }
}

void usesAuxiliaryStreams() {
  Fixture fixture(affinePlan(4096, 0, "auxiliary\n"));
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  for (int round = 0; round < 3; round++) {
    checkGood(executor, fixture.engine, 4);
    const Outcome outcome = runCaptured(executor, registers, fixture.engine, 3);
    CHECK(!outcome.error && outcome.notCaptured.empty() && outcome.replayed == (round > 0));
  }
}

// TensorRT allocates by itself, and says so only in words where that fails.
void makesRoomForContexts() {
  for (const std::string& what : {std::string("context"), std::string("first")}) {
    Fixture fixture;
    Executor& executor = *fixture.executor;
    const Plan greedy = writePlan(affinePlan(0, 0, what + " 600000\n"));
    const auto engine = executor.load(greedy.path, greedy.identity);
    const uint64_t before = simulatedCounts().deviceBytes;

    // 1. What the pool keeps makes room.
    Run large;
    fill(*large.submission, executor.createRegisters(900000), fixture.engine, 1);
    CHECK(!large.start(executor).get().error);
    large.submission.reset();
    simulatedCapacity(before + 1200000);
    checkGood(executor, engine);

    // 2. So does a CUDA graph that waits for its next run; then it is captured once more.
    const auto registers = executor.createRegisters(2 * kRegisterBytes);
    CHECK(!runCaptured(executor, registers, fixture.engine, 2, 300000).replayed);
    CHECK(runCaptured(executor, registers, fixture.engine, 2, 300000).replayed);
    const Plan second = writePlan(affinePlan(0, 0, what + " 600001\n"));
    const auto other = executor.load(second.path, second.identity);
    simulatedCapacity(simulatedCounts().deviceBytes + 500000);
    checkGood(executor, other);
    simulatedCapacity(uint64_t{1} << 30);
    CHECK(!runCaptured(executor, registers, fixture.engine, 2, 300000).replayed);
    CHECK(runCaptured(executor, registers, fixture.engine, 2, 300000).replayed);

    // 3. Where nothing helps, the error has both numbers.
    const Plan last = writePlan(affinePlan(0, 0, what + " 3000000\n"));
    const auto tooLarge = executor.load(last.path, last.identity);
    simulatedCapacity(simulatedCounts().deviceBytes + 1000000);
    Run run;
    fill(*run.submission, executor.createRegisters(2 * kRegisterBytes), tooLarge, 1);
    const Outcome outcome = run.start(executor).get();
    CHECK(outcome.error && outcome.error->code() == "DEVICE_MEMORY");
    CHECK(outcome.error->needed == 3000000 && outcome.error->available < 3000000);
    checkGood(executor, fixture.engine);
    for (const Plan& plan : {greedy, second, last}) unlink(plan.path.c_str());
  }
}

void remembersFailedCaptures() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  simulatedRefuseCaptures(true);
  std::string reason;
  for (int round = 0; round < 4; round++) {
    const Outcome outcome = runCaptured(executor, registers, fixture.engine, 3);
    CHECK(!outcome.error && !outcome.replayed && outcome.notCaptured.find("900") != std::string::npos);
    CHECK(round == 0 || outcome.notCaptured == reason);
    reason = outcome.notCaptured;
    CHECK(simulatedCounts().captures == 1);
    checkGood(executor, fixture.engine);
  }
  // Another program is tried, and the first one again once it has been forgotten.
  simulatedRefuseCaptures(false);
  for (const int launches : {2, 3}) {
    CHECK(runCaptured(executor, registers, fixture.engine, launches).notCaptured.empty());
    CHECK(runCaptured(executor, registers, fixture.engine, launches).replayed);
  }
  CHECK(simulatedCounts().captures == 3);
}

void givesRegistersBack() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  checkGood(executor, fixture.engine);
  simulatedReset();
  simulatedHold();
  const uint64_t before = executor.statistics().launches;
  Run first;
  Run second;
  fill(*first.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 1);
  fill(*second.submission, executor.createRegisters(2 * kRegisterBytes), fixture.engine, 8);
  auto one = first.start(executor);
  auto two = second.start(executor);
  simulatedLet(1);
  CHECK(!one.get().error);
  // The first run's registers are released now. The device is never left with less than two launches all the same.
  for (uint64_t done = 1; done < 7; done++) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    waitUntil([&] {
      CHECK(std::chrono::steady_clock::now() < limit);
      return executor.statistics().launches - before == done + 2;
    });
    simulatedLet(1);
  }
  simulatedLet(-1);
  CHECK(floatsOf(two.get().results.at(0)) == expected(8));
}

void waitsAsleep() {
  Fixture fixture;
  Executor& executor = *fixture.executor;
  const auto registers = executor.createRegisters(2 * kRegisterBytes);
  simulatedReset();
  for (int launches = 1; launches < 6; launches++) {
    const uint64_t before = simulatedCounts().interrupts;
    checkGood(executor, fixture.engine, launches);
    // One for each launch, and one for the end.
    CHECK(simulatedCounts().interrupts - before == static_cast<uint64_t>(launches) + 1);
  }
  CHECK(!runCaptured(executor, registers, fixture.engine, 4).replayed);
  const uint64_t before = simulatedCounts().interrupts;
  CHECK(runCaptured(executor, registers, fixture.engine, 4).replayed);
  // The end of the graph, and that of the submission.
  CHECK(simulatedCounts().interrupts - before == 2);
  CHECK(simulatedCounts().spins == 0);
}

void countsEngines() {
  Fixture fixture(affinePlan(300000, 0, "context 50000\nfirst 20000\n"));
  Executor& executor = *fixture.executor;
  CHECK(executor.statistics().weightBytes == 300000 && executor.statistics().contextBytes == 0);
  checkGood(executor, fixture.engine);
  CHECK(executor.statistics().contextBytes == 70000);
  {
    const auto registers = executor.createRegisters(2 * kRegisterBytes);
    CHECK(!runCaptured(executor, registers, fixture.engine, 3).replayed);
    CHECK(executor.statistics().contextBytes == 140000);
  }
  // All that is on the device is accounted for.
  waitUntil([&] { return executor.statistics().contextBytes == 70000; });
  const ExecutorStatistics now = executor.statistics();
  CHECK(now.deviceBytes + now.weightBytes + now.contextBytes == simulatedCounts().deviceBytes);
  fixture.engine.reset();
  waitUntil([&] { return executor.statistics().weightBytes == 0; });
  CHECK(executor.statistics().contextBytes == 0);
}

}  // namespace
}  // namespace flowturbo
