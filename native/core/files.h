// The files that a build reads and writes: weights mapped into memory, so that nothing is copied; the plan, streamed
// to a file of its own; and a lock that the kernel releases when its process ends, however it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace flowturbo {

// A file mapped read-only from its first byte to its last.
class MappedFile {
 public:
  // `identity` is what the file was when it was hashed (see identityOf). Throws Error `changed` if it is another one by
  // now, IO if it cannot be read.
  MappedFile(const std::string& path, const std::string& identity, const char* changed = "WEIGHTS_CHANGED");
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  uint64_t size() const noexcept { return size_; }

  // Throws Error `changed` where the range lies outside of the file.
  const void* range(uint64_t offset, uint64_t length) const;

  // Throws Error `changed` if the file has changed since it was mapped.
  void verifyUnchanged() const;

 private:
  std::string path_;
  std::string identity_;
  const char* changed_;
  int descriptor_ = -1;
  void* data_ = nullptr;
  uint64_t size_ = 0;
};

// "device:inode:size:mtime:ctime", times in nanoseconds: every change to a file that goes
// through the operating system changes this string.
std::string identityOf(int descriptor, const std::string& path);

// A file under construction: new, private to its owner, removed unless `keep` was called.
class NewFile {
 public:
  // Throws Error IO; an existing file is one of the reasons.
  explicit NewFile(const std::string& path);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  // False after a failure, which `finish` reports.
  bool write(const void* data, uint64_t length) noexcept;
  uint64_t written() const noexcept { return written_; }

  // Flushes to the disk. Throws Error IO for the first failure so far.
  void finish();
  void keep() noexcept { kept_ = true; }

 private:
  std::string path_;
  int descriptor_ = -1;
  uint64_t written_ = 0;
  int failure_ = 0;
  bool kept_ = false;
};

// Exclusive among processes and threads for as long as the object lives.
class FileLock {
 public:
  // Null while another holder has it. Throws Error IO.
  static std::unique_ptr<FileLock> tryLock(const std::string& path);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  FileLock(std::string path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}

  std::string path_;
  int descriptor_;
};

}  // namespace flowturbo
