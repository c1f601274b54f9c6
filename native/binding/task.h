// Work that takes long, on a thread of its own: four busy workers of Node's pool would stop its file system and DNS.
// A task belongs to the environment (main thread or worker) that started it and settles one promise there. When the
// environment or the process ends first, the task is told to cancel and nothing of it touches JavaScript any more.
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
  // Calls the progress function with fresh values, on JavaScript's thread.
  using Report = std::function<void(Napi::Env, Napi::Function)>;

  // Starts `work`. `onProgress` may be empty. Returns { promise, cancel() }.
  static Napi::Object start(Napi::Env env, const char* name, Napi::Function onProgress, Work work);

  const std::atomic<bool>& cancelled() const noexcept { return cancelled_; }

  // From any thread: the latest report replaces one that JavaScript has not seen yet.
  void report(Report report);

  // To be called once `library` is open and before it works: handlers run in reverse order at exit, so ours then runs
  // before the library's own, while its threads can still be told to stop.
  static void guardExit(const std::string& library);

  // A file to remove if the process ends while the task runs; empty for none.
  void removeAtExit(const std::string& path);

  void cancel() noexcept { cancelled_ = true; }
  std::string fileToRemove();

 private:
  explicit Task(Napi::Env env) : deferred_(Napi::Promise::Deferred::New(env)) {}

  void run(Work work) noexcept;
  void settle(Napi::Env env);
  bool send(bool last);
  static void onEnvironmentGone(void* data);
  void leaveEnvironment(napi_env env);
  static void onEvent(napi_env env, napi_value callback, void* context, void* data);

  Napi::Promise::Deferred deferred_;
  // Node frees the channel with its environment, whoever still holds it: from then on it is null here.
  std::mutex channelMutex_;
  napi_threadsafe_function channel_ = nullptr;
  // What the environment's cleanup hook holds; touched on JavaScript's thread only.
  std::shared_ptr<Task>* environment_ = nullptr;
  std::atomic<bool> cancelled_{false};

  std::mutex mutex_;
  Report pending_;
  std::string fileToRemove_;
  Answer answer_;
  std::optional<Error> error_;
};

// A JavaScript error with the fields of a core error: code, complaints, log, errno, path.
Napi::Error toJavaScript(Napi::Env env, const Error& error);

}  // namespace flowturbo::binding
