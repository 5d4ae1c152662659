// Runs of values, cut anywhere, into and out of every layout in use, against the weight packed from the whole.
#include "kernels/cpu/live_weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/linear.h"
#include "kernels/cpu/test_util.h"
#include "kernels/cpu/weight_stage.h"
#include "kernels/digest_math.h"
#include "kernels/host_values.h"

namespace lockstep {
namespace {

using testing::TestContext;

constexpr int64_t kGap = 512;  // before the second tensor

class LiveWeightsTest : public ::testing::TestWithParam<const char*> {
 protected:
  std::vector<std::byte> Random(int64_t count) {
    std::vector<float> values(count);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(generator_);
    std::vector<std::byte> bytes(count * DTypeBytes(dtype()));
    ConvertValues(reinterpret_cast<const std::byte*>(values.data()), DType::kF32, count, dtype(), bytes.data());
    return bytes;
  }
  DType dtype() { return context_.get().profile.weights; }
  std::unique_ptr<LinearWeight> Pack(const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
    const HostMatrix parts[] = {{a.data(), kRows[0], kCols, dtype()}, {b.data(), kRows[1], kCols, dtype()}};
    return CpuPackLinear(context_.get(), parts);
  }
  static bool Equal(const LinearWeight& a, const LinearWeight& b) {
    return std::memcmp(static_cast<const CpuLinearWeight&>(a).panel(0), static_cast<const CpuLinearWeight&>(b).panel(0),
                       a.bytes()) == 0;
  }
  CpuLiveWeights Live(LinearWeight& weight) {
    auto* linear = static_cast<CpuLinearWeight*>(&weight);
    const int64_t size = DTypeBytes(dtype());
    return CpuLiveWeights(context_.get(),
                          {{.offset = 0, .bytes = kRows[0] * kCols * size, .linear = linear, .dtype = dtype()},
                           {.offset = At(),
                            .bytes = kRows[1] * kCols * size,
                            .linear = linear,
                            .first_row = kRows[0],
                            .dtype = dtype()}});
  }
  int64_t At() { return kRows[0] * kCols * DTypeBytes(dtype()) + kGap; }

  // Neither the rows nor the columns end with a panel or a pair; the parts share one.
  static constexpr int64_t kRows[2] = {45, 70}, kCols = 37;
  TestContext context_{GetParam(), 3};
  std::mt19937 generator_{3};
};

TEST_P(LiveWeightsTest, WritesWhatPackingTheWholeGivesAndReadsItBack) {
  const std::vector<std::byte> old_a = Random(kRows[0] * kCols), old_b = Random(kRows[1] * kCols);
  const std::vector<std::byte> new_b = Random(kRows[1] * kCols);
  const auto weight = Pack(old_a, old_b), want = Pack(old_a, new_b);
  CpuLiveWeights live = Live(*weight);
  const int64_t size = DTypeBytes(dtype()), total = kRows[1] * kCols;
  for (int64_t done = 0; done < total;) {
    const int64_t count = std::min<int64_t>(total - done, 1 + static_cast<int64_t>(generator_() % 200));
    ASSERT_TRUE(live.Write(At() + done * size, std::span(new_b).subspan(done * size, count * size)).ok());
    done += count;
  }
  EXPECT_TRUE(Equal(*weight, *want));
  std::vector<std::byte> read(new_b.size());
  for (int64_t done = 0; done < total;) {
    const int64_t count = std::min<int64_t>(total - done, 1 + static_cast<int64_t>(generator_() % 200));
    ASSERT_TRUE(live.Read(At() + done * size, std::span(read).subspan(done * size, count * size)).ok());
    done += count;
  }
  EXPECT_EQ(read, new_b);
  EXPECT_EQ(*live.SumInUse(At(), total * size, 0), DigestSum(new_b, 0));
  EXPECT_EQ(*live.SumInUse(At() + 8, total * size - 8, 1), DigestSum(std::span(new_b).subspan(8), 1));
  std::vector<std::byte> other(old_a.size());
  ASSERT_TRUE(live.Read(0, other).ok());
  EXPECT_EQ(other, old_a);
}

TEST_P(LiveWeightsTest, AnInboxWritesIntoThem) {
  const std::vector<std::byte> old_a = Random(kRows[0] * kCols), old_b = Random(kRows[1] * kCols);
  const auto weight = Pack(old_a, old_b);
  CpuLiveWeights live = Live(*weight);
  auto inbox = CpuWeightInbox::Create(1 << 20, 1);
  ASSERT_TRUE(inbox.ok()) << inbox.status();
  // As fp32 masters, of which the values are the rounding; in two pieces that meet within a row.
  std::vector<float> sent(kRows[0] * kCols);
  std::normal_distribution<float> normal;
  for (float& value : sent) value = normal(generator_);
  const int64_t count = static_cast<int64_t>(sent.size()), cut = count / 2 / 4 * 4;
  std::memcpy((*inbox)->buffer(0), sent.data(), count * sizeof(float));
  for (const auto& [begin, end] : {std::pair{int64_t{0}, cut}, {cut, count}}) {
    ASSERT_TRUE((*inbox)
                    ->Store({.from = (*inbox)->buffer(0) + begin * 4,
                             .sent = DType::kF32,
                             .count = end - begin,
                             .sent_index = begin,
                             .held_index = begin,
                             .held = dtype(),
                             .to = begin * DTypeBytes(dtype()),
                             .stored = dtype(),
                             .tally = 0},
                            live)
                    .ok());
  }
  std::vector<std::byte> held(old_a.size());
  ConvertValues(reinterpret_cast<const std::byte*>(sent.data()), DType::kF32, count, dtype(), held.data());
  EXPECT_TRUE(Equal(*weight, *Pack(held, old_b)));
}

INSTANTIATE_TEST_SUITE_P(Layouts, LiveWeightsTest, ::testing::Values("fp32", "hf", "hf-torch"), [](const auto& layout) {
  std::string name = layout.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

}  // namespace
}  // namespace lockstep
