// How a manifest's tensors are cut into broadcasts: one rule, which a sender and its receivers each apply to the same
// manifest. docs/weights.md states it for other languages; tests/data/bucket_plan_golden.json holds plans.
//
// Tensors in the manifest's order fill buckets of `bucket_bytes` (a multiple of 256). A piece of a tensor starts at the
// next multiple of 256 in its bucket and is as long as the tensor or the bucket allows; the rest of the tensor starts
// the next bucket. A tensor of no bytes has no piece.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"

namespace lockstep {

inline constexpr int64_t kBucketAlign = 256;
inline constexpr int64_t kMaxBucketBytes = int64_t{1} << 30;

struct BucketPiece {
  int64_t tensor = 0;         // index into the manifest
  int64_t tensor_offset = 0;  // bytes
  int64_t bytes = 0;
  int64_t bucket_offset = 0;
  bool operator==(const BucketPiece&) const = default;
};

using Bucket = std::vector<BucketPiece>;

// tensors: those to send, as indices into the manifest, ascending; bytes: of every tensor of the manifest.
// INVALID_ARGUMENT unless bucket_bytes is a multiple of 256 from 256 to kMaxBucketBytes.
absl::StatusOr<std::vector<Bucket>> PlanBuckets(std::span<const int64_t> tensors, std::span<const int64_t> bytes,
                                                int64_t bucket_bytes);

}  // namespace lockstep
