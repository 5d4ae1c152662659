#include "weights_sync/bucket_plan.h"

#include <gtest/gtest.h>

#include <fstream>
#include <numeric>
#include <random>

#include "nlohmann/json.hpp"

namespace lockstep {
namespace {

std::vector<int64_t> All(size_t count) {
  std::vector<int64_t> tensors(count);
  std::iota(tensors.begin(), tensors.end(), 0);
  return tensors;
}

// The plans that tests/python/test_publish_nccl.py compares with as well.
TEST(BucketPlan, Golden) {
  std::ifstream file(std::string(LOCKSTEP_TEST_DATA) + "/bucket_plan_golden.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  ASSERT_GE(golden["plans"].size(), 5u);
  for (const nlohmann::json& plan : golden["plans"]) {
    const auto bytes = plan["bytes"].get<std::vector<int64_t>>();
    const auto buckets = PlanBuckets(All(bytes.size()), bytes, plan["bucket_bytes"]);
    ASSERT_TRUE(buckets.ok()) << buckets.status();
    ASSERT_EQ(buckets->size(), plan["buckets"].size());
    for (size_t b = 0; b < buckets->size(); ++b) {
      ASSERT_EQ((*buckets)[b].size(), plan["buckets"][b].size());
      for (size_t i = 0; i < (*buckets)[b].size(); ++i) {
        const nlohmann::json& p = plan["buckets"][b][i];
        EXPECT_EQ((*buckets)[b][i], (BucketPiece{p[0], p[1], p[2], p[3]}));
      }
    }
  }
}

TEST(BucketPlan, EveryByteOnceInOrderWithinBuckets) {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    const int64_t bucket_bytes = kBucketAlign * std::uniform_int_distribution<int64_t>(1, 20)(random);
    std::vector<int64_t> bytes(std::uniform_int_distribution<int>(0, 30)(random));
    for (int64_t& b : bytes) b = std::uniform_int_distribution<int64_t>(0, 5000)(random);
    std::vector<int64_t> tensors;
    for (const int64_t t : All(bytes.size())) {
      if (random() % 3 > 0) tensors.push_back(t);
    }
    const auto buckets = PlanBuckets(tensors, bytes, bucket_bytes);
    ASSERT_TRUE(buckets.ok()) << buckets.status();
    std::vector<int64_t> done(bytes.size());
    int64_t last = -1;
    for (const Bucket& bucket : *buckets) {
      ASSERT_FALSE(bucket.empty());
      int64_t end = 0;
      for (const BucketPiece& piece : bucket) {
        EXPECT_GE(piece.tensor, last);
        last = piece.tensor;
        EXPECT_EQ(piece.tensor_offset, done[piece.tensor]);
        EXPECT_GT(piece.bytes, 0);
        EXPECT_EQ(piece.bucket_offset % kBucketAlign, 0);
        EXPECT_GE(piece.bucket_offset, end);
        end = piece.bucket_offset + piece.bytes;
        EXPECT_LE(end, bucket_bytes);
        done[piece.tensor] += piece.bytes;
      }
    }
    for (const int64_t t : tensors) EXPECT_EQ(done[t], bytes[t]);
  }
}

TEST(BucketPlan, RefusesOtherSizes) {
  const std::vector<int64_t> bytes = {10};
  for (const int64_t size : {int64_t{0}, int64_t{255}, int64_t{300}, kMaxBucketBytes + kBucketAlign}) {
    EXPECT_TRUE(absl::IsInvalidArgument(PlanBuckets(All(1), bytes, size).status())) << size;
  }
}

}  // namespace
}  // namespace lockstep
