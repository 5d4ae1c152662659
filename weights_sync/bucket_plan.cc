#include "weights_sync/bucket_plan.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace lockstep {

absl::StatusOr<std::vector<Bucket>> PlanBuckets(std::span<const int64_t> tensors, std::span<const int64_t> bytes,
                                                int64_t bucket_bytes) {
  if (bucket_bytes < kBucketAlign || bucket_bytes > kMaxBucketBytes || bucket_bytes % kBucketAlign != 0) {
    return absl::InvalidArgumentError(absl::StrCat("bucket_bytes: ", bucket_bytes, "; want a multiple of ",
                                                   kBucketAlign, " up to ", kMaxBucketBytes));
  }
  std::vector<Bucket> buckets;
  int64_t used = bucket_bytes;  // of the last bucket, a multiple of kBucketAlign: none is open yet
  for (const int64_t tensor : tensors) {
    for (int64_t done = 0; done < bytes[tensor];) {
      if (used >= bucket_bytes) {
        buckets.emplace_back();
        used = 0;
      }
      const int64_t size = std::min(bytes[tensor] - done, bucket_bytes - used);
      buckets.back().push_back({.tensor = tensor, .tensor_offset = done, .bytes = size, .bucket_offset = used});
      used += (size + kBucketAlign - 1) / kBucketAlign * kBucketAlign;
      done += size;
    }
  }
  return buckets;
}

}  // namespace lockstep
