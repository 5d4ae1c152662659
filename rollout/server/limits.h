// What a request is checked against. GetInfo reports all of it.
#pragma once

#include <cstdint>

#include "absl/time/time.h"
#include "sampler/params.h"

namespace lockstep {

// Counts whose limits only keep a request small; no one has needed more.
inline constexpr int32_t kMaxRequestIdBytes = 128;
inline constexpr int32_t kMaxHintBytes = 128;  // session_id, cache_salt
inline constexpr int32_t kMaxStopSequences = 256;
inline constexpr int32_t kMaxStopSequenceTokens = 256;
inline constexpr int32_t kMaxStopStrings = 256;
inline constexpr int32_t kMaxStopStringBytes = 1024;
inline constexpr int32_t kMaxStreamInterval = 1'000'000;
inline constexpr int32_t kMaxAbsPriority = 1'000'000;
inline constexpr int64_t kMaxTimeBudgetMs = 7LL * 24 * 3600 * 1000;
inline constexpr int64_t kMaxResponseBytes = 1 << 20;

struct ServiceLimits {
  int64_t max_prompt_tokens = 0;  // of Generate
  int32_t max_n = 128;
  int64_t max_request_bytes = 16 << 20;
  int64_t max_waiting_sequences = 4096;
  int64_t max_buffered_bytes = 1LL << 30;
  int64_t max_retained_bytes = 256LL << 20;
  absl::Duration reattach = absl::Seconds(120);
  absl::Duration max_version_wait = absl::Seconds(600);
};

}  // namespace lockstep
