// What every operation of the CPU backend is given besides its operands.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/aligned_buffer.h"
#include "kernels/numerics.h"
#include "rollout/base/thread_pool.h"

namespace lockstep {

// One growing buffer per thread of the pool, kept between calls: operations allocate only when they see a larger shape
// than before.
class ThreadScratch {
 public:
  explicit ThreadScratch(int threads) : buffers_(threads) {}

  // At least `count` floats, 64-byte aligned, contents undefined; valid until the same thread index asks for more.
  // Called inside ParallelFor with the index it passes: a slot is only ever touched by its own thread.
  float* Floats(int thread, int64_t count) {
    AlignedBuffer& buffer = buffers_[thread];
    const int64_t bytes = count * static_cast<int64_t>(sizeof(float));
    if (buffer.bytes() < bytes) buffer = AlignedBuffer(bytes);
    return reinterpret_cast<float*>(buffer.data());
  }

 private:
  std::vector<AlignedBuffer> buffers_;
};

struct CpuContext {
  const NumericsProfile& profile;
  ThreadPool& threads;
  ThreadScratch& scratch;
};

}  // namespace lockstep
