#include "rollout/server/fake_worker.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/check.h"

namespace lockstep {
namespace {

constexpr int32_t kEos = 2;
constexpr int64_t kMaxSequenceTokens = 4096;

uint64_t Mix(uint64_t a, uint64_t b) {
  uint64_t x = a * 0x9e3779b97f4a7c15u + b;
  x ^= x >> 31;
  x *= 0xbf58476d1ce4e5b9u;
  return x ^ (x >> 29);
}

float Pseudo(uint64_t key) {
  return -static_cast<float>(key % 4096) / 1024;
}

std::vector<TokenLogprob> Top(uint64_t key, int32_t k, int64_t vocab_size) {
  std::vector<TokenLogprob> top;
  for (int32_t i = 0; i < std::min<int64_t>(k, vocab_size); ++i) {
    top.push_back({static_cast<int32_t>((key + i) % vocab_size), -0.25f * static_cast<float>(i + 1)});
  }
  return top;
}

RowLogprobs Row(uint64_t key, const LogprobOptions& options, int64_t vocab_size) {
  RowLogprobs row;
  if (options.raw) row.raw = Pseudo(key);
  if (options.temperature) row.temperature = Pseudo(key + 1);
  if (options.processed) row.processed = Pseudo(key + 2);
  if (options.raw) row.top_raw = Top(key, options.top_k, vocab_size);
  if (options.temperature) row.top_temperature = Top(key + 1, options.top_k, vocab_size);
  // As after a filter that kept two tokens.
  if (options.processed) row.top_processed = Top(key + 2, std::min(options.top_k, 2), vocab_size);
  if (options.kept_token_ids) row.kept_token_ids = {3, 5};
  return row;
}

}  // namespace

struct FakeWorker::Sequence {
  int32_t sample = 0;
  int64_t offset = 0;  // of the next token
  bool running = false;
  bool ended = false;
};

struct FakeWorker::Request {
  RequestSpec spec;
  std::shared_ptr<RequestSink> sink;
  absl::Time submitted;
  uint64_t prompt_key = 0;
  int64_t prefilled = 0;
  std::vector<Sequence> sequences;
  std::vector<std::pair<std::optional<int32_t>, AbortReason>> aborts;

  bool ended() const {
    return std::all_of(sequences.begin(), sequences.end(), [](const Sequence& s) { return s.ended; });
  }
};

FakeWorker::FakeWorker(const FakeWorkerOptions& options)
    : options_(options), start_(absl::Now()), thread_([this] { Run(); }) {}

FakeWorker::~FakeWorker() {
  Drain(absl::InfinitePast());
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
  }
  thread_.join();
}

absl::Status FakeWorker::Submit(RequestSpec spec, std::shared_ptr<RequestSink> sink) {
  absl::MutexLock lock(&mutex_);
  if (draining_) return absl::UnavailableError("the worker is draining");
  const int64_t sequences = std::max(spec.n, 1);
  if (load_.waiting_sequences + sequences > options_.max_waiting_sequences) {
    return absl::ResourceExhaustedError(absl::StrCat("the queue holds ", load_.waiting_sequences, " of ",
                                                     options_.max_waiting_sequences, " sequences"));
  }
  auto request = std::make_unique<Request>();
  request->sink = std::move(sink);
  request->submitted = absl::Now();
  for (const int32_t token : spec.prompt) request->prompt_key = Mix(request->prompt_key, token);
  for (int32_t i = 0; i < sequences; ++i) {
    request->sequences.push_back({.sample = i, .offset = static_cast<int64_t>(spec.generated_prefix.size())});
  }
  request->spec = std::move(spec);
  load_.waiting_sequences += sequences;
  ++load_.running_requests;
  requests_.push_back(std::move(request));
  return absl::OkStatus();
}

void FakeWorker::Abort(const std::string& request_id, std::optional<int32_t> sample, AbortReason reason) {
  absl::MutexLock lock(&mutex_);
  for (auto& request : requests_) {
    if (request->spec.request_id == request_id) request->aborts.emplace_back(sample, reason);
  }
}

WorkerLoad FakeWorker::Load() const {
  absl::MutexLock lock(&mutex_);
  return load_;
}

absl::Status FakeWorker::Health() const {
  const absl::Duration age = absl::Now() - start_;
  if (age >= options_.stuck_after) return absl::DeadlineExceededError("a step does not end");
  if (age >= options_.failed_after) return absl::InternalError("the device failed");
  return absl::OkStatus();
}

WeightVersion FakeWorker::weight_version() const {
  return {.epoch = 0, .step = absl::Now() - start_ >= options_.next_version_after ? 1 : 0};
}

void FakeWorker::Drain(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  const auto empty = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return requests_.empty(); };
  if (mutex_.AwaitWithDeadline(absl::Condition(&empty), deadline)) return;
  for (auto& request : requests_) request->aborts.emplace_back(std::nullopt, AbortReason::kShutdown);
  mutex_.Await(absl::Condition(&empty));
}

void FakeWorker::Run() {
  while (true) {
    absl::SleepFor(options_.step);
    absl::MutexLock lock(&mutex_);
    if (stop_) return;
    if (absl::Now() - start_ >= options_.stuck_after) continue;
    Step(absl::Now());
  }
}

void FakeWorker::Finish(Request& request, Sequence& sequence, SampleResult result) {
  (sequence.running ? load_.running_sequences : load_.waiting_sequences) -= 1;
  sequence.ended = true;
  sequence.running = false;
  const int64_t begin = static_cast<int64_t>(request.spec.generated_prefix.size());
  if (sequence.offset > begin)
    result.spans.push_back(
        {.weights = weight_version(), .state = weight_version(), .begin = begin, .end = sequence.offset});
  request.sink->OnSampleDone(sequence.sample, std::move(result));
}

void FakeWorker::Step(absl::Time now) {
  if (!requests_.empty()) ++load_.steps;
  for (auto& request : requests_) {
    if (now - request->submitted >= request->spec.time_budget)
      request->aborts.emplace_back(std::nullopt, AbortReason::kTimeBudget);
    for (const auto& [sample, reason] : request->aborts) {
      for (Sequence& sequence : request->sequences) {
        if (sequence.ended || (sample && *sample != sequence.sample)) continue;
        SampleResult result;
        result.finish = FinishKind::kAborted;
        result.abort = reason;
        Finish(*request, sequence, std::move(result));
      }
    }
    request->aborts.clear();
    for (Sequence& sequence : request->sequences) {
      if (sequence.ended) continue;
      if (!sequence.running && load_.running_sequences < options_.max_sequences) {
        sequence.running = true;
        ++load_.running_sequences;
        --load_.waiting_sequences;
      }
      if (sequence.running) Advance(*request, sequence);
    }
  }
  const int64_t before = static_cast<int64_t>(requests_.size());
  std::erase_if(requests_, [](const auto& request) { return request->ended(); });
  load_.running_requests -= before - static_cast<int64_t>(requests_.size());
}

void FakeWorker::Prefill(Request& request) {
  const int64_t begin = request.prefilled;
  request.prefilled = std::min<int64_t>(begin + options_.prefill_tokens, request.spec.prompt.size());
  load_.prefill_tokens += request.prefilled - begin;
  const int64_t from = std::max(begin, request.spec.prompt_logprobs.begin);
  const int64_t to = std::min(request.prefilled, request.spec.prompt_logprobs.end);
  if (from >= to) return;
  PromptLogprobs logprobs{.begin = from, .logprobs = {}};
  for (int64_t position = from; position < to; ++position) {
    logprobs.logprobs.push_back(
        Row(Mix(request.spec.prompt[position], position), request.spec.logprobs, options_.vocab_size));
  }
  request.sink->OnPromptLogprobs(std::move(logprobs));
}

void FakeWorker::Advance(Request& request, Sequence& sequence) {
  const RequestSpec& spec = request.spec;
  if (request.prefilled < static_cast<int64_t>(spec.prompt.size())) {
    // The request's first unfinished sequence prefills for all.
    if (&sequence ==
        &*std::find_if(request.sequences.begin(), request.sequences.end(), [](const Sequence& s) { return !s.ended; }))
      Prefill(request);
    if (request.prefilled < static_cast<int64_t>(spec.prompt.size()) || spec.n > 0) return;
  }
  SampleResult result;
  if (spec.n == 0) {
    result.finish = FinishKind::kScored;
    return Finish(request, sequence, std::move(result));
  }
  const uint64_t key =
      Mix(Mix(Mix(request.prompt_key, spec.sampling.seed), spec.first_sample_index + sequence.sample), sequence.offset);
  const int32_t token = static_cast<int32_t>(key % options_.vocab_size);
  request.sink->OnTokens({.sample = sequence.sample,
                          .offset = sequence.offset,
                          .tokens = {token},
                          .logprobs = {Row(key, spec.logprobs, options_.vocab_size)}});
  ++sequence.offset;
  ++load_.generated_tokens;
  const auto& eos = spec.stop.eos_token_ids;
  if (std::find(eos.begin(), eos.end(), token) != eos.end()) {
    result.finish = FinishKind::kStop;
    result.stop = {.kind = StopKind::kEos, .token_id = token};
    return Finish(request, sequence, std::move(result));
  }
  if (sequence.offset < spec.max_tokens) return;
  result.finish = FinishKind::kLength;
  result.length = spec.max_tokens_is_context ? LengthReason::kContext : LengthReason::kMaxTokens;
  Finish(request, sequence, std::move(result));
}

ServingModel MakeFakeModel(const FakeWorkerOptions& options) {
  ServingModel model;
  model.name = "fake";
  model.spec.model_type = "fake";
  model.spec.vocab_size = options.vocab_size;
  model.spec.hidden_size = 8;
  model.spec.max_position = kMaxSequenceTokens;
  model.spec.eos_token_ids = {kEos};
  const auto profile = FindNumericsProfile("fp32");
  LOCKSTEP_CHECK(profile.ok(), "{}", profile.status().ToString());
  model.profile = *profile;
  model.has_tokenizer = true;
  model.max_sequence_tokens = kMaxSequenceTokens;
  model.worker = std::make_unique<FakeWorker>(options);
  return model;
}

}  // namespace lockstep
