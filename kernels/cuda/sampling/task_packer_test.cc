// The edits of a packed task, carried out here, against AdjustLogits of the CPU sampler. Needs no GPU.
#include "kernels/cuda/sampling/task_packer.h"

#include <bit>
#include <limits>
#include <map>
#include <random>

#include "gtest/gtest.h"
#include "sampler/adjust.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kVocab = 61;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// What AdjustRowsKernel does.
std::vector<float> Adjust(const std::vector<float>& row, const DeviceTask& task, std::span<const LogitEdit> edits) {
  std::vector<float> adjusted = task.allow_only != 0 ? std::vector<float>(row.size(), kMasked) : row;
  for (const LogitEdit& edit : edits) {
    float x = row[edit.token];
    if ((edit.flags & kEditRepeated) != 0) {
      x = x > 0 ? x / task.repetition_penalty : x * task.repetition_penalty;
      if (edit.generated > 0) {
        x -= task.frequency_penalty * static_cast<float>(edit.generated);
        x -= task.presence_penalty;
      }
    }
    if ((edit.flags & kEditBiased) != 0) x += edit.bias;
    if ((edit.flags & kEditMasked) != 0 || (task.allow_only != 0 && (edit.flags & kEditAllowed) == 0)) x = kMasked;
    adjusted[edit.token] = x;
  }
  return adjusted;
}

TEST(TaskPacker, EditsAreTheCpusAdjustments) {
  std::mt19937 engine(4);
  const auto below = [&](int n) { return static_cast<int32_t>(engine() % n); };
  const auto real = [&] { return std::uniform_real_distribution<float>(-3, 3)(engine); };
  const auto tokens = [&](int count) {
    std::vector<int32_t> result(count);
    for (int32_t& t : result) t = below(kVocab);
    return result;
  };
  TaskPacker packer(kVocab);
  int adjusted = 0;
  for (int round = 0; round < 500; ++round) {
    SamplingParams params[3];
    LogprobOptions options;
    std::vector<TokenHistory> histories;
    std::vector<RowTask> tasks(3);
    std::vector<SampleTask> row_tasks;
    for (int i = 0; i < 3; ++i) {
      SamplingParams& p = params[i];
      if (below(2) == 0) p.repetition_penalty = 0.5f + std::abs(real());
      if (below(2) == 0) p.frequency_penalty = real();
      if (below(2) == 0) p.presence_penalty = real();
      if (below(2) == 0) p.logit_bias = {{below(kVocab), real()}, {below(kVocab), real()}};
      if (below(3) == 0) p.allowed_token_ids = tokens(20);
      if (below(2) == 0) {
        p.min_tokens = below(6);
        p.eos_token_ids = tokens(1);
        p.stop_token_ids = tokens(2);
      }
      TokenHistory history(tokens(1 + below(20)), NeedsCounts(p));
      for (int n = below(8); n > 0; --n) history.Append(below(kVocab));
      if (below(2) == 0) p.bad_words = {tokens(1), {history.tokens().back(), below(kVocab)}, tokens(40)};
      histories.push_back(std::move(history));
    }
    for (int i = 0; i < 3; ++i) {
      tasks[i] = {.params = &params[i], .options = &options, .history = &histories[i]};
      row_tasks.push_back({i, &tasks[i]});
    }
    packer.Pack(row_tasks);
    ASSERT_EQ(packer.tasks().size(), 3u);
    for (int i = 0; i < 3; ++i) {
      const PackedTask& packed = packer.tasks()[i];
      ASSERT_EQ(packed.adjusted, HasAdjustments(params[i], histories[i]));
      if (!packed.adjusted) continue;
      ++adjusted;
      std::vector<float> row(kVocab);
      for (float& x : row) x = real();
      const auto edits = std::span(packer.edits()).subspan(packed.edits, packed.device.edit_count);
      std::map<int32_t, int> seen;
      for (const LogitEdit& edit : edits) EXPECT_EQ(++seen[edit.token], 1) << "token " << edit.token;
      const std::vector<float> got = Adjust(row, packed.device, edits);
      AdjustLogits(params[i], histories[i], row);
      for (int64_t t = 0; t < kVocab; ++t) {
        ASSERT_EQ(std::bit_cast<uint32_t>(got[t]), std::bit_cast<uint32_t>(row[t])) << "token " << t;
      }
    }
  }
  EXPECT_GT(adjusted, 1000);
}

TEST(TaskPacker, AsksOnlyForWhatIsWanted) {
  SamplingParams params;
  params.temperature = 0.5f;
  params.top_k = kVocab;  // off
  params.top_p = 0.5f;
  LogprobOptions options = {.raw = true, .top_k = 4};
  const TokenHistory history({}, false);
  const RowTask forced = {
      .params = &params, .options = &options, .history = &history, .forced = true, .forced_token = 7};
  const RowTask drawn = {.params = &params, .options = &options, .history = &history};
  TaskPacker packer(kVocab);
  packer.Pack(std::vector<SampleTask>{{0, &forced}, {2, &drawn}});
  EXPECT_EQ(packer.list_entries(), 2 * kSampleLists * 4);
  EXPECT_EQ(packer.kept_bytes(), 0);
  const DeviceTask& score = packer.tasks()[0].device;
  EXPECT_EQ(score.flags, uint32_t{kSampleRaw | kSampleListRaw});
  EXPECT_EQ(score.token, 7);
  EXPECT_EQ(score.top_p, 0u);
  const DeviceTask& draw = packer.tasks()[1].device;
  EXPECT_EQ(draw.flags, uint32_t{kSampleRaw | kSampleListRaw | kSampleProcessed});
  EXPECT_EQ(draw.token, -1);
  EXPECT_EQ(draw.row, 2);
  EXPECT_EQ(draw.top_k, 0);
  EXPECT_EQ(draw.top_p, uint64_t{1} << 47);
  EXPECT_EQ(draw.draw % 2, 1u);
  EXPECT_EQ(packer.tasks()[1].lists, kSampleLists * 4);
}

TEST(KeptTokens, AreTheBitsThatAreSet) {
  std::mt19937 engine(5);
  for (const int64_t vocab : {1, 63, 64, 65, 256, 257, 100278}) {
    for (const unsigned one_in : {1u, 2u, 1000u}) {
      std::vector<std::byte> bits(KeptBytes(vocab));
      std::vector<int32_t> want;
      for (int32_t token = 0; token < vocab; ++token) {
        if (engine() % one_in != 0) continue;
        bits[token / 8] |= std::byte{1} << token % 8;
        want.push_back(token);
      }
      EXPECT_EQ(KeptTokens(bits), want) << vocab << ", one in " << one_in;
    }
  }
  EXPECT_TRUE(KeptTokens(std::vector<std::byte>(KeptBytes(1000))).empty());
}

}  // namespace
}  // namespace lockstep::cuda
