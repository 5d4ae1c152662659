#include "tests/fake_nccl/communicator.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "tests/fake_nccl/rendezvous.h"

namespace fake_nccl {
namespace {

using namespace lockstep::nccl;  // NOLINT: the results

// Before the data, from the root: count and sizes. Then each rank's 1, or 0 if that is not what it expects; then the
// root's 1 to all, or 0 if one of them did.
std::vector<uint64_t> HeaderOf(const Broadcast* batch, size_t count) {
  std::vector<uint64_t> header = {count};
  for (size_t i = 0; i < count; ++i) header.push_back(batch[i].bytes);
  return header;
}

Result Mismatch() {
  SetLastError("the ranks disagree on the number or the sizes of a group's broadcasts");
  return kInvalidUsage;
}

}  // namespace

Communicator::Communicator(int nranks, const UniqueId& id, int rank, bool blocking)
    : nranks_(nranks), id_(id), rank_(rank), blocking_(blocking), peers_(nranks) {
  Join(id_);
  thread_ = std::thread([this] { Run(); });
}

Communicator::~Communicator() {
  stop_.Set();
  {
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
  thread_.join();
  Leave(id_);
}

Result Communicator::state() {
  const std::lock_guard lock(mutex_);
  return state_;
}

Result Communicator::Wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return state_ != kInProgress; });
  return state_;
}

Result Communicator::Begin(std::vector<Broadcast> broadcasts) {
  const std::lock_guard lock(mutex_);
  if (state_ == kInProgress || finalized_) {
    SetLastError(finalized_ ? "the communicator was finalized"
                            : "the communicator was used before ncclCommGetAsyncError had left ncclInProgress");
    return kInvalidArgument;
  }
  if (state_ != kSuccess) return state_;
  state_ = kInProgress;
  next_ = std::move(broadcasts);
  changed_.notify_all();
  return kInProgress;
}

Result Communicator::Finalize() {
  const Result result = Begin({});
  if (result == kInProgress) {
    const std::lock_guard lock(mutex_);
    finalized_ = true;
  }
  return result;
}

void Communicator::Run() {
  Result result = Connect();
  while (!stop_.IsSet()) {
    std::unique_lock lock(mutex_);
    state_ = result;
    changed_.notify_all();
    changed_.wait(lock, [this] { return next_.has_value() || stop_.IsSet(); });
    if (stop_.IsSet()) return;
    const std::vector<Broadcast> broadcasts = *std::exchange(next_, std::nullopt);
    lock.unlock();
    result = Do(broadcasts);
  }
}

// A rank calls those below it and is called by those above.
Result Communicator::Connect() {
  Fd listener;
  uint16_t port = 0;
  std::vector<uint16_t> ports;
  Result result = Listen(&listener, &port);
  if (result == kSuccess) result = Meet(id_, nranks_, rank_, port, stop_, &ports);
  struct {
    uint64_t nonce;
    uint64_t rank;
  } hello = {NonceOf(id_), static_cast<uint64_t>(rank_)};
  for (int peer = 0; peer < rank_ && result == kSuccess; ++peer) {
    result = fake_nccl::Connect(ports[peer], stop_, &peers_[peer]);
    if (result == kSuccess) result = Send(peers_[peer].get(), &hello, sizeof(hello), stop_);
  }
  for (int missing = nranks_ - 1 - rank_; missing > 0 && result == kSuccess;) {
    Fd socket;
    result = Accept(listener.get(), stop_, &socket);
    if (result == kSuccess) result = Receive(socket.get(), &hello, sizeof(hello), stop_);
    if (result != kSuccess) break;
    if (hello.nonce != NonceOf(id_) || hello.rank <= rank_ || hello.rank >= nranks_) continue;  // a stranger
    peers_[hello.rank] = std::move(socket);
    --missing;
  }
  return result;
}

Result Communicator::Do(const std::vector<Broadcast>& broadcasts) {
  Result result = kSuccess;
  for (size_t begin = 0; begin < broadcasts.size() && result == kSuccess;) {
    size_t end = begin + 1;
    while (end < broadcasts.size() && broadcasts[end].root == broadcasts[begin].root) ++end;
    const Broadcast* batch = &broadcasts[begin];
    result = batch->root == rank_ ? SendBatch(batch, end - begin) : ReceiveBatch(batch, end - begin);
    begin = end;
  }
  return result;
}

Result Communicator::SendBatch(const Broadcast* batch, size_t count) {
  const std::vector<uint64_t> header = HeaderOf(batch, count);
  for (int peer = 0; peer < nranks_; ++peer) {
    if (peer == rank_) continue;
    const Result result = Send(peers_[peer].get(), header.data(), header.size() * sizeof(header[0]), stop_);
    if (result != kSuccess) return result;
  }
  char all_agree = 1;
  for (int peer = 0; peer < nranks_; ++peer) {
    if (peer == rank_) continue;
    char agrees = 0;
    const Result result = Receive(peers_[peer].get(), &agrees, 1, stop_);
    if (result != kSuccess) return result;
    all_agree &= agrees;
  }
  for (int peer = 0; peer < nranks_; ++peer) {
    if (peer == rank_) continue;
    const Result result = Send(peers_[peer].get(), &all_agree, 1, stop_);
    if (result != kSuccess) return result;
  }
  if (!all_agree) return Mismatch();
  for (size_t i = 0; i < count; ++i)
    if (batch[i].receive != batch[i].send && batch[i].bytes > 0)
      std::memcpy(batch[i].receive, batch[i].send, batch[i].bytes);
  return SendData(batch, count);
}

// To all at once, each as fast as it reads.
Result Communicator::SendData(const Broadcast* batch, size_t count) {
  struct Cursor {
    int fd;
    size_t piece = 0, offset = 0;
  };
  std::vector<Cursor> cursors;
  for (int peer = 0; peer < nranks_; ++peer)
    if (peer != rank_) cursors.push_back({peers_[peer].get()});
  while (!stop_.IsSet()) {
    for (Cursor& cursor : cursors) {
      while (cursor.piece < count) {
        const Broadcast& piece = batch[cursor.piece];
        // A part at a time, so that one fast reader does not keep the others waiting.
        const size_t bytes = std::min<size_t>(piece.bytes - cursor.offset, 256 << 10);
        const ssize_t sent = send(cursor.fd, static_cast<const char*>(piece.send) + cursor.offset, bytes, MSG_NOSIGNAL);
        if (sent < 0) {
          if (errno == EAGAIN || errno == EINTR) break;
          SetLastError("send: %s", std::strerror(errno));
          return kRemoteError;
        }
        cursor.offset += sent;
        if (cursor.offset < piece.bytes) break;
        ++cursor.piece;
        cursor.offset = 0;
      }
    }
    std::erase_if(cursors, [&](const Cursor& cursor) { return cursor.piece == count; });
    if (cursors.empty()) return kSuccess;
    std::vector<pollfd> fds = {{stop_.fd(), POLLIN, 0}};
    for (const Cursor& cursor : cursors) fds.push_back({cursor.fd, POLLOUT, 0});
    if (poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) return kSystemError;
  }
  return kInternalError;
}

Result Communicator::ReceiveBatch(const Broadcast* batch, size_t count) {
  const int root = peers_[batch->root].get();
  const std::vector<uint64_t> want = HeaderOf(batch, count);
  std::vector<uint64_t> header(1);
  Result result = Receive(root, header.data(), sizeof(header[0]), stop_);
  if (result != kSuccess) return result;
  header.resize(1 + header[0]);
  result = Receive(root, &header[1], header[0] * sizeof(header[0]), stop_);
  char agrees = header == want ? 1 : 0;
  if (result == kSuccess) result = Send(root, &agrees, 1, stop_);
  if (result == kSuccess) result = Receive(root, &agrees, 1, stop_);
  if (result != kSuccess) return result;
  if (!agrees) return Mismatch();
  for (size_t i = 0; i < count && result == kSuccess; ++i)
    result = Receive(root, batch[i].receive, batch[i].bytes, stop_);
  return result;
}

}  // namespace fake_nccl
