#include "tests/fake_nccl/io.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace fake_nccl {
namespace {

using namespace lockstep::nccl;  // NOLINT: the results

// errno of a call on a connection.
Result Failed(const char* call) {
  const int error = errno;
  SetLastError("%s: %s", call, std::strerror(error));
  return error == ECONNRESET || error == EPIPE || error == ECONNREFUSED || error == ETIMEDOUT ? kRemoteError
                                                                                              : kSystemError;
}

void Prepare(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

constexpr size_t kLastErrorBytes = 256;
std::mutex last_error_mutex;
char last_error[kLastErrorBytes];

}  // namespace

Fd::~Fd() {
  if (fd_ >= 0) close(fd_);
}

Stop::Stop() : event_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

void Stop::Set() {
  set_.store(true, std::memory_order_release);
  const uint64_t one = 1;
  static_cast<void>(!write(event_.get(), &one, sizeof(one)));
}

Result WaitFor(int fd, short events, const Stop& stop) {
  pollfd fds[2] = {{fd, events, 0}, {stop.fd(), POLLIN, 0}};
  while (poll(fds, 2, -1) < 0) {
    if (errno != EINTR) return Failed("poll");
  }
  return stop.IsSet() ? kInternalError : kSuccess;
}

Result Send(int fd, const void* data, size_t bytes, const Stop& stop) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t sent = send(fd, from, bytes, MSG_NOSIGNAL);
    if (sent >= 0) {
      from += sent;
      bytes -= sent;
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return Failed("send");
    const Result result = WaitFor(fd, POLLOUT, stop);
    if (result != kSuccess) return result;
  }
  return kSuccess;
}

Result Receive(int fd, void* data, size_t bytes, const Stop& stop) {
  char* to = static_cast<char*>(data);
  while (bytes > 0) {
    const ssize_t got = recv(fd, to, bytes, 0);
    if (got == 0) {
      SetLastError("recv: the peer closed the connection");
      return kRemoteError;
    }
    if (got > 0) {
      to += got;
      bytes -= got;
      if (stop.IsSet()) return kInternalError;
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return Failed("recv");
    const Result result = WaitFor(fd, POLLIN, stop);
    if (result != kSuccess) return result;
  }
  return kSuccess;
}

Result Listen(Fd* listener, uint16_t* port) {
  Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  if (!fd.valid() || bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(fd.get(), 128) != 0 ||
      getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    return Failed("listen");
  }
  *port = ntohs(address.sin_port);
  *listener = std::move(fd);
  return kSuccess;
}

Result Connect(uint16_t port, const Stop& stop, Fd* to) {
  Fd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid()) return Failed("socket");
  const sockaddr_in address = Loopback(port);
  if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    if (errno != EINPROGRESS) return Failed("connect");
    const Result result = WaitFor(fd.get(), POLLOUT, stop);
    if (result != kSuccess) return result;
    socklen_t size = sizeof(errno);
    int error = 0;
    getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) {
      errno = error;
      return Failed("connect");
    }
  }
  Prepare(fd.get());
  *to = std::move(fd);
  return kSuccess;
}

Fd TryAccept(int listener) {
  Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (fd.valid()) Prepare(fd.get());
  return fd;
}

Result Accept(int listener, const Stop& stop, Fd* from) {
  for (;;) {
    Fd fd = TryAccept(listener);
    if (fd.valid()) {
      *from = std::move(fd);
      return kSuccess;
    }
    if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) return Failed("accept");
    const Result result = WaitFor(listener, POLLIN, stop);
    if (result != kSuccess) return result;
  }
}

void SetLastError(const char* format, ...) {
  const std::lock_guard lock(last_error_mutex);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
}

const char* LastError() {
  thread_local char copy[kLastErrorBytes];  // the caller reads it without the lock
  const std::lock_guard lock(last_error_mutex);
  std::memcpy(copy, last_error, sizeof(copy));
  return copy;
}

}  // namespace fake_nccl
