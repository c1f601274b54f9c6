// Long work, on a thread of its own: Node's pool has four threads, and its file system and DNS calls need them.
// A task belongs to the environment (main thread or worker) that started it and settles one promise there. When the
// environment or the process ends first, the task is cancelled and does not touch JavaScript any more.
#pragma once

#include <napi.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "error.h"

namespace flowturbo::binding {

class Task : public std::enable_shared_from_this<Task> {
 public:
  // Makes the value that the promise resolves with, on JavaScript's thread.
  using Answer = std::function<Napi::Value(Napi::Env)>;
  // Runs on the task's thread; an Error that it throws rejects the promise.
  using Work = std::function<Answer(Task&)>;
  // Calls the progress function with the latest values, on JavaScript's thread.
  using Report = std::function<void(Napi::Env, Napi::Function)>;

  // Starts `work` on a thread of its own. `onProgress` may be empty. Returns { promise, cancel() }.
  static Napi::Object start(Napi::Env env, const char* name, Napi::Function onProgress, Work work);

  // A task whose work runs on a thread of another owner. `begin` starts the work with the task and returns a function that
  // cancels it. The work must call `finish` once.
  using Begin = std::function<std::function<void()>(const std::shared_ptr<Task>&)>;
  static Napi::Object begin(Napi::Env env, const char* name, Napi::Function onProgress, const Begin& begin);

  // From any thread.
  void finish(Answer answer) noexcept;
  void finish(const Error& error) noexcept;

  const std::atomic<bool>& cancelled() const noexcept { return cancelled_; }

  // From any thread: the latest report replaces one that has not been passed to JavaScript yet.
  void report(Report report);

  // To be called once `library` is open and before it works. Exit handlers run in reverse order, so this one runs before
  // the library's own, while the library's threads can still be stopped.
  static void guardExit(const std::string& library);

  // A file to remove if the process ends while the task runs; empty for none.
  void removeAtExit(const std::string& path);

  void cancel() noexcept;
  std::string fileToRemove();

 private:
  explicit Task(Napi::Env env) : deferred_(Napi::Promise::Deferred::New(env)) {}

  static std::shared_ptr<Task> create(Napi::Env env, const char* name, Napi::Function onProgress);
  Napi::Object handle(Napi::Env env, bool interruptible);
  void end() noexcept;
  void run(Work work) noexcept;
  void settle(Napi::Env env);
  bool send(bool last);
  static void onEnvironmentGone(void* data);
  void leaveEnvironment(napi_env env);
  static void onEvent(napi_env env, napi_value callback, void* context, void* data);

  Napi::Promise::Deferred deferred_;
  // Node frees the channel with its environment even while others hold it: it is null here from then on.
  std::mutex channelMutex_;
  napi_threadsafe_function channel_ = nullptr;
  // What the environment's cleanup hook holds; touched on JavaScript's thread only.
  std::shared_ptr<Task>* environment_ = nullptr;
  std::atomic<bool> cancelled_{false};

  std::mutex mutex_;
  std::function<void()> onCancel_;
  bool ended_ = false;
  Report pending_;
  std::string fileToRemove_;
  Answer answer_;
  std::optional<Error> error_;
};

// A JavaScript error with the fields of a core error: code, complaints, log, errno, path.
Napi::Error toJavaScript(Napi::Env env, const Error& error);

}  // namespace flowturbo::binding
