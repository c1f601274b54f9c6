#include "files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "error.h"

namespace flowturbo {
namespace {

// The kernel shortens writes of more than 2 GiB; with smaller ones a full disk is also noticed earlier.
constexpr uint64_t kWriteBytes = uint64_t{64} << 20;

Error changedFile(const std::string& code, const std::string& path) {
  const char* since = code == "WEIGHTS_CHANGED" ? "the model was opened" : "it was verified";
  Error error(code, path + " has changed since " + since);
  error.path = path;
  return error;
}

}  // namespace

std::string identityOf(int descriptor, const std::string& path) {
  struct stat status {};
  if (fstat(descriptor, &status) != 0) throw systemError("IO", errno, "Cannot examine", path);
  const auto nanoseconds = [](const timespec& time) {
    return std::to_string(static_cast<int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec);
  };
  return std::to_string(status.st_dev) + ":" + std::to_string(status.st_ino) + ":" + std::to_string(status.st_size) +
         ":" + nanoseconds(status.st_mtim) + ":" + nanoseconds(status.st_ctim);
}

MappedFile::MappedFile(const std::string& path, const std::string& identity, const char* changed)
    : path_(path), identity_(identity), changed_(changed) {
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) throw systemError("IO", errno, "Cannot read", path);
  try {
    verifyUnchanged();
    struct stat status {};
    if (fstat(descriptor_, &status) != 0) throw systemError("IO", errno, "Cannot examine", path);
    size_ = static_cast<uint64_t>(status.st_size);
    data_ = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
    if (data_ == MAP_FAILED) throw systemError("IO", errno, "Cannot map", path);
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

MappedFile::~MappedFile() {
  munmap(data_, size_);
  ::close(descriptor_);
}

const void* MappedFile::range(uint64_t offset, uint64_t length) const {
  if (offset > size_ || length > size_ - offset) throw changedFile(changed_, path_);
  return static_cast<const char*>(data_) + offset;
}

void MappedFile::verifyUnchanged() const {
  if (identityOf(descriptor_, path_) != identity_) throw changedFile(changed_, path_);
}

NewFile::NewFile(const std::string& path) : path_(path) {
  descriptor_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  if (descriptor_ < 0) throw systemError("IO", errno, "Cannot create", path);
}

NewFile::~NewFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!kept_) ::unlink(path_.c_str());
}

bool NewFile::write(const void* data, uint64_t length) noexcept {
  const char* from = static_cast<const char*>(data);
  while (length > 0 && failure_ == 0) {
    const ssize_t count = ::write(descriptor_, from, static_cast<size_t>(std::min(length, kWriteBytes)));
    if (count < 0) {
      if (errno != EINTR) failure_ = errno;
      continue;
    }
    from += count;
    length -= static_cast<uint64_t>(count);
    written_ += static_cast<uint64_t>(count);
  }
  return failure_ == 0;
}

void NewFile::finish() {
  if (failure_ == 0 && ::fsync(descriptor_) != 0) failure_ = errno;
  if (failure_ == 0) {
    const int descriptor = descriptor_;
    descriptor_ = -1;
    if (::close(descriptor) != 0) failure_ = errno;
  }
  if (failure_ != 0) throw systemError("IO", failure_, "Cannot write", path_);
}

std::unique_ptr<FileLock> FileLock::tryLock(const std::string& path) {
  for (;;) {
    const int descriptor = ::open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (descriptor < 0) throw systemError("IO", errno, "Cannot create", path);
    if (flock(descriptor, LOCK_EX | LOCK_NB) != 0) {
      const int number = errno;
      ::close(descriptor);
      if (number == EWOULDBLOCK) return nullptr;
      if (number == EINTR) continue;
      throw systemError("IO", number, "Cannot lock", path);
    }
    // The previous holder removes the file while it still holds the lock: then the locked file has no name any more.
    struct stat held {};
    struct stat named {};
    if (fstat(descriptor, &held) == 0 && stat(path.c_str(), &named) == 0 && held.st_ino == named.st_ino &&
        held.st_dev == named.st_dev)
      return std::unique_ptr<FileLock>(new FileLock(path, descriptor));
    ::close(descriptor);
  }
}

FileLock::~FileLock() {
  ::unlink(path_.c_str());
  ::close(descriptor_);
}

}  // namespace flowturbo
