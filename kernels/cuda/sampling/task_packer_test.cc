// What a packed task and its request's lists say, carried out here, against AdjustLogits of the CPU sampler. Needs no
// GPU; the kernel's own source runs on a CPU in host_run/adjust_rows_host_test.cc.
#include "kernels/cuda/sampling/task_packer.h"

#include <bit>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <span>

#include "gtest/gtest.h"
#include "kernels/cuda/sampling/token_lists.h"
#include "sampler/adjust.h"

namespace lockstep::cuda {
namespace {

constexpr int64_t kVocab = 61;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// What AdjustRowsKernel does.
std::vector<float> Adjust(std::vector<float> row, const DeviceTask& task) {
  for (size_t t = 0; t < row.size(); ++t) {
    if (task.allowed != nullptr && (task.allowed[t / 32] >> t % 32 & 1) == 0) row[t] = kMasked;
  }
  for (const TokenPenalty& penalty : std::span(task.penalties, task.penalty_count)) {
    float& x = row[penalty.token];
    x = x > 0 ? x / task.repetition_penalty : x * task.repetition_penalty;
    if (penalty.generated > 0) {
      x -= task.frequency_penalty * static_cast<float>(penalty.generated);
      x -= task.presence_penalty;
    }
  }
  for (const TokenBias& bias : std::span(task.biases, task.bias_count)) row[bias.token] += bias.bias;
  for (const int32_t token : std::span(task.masked, task.masked_count)) row[token] = kMasked;
  return row;
}

TEST(TaskPacker, TasksAndTheirListsAreTheCpusAdjustments) {
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
      std::vector<uint64_t> lists(TokenListBytes(params[i], kVocab) / 8);
      PackTokenLists(params[i], kVocab, std::as_writable_bytes(std::span(lists)));
      DeviceTask task = packed.device;
      PointToTokenLists(params[i], kVocab, std::as_bytes(std::span(lists)).data(), task);
      task.penalties = packer.penalties().data() + packed.penalties;
      task.masked = packer.masked().data() + packed.masked;
      std::set<int32_t> seen;
      for (int32_t p = 0; p < task.penalty_count; ++p) {
        EXPECT_TRUE(seen.insert(task.penalties[p].token).second) << "token " << task.penalties[p].token;
      }
      const std::vector<float> got = Adjust(row, task);
      AdjustLogits(params[i], histories[i], row);
      for (int64_t t = 0; t < kVocab; ++t) {
        ASSERT_EQ(std::bit_cast<uint32_t>(got[t]), std::bit_cast<uint32_t>(row[t])) << "token " << t;
      }
    }
  }
  EXPECT_GT(adjusted, 1000);
}

TEST(TokenLists, AreAsLongAsTheyMustBeAndNeverLongerThanTheirPlace) {
  for (const int64_t vocab : {1, 255, 256, 61, 16385, 100278, 262144}) {
    SamplingParams params;
    EXPECT_FALSE(HasTokenLists(params));
    EXPECT_EQ(TokenListBytes(params, vocab), 0);
    for (int64_t t = 0; t < std::min(vocab, kMaxLogitBiasEntries); ++t) params.logit_bias[static_cast<int32_t>(t)] = 1;
    EXPECT_TRUE(HasTokenLists(params));
    EXPECT_EQ(TokenListBytes(params, vocab), static_cast<int64_t>(params.logit_bias.size()) * 8);
    params.allowed_token_ids = {static_cast<int32_t>(vocab - 1)};
    EXPECT_LE(TokenListBytes(params, vocab), MaxTokenListBytes(vocab));
    EXPECT_LT(MaxTokenListBytes(vocab), TokenListBytes(params, vocab) + 256);
    params.logit_bias.clear();
    EXPECT_EQ(TokenListBytes(params, vocab), KeptBytes(vocab));
  }
}

TEST(TokenLists, AllowedTokensAreTheBitsThatAreSet) {
  SamplingParams params;
  params.allowed_token_ids = {60, 3, 31, 32, 3, 0};
  params.logit_bias = {{32, -1.5f}, {2, 100.0f}};
  std::vector<std::byte> bytes(TokenListBytes(params, kVocab), std::byte{0xFF});
  PackTokenLists(params, kVocab, bytes);
  EXPECT_EQ(KeptTokens(std::span(bytes).first(KeptBytes(kVocab))), (std::vector<int32_t>{0, 3, 31, 32, 60}));
  TokenBias biases[2];
  std::memcpy(biases, bytes.data() + KeptBytes(kVocab), sizeof(biases));
  EXPECT_EQ(biases[0].token, 2);
  EXPECT_EQ(biases[0].bias, 100.0f);
  EXPECT_EQ(biases[1].token, 32);
  EXPECT_EQ(biases[1].bias, -1.5f);
}

// What changes with the tokens is all that a step packs.
TEST(TaskPacker, AStepHasNothingOfTheLists) {
  SamplingParams params;
  for (int32_t t = 0; t < kVocab; t += 2) params.allowed_token_ids.push_back(t);
  params.logit_bias = {{1, 1.0f}, {2, 2.0f}};
  params.bad_words = {{4}, {9, 5}};
  LogprobOptions options;
  const TokenHistory history(std::vector<int32_t>{1, 2}, false);
  const RowTask task = {.params = &params, .options = &options, .history = &history};
  TaskPacker packer(kVocab);
  packer.Pack(std::vector<SampleTask>{{0, &task}});
  EXPECT_TRUE(packer.tasks()[0].adjusted);
  EXPECT_TRUE(packer.penalties().empty());
  EXPECT_EQ(packer.masked(), std::vector<int32_t>{4});
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
