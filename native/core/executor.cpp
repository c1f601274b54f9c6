#include "executor.h"

#include <time.h>

#include <algorithm>
#include <future>
#include <thread>

#include "executor_state.h"

namespace flowturbo {
namespace {

// Processor time of the calling thread: time that other threads of a busy machine take does not count.
int64_t threadNanoseconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{1000000000} * now.tv_sec + now.tv_nsec;
}

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

}  // namespace

Error hostMemory() { return Error("OUT_OF_MEMORY", "the machine has too little memory"); }

Registers::Registers(uint64_t bytes) : bytes_(bytes) {}
Registers::~Registers() = default;

ExecutorState::ExecutorState(std::shared_ptr<const TensorRtLibrary> opened, int ordinal)
    : library(std::move(opened)),
      device(Device::open(ordinal)),
      stream(createStream(*device)),
      memory(std::make_shared<DeviceMemoryPool>(device, stream.get())),
      pinned(std::make_shared<PinnedMemoryPool>(device, stream.get())) {}

// 1. Threads.

void ExecutorState::start(const std::shared_ptr<ExecutorState>& state) {
  std::thread([state] { state->issueLoop(); }).detach();
}

void ExecutorState::issueLoop() {
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
      // A caller may have withdrawn what there was to do.
      if (!canProceed()) continue;
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
bool ExecutorState::useDevice(bool again) {
  try {
    const Busy busy;
    device->makeCurrent();
    return true;
  } catch (const Error& error) {
    if (again) note(Error("DEVICE_LOST", error.what()));
    return false;
  }
}

// Holding the mutex.
bool ExecutorState::canProceed() const {
  if (!commands.empty() || !returned.empty()) return true;
  if (!released.empty()) return inFlight.empty();
  if (hasReadyCloser()) return true;
  if (queue.empty()) return closing && inFlight.empty();
  const Submission& next = *queue.front();
  if (!next.begun_) {
    if (lost) return true;
    const CapturedProgram* program = next.registers->captured_.get();
    return (program == nullptr || !program->running) && inFlight.size() < kQueued;
  }
  if (mustStop(next)) return true;
  if (inFlight.size() >= kQueued) return false;
  return next.next_ == next.instructions.size() || launchesInFlight < kLaunchesAhead;
}

bool ExecutorState::isReady(const Closer& closer) const {
  return closer.ready && (queue.empty() || queue.front()->number_ > closer.after) &&
         (inFlight.empty() || inFlight.front()->submission->number_ > closer.after);
}

bool ExecutorState::hasReadyCloser() const {
  return !closing &&
         std::any_of(closers.begin(), closers.end(), [&](const Closer& closer) { return isReady(closer); });
}

// Does one thing. Returns true with the mutex released, since destructors of what is done with may lock it; false with
// the mutex held when nothing is left to do and nothing can be added.
bool ExecutorState::proceed(std::unique_lock<std::mutex>& lock) {
  if (!commands.empty()) {
    const auto command = std::move(commands.front());
    commands.pop_front();
    lock.unlock();
    command();
    return true;
  }
  if (!returned.empty()) {
    std::vector<std::unique_ptr<Registers>> freed;
    freed.swap(returned);
    lock.unlock();
    for (const auto& registers : freed) discard(*registers);
    return true;
  }
  if (!released.empty()) {
    std::vector<std::shared_ptr<const void>> freed;
    freed.swap(released);
    lock.unlock();
    // The upload of a profile's resources by `prepare` may still run. Errors here are not reported to anyone, but a
    // lost device is recorded for all.
    const CudaResult rest = driver().cuStreamSynchronize(stream.get());
    if (rest != kCudaSuccess) note(driver().failure(rest, "cuStreamSynchronize"));
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

void ExecutorState::retireLoop() {
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
    if (done->start) events[static_cast<size_t>(EventUse::kTime)].push_back(std::move(done->start));
    if (done->end) events[static_cast<size_t>(done->endUse())].push_back(std::move(done->end));
    issuing.notify_one();
    lock.unlock();
    // This may destroy the last references, whose destructors lock the mutex.
    done.reset();
    lock.lock();
  }
}

// On the issuing thread, when nothing is left to do.
void ExecutorState::free() {
  scratch.reset();
  for (auto& kept : events) kept.clear();
  memory.reset();
  pinned.reset();
  stream.reset();
  device.reset();
}

// 2. Failures and ends.

bool ExecutorState::hasFailed(const Submission& submission) const {
  const std::lock_guard<std::mutex> lock(mutex);
  return submission.failure_.has_value();
}

Error ExecutorState::lostError() const {
  const std::lock_guard<std::mutex> lock(mutex);
  return *lost;
}

void ExecutorState::note(const Error& error) {
  if (error.code() != "DEVICE_LOST") return;
  device->lose(error);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!lost) lost = Error("DEVICE_LOST", error.what());
  issuing.notify_one();
}

void ExecutorState::fail(Submission& submission, const Error& error) {
  note(error);
  const std::lock_guard<std::mutex> lock(mutex);
  if (!submission.failure_) submission.failure_ = error;
  issuing.notify_one();
}

void ExecutorState::settle(Submission& submission, std::optional<Error> error, std::vector<std::vector<uint8_t>> results) {
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

// 3. Memory.

void ExecutorState::makeRoom(const Registers* keep) {
  // What runs must have ended before memory that it uses is freed; then all that was released can go.
  const CudaResult rest = driver().cuStreamSynchronize(stream.get());
  if (rest != kCudaSuccess) {
    const Error error = driver().failure(rest, "cuStreamSynchronize");
    note(error);
    throw error;
  }
  std::vector<std::unique_ptr<Registers>> freed;
  std::vector<Registers*> idle;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    freed.swap(returned);
    for (Registers* registers : captured)
      if (registers != keep && !registers->captured_->running) idle.push_back(registers);
  }
  for (Registers* registers : idle) discard(*registers);
  for (const auto& registers : freed) discard(*registers);
  freed.clear();
  std::vector<std::shared_ptr<const void>> things;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    things.swap(released);
  }
  things.clear();
  memory->trim();
  pinned->trim();
}

void ExecutorState::requestRoom() {
  auto made = std::make_shared<std::promise<void>>();
  const std::future<void> done = made->get_future();
  addCommand([this, made] {
    try {
      makeRoom(nullptr);
    } catch (const std::exception&) {
      // The attempt that follows says what is wrong.
    }
    made->set_value();
  });
  done.wait();
}

// 4. Events.

OwnedEvent ExecutorState::takeEvent(EventUse use) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<OwnedEvent>& kept = events[static_cast<size_t>(use)];
    if (!kept.empty()) {
      OwnedEvent event = std::move(kept.back());
      kept.pop_back();
      return event;
    }
  }
  return createEvent(*device, use);
}

void ExecutorState::record(const OwnedEvent& event, unsigned flags) {
  driver().check(driver().cuEventRecordWithFlags(event.get(), stream.get(), flags), "cuEventRecord");
}

// 5. What is released.

void ExecutorState::release(std::shared_ptr<const void> thing) {
  const std::lock_guard<std::mutex> lock(mutex);
  released.push_back(std::move(thing));
  issuing.notify_one();
}

void ExecutorState::release(std::unique_ptr<Registers> registers) {
  const std::lock_guard<std::mutex> lock(mutex);
  returned.push_back(std::move(registers));
  issuing.notify_one();
}

void ExecutorState::ready(uint64_t id) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (Closer& closer : closers)
    if (closer.id == id) closer.ready = true;
  issuing.notify_one();
}

void ExecutorState::addCommand(std::function<void()> command) {
  const std::lock_guard<std::mutex> lock(mutex);
  commands.push_back(std::move(command));
  issuing.notify_one();
}

// 6. What others see.

std::shared_ptr<Executor> Executor::open(std::shared_ptr<const TensorRtLibrary> library, int ordinal) {
  // Weak references only: nothing here has to be destroyed when the process exits.
  static auto* mutex = new std::mutex();
  static auto* opened = new std::map<std::pair<std::string, int>, std::weak_ptr<Executor>>();
  const std::lock_guard<std::mutex> lock(*mutex);
  std::weak_ptr<Executor>& known = (*opened)[{library->path(), ordinal}];
  if (std::shared_ptr<Executor> existing = known.lock()) {
    const std::lock_guard<std::mutex> state(existing->state_->mutex);
    if (existing->state_->lost) throw *existing->state_->lost;
    return existing;
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
    const auto create = [&] { return new Engine(state.library, state.device, state.engineMemory, plan, identity); };
    Engine* created = nullptr;
    // Read before the attempt: what was released may be freed at any time during it.
    const uint64_t before = state.device->memory().free;
    try {
      created = create();
    } catch (const Error&) {
      // Freeing what nobody needs at present may make room.
      state.requestRoom();
      if (state.device->memory().free <= before) throw;
      created = create();
    }
    engine = std::shared_ptr<Engine>(created, [executor = shared_from_this()](Engine* unused) mutable {
      // The weak references above keep this function, but must not keep the executor.
      const std::shared_ptr<Executor> last = std::move(executor);
      last->state_->release(std::shared_ptr<const void>(unused));
    });
  } catch (const Error& error) {
    state.note(error);
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
    executor->state_->release(std::unique_ptr<Registers>(unused));
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
      state->withRoom(nullptr, [&] { shapes = engine->context(profile, state->stream.get()).shapes(); });
    } catch (const Error& error) {
      state->note(error);
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
      state->note(error);
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
  result.weightBytes = state_->engineMemory->weights;
  result.contextBytes = state_->engineMemory->contexts;
  result.pinnedBytes = state_->pinned->bytes();
  result.busySeconds = static_cast<double>(state_->busyNanoseconds.load()) * 1e-9;
  const std::lock_guard<std::mutex> lock(state_->enginesMutex);
  for (const auto& [identity, engine] : state_->engines)
    if (!engine.expired()) result.engines++;
  return result;
}

}  // namespace flowturbo
