#include "task.h"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <set>
#include <thread>
#include <utility>

#include "executor.h"

namespace flowturbo::binding {
namespace {

// How long an exiting process waits for threads inside NVIDIA's libraries.
constexpr std::chrono::milliseconds kExitTimeout(500);

// The running tasks of the process. TensorRT's own exit handlers must not run while a thread is still inside the library,
// so an exiting process waits for a short time and then ends without running them.
struct Running {
  std::mutex mutex;
  std::condition_variable changed;
  std::set<std::shared_ptr<Task>> tasks;
};

Running& running() {
  static auto* instance = new Running();
  return *instance;
}

void leaveProcess(int status, void*) {
  Running& all = running();
  std::unique_lock<std::mutex> lock(all.mutex);
  const std::set<std::shared_ptr<Task>> tasks = all.tasks;
  lock.unlock();
  for (const auto& task : tasks) task->cancel();
  lock.lock();
  const bool done = all.changed.wait_for(lock, kExitTimeout, [&] { return all.tasks.empty(); });
  if (done && Executor::quiesce(kExitTimeout)) return;
  for (const auto& task : all.tasks) {
    const std::string path = task->fileToRemove();
    if (!path.empty()) ::unlink(path.c_str());
  }
  _exit(status);
}

// An event of the channel. It keeps the task until JavaScript's thread has handled it.
struct Event {
  std::shared_ptr<Task> task;
  bool last;
};

}  // namespace

std::shared_ptr<Task> Task::create(Napi::Env env, const char* name, Napi::Function onProgress) {
  const std::shared_ptr<Task> task(new Task(env));
  const napi_status status = napi_create_threadsafe_function(
      env, onProgress.IsEmpty() ? nullptr : static_cast<napi_value>(onProgress), nullptr, Napi::String::New(env, name),
      0, 1, nullptr, nullptr, nullptr, &Task::onEvent, &task->channel_);
  if (status != napi_ok) throw Napi::Error::New(env);

  // Cancelled when its environment ends first.
  task->environment_ = new std::shared_ptr<Task>(task);
  napi_add_env_cleanup_hook(env, &Task::onEnvironmentGone, task->environment_);

  const std::lock_guard<std::mutex> lock(running().mutex);
  running().tasks.insert(task);
  return task;
}

Napi::Object Task::handle(Napi::Env env, bool interruptible) {
  Napi::Object handle = Napi::Object::New(env);
  handle["promise"] = deferred_.Promise();
  const std::weak_ptr<Task> self = weak_from_this();
  handle["cancel"] = Napi::Function::New(env, [self, interruptible](const Napi::CallbackInfo& info) {
    const auto task = self.lock();
    if (!task) return;
    task->cancel();
    // Work that the library cannot interrupt must not keep a process running that has nothing else to do.
    if (!interruptible && task->environment_ != nullptr) napi_unref_threadsafe_function(info.Env(), task->channel_);
  });
  return handle;
}

Napi::Object Task::start(Napi::Env env, const char* name, Napi::Function onProgress, Work work) {
  const std::shared_ptr<Task> task = create(env, name, onProgress);
  try {
    std::thread([task, work = std::move(work)]() mutable {
      task->run(std::move(work));
    }).detach();
  } catch (const std::exception& exception) {
    task->end();
    task->leaveEnvironment(env);
    throw Napi::Error::New(env, exception.what());
  }
  return task->handle(env, false);
}

Napi::Object Task::begin(Napi::Env env, const char* name, Napi::Function onProgress, const Begin& begin) {
  const std::shared_ptr<Task> task = create(env, name, onProgress);
  const Napi::Object handle = task->handle(env, true);
  std::function<void()> onCancel = begin(task);
  const std::lock_guard<std::mutex> lock(task->mutex_);
  // A task that has ended already must not store the function: the function may hold the task.
  if (!task->ended_) task->onCancel_ = std::move(onCancel);
  return handle;
}

void Task::run(Work work) noexcept {
  try {
    Answer answer = work(*this);
    work = nullptr;
    finish(std::move(answer));
  } catch (const Error& error) {
    work = nullptr;
    finish(error);
  } catch (const std::exception& exception) {
    work = nullptr;
    finish(Error("INTERNAL", exception.what()));
  }
}

void Task::finish(Answer answer) noexcept {
  answer_ = std::move(answer);
  end();
  send(true);
}

void Task::finish(const Error& error) noexcept {
  error_ = error;
  end();
  send(true);
}

// Called when none of its work runs any more.
void Task::end() noexcept {
  std::function<void()> unused;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    unused.swap(onCancel_);
    ended_ = true;
  }
  Running& all = running();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.tasks.erase(shared_from_this());
  all.changed.notify_all();
}

void Task::cancel() noexcept {
  cancelled_ = true;
  std::function<void()> onCancel;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    onCancel = onCancel_;
  }
  if (onCancel) onCancel();
}

// False once the environment ends, and the promise with it.
bool Task::send(bool last) {
  auto event = std::make_unique<Event>(Event{shared_from_this(), last});
  const std::lock_guard<std::mutex> lock(channelMutex_);
  if (channel_ == nullptr || napi_call_threadsafe_function(channel_, event.get(), napi_tsfn_nonblocking) != napi_ok)
    return false;
  event.release();
  return true;
}

void Task::report(Report report) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool waiting = static_cast<bool>(pending_);
    pending_ = std::move(report);
    if (waiting) return;
  }
  if (!send(false)) cancel();
}

void Task::guardExit(const std::string& library) {
  static std::mutex mutex;
  static auto* guarded = new std::set<std::string>();
  const std::lock_guard<std::mutex> lock(mutex);
  if (guarded->insert(library).second) on_exit(leaveProcess, nullptr);
}

void Task::removeAtExit(const std::string& path) {
  const std::lock_guard<std::mutex> lock(mutex_);
  fileToRemove_ = path;
}

std::string Task::fileToRemove() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return fileToRemove_;
}

void Task::onEvent(napi_env rawEnv, napi_value callback, void*, void* data) {
  const std::unique_ptr<Event> event(static_cast<Event*>(data));
  // Without an environment, Node is emptying the channel at its end.
  if (rawEnv == nullptr) return;
  const Napi::Env env(rawEnv);
  const Napi::HandleScope scope(env);
  try {
    Report report;
    {
      const std::lock_guard<std::mutex> lock(event->task->mutex_);
      report = std::move(event->task->pending_);
      event->task->pending_ = nullptr;
    }
    if (report && callback != nullptr) report(env, Napi::Function(env, callback));
    if (event->last) event->task->settle(env);
  } catch (const Napi::Error&) {
    // The progress function is wrapped in TypeScript and does not throw; an environment that is being terminated does.
    event->task->cancel();
  }
}

void Task::onEnvironmentGone(void* data) {
  const std::unique_ptr<std::shared_ptr<Task>> task(static_cast<std::shared_ptr<Task>*>(data));
  (*task)->environment_ = nullptr;
  (*task)->cancel();
  const std::lock_guard<std::mutex> lock((*task)->channelMutex_);
  (*task)->channel_ = nullptr;
}

void Task::leaveEnvironment(napi_env env) {
  if (environment_ == nullptr) return;
  napi_remove_env_cleanup_hook(env, &Task::onEnvironmentGone, environment_);
  delete environment_;
  environment_ = nullptr;
  // Released here and not by the task's thread, which must not touch the channel after its last event. Locking the mutex
  // waits until that thread has left `send`.
  const std::lock_guard<std::mutex> lock(channelMutex_);
  napi_release_threadsafe_function(channel_, napi_tsfn_release);
  channel_ = nullptr;
}

void Task::settle(Napi::Env env) {
  leaveEnvironment(env);
  // The answer may hold an engine. It is destroyed here, since the task exists until its thread has ended too: JavaScript
  // may have released the engine by then and needs its memory.
  const Answer answer = std::exchange(answer_, nullptr);
  if (error_)
    deferred_.Reject(toJavaScript(env, *error_).Value());
  else
    deferred_.Resolve(answer(env));
}

Napi::Error toJavaScript(Napi::Env env, const Error& error) {
  Napi::Error result = Napi::Error::New(env, error.what());
  Napi::Object fields = result.Value();
  fields["code"] = Napi::String::New(env, error.code());
  if (error.systemError != 0) fields["errno"] = Napi::Number::New(env, error.systemError);
  if (!error.path.empty()) fields["path"] = Napi::String::New(env, error.path);
  Napi::Array log = Napi::Array::New(env, error.log.size());
  for (uint32_t index = 0; index < error.log.size(); index++) log[index] = Napi::String::New(env, error.log[index]);
  fields["log"] = log;
  const auto number = [&](const char* name, double value) { fields[name] = Napi::Number::New(env, value); };
  if (error.needed != 0) number("needed", static_cast<double>(error.needed));
  if (error.needed != 0) number("available", static_cast<double>(error.available));
  if (error.launch >= 0) number("launch", static_cast<double>(error.launch));
  if (error.operand >= 0) number("operand", static_cast<double>(error.operand));
  Napi::Array complaints = Napi::Array::New(env, error.complaints.size());
  for (uint32_t index = 0; index < error.complaints.size(); index++) {
    const ParserComplaint& complaint = error.complaints[index];
    Napi::Object entry = Napi::Object::New(env);
    entry["code"] = Napi::String::New(env, complaint.code);
    entry["node"] = Napi::Number::New(env, complaint.node);
    entry["nodeName"] = Napi::String::New(env, complaint.nodeName);
    entry["operator"] = Napi::String::New(env, complaint.nodeOperator);
    entry["description"] = Napi::String::New(env, complaint.description);
    complaints[index] = entry;
  }
  fields["complaints"] = complaints;
  return result;
}

}  // namespace flowturbo::binding
