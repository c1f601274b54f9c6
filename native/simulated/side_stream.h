// A stream of the library's own, which a launch uses beside the caller's.
#pragma once

#include <memory>

#include "machine.h"

namespace machine {

class SideStream {
 public:
  // Null where the driver refuses.
  static std::unique_ptr<SideStream> open() {
    constexpr unsigned kNonBlocking = 1;
    constexpr unsigned kDisableTiming = 2;
    std::unique_ptr<SideStream> opened(new SideStream());
    const StreamCalls& calls = opened->calls_;
    const bool made = calls.createStream(&opened->stream_, kNonBlocking) == 0 &&
                      calls.createEvent(&opened->forked_, kDisableTiming) == 0 &&
                      calls.createEvent(&opened->joined_, kDisableTiming) == 0;
    return made ? std::move(opened) : nullptr;
  }
  ~SideStream() {
    if (stream_ != nullptr) calls_.destroyStream(stream_);
    for (CUevent_st* event : {forked_, joined_})
      if (event != nullptr) calls_.destroyEvent(event);
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  CUstream_st* stream() const { return stream_; }
  // It waits for what the caller's stream has been given, and later the caller's stream waits for it.
  int fork(CUstream_st* from) { return follow(stream_, from, forked_); }
  int join(CUstream_st* to) { return follow(to, stream_, joined_); }

 private:
  SideStream() = default;

  int follow(CUstream_st* after, CUstream_st* before, CUevent_st* event) {
    const int result = calls_.record(event, before, 0);
    return result != 0 ? result : calls_.wait(after, event, 0);
  }

  const StreamCalls calls_ = streamCalls();
  CUstream_st* stream_ = nullptr;
  CUevent_st* forked_ = nullptr;
  CUevent_st* joined_ = nullptr;
};

}  // namespace machine
