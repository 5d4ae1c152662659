// One rank: connections to all others, and a thread on which everything happens.
#pragma once

#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "tests/fake_nccl/io.h"

namespace fake_nccl {

struct Broadcast {
  const void* send;
  void* receive;
  size_t bytes;
  int root;
};

// Thread-safe.
class Communicator {
 public:
  Communicator(int nranks, const lockstep::nccl::UniqueId& id, int rank, bool blocking);
  // At once, whatever it is doing.
  ~Communicator();

  // kInProgress until the last thing that was begun is over. An error stays.
  Result state();
  // kInProgress; or at once what forbids it.
  Result Begin(std::vector<Broadcast> broadcasts);
  Result Finalize();
  Result Wait();  // for the end of kInProgress

  int nranks() const { return nranks_; }
  bool blocking() const { return blocking_; }

 private:
  // On the thread. A batch: broadcasts of one root, one after another.
  void Run();
  Result Connect();
  Result Do(const std::vector<Broadcast>& broadcasts);
  Result SendBatch(const Broadcast* batch, size_t count);
  Result SendData(const Broadcast* batch, size_t count);
  Result ReceiveBatch(const Broadcast* batch, size_t count);

  const int nranks_;
  const lockstep::nccl::UniqueId id_;
  const int rank_;
  const bool blocking_;
  Stop stop_;
  std::vector<Fd> peers_;  // by rank; the thread's

  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  Result state_ = lockstep::nccl::kInProgress;
  std::optional<std::vector<Broadcast>> next_;
  bool finalized_ = false;

  std::thread thread_;
};

}  // namespace fake_nccl
