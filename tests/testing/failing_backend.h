// CPU backends whose device fails, or their sampler.
#pragma once

#include <memory>

#include "absl/synchronization/notification.h"
#include "rollout/engine/backend.h"

namespace lockstep {

// `steps`: that succeed; those after end with an error. `threads` must outlive it.
std::unique_ptr<Backend> MakeFailingBackend(const NumericsProfile& profile, ThreadPool* threads, int steps);

// Steps fail on a thread that is neither the maker's nor has called Ops::UseOnThisThread.
std::unique_ptr<Backend> MakeThreadBoundBackend(const NumericsProfile& profile, ThreadPool* threads);

// Steps do not end before `released`, which must outlive it.
std::unique_ptr<Backend> MakeBlockingBackend(const NumericsProfile& profile, ThreadPool* threads,
                                             absl::Notification* released);

// The sampler has no memory for a step after the first `steps`.
std::unique_ptr<Backend> MakeFailingSamplerBackend(const NumericsProfile& profile, ThreadPool* threads, int steps);

// The logits that score `forced_token` are not finite; all others are as they should be.
std::unique_ptr<Backend> MakeNonFiniteBackend(const NumericsProfile& profile, ThreadPool* threads,
                                              int32_t forced_token);

// What the failed steps report.
inline constexpr char kOtherThread[] = "BeginStep: the device is not this thread's";
inline constexpr char kDeviceFailure[] = "GdnDecode: an illegal memory access was encountered";
inline constexpr char kSamplerFailure[] = "cudaMalloc of 65536 bytes: out of memory";
// What the failed tasks report.
inline constexpr char kNotFinite[] = "logits: the logit of token 3 is nan; want finite or -inf";

}  // namespace lockstep
