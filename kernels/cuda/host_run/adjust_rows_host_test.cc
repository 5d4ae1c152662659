// The kernel of penalties, bias and masks, its own source on a CPU, against AdjustLogits of the CPU sampler.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "kernels/cuda/sampling/adjust_rows.h"
#include "kernels/cuda/sampling/task_packer.h"
#include "kernels/cuda/sampling/token_lists.h"
#include "kernels/float_bits.h"
#include "sampler/adjust.h"

namespace lockstep::cuda {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// [rows, stride] logits as the device has them, NaN after a row's end, and as the CPU sampler takes them.
struct alignas(16) Vector {
  std::byte bytes[16];
};
struct Logits {
  std::vector<std::vector<float>> rows;
  std::vector<Vector> device;
  int64_t stride;

  Logits(int64_t count, int64_t vocab, bool fp32, std::mt19937& engine) : stride((vocab + 7) / 8 * 8) {
    const int64_t element = fp32 ? 4 : 2;
    device.resize(count * stride * element / 16);
    std::normal_distribution<float> normal(0, 5);
    for (int64_t r = 0; r < count; ++r) {
      rows.emplace_back(vocab);
      for (int64_t c = 0; c < stride; ++c) {
        float x = engine() % 20 == 0 ? -std::numeric_limits<float>::infinity() : normal(engine);
        if (!fp32) x = Bf16ToF32(F32ToBf16(x));
        if (c < vocab) rows[r][c] = x;
        if (c >= vocab) x = kNan;
        std::byte* const to = reinterpret_cast<std::byte*>(device.data()) + (r * stride + c) * element;
        const uint16_t narrow = F32ToBf16(x);
        if (fp32) {
          std::memcpy(to, &x, sizeof(x));
        } else {
          std::memcpy(to, &narrow, sizeof(narrow));
        }
      }
    }
  }
};

class AdjustRows : public testing::TestWithParam<int64_t> {
 protected:
  int32_t Token() { return static_cast<int32_t>(engine_() % vocab_); }
  float Real() { return std::uniform_real_distribution<float>(-3, 3)(engine_); }
  std::vector<int32_t> Tokens(int64_t count) {
    std::vector<int32_t> tokens(count);
    for (int32_t& t : tokens) t = Token();
    return tokens;
  }
  SamplingParams Params();
  void Compare(bool fp32);

  const int64_t vocab_ = GetParam();
  std::mt19937 engine_{static_cast<uint32_t>(vocab_)};
};

SamplingParams AdjustRows::Params() {
  SamplingParams p;
  if (engine_() % 2 == 0) p.repetition_penalty = 0.5f + std::abs(Real());
  if (engine_() % 2 == 0) p.frequency_penalty = Real();
  if (engine_() % 2 == 0) p.presence_penalty = Real();
  for (int64_t i = engine_() % 3 == 0 ? 0 : static_cast<int64_t>(engine_() % 2000); i > 0; --i) {
    p.logit_bias[Token()] = 10 * Real();
  }
  if (engine_() % 2 == 0) p.allowed_token_ids = Tokens(1 + static_cast<int64_t>(engine_() % (2 * vocab_)));
  if (engine_() % 2 == 0) {
    p.min_tokens = static_cast<int64_t>(engine_() % 6);
    p.stop_token_ids = Tokens(700);
  }
  return p;
}

void AdjustRows::Compare(bool fp32) {
  constexpr int64_t kTasks = 12, kRows = 5;
  const Logits logits(kRows, vocab_, fp32, engine_);
  const LogprobOptions options;
  std::vector<SamplingParams> params;
  std::vector<TokenHistory> histories;
  std::vector<RowTask> tasks(kTasks);
  std::vector<SampleTask> row_tasks;
  for (int64_t i = 0; i < kTasks; ++i) {
    params.push_back(i == 0 ? SamplingParams() : Params());  // the first changes nothing
    TokenHistory history(Tokens(1 + static_cast<int64_t>(engine_() % 900)), NeedsCounts(params[i]));
    for (int64_t n = static_cast<int64_t>(engine_() % 8); n > 0; --n) history.Append(Token());
    if (i > 0 && engine_() % 2 == 0) params[i].bad_words = {Tokens(1), {history.tokens().back(), Token()}, Tokens(40)};
    histories.push_back(std::move(history));
  }
  for (int64_t i = 0; i < kTasks; ++i) {
    tasks[i] = {.params = &params[i], .options = &options, .history = &histories[i]};
    row_tasks.push_back({static_cast<int64_t>(engine_() % kRows), &tasks[i]});
  }
  TaskPacker packer(vocab_);
  packer.Pack(row_tasks);
  std::vector<DeviceTask> device_tasks;
  std::vector<DeviceResult> results(kTasks);
  std::vector<std::vector<uint64_t>> lists(kTasks);
  std::vector<std::vector<float>> adjusted(kTasks, std::vector<float>(logits.stride, kNan));
  for (int64_t i = 0; i < kTasks; ++i) {
    const PackedTask& packed = packer.tasks()[i];
    DeviceTask& task = device_tasks.emplace_back(packed.device);
    if (!packed.adjusted) continue;
    lists[i].resize(TokenListBytes(params[i], vocab_) / 8);
    PackTokenLists(params[i], vocab_, std::as_writable_bytes(std::span(lists[i])));
    PointToTokenLists(params[i], vocab_, std::as_bytes(std::span(lists[i])).data(), task);
    task.penalties = packer.penalties().data() + packed.penalties;
    task.masked = packer.masked().data() + packed.masked;
    task.adjusted = adjusted[i].data();
  }
  const absl::Status status = LaunchAdjustRows({.logits = logits.device.data(),
                                                .fp32 = fp32,
                                                .logits_stride = logits.stride,
                                                .tasks = device_tasks.data(),
                                                .results = results.data(),
                                                .count = kTasks,
                                                .vocab = vocab_},
                                               nullptr);
  ASSERT_TRUE(status.ok()) << status;
  for (int64_t i = 0; i < kTasks; ++i) {
    SCOPED_TRACE("task " + std::to_string(i));
    std::vector<float> want(vocab_, kNan);
    if (packer.tasks()[i].adjusted) {
      want = logits.rows[row_tasks[i].logits_row];
      AdjustLogits(params[i], histories[i], want);
    }
    for (int64_t c = 0; c < vocab_; ++c) {
      ASSERT_EQ(std::bit_cast<uint32_t>(adjusted[i][c]), std::bit_cast<uint32_t>(want[c])) << "token " << c;
    }
    for (int64_t c = vocab_; c < logits.stride; ++c) EXPECT_TRUE(std::isnan(adjusted[i][c])) << c;
  }
}

TEST_P(AdjustRows, HaveTheCpusBitsFromBf16) {
  Compare(false);
}

TEST_P(AdjustRows, HaveTheCpusBitsFromFp32) {
  Compare(true);
}

// One slice, slices without a column, columns for each thread, and several for each.
INSTANTIATE_TEST_SUITE_P(Vocab, AdjustRows, testing::Values(1, 17, 256, 1003, 10007));

}  // namespace
}  // namespace lockstep::cuda
