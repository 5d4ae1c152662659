// How many of Rollout's streams are open, for a drain that waits for them and for no other call: health watches stay
// open for good. Thread-safe.
#pragma once

#include <cstdint>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace lockstep {

class OpenStreams {
 public:
  void Add() {
    absl::MutexLock lock(&mutex_);
    ++open_;
  }
  void Remove() {
    absl::MutexLock lock(&mutex_);
    --open_;
  }
  // Until none is open, or `deadline`.
  void AwaitNone(absl::Time deadline) const {
    absl::MutexLock lock(&mutex_);
    const auto none = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return open_ == 0; };
    mutex_.AwaitWithDeadline(absl::Condition(&none), deadline);
  }

 private:
  mutable absl::Mutex mutex_;
  int64_t open_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace lockstep
