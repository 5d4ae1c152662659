// A fixed set of threads for data-parallel loops inside one step. One loop at a time, started by one thread (the step
// loop); results must not depend on how a loop is split, which every caller guarantees by giving each index its own
// outputs.
#pragma once

#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace lockstep {

class ThreadPool {
 public:
  // `threads` in total, the calling thread included; 1 runs everything inline.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls fn(begin, end, thread) over disjoint ranges that cover [0, n), each at most `grain` long, until all are done.
  // Ranges are handed out dynamically. `thread` is in [0, threads()): an index for per-thread scratch. Not reentrant:
  // fn must not call ParallelFor.
  void ParallelFor(int64_t n, int64_t grain, absl::FunctionRef<void(int64_t begin, int64_t end, int thread)> fn);

 private:
  struct State;
  void Run(int thread);

  std::unique_ptr<State> state_;
  std::vector<std::thread> workers_;
};

}  // namespace lockstep
