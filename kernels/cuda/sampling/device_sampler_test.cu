// The device sampler against the CPU's, which is exact: the same tokens, kept ids, lists, PROCESSED and errors on
// random rows and parameters; RAW and TEMPERATURE within the bound of an fp32 sum (tests/gpu/check_logprobs.py has
// their bits).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/cuda_test_util.h"
#include "kernels/cuda/sampling/device_sampler.h"
#include "kernels/cuda/sampling/row_math.cuh"
#include "kernels/cuda/sampling/sample_rows.h"
#include "sampler/mass.h"
#include "sampler/row_ops.h"

namespace lockstep::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

uint32_t BitsOf(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

int64_t StrideOf(int64_t vocab) {
  return (vocab + 7) / 8 * 8;
}

// [rows, vocab] logits, on the host as fp32 and on the device as bf16 or fp32, with poison (NaN) between the rows.
struct Logits {
  Logits(std::vector<std::vector<float>> values, bool wide) : host(std::move(values)), fp32(wide) {
    const auto vocab = static_cast<int64_t>(host[0].size());
    const int64_t stride = StrideOf(vocab);
    if (fp32) {
      std::vector<float> flat(host.size() * stride, std::numeric_limits<float>::quiet_NaN());
      for (size_t r = 0; r < host.size(); ++r) std::copy(host[r].begin(), host[r].end(), flat.begin() + r * stride);
      wide_device = std::make_unique<DeviceArray<float>>(flat);
    } else {
      Bits flat(host.size() * stride, kPoison);
      for (size_t r = 0; r < host.size(); ++r) {
        for (int64_t c = 0; c < vocab; ++c) {
          flat[r * stride + c] = F32ToBf16(host[r][c]);
          host[r][c] = Bf16ToF32(flat[r * stride + c]);
        }
      }
      narrow_device = std::make_unique<DeviceArray<uint16_t>>(flat);
    }
    rows = {fp32 ? static_cast<void*>(wide_device->data()) : static_cast<void*>(narrow_device->data()),
            static_cast<int64_t>(host.size()), vocab, stride, fp32 ? DType::kF32 : DType::kBF16};
  }

  std::vector<std::vector<float>> host;
  bool fp32;
  std::unique_ptr<DeviceArray<float>> wide_device;
  std::unique_ptr<DeviceArray<uint16_t>> narrow_device;
  Rows rows;
};

// A task and what it points to.
struct Case {
  int64_t row = 0;
  SamplingParams params;
  LogprobOptions options;
  std::unique_ptr<TokenHistory> history;
  RowTask task;
};

class Generator {
 public:
  explicit Generator(uint32_t seed) : engine_(seed) {}

  bool Chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  int32_t Int(int64_t begin, int64_t end) {
    return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(begin, end - 1)(engine_));
  }
  float Real(float begin, float end) { return std::uniform_real_distribution<float>(begin, end)(engine_); }

  std::vector<float> Row(int64_t vocab) {
    std::normal_distribution<float> normal(Real(-5, 5), std::exp(Real(-2.0f, 2.5f)));
    std::vector<float> row(vocab);
    const bool coarse = Chance(0.2);  // many ties
    const double masked = Chance(0.2) ? 0.3 : 0.0;
    for (float& x : row) {
      x = normal(engine_);
      if (coarse) x = std::rint(x);
      if (masked > 0 && Chance(masked)) x = -kInfinity;
    }
    row[Int(0, vocab)] = Real(-2, 2);
    return row;
  }

  std::vector<int32_t> Tokens(int64_t vocab, int count) {
    std::vector<int32_t> tokens(count);
    for (int32_t& t : tokens) t = Int(0, vocab);
    return tokens;
  }

  std::unique_ptr<Case> Make(int64_t vocab, int64_t rows) {
    auto c = std::make_unique<Case>();
    SamplingParams& p = c->params;
    c->row = Int(0, rows);
    if (Chance(0.15))
      p.temperature = 0.0f;
    else if (Chance(0.7))
      p.temperature = std::exp(Real(-2, 2));
    if (Chance(0.4)) p.top_k = Int(1, Chance(0.5) ? 50 : vocab + 10);
    if (Chance(0.4)) p.top_p = Chance(0.1) ? 1e-6f : Real(0.01f, 0.9999f);
    if (Chance(0.3)) p.min_p = Chance(0.5) ? Real(0.0f, 0.2f) : Real(0.0f, 1e-4f);
    if (Chance(0.2)) p.repetition_penalty = Real(0.5f, 2.0f);
    if (Chance(0.2)) p.presence_penalty = Real(-2, 2);
    if (Chance(0.2)) p.frequency_penalty = Real(-2, 2);
    if (Chance(0.2)) {
      for (const int32_t t : Tokens(vocab, 9)) p.logit_bias[t] = Real(-20, 20);
    }
    if (Chance(0.1)) p.allowed_token_ids = Tokens(vocab, 30);
    if (Chance(0.2)) {
      p.min_tokens = Int(0, 8);
      p.eos_token_ids = Tokens(vocab, 2);
      p.stop_token_ids = Tokens(vocab, 3);
    }
    const std::vector<int32_t> prompt = Tokens(vocab, Int(1, 40));
    c->history = std::make_unique<TokenHistory>(prompt, NeedsCounts(p));
    for (int i = Int(0, 12); i > 0; --i) {
      c->history->Append(Chance(0.5) ? prompt[Int(0, static_cast<int64_t>(prompt.size()))] : Int(0, vocab));
    }
    if (Chance(0.2)) {
      p.bad_words = {Tokens(vocab, 1), {c->history->tokens().back(), Int(0, vocab)}, Tokens(vocab, 3)};
    }
    LogprobOptions& o = c->options;
    o.raw = Chance(0.6);
    o.temperature = Chance(0.6);
    o.processed = Chance(0.5);
    o.kept_token_ids = Chance(0.3);
    if (Chance(0.4)) o.top_k = Int(1, kMaxTopLogprobs + 1);
    c->task.request = ++requests_;
    c->task.params = &p;
    c->task.options = &o;
    c->task.history = c->history.get();
    c->task.key = {.seed = engine_(), .prompt_hash = PromptHash(prompt), .sample_index = 3, .position = 5};
    c->task.forced = Chance(0.3);
    c->task.forced_token = Int(0, vocab);
    return c;
  }

 private:
  std::mt19937 engine_;
  uint64_t requests_ = 0;
};

absl::StatusOr<SampledToken> OnCpu(const Logits& logits, const Case& c, SamplerScratch& scratch) {
  const std::vector<float>& row = logits.host[c.row];
  if (!c.task.forced) return SampleRow(row, c.params, c.options, *c.history, c.task.key, scratch);
  absl::StatusOr<RowLogprobs> scored = ScoreRow(row, c.task.forced_token, c.params, c.options, *c.history, scratch);
  if (!scored.ok()) return scored.status();
  return SampledToken{c.task.forced_token, *scored};
}

// The sum's chain of vocab / 1024 + 10 additions and expf's 2 ulp, in units of 2^-24 of a sum of at least 1; the
// logarithm, the two subtractions and the CPU's own rounding.
bool IsNear(float got, float want, int64_t vocab) {
  if (std::isinf(want)) return got == want;
  const float error = (static_cast<float>(vocab) / 1024.0f + 12.0f) * 0x1p-24f + (16.0f + std::abs(want)) * 0x1p-22f;
  return std::abs(got - want) <= error;
}

void ExpectList(std::vector<TokenLogprob> got, std::vector<TokenLogprob> want, int64_t vocab, const char* what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 1; i < got.size(); ++i) {
    EXPECT_TRUE(got[i - 1].logprob > got[i].logprob ||
                (got[i - 1].logprob == got[i].logprob && got[i - 1].token < got[i].token))
        << what << " is out of order at " << i;
  }
  const auto by_token = [](const TokenLogprob& a, const TokenLogprob& b) { return a.token < b.token; };
  std::sort(got.begin(), got.end(), by_token);
  std::sort(want.begin(), want.end(), by_token);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_EQ(got[i].token, want[i].token) << what;
    EXPECT_TRUE(IsNear(got[i].logprob, want[i].logprob, vocab))
        << what << ": " << got[i].logprob << " and " << want[i].logprob;
  }
}

void ExpectSame(const absl::StatusOr<SampledToken>& got, const absl::StatusOr<SampledToken>& want, int64_t vocab) {
  ASSERT_EQ(got.status(), want.status());
  if (!want.ok()) return;
  const RowLogprobs &g = got->logprobs, &w = want->logprobs;
  EXPECT_EQ(got->token, want->token);
  // Of logits that are 0 and -0 the CPU may have either as the maximum, and 0 or -0 here.
  EXPECT_EQ(BitsOf(g.processed), BitsOf(w.processed + 0.0f)) << g.processed << " and " << w.processed;
  EXPECT_EQ(g.kept_token_ids, w.kept_token_ids);
  EXPECT_TRUE(IsNear(g.raw, w.raw, vocab)) << g.raw << " and " << w.raw;
  EXPECT_TRUE(IsNear(g.temperature, w.temperature, vocab)) << g.temperature << " and " << w.temperature;
  ExpectList(g.top_raw, w.top_raw, vocab, "top_raw");
  ExpectList(g.top_temperature, w.top_temperature, vocab, "top_temperature");
  ASSERT_EQ(g.top_processed.size(), w.top_processed.size());
  for (size_t i = 0; i < w.top_processed.size(); ++i) {
    EXPECT_EQ(g.top_processed[i].token, w.top_processed[i].token) << i;
    EXPECT_EQ(BitsOf(g.top_processed[i].logprob), BitsOf(w.top_processed[i].logprob + 0.0f)) << i;
  }
}

// Of `requests` with token lists in a step at most.
std::unique_ptr<RowSampler> MakeSampler(int64_t vocab, int64_t requests) {
  absl::StatusOr<std::unique_ptr<RowSampler>> sampler =
      MakeDeviceSampler({.vocab = vocab, .requests = requests, .temperature_rounding = TemperatureRounding::kDivide});
  EXPECT_TRUE(sampler.ok()) << sampler.status();
  return sampler.ok() ? *std::move(sampler) : nullptr;
}

std::string Describe(const Case& c) {
  const SamplingParams& p = c.params;
  const LogprobOptions& o = c.options;
  return testing::PrintToString(std::vector<double>{static_cast<double>(c.row), p.temperature,
                                                    static_cast<double>(p.top_k), p.top_p, p.min_p}) +
         (c.task.forced ? " forced" : "") + " list " + std::to_string(o.top_k) + " raw " + std::to_string(o.raw) +
         " temperature " + std::to_string(o.temperature) + " processed " + std::to_string(o.processed);
}

std::vector<SampleTask> TasksOf(const std::vector<std::unique_ptr<Case>>& cases, size_t begin, size_t end) {
  std::vector<SampleTask> tasks;
  for (size_t i = begin; i < end; ++i) tasks.push_back({cases[i]->row, &cases[i]->task});
  return tasks;
}

struct Shape {
  int64_t vocab;
  int rows, cases;
};

class SamplerShapes : public CudaOps, public ::testing::WithParamInterface<Shape> {};

TEST_P(SamplerShapes, EqualsTheCpus) {
  const Shape& shape = GetParam();
  for (const bool fp32 : {false, true}) {
    Generator generator(static_cast<uint32_t>(2 * shape.vocab + fp32));
    std::vector<std::vector<float>> rows;
    for (int r = 0; r < shape.rows; ++r) rows.push_back(generator.Row(shape.vocab));
    const Logits logits(std::move(rows), fp32);
    std::vector<std::unique_ptr<Case>> cases;
    for (int i = 0; i < shape.cases; ++i) cases.push_back(generator.Make(shape.vocab, shape.rows));
    const std::unique_ptr<RowSampler> sampler = MakeSampler(shape.vocab, shape.cases);
    ASSERT_NE(sampler, nullptr);
    // Pieces of several sizes before one Collect: 1, 2, 4 and 8 blocks a task.
    size_t begin = 0;
    for (const size_t size : {3, 20, 40, 100, 600}) {
      const size_t end = std::min(begin + size, cases.size());
      sampler->Enqueue(logits.rows, TasksOf(cases, begin, end));
      begin = end;
    }
    const std::vector<absl::StatusOr<SampledToken>> got = *sampler->Collect();
    ASSERT_EQ(got.size(), cases.size());
    SamplerScratch scratch;
    int failed = 0;
    for (size_t i = 0; i < cases.size() && failed < 3; ++i) {
      SCOPED_TRACE((fp32 ? "fp32 case " : "bf16 case ") + std::to_string(i) + ": " + Describe(*cases[i]));
      const int before = ::testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
      ExpectSame(got[i], OnCpu(logits, *cases[i], scratch), shape.vocab);
      failed += ::testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count() > before;
    }
  }
}

// By name, so that a sanitizer that is slow on large rows can leave them out.
INSTANTIATE_TEST_SUITE_P(Vocab, SamplerShapes,
                         ::testing::Values(Shape{1, 1, 20}, Shape{7, 4, 100}, Shape{211, 30, 600}, Shape{256, 30, 600},
                                           Shape{1000, 30, 600}, Shape{5003, 20, 300}, Shape{12001, 20, 200},
                                           Shape{100278, 12, 100}, Shape{100352, 12, 100}),
                         [](const auto& test) { return std::to_string(test.param.vocab); });

TEST_F(CudaOps, DeviceSamplerDoesNotDependOnTheBatch) {
  constexpr int64_t kVocab = 100352;
  Generator generator(77);
  std::vector<std::vector<float>> rows;
  for (int r = 0; r < 8; ++r) rows.push_back(generator.Row(kVocab));
  const Logits logits(std::move(rows), false);
  std::vector<std::unique_ptr<Case>> cases;
  for (int i = 0; i < 140; ++i) cases.push_back(generator.Make(kVocab, 8));
  const std::unique_ptr<RowSampler> sampler = MakeSampler(kVocab, 140);
  ASSERT_NE(sampler, nullptr);
  sampler->Enqueue(logits.rows, TasksOf(cases, 0, cases.size()));
  const std::vector<absl::StatusOr<SampledToken>> together = *sampler->Collect();
  for (size_t i = 0; i < cases.size(); ++i) {
    sampler->Enqueue(logits.rows, TasksOf(cases, i, i + 1));
    const std::vector<absl::StatusOr<SampledToken>> alone = *sampler->Collect();
    ASSERT_EQ(alone.size(), 1u);
    ASSERT_EQ(alone[0].status(), together[i].status());
    if (!alone[0].ok()) continue;
    const RowLogprobs &a = alone[0]->logprobs, &t = together[i]->logprobs;
    EXPECT_EQ(alone[0]->token, together[i]->token);
    EXPECT_EQ(BitsOf(a.raw), BitsOf(t.raw));
    EXPECT_EQ(BitsOf(a.temperature), BitsOf(t.temperature));
    EXPECT_EQ(BitsOf(a.processed), BitsOf(t.processed));
    EXPECT_EQ(a.kept_token_ids, t.kept_token_ids);
    ASSERT_EQ(a.top_raw.size(), t.top_raw.size());
    for (size_t j = 0; j < a.top_raw.size(); ++j) {
      EXPECT_EQ(a.top_raw[j].token, t.top_raw[j].token);
      EXPECT_EQ(BitsOf(a.top_raw[j].logprob), BitsOf(t.top_raw[j].logprob));
    }
  }
}

// A request with long lists, and its samples.
struct Listed {
  uint64_t request = 0;
  SamplingParams params;
  std::vector<TokenHistory> samples;
};

std::unique_ptr<Listed> MakeListed(Generator& generator, int64_t vocab, uint64_t request) {
  auto listed = std::make_unique<Listed>();
  listed->request = request;
  SamplingParams& p = listed->params;
  p.temperature = generator.Chance(0.2) ? 0.0f : 0.8f;
  if (generator.Chance(0.7)) p.allowed_token_ids = generator.Tokens(vocab, generator.Int(1, 2 * vocab));
  if (generator.Chance(0.7)) {
    for (const int32_t t : generator.Tokens(vocab, generator.Int(1, 20000))) {
      if (p.logit_bias.size() < kMaxLogitBiasEntries) p.logit_bias[t] = generator.Real(-20, 20);
    }
  }
  if (generator.Chance(0.5)) p.repetition_penalty = 1.3f;
  if (generator.Chance(0.5)) p.frequency_penalty = 0.4f;
  p.min_tokens = generator.Int(0, 6);
  p.eos_token_ids = generator.Tokens(vocab, 2);
  p.bad_words = {generator.Tokens(vocab, 1)};
  for (int n = generator.Int(1, 4); n > 0; --n) {
    listed->samples.emplace_back(generator.Tokens(vocab, 20), NeedsCounts(p));
  }
  return listed;
}

// Requests that begin, end, wait and share, over many steps, more than there are places. Every step's tokens and
// PROCESSED are the CPU sampler's.
void CompareOverSteps(int64_t vocab, int steps) {
  constexpr int64_t kPlaces = 4;
  Generator generator(static_cast<uint32_t>(vocab));
  std::vector<std::vector<float>> rows;
  for (int r = 0; r < 6; ++r) rows.push_back(generator.Row(vocab));
  const Logits logits(std::move(rows), /*wide=*/false);
  const std::unique_ptr<RowSampler> sampler = MakeSampler(vocab, kPlaces);
  ASSERT_NE(sampler, nullptr);
  const LogprobOptions options = {.processed = true};
  SamplerScratch scratch;
  std::vector<std::unique_ptr<Listed>> requests;
  uint64_t begun = 0;
  for (int step = 0; step < steps; ++step) {
    SCOPED_TRACE("step " + std::to_string(step));
    while (requests.size() < kPlaces + 2) requests.push_back(MakeListed(generator, vocab, ++begun));
    // Mostly those that ran in the step before.
    if (generator.Chance(0.2)) std::swap(requests[0], requests[generator.Int(1, requests.size())]);
    std::vector<RowTask> tasks;
    std::vector<int64_t> task_rows;
    std::vector<std::pair<Listed*, TokenHistory*>> owners;
    for (int64_t i = 0; i < kPlaces; ++i) {
      for (TokenHistory& history : requests[i]->samples) {
        tasks.push_back({.request = requests[i]->request,
                         .params = &requests[i]->params,
                         .options = &options,
                         .history = &history,
                         .key = {.seed = 5, .position = static_cast<uint32_t>(history.generated())}});
        task_rows.push_back(generator.Int(0, 6));
        owners.emplace_back(requests[i].get(), &history);
      }
    }
    std::vector<SampleTask> row_tasks;
    for (size_t i = 0; i < tasks.size(); ++i) row_tasks.push_back({task_rows[i], &tasks[i]});
    // Two pieces of one step.
    const size_t half = row_tasks.size() / 2;
    sampler->Enqueue(logits.rows, std::span(row_tasks).first(half));
    sampler->Enqueue(logits.rows, std::span(row_tasks).subspan(half));
    const absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> got = sampler->Collect();
    ASSERT_TRUE(got.ok()) << got.status();
    ASSERT_EQ(got->size(), tasks.size());
    for (size_t i = 0; i < tasks.size(); ++i) {
      const auto [listed, history] = owners[i];
      const absl::StatusOr<SampledToken> want =
          SampleRow(logits.host[task_rows[i]], listed->params, options, *history, tasks[i].key, scratch);
      ASSERT_EQ((*got)[i].status(), want.status()) << "request " << listed->request;
      if (!want.ok()) continue;
      ASSERT_EQ((*got)[i]->token, want->token) << "request " << listed->request;
      ASSERT_EQ(BitsOf((*got)[i]->logprobs.processed), BitsOf(want->logprobs.processed + 0.0f));
      history->Append(want->token);
    }
    if (generator.Chance(0.3)) {
      const size_t ends = generator.Int(0, requests.size());
      sampler->Forget(requests[ends]->request);
      requests.erase(requests.begin() + static_cast<int64_t>(ends));
    }
  }
}

TEST_F(CudaOps, DeviceSamplerKeepsTokenListsOverSteps) {
  CompareOverSteps(1003, 300);
  CompareOverSteps(100352, 60);
}

// Only so that it shows are a request's parameters changed here.
TEST_F(CudaOps, DeviceSamplerReadsTokenListsWhereTheyWereSentOnce) {
  constexpr int64_t kVocab = 1003;
  const Logits logits({std::vector<float>(kVocab)}, /*wide=*/false);
  const std::unique_ptr<RowSampler> sampler = MakeSampler(kVocab, 1);
  ASSERT_NE(sampler, nullptr);
  SamplingParams params;
  params.allowed_token_ids = {5, 6, 7};
  params.logit_bias = {{6, 90.0f}};
  const LogprobOptions options;
  const TokenHistory history({}, false);
  const auto token = [&](uint64_t request) {
    const RowTask task = {.request = request, .params = &params, .options = &options, .history = &history, .key = {}};
    const SampleTask row_task = {0, &task};
    sampler->Enqueue(logits.rows, {&row_task, 1});
    const absl::StatusOr<std::vector<absl::StatusOr<SampledToken>>> got = sampler->Collect();
    return got.ok() && got->at(0).ok() ? got->at(0)->token : -1;
  };
  EXPECT_EQ(token(1), 6);
  params.allowed_token_ids = {100, 101, 102};
  params.logit_bias = {{101, 90.0f}};
  EXPECT_EQ(token(1), 6);
  sampler->Forget(1);
  EXPECT_EQ(token(2), 101);
  EXPECT_EQ(token(3), 101);  // in the place of 2, which waits
}

TEST_F(CudaOps, DeviceSamplerReportsWhatTheCpuDoes) {
  constexpr int64_t kVocab = 1001;
  Generator generator(5);
  for (const bool fp32 : {false, true}) {
    std::vector<std::vector<float>> rows(6);
    for (std::vector<float>& row : rows) row = generator.Row(kVocab);
    rows[0][500] = rows[0][17] = std::numeric_limits<float>::quiet_NaN();
    rows[1][1000] = kInfinity;
    rows[2].assign(kVocab, -kInfinity);
    rows[3][3] = 3e38f;
    const Logits logits(std::move(rows), fp32);
    std::vector<std::unique_ptr<Case>> cases;
    for (int i = 0; i < 10; ++i) {
      cases.push_back(generator.Make(kVocab, 1));
      cases.back()->params = {};
      cases.back()->task.forced = i % 2 == 1;
      cases.back()->row = i / 2;
      if (i / 2 == 3) cases.back()->params.temperature = 0.5f;
      cases.back()->options = {.raw = true, .temperature = true};
    }
    cases[8]->params.allowed_token_ids = {4, 9};
    cases[8]->params.bad_words = {{4}, {9}};
    cases[9]->params.logit_bias = {{6, 1e38f}, {7, 3.4e38f}};
    cases[9]->params.temperature = 0.1f;
    cases[9]->options.processed = true;
    const std::unique_ptr<RowSampler> sampler = MakeSampler(kVocab, 10);
    ASSERT_NE(sampler, nullptr);
    sampler->Enqueue(logits.rows, TasksOf(cases, 0, cases.size()));
    const std::vector<absl::StatusOr<SampledToken>> got = *sampler->Collect();
    ASSERT_EQ(got.size(), cases.size());
    SamplerScratch scratch;
    for (size_t i = 0; i < cases.size(); ++i) {
      const absl::StatusOr<SampledToken> want = OnCpu(logits, *cases[i], scratch);
      EXPECT_FALSE(want.ok()) << i;
      EXPECT_EQ(got[i].status(), want.status()) << i;
    }
  }
}

__global__ void WeighEach(const float* d, int count, uint64_t* mass, float* weight) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  weight[i] = Weight(d[i]);
  mass[i] = MassOf(weight[i]);
}

TEST_F(CudaOps, DeviceWeightAndMassAreTheCpus) {
  constexpr int kCount = 1 << 21;
  std::mt19937 engine(9);
  std::uniform_real_distribution<float> wide(-88.0f, 0.0f), close(-32.0f, 0.0f);
  std::vector<float> d(kCount);
  for (int i = 0; i < kCount; ++i) d[i] = i % 4 == 0 ? wide(engine) : close(engine) / static_cast<float>(1 << i % 16);
  d[0] = 0.0f, d[1] = -87.0f, d[2] = std::nextafter(-87.0f, -100.0f), d[3] = -kInfinity, d[4] = -0x1p-30f;
  std::vector<float> want(kCount);
  std::vector<uint64_t> block_mass(MassBlocks(kCount));
  WeighRow(d, 0.0f, want.data(), block_mass.data());
  const DeviceArray<float> device_d(d), weight(std::vector<float>(kCount, -1.0f));
  const DeviceArray<uint64_t> mass(std::vector<uint64_t>(kCount, ~uint64_t{0}));
  WeighEach<<<kCount / 256, 256>>>(device_d.data(), kCount, mass.data(), weight.data());
  const std::vector<float> got = weight.Host();
  const std::vector<uint64_t> got_mass = mass.Host();
  int64_t weights = 0, masses = 0;
  for (int i = 0; i < kCount; ++i) {
    weights += BitsOf(got[i]) != BitsOf(want[i]);
    masses += got_mass[i] != Mass(want[i]);
    if (weights + masses == 1) EXPECT_EQ(BitsOf(got[i]), BitsOf(want[i])) << "first at d = " << d[i];
  }
  EXPECT_EQ(weights, 0);
  EXPECT_EQ(masses, 0);
}

__global__ void DivideEach(const float* x, int count, float divisor, float inverse, float* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = Divisor{divisor, inverse}.Divide(x[i]);
}

TEST_F(CudaOps, DeviceDivisionIsRoundedCorrectly) {
  constexpr int kCount = 1 << 18;
  std::mt19937 engine(10);
  std::vector<float> x(kCount);
  for (int i = 0; i < kCount; ++i) {
    uint32_t bits = engine();
    if (i % 2 == 0) bits = (bits & 0x83FFFFFFu) | 0x3C000000u;  // 2^-7 to 2, roughly
    std::memcpy(&x[i], &bits, sizeof(bits));
    if (std::isnan(x[i])) x[i] = 1.0f;
  }
  const DeviceArray<float> device_x(x), out(std::vector<float>(kCount, -1.0f));
  for (int round = 0; round < 40; ++round) {
    const float divisor = round == 0 ? 0.7f : std::exp(std::uniform_real_distribution<float>(-9.2f, 9.2f)(engine));
    DivideEach<<<kCount / 256, 256>>>(device_x.data(), kCount, divisor, 1.0f / divisor, out.data());
    const std::vector<float> got = out.Host();
    int64_t wrong = 0;
    for (int i = 0; i < kCount; ++i) wrong += BitsOf(got[i]) != BitsOf(x[i] / divisor);
    EXPECT_EQ(wrong, 0) << divisor;
  }
}

TEST(SampleRowsParams, RefusesWhatItCannotRead) {
  SampleRowsParams params = {.logits = reinterpret_cast<const void*>(256),
                             .logits_stride = 104,
                             .tasks = reinterpret_cast<const DeviceTask*>(256),
                             .results = reinterpret_cast<DeviceResult*>(256),
                             .count = 1,
                             .vocab = 100};
  EXPECT_TRUE(params.Validate().ok()) << params.Validate();
  params.logits_stride = 100;
  EXPECT_EQ(params.Validate().code(), absl::StatusCode::kInvalidArgument);
  params.logits_stride = 96;
  EXPECT_EQ(params.Validate().code(), absl::StatusCode::kInvalidArgument);
  params.logits_stride = 104;
  params.logits = reinterpret_cast<const void*>(264);
  EXPECT_EQ(params.Validate().code(), absl::StatusCode::kInvalidArgument);
  params.logits = reinterpret_cast<const void*>(256);
  params.vocab = (1 << 18) + 1;
  params.logits_stride = (1 << 18) + 8;
  EXPECT_EQ(params.Validate().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace lockstep::cuda
