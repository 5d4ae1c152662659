#include "rollout/server/convert.h"

#include <algorithm>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "rollout/base/status.h"
#include "rollout/server/check_range.h"
#include "rollout/server/token_buffer.h"
#include "rollout/server/unknown_fields.h"

namespace lockstep {
namespace {

using TokenField = google::protobuf::RepeatedField<int32_t>;

absl::Status Bad(std::string_view field, const std::string& what, std::string_view want) {
  return absl::InvalidArgumentError(absl::StrCat(std::string(field), ": ", what, "; want ", std::string(want)));
}

template <class T>
absl::Status BadValue(std::string_view field, T value, std::string_view want) {
  return Bad(field, absl::StrCat("value ", value), want);
}

absl::Status CheckCount(std::string_view field, int64_t count, int64_t limit) {
  if (count <= limit) return absl::OkStatus();
  return Bad(field, absl::StrCat(count, " entries"), absl::StrCat("at most ", limit));
}

absl::Status CheckTokens(std::string_view field, const TokenField& ids, int64_t vocab_size) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      return BadValue(absl::StrCat(std::string(field), "[", i, "]"), ids[i],
                      absl::StrCat("a token id, 0 to ", vocab_size - 1));
    }
  }
  return absl::OkStatus();
}

std::vector<int32_t> ToVector(const TokenField& ids) {
  return {ids.begin(), ids.end()};
}

// Rendered as a C string, cut short: what a client sent may be long or unprintable.
std::string Quote(const std::string& value) {
  constexpr size_t kShown = 40;
  return absl::StrCat("\"", absl::CEscape(value.substr(0, kShown)), value.size() > kShown ? "..." : "", "\"");
}

absl::Status CheckRequestId(const std::string& id) {
  constexpr std::string_view kWant = "1 to 128 characters of A-Z a-z 0-9 . _ : / -";
  const auto allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view("._:/-").find(c) != std::string_view::npos;
  };
  if (id.size() > kMaxRequestIdBytes || !std::all_of(id.begin(), id.end(), allowed)) {
    return Bad("request_id", absl::StrCat("value ", Quote(id), " of ", id.size(), " bytes"), kWant);
  }
  return absl::OkStatus();
}

absl::Status CheckHint(std::string_view field, const std::string& value) {
  if (value.size() <= kMaxHintBytes) return absl::OkStatus();
  return Bad(field, absl::StrCat(value.size(), " bytes"), absl::StrCat("at most ", kMaxHintBytes));
}

// The fields GenerateRequest and ScoreRequest share.
template <class Request>
absl::Status ConvertCommon(const Request& request, const DrawnDefaults& drawn, ConvertedRequest& out) {
  LOCKSTEP_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("time_budget_ms", request.time_budget_ms(), 0, kMaxTimeBudgetMs));
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("priority", request.priority(), -kMaxAbsPriority, kMaxAbsPriority));
  LOCKSTEP_RETURN_IF_ERROR(CheckHint("session_id", request.session_id()));
  LOCKSTEP_RETURN_IF_ERROR(CheckHint("cache_salt", request.cache_salt()));
  if (request.has_min_weight_version()) {
    const auto& version = request.min_weight_version();
    if (version.epoch() < 0) return BadValue("min_weight_version.epoch", version.epoch(), "0 or more");
    if (version.step() < 0) return BadValue("min_weight_version.step", version.step(), "0 or more");
    out.min_weight_version = WeightVersion{.epoch = version.epoch(), .step = version.step()};
  }
  out.info.request_id = request.request_id().empty() ? drawn.request_id : request.request_id();
  out.spec.request_id = out.info.request_id;
  if (request.time_budget_ms() > 0) out.spec.time_budget = absl::Milliseconds(request.time_budget_ms());
  out.spec.priority = request.priority();
  out.spec.cache_salt = request.cache_salt();
  return absl::OkStatus();
}

absl::Status ConvertPrompt(const TokenField& ids, int64_t limit, const RequestContext& context, RequestSpec& spec) {
  if (ids.empty()) return Bad("prompt_token_ids", "empty", "at least 1 token");
  if (ids.size() > limit)
    return Bad("prompt_token_ids", absl::StrCat(ids.size(), " tokens"), absl::StrCat("at most ", limit));
  LOCKSTEP_RETURN_IF_ERROR(CheckTokens("prompt_token_ids", ids, context.vocab_size));
  spec.prompt = ToVector(ids);
  return absl::OkStatus();
}

absl::StatusOr<PromptLogprobRange> ConvertRange(std::string_view field, const v1::PositionRange& range,
                                                int64_t prompt_tokens) {
  const std::string name(field);
  const int64_t begin = range.has_begin() ? range.begin() : 1;
  const int64_t end = range.has_end() ? range.end() : prompt_tokens;
  if (end < 1 || end > prompt_tokens) {
    return BadValue(absl::StrCat(name, ".end"), end, absl::StrCat("1 to the number of prompt tokens, ", prompt_tokens));
  }
  if (begin < 1 || begin > end) {
    return BadValue(absl::StrCat(name, ".begin"), begin,
                    absl::StrCat("1 (position 0 has no log-probability) to the end, ", end));
  }
  return PromptLogprobRange{.begin = begin, .end = end};
}

absl::Status ConvertLogprobOptions(const v1::LogprobOptions& options, LogprobOptions& out) {
  for (int i = 0; i < options.kinds_size(); ++i) {
    switch (options.kinds(i)) {
      case v1::LOGPROB_KIND_RAW:
        out.raw = true;
        break;
      case v1::LOGPROB_KIND_TEMPERATURE:
        out.temperature = true;
        break;
      case v1::LOGPROB_KIND_PROCESSED:
        out.processed = true;
        break;
      default:
        return BadValue(absl::StrCat("logprobs.kinds[", i, "]"), static_cast<int>(options.kinds(i)),
                        "LOGPROB_KIND_RAW (1), LOGPROB_KIND_TEMPERATURE (2) or LOGPROB_KIND_PROCESSED (3)");
    }
  }
  out.top_k = options.top_k();
  out.kept_token_ids = options.kept_token_ids();
  return ValidateLogprobOptions(out);
}

LogprobLayout MakeLayout(const LogprobOptions& options, int64_t vocab_size, bool prompt) {
  return {.raw = options.raw,
          .temperature = options.temperature,
          .processed = options.processed && !prompt,
          .top_k = static_cast<int32_t>(std::min<int64_t>(options.top_k, vocab_size)),
          .kept = options.kept_token_ids && !prompt,
          .vocab_size = vocab_size};
}

absl::Status ConvertGenerateLogprobs(const v1::GenerateRequest& request, const RequestContext& context,
                                     ConvertedRequest& out) {
  LogprobOptions& options = out.spec.logprobs;
  LOCKSTEP_RETURN_IF_ERROR(ConvertLogprobOptions(request.logprobs(), options));
  out.info.layout = MakeLayout(options, context.vocab_size, /*prompt=*/false);
  out.info.prompt_layout = MakeLayout(options, context.vocab_size, /*prompt=*/true);
  // One row must fit a message.
  if (options.kept_token_ids && MaxWireBytes(out.info.layout, context.vocab_size) > kMaxResponseBytes / 2) {
    return Bad("logprobs.kept_token_ids", absl::StrCat("true for a vocabulary of ", context.vocab_size),
               "false: one token's ids would not fit a message");
  }
  if (!request.logprobs().has_prompt()) return absl::OkStatus();
  if (!options.raw && !options.temperature) {
    return Bad("logprobs.prompt", "set without a kind that prompt positions have",
               "LOGPROB_KIND_RAW or LOGPROB_KIND_TEMPERATURE in logprobs.kinds");
  }
  LOCKSTEP_ASSIGN_OR_RETURN(out.spec.prompt_logprobs, ConvertRange("logprobs.prompt", request.logprobs().prompt(),
                                                                   request.prompt_token_ids_size()));
  out.info.prompt_range = out.spec.prompt_logprobs;
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::vector<int32_t>>> ConvertSequences(
    std::string_view field, const google::protobuf::RepeatedPtrField<v1::TokenSequence>& sequences,
    int64_t max_sequences, int64_t max_tokens, int64_t vocab_size) {
  LOCKSTEP_RETURN_IF_ERROR(CheckCount(field, sequences.size(), max_sequences));
  std::vector<std::vector<int32_t>> out;
  for (int i = 0; i < sequences.size(); ++i) {
    const std::string name = absl::StrCat(std::string(field), "[", i, "].token_ids");
    const TokenField& ids = sequences[i].token_ids();
    if (ids.empty()) return Bad(name, "empty", "at least 1 token");
    LOCKSTEP_RETURN_IF_ERROR(CheckCount(name, ids.size(), max_tokens));
    LOCKSTEP_RETURN_IF_ERROR(CheckTokens(name, ids, vocab_size));
    out.push_back(ToVector(ids));
  }
  return out;
}

absl::Status ConvertStops(const v1::SamplingParams& params, const RequestContext& context, RequestSpec& spec) {
  spec.stop.stop_token_ids = ToVector(params.stop_token_ids());
  if (!params.ignore_eos()) spec.stop.eos_token_ids = context.eos_token_ids;
  spec.sampling.stop_token_ids = spec.stop.stop_token_ids;
  spec.sampling.eos_token_ids = spec.stop.eos_token_ids;
  LOCKSTEP_ASSIGN_OR_RETURN(spec.stop.stop_token_sequences,
                            ConvertSequences("sampling.stop_token_sequences", params.stop_token_sequences(),
                                             kMaxStopSequences, kMaxStopSequenceTokens, context.vocab_size));
  LOCKSTEP_RETURN_IF_ERROR(CheckCount("sampling.stop_strings", params.stop_strings_size(), kMaxStopStrings));
  for (int i = 0; i < params.stop_strings_size(); ++i) {
    const std::string& text = params.stop_strings(i);
    if (text.empty() || text.size() > kMaxStopStringBytes) {
      return Bad(absl::StrCat("sampling.stop_strings[", i, "]"), absl::StrCat(text.size(), " bytes"),
                 absl::StrCat("1 to ", kMaxStopStringBytes));
    }
    spec.stop.stop_strings.push_back(text);
  }
  if (!spec.stop.stop_strings.empty() && !context.has_tokenizer) {
    return absl::FailedPreconditionError(
        "sampling.stop_strings: this checkpoint has no tokenizer.json to match text with; want stop_token_sequences");
  }
  return absl::OkStatus();
}

// Resolves max_tokens against the context; `prompt` and `generated_prefix` are set.
absl::Status ConvertLength(const v1::SamplingParams& params, const RequestContext& context, RequestSpec& spec) {
  const int64_t prefix = static_cast<int64_t>(spec.generated_prefix.size());
  const int64_t fits = context.max_sequence_tokens - static_cast<int64_t>(spec.prompt.size());
  if (fits <= prefix) {
    return Bad(prefix == 0 ? "prompt_token_ids" : "generated_prefix_ids",
               absl::StrCat(spec.prompt.size(), " prompt tokens and ", prefix, " generated ones"),
               absl::StrCat("at most ", context.max_sequence_tokens - 1, " together, to leave room for one more"));
  }
  if (!params.has_max_tokens()) {
    spec.max_tokens = fits;
    spec.max_tokens_is_context = true;
  } else {
    if (params.max_tokens() <= prefix) {
      return BadValue("sampling.max_tokens", params.max_tokens(),
                      absl::StrCat("more than the ", prefix, " generated_prefix_ids"));
    }
    if (params.max_tokens() > fits && !params.clamp()) {
      return BadValue("sampling.max_tokens", params.max_tokens(),
                      absl::StrCat("at most ", fits, " (", context.max_sequence_tokens, " less ", spec.prompt.size(),
                                   " prompt tokens), or `clamp`"));
    }
    spec.max_tokens = std::min(params.max_tokens(), fits);
    spec.max_tokens_is_context = params.max_tokens() > fits;
  }
  if (params.min_tokens() < 0 || params.min_tokens() > spec.max_tokens) {
    return BadValue("sampling.min_tokens", params.min_tokens(), absl::StrCat("0 to max_tokens, ", spec.max_tokens));
  }
  return absl::OkStatus();
}

absl::Status ConvertSampling(const v1::SamplingParams& params, const RequestContext& context,
                             const DrawnDefaults& drawn, RequestSpec& spec) {
  SamplingParams& out = spec.sampling;
  if (params.has_temperature()) out.temperature = params.temperature();
  if (params.has_top_p()) out.top_p = params.top_p();
  out.top_k = params.top_k();
  out.min_p = params.min_p();
  out.seed = params.has_seed() ? params.seed() : drawn.seed;
  for (const auto& [token, bias] : params.logit_bias()) out.logit_bias[token] = bias;
  out.allowed_token_ids = ToVector(params.allowed_token_ids());
  LOCKSTEP_ASSIGN_OR_RETURN(out.bad_words, ConvertSequences("sampling.bad_words", params.bad_words(), kMaxBadWords,
                                                            kMaxBadWordLength, context.vocab_size));
  if (params.has_repetition_penalty()) out.repetition_penalty = params.repetition_penalty();
  out.presence_penalty = params.presence_penalty();
  out.frequency_penalty = params.frequency_penalty();
  LOCKSTEP_RETURN_IF_ERROR(ConvertLength(params, context, spec));
  out.min_tokens = params.min_tokens();
  LOCKSTEP_RETURN_IF_ERROR(ConvertStops(params, context, spec));
  LOCKSTEP_RETURN_IF_ERROR(ValidateSamplingParams(out, context.vocab_size));
  return CheckSomeTokenIsLeft(out, context.vocab_size, static_cast<int64_t>(spec.generated_prefix.size()));
}

}  // namespace

absl::StatusOr<ConvertedRequest> ConvertGenerate(const v1::GenerateRequest& request, const RequestContext& context,
                                                 const DrawnDefaults& drawn) {
  LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(request));
  ConvertedRequest out;
  RequestSpec& spec = out.spec;
  LOCKSTEP_RETURN_IF_ERROR(ConvertCommon(request, drawn, out));
  LOCKSTEP_RETURN_IF_ERROR(ConvertPrompt(request.prompt_token_ids(), context.limits.max_prompt_tokens, context, spec));
  LOCKSTEP_RETURN_IF_ERROR(CheckTokens("generated_prefix_ids", request.generated_prefix_ids(), context.vocab_size));
  spec.generated_prefix = ToVector(request.generated_prefix_ids());
  spec.n = request.has_n() ? request.n() : 1;
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("n", spec.n, 1, context.limits.max_n));
  LOCKSTEP_RETURN_IF_ERROR(
      CheckRange("first_sample_index", request.first_sample_index(), 0, int64_t{INT32_MAX} - spec.n + 1));
  spec.first_sample_index = request.first_sample_index();
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("stream_interval", request.stream_interval(), 0, kMaxStreamInterval));
  out.stream_interval = request.stream_interval();
  LOCKSTEP_RETURN_IF_ERROR(ConvertSampling(request.sampling(), context, drawn, spec));
  LOCKSTEP_RETURN_IF_ERROR(ConvertGenerateLogprobs(request, context, out));

  out.info.n = spec.n;
  out.info.first_sample_index = spec.first_sample_index;
  out.info.first_offset = static_cast<int64_t>(spec.generated_prefix.size());
  out.info.seed = spec.sampling.seed;
  out.info.max_tokens = spec.max_tokens;
  out.info.detach_on_disconnect = request.detach_on_disconnect();
  return out;
}

absl::StatusOr<ConvertedRequest> ConvertScore(const v1::ScoreRequest& request, const RequestContext& context,
                                              const DrawnDefaults& drawn) {
  LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(request));
  ConvertedRequest out;
  RequestSpec& spec = out.spec;
  LOCKSTEP_RETURN_IF_ERROR(ConvertCommon(request, drawn, out));
  LOCKSTEP_RETURN_IF_ERROR(ConvertPrompt(request.prompt_token_ids(), context.max_sequence_tokens, context, spec));
  spec.n = 0;
  const v1::LogprobOptions& logprobs = request.logprobs();
  if (logprobs.has_prompt()) return Bad("logprobs.prompt", "set", "`range` instead");
  if (logprobs.kept_token_ids()) return Bad("logprobs.kept_token_ids", "true", "false: given tokens are not drawn");
  LOCKSTEP_RETURN_IF_ERROR(ConvertLogprobOptions(logprobs, spec.logprobs));
  if (spec.logprobs.processed)
    return Bad("logprobs.kinds", "LOGPROB_KIND_PROCESSED", "RAW or TEMPERATURE: given tokens are not drawn");
  if (!spec.logprobs.raw && !spec.logprobs.temperature)
    return Bad("logprobs.kinds", "empty", "RAW, TEMPERATURE or both");
  if (request.has_temperature()) spec.sampling.temperature = request.temperature();
  if (const absl::Status status = ValidateSamplingParams(spec.sampling, context.vocab_size); !status.ok()) {
    // Nothing but the temperature differs from the defaults here, and ScoreRequest has it at the top.
    const std::string message(status.message());
    const std::string prefix = "sampling.";
    return absl::InvalidArgumentError(message.rfind(prefix, 0) == 0 ? message.substr(prefix.size()) : message);
  }
  LOCKSTEP_ASSIGN_OR_RETURN(spec.prompt_logprobs,
                            ConvertRange("range", request.range(), static_cast<int64_t>(spec.prompt.size())));

  out.info.score = true;
  out.info.prompt_layout = MakeLayout(spec.logprobs, context.vocab_size, /*prompt=*/true);
  out.info.prompt_range = spec.prompt_logprobs;
  return out;
}

absl::StatusOr<ConvertedAttach> ConvertAttach(const v1::GenerateRequest& request) {
  LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(request));
  if (request.request_id().empty()) return Bad("request_id", "empty", "the id of the request to attach to");
  LOCKSTEP_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  request.GetReflection()->ListFields(request, &fields);
  for (const auto* field : fields) {
    if (field->name() != "request_id" && field->name() != "attach" && field->name() != "stream_interval") {
      return Bad(field->name(), "set beside `attach`", "only request_id, attach and stream_interval");
    }
  }
  LOCKSTEP_RETURN_IF_ERROR(CheckRange("stream_interval", request.stream_interval(), 0, kMaxStreamInterval));
  ConvertedAttach out{.request_id = request.request_id(),
                      .offsets = {},
                      .prompt_position = request.attach().prompt_position(),
                      .stream_interval = request.stream_interval()};
  if (out.prompt_position < 0) return BadValue("attach.prompt_position", out.prompt_position, "0 or more");
  std::set<int32_t> seen;
  for (int i = 0; i < request.attach().samples_size(); ++i) {
    const auto& sample = request.attach().samples(i);
    const std::string name = absl::StrCat("attach.samples[", i, "]");
    if (!seen.insert(sample.sample_index()).second)
      return BadValue(absl::StrCat(name, ".sample_index"), sample.sample_index(), "each sample once");
    if (sample.offset() < 0) return BadValue(absl::StrCat(name, ".offset"), sample.offset(), "0 or more");
    out.offsets.emplace_back(sample.sample_index(), sample.offset());
  }
  return out;
}

absl::StatusOr<AttachPoint> ResolveAttach(const ConvertedAttach& attach, const RequestInfo& info) {
  AttachPoint point{.offsets = {}, .prompt_position = attach.prompt_position};
  for (size_t i = 0; i < attach.offsets.size(); ++i) {
    const auto& [index, offset] = attach.offsets[i];
    LOCKSTEP_RETURN_IF_ERROR(CheckRange(absl::StrCat("attach.samples[", i, "].sample_index"), index,
                                        info.first_sample_index, int64_t{info.first_sample_index} + info.n - 1));
    point.offsets.emplace_back(index - info.first_sample_index, offset);
  }
  return point;
}

absl::Status ValidateAbort(const v1::AbortRequest& request) {
  LOCKSTEP_RETURN_IF_ERROR(CheckNoUnknownFields(request));
  if (request.request_id().empty()) return Bad("request_id", "empty", "the id of the request to abort");
  return CheckRequestId(request.request_id());
}

}  // namespace lockstep
