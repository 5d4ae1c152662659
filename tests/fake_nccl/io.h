// Sockets of the loopback that can be given up from another thread: every wait ends when a Stop is set.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "weights_sync/nccl_abi.h"

namespace fake_nccl {

using lockstep::nccl::Result;

class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

 private:
  int fd_;
};

class Stop {
 public:
  Stop();
  void Set();
  bool IsSet() const { return set_.load(std::memory_order_acquire); }
  int fd() const { return event_.get(); }  // readable once it is set

 private:
  Fd event_;
  std::atomic<bool> set_ = false;
};

// All sockets are non-blocking. Results: kSuccess; kRemoteError, the peer is gone; kSystemError, an error of this
// side; kInternalError, stopped, which nobody sees: only an abort stops.
Result WaitFor(int fd, short events, const Stop& stop);  // poll(2)'s events
Result Send(int fd, const void* data, size_t bytes, const Stop& stop);
Result Receive(int fd, void* data, size_t bytes, const Stop& stop);
Result Listen(Fd* listener, uint16_t* port);
Result Connect(uint16_t port, const Stop& stop, Fd* socket);
Result Accept(int listener, const Stop& stop, Fd* socket);
// One that waits already. Not valid: there is none.
Fd TryAccept(int listener);

// Of this process. What ncclGetLastError gives.
void SetLastError(const char* format, ...) __attribute__((format(printf, 1, 2)));
const char* LastError();

}  // namespace fake_nccl
