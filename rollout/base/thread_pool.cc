#include "rollout/base/thread_pool.h"

#include <algorithm>
#include <atomic>

#include "rollout/base/check.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lockstep {
namespace {

void CpuRelax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A decode step runs some hundred loops a few microseconds apart: a futex sleep and wake between two of them would cost
// more than the loop. Workers spin for about this many pauses (some tens of microseconds), then sleep until the next
// loop.
constexpr int kSpin = 2000;

}  // namespace

struct ThreadPool::State {
  // The loop in progress. Written by the starter before `generation` is released, read by workers after they acquire
  // it.
  absl::FunctionRef<void(int64_t, int64_t, int)>* fn = nullptr;
  int64_t n = 0;
  int64_t grain = 1;
  std::atomic<int64_t> next{0};
  std::atomic<uint32_t> generation{0};
  std::atomic<int> running{0};
  std::atomic<bool> stop{false};
  std::atomic<bool> busy{false};
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  LOCKSTEP_CHECK(threads >= 1, "a thread pool needs at least 1 thread, got {}", threads);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { Run(i); });
}

ThreadPool::~ThreadPool() {
  state_->stop.store(true);
  state_->generation.fetch_add(1);
  state_->generation.notify_all();
  for (auto& w : workers_) w.join();
}

int ThreadPool::threads() const {
  return static_cast<int>(workers_.size()) + 1;
}

void ThreadPool::Run(int thread) {
  uint32_t seen = 0;
  for (;;) {
    uint32_t now = state_->generation.load(std::memory_order_acquire);
    for (int spin = 0; now == seen; now = state_->generation.load(std::memory_order_acquire)) {
      if (++spin < kSpin) {
        CpuRelax();
      } else {
        state_->generation.wait(seen, std::memory_order_acquire);
      }
    }
    seen = now;
    if (state_->stop.load()) return;
    for (int64_t begin; (begin = state_->next.fetch_add(state_->grain)) < state_->n;) {
      (*state_->fn)(begin, std::min(begin + state_->grain, state_->n), thread);
    }
    state_->running.fetch_sub(1, std::memory_order_release);
  }
}

void ThreadPool::ParallelFor(int64_t n, int64_t grain, absl::FunctionRef<void(int64_t, int64_t, int)> fn) {
  LOCKSTEP_CHECK(grain >= 1, "ParallelFor: grain must be at least 1, got {}", grain);
  if (n <= 0) return;
  if (workers_.empty() || n <= grain) {
    for (int64_t begin = 0; begin < n; begin += grain) fn(begin, std::min(begin + grain, n), 0);
    return;
  }
  LOCKSTEP_CHECK(!state_->busy.exchange(true), "ParallelFor is not reentrant");
  state_->fn = &fn;
  state_->n = n;
  state_->grain = grain;
  state_->next.store(0, std::memory_order_relaxed);
  state_->running.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  state_->generation.fetch_add(1, std::memory_order_release);
  state_->generation.notify_all();
  for (int64_t begin; (begin = state_->next.fetch_add(grain)) < n;) fn(begin, std::min(begin + grain, n), 0);
  // Every worker passes through every generation, so the loop's state is free for the next one only when all have left
  // it.
  for (int spin = 0; state_->running.load(std::memory_order_acquire) != 0;) {
    // Past the usual imbalance of a loop, a worker has lost its core to another process: give it ours.
    if (++spin < kSpin) {
      CpuRelax();
    } else {
      std::this_thread::yield();
    }
  }
  state_->busy.store(false);
}

}  // namespace lockstep
