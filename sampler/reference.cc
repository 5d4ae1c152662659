#include "sampler/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

namespace lockstep {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

void Penalties(const SamplingParams& params, const TokenHistory& history, Mutation mutation, std::vector<double>& z) {
  const std::span<const int32_t> tokens = history.tokens();
  const std::span<const int32_t> prompt = tokens.first(history.prompt_length());
  const std::span<const int32_t> generated = tokens.subspan(history.prompt_length());
  std::set<int32_t> seen;
  if (mutation != Mutation::kRepetitionIgnoresPrompt) seen.insert(prompt.begin(), prompt.end());
  if (mutation != Mutation::kRepetitionIgnoresGenerated) seen.insert(generated.begin(), generated.end());
  double p = params.repetition_penalty;
  if (mutation == Mutation::kRepetitionInverted) p = 1 / p;
  for (const int32_t t : seen) {
    const bool divide = z[t] > 0 || mutation == Mutation::kRepetitionAlwaysDivides;
    z[t] = divide ? z[t] / p : z[t] * p;
  }
  for (size_t t = 0; t < z.size(); ++t) {
    const auto is_token = [&](int32_t other) { return other == static_cast<int32_t>(t); };
    double count = std::count_if(generated.begin(), generated.end(), is_token);
    double present = count > 0 ? 1 : 0;
    if (mutation == Mutation::kPresenceCountsPrompt && std::count_if(prompt.begin(), prompt.end(), is_token) > 0) {
      present = 1;
    }
    if (mutation == Mutation::kFrequencyIgnoresCount) count = present;
    const double frequency_sign = mutation == Mutation::kFrequencyAdds ? -1 : 1;
    const double presence_sign = mutation == Mutation::kPresenceAdds ? -1 : 1;
    z[t] -= frequency_sign * params.frequency_penalty * count + presence_sign * params.presence_penalty * present;
  }
}

void Bias(const SamplingParams& params, Mutation mutation, std::vector<double>& z) {
  for (const auto& [token, bias] : params.logit_bias) z[token] += mutation == Mutation::kBiasSubtracts ? -bias : bias;
}

void Masks(const SamplingParams& params, const TokenHistory& history, Mutation mutation, std::vector<double>& z) {
  if (!params.allowed_token_ids.empty()) {
    const std::set<int32_t> allowed(params.allowed_token_ids.begin(), params.allowed_token_ids.end());
    for (size_t t = 0; t < z.size(); ++t) {
      if (allowed.contains(static_cast<int32_t>(t)) == (mutation == Mutation::kAllowedInverted)) z[t] = -kInfinity;
    }
  }
  const int64_t visible_from = mutation == Mutation::kBadWordsGeneratedOnly ? history.prompt_length() : 0;
  for (const std::vector<int32_t>& words : params.bad_words) {
    if (mutation == Mutation::kBadWordsIgnored) break;
    std::vector<int32_t> text(history.tokens().begin() + visible_from, history.tokens().end());
    text.push_back(words.back());
    const bool completes =
        text.size() >= words.size() && std::equal(words.begin(), words.end(), text.end() - words.size());
    if (completes || mutation == Mutation::kBadWordsIgnorePrefix) z[words.back()] = -kInfinity;
  }
  int64_t min_tokens = params.min_tokens;
  if (mutation == Mutation::kMinTokensOneLess) --min_tokens;
  if (mutation == Mutation::kMinTokensOneMore) ++min_tokens;
  if (history.generated() < min_tokens) {
    for (const int32_t t : params.eos_token_ids) z[t] = -kInfinity;
    if (mutation != Mutation::kMinTokensEosOnly) {
      for (const int32_t t : params.stop_token_ids) z[t] = -kInfinity;
    }
  }
}

std::vector<double> Normalised(std::vector<double> weights) {
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& w : weights) w /= total;
  return weights;
}

std::vector<double> Softmax(const std::vector<double>& z) {
  const double max = *std::max_element(z.begin(), z.end());
  std::vector<double> p(z.size());
  for (size_t i = 0; i < z.size(); ++i) p[i] = std::exp(z[i] - max);
  return Normalised(std::move(p));
}

// Kept tokens of a distribution: filters over probabilities `p`, ranked by `z`.
class Filter {
 public:
  Filter(const SamplingParams& params, Mutation mutation, const std::vector<double>& z)
      : params_(params), mutation_(mutation), z_(z), full_(lockstep::Softmax(z)), p_(full_) {
    for (size_t i = 0; i < z.size(); ++i) {
      if (z[i] > -kInfinity) order_.push_back(static_cast<int32_t>(i));
    }
    std::sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
      if (z[a] != z[b]) return z[a] > z[b];
      return mutation == Mutation::kTiesToHighestId ? a > b : a < b;
    });
  }

  std::vector<int32_t> Run() {
    if (mutation_ == Mutation::kTopPBeforeTopK) {
      TopP();
      TopK();
    } else {
      TopK();
      TopP();
    }
    MinP();
    return order_;
  }
  double margin() const { return margin_; }

 private:
  void Keep(size_t count) {
    order_.resize(std::min(count, order_.size()));
    std::vector<double> kept(p_.size(), 0.0);
    for (const int32_t t : order_) kept[t] = p_[t];
    p_ = Normalised(std::move(kept));
  }

  void TopK() {
    if (params_.top_k == 0 || params_.top_k >= static_cast<int64_t>(p_.size())) return;
    size_t keep = params_.top_k;
    if (mutation_ == Mutation::kTopKOneMore) ++keep;
    if (mutation_ == Mutation::kTopKOneLess) --keep;
    if (mutation_ == Mutation::kTiesAllKept) {
      while (keep < order_.size() && z_[order_[keep]] == z_[order_[keep - 1]]) ++keep;
    }
    Keep(std::max<size_t>(keep, 1));
  }

  void TopP() {
    if (params_.top_p >= 1) return;
    const std::vector<double>& p = mutation_ == Mutation::kTopPOverFullVocabulary ? full_ : p_;
    double cumulative = 0;
    size_t keep = 0;
    while (keep < order_.size() && cumulative < params_.top_p) {
      margin_ = std::min(margin_, std::abs(params_.top_p - cumulative) / params_.top_p);
      cumulative += p[order_[keep++]];
    }
    margin_ = std::min(margin_, std::abs(cumulative - params_.top_p) / params_.top_p);
    if (mutation_ == Mutation::kTopPExcludesCrossing) --keep;
    if (mutation_ == Mutation::kTopPOneMore) ++keep;
    Keep(std::max<size_t>(keep, 1));
  }

  void MinP() {
    if (params_.min_p == 0) return;
    double threshold = params_.min_p;
    if (mutation_ == Mutation::kMinPOfSecond && order_.size() > 1) {
      threshold *= p_[order_[1]];
    } else if (mutation_ != Mutation::kMinPUnnormalised) {
      threshold *= p_[order_[0]];
    }
    size_t keep = 0;
    for (const int32_t t : order_) {
      margin_ = std::min(margin_, std::abs(p_[t] - threshold) / threshold);
      if (p_[t] >= threshold) ++keep;
    }
    Keep(std::max<size_t>(keep, 1));
  }

  const SamplingParams& params_;
  const Mutation mutation_;
  const std::vector<double>& z_;
  const std::vector<double> full_;
  std::vector<double> p_;
  std::vector<int32_t> order_;
  double margin_ = 1;
};

}  // namespace

ReferenceResult ReferenceDistribution(std::span<const float> logits, const SamplingParams& params,
                                      const TokenHistory& history, Mutation mutation) {
  std::vector<double> z(logits.begin(), logits.end());
  double t = params.temperature == 0 ? 1 : params.temperature;
  if (mutation == Mutation::kTemperatureMultiplies) t = 1 / t;
  if (mutation == Mutation::kTemperatureIgnored) t = 1;
  const auto divide = [&] {
    for (double& x : z) x /= t;
  };
  const bool early = mutation == Mutation::kPenaltiesAfterTemperature;
  if (early) divide();
  if (mutation == Mutation::kBiasBeforeRepetition) Bias(params, mutation, z);
  Penalties(params, history, mutation, z);
  const bool late_bias = mutation == Mutation::kBiasAfterTemperature;
  if (!late_bias && mutation != Mutation::kBiasBeforeRepetition) Bias(params, mutation, z);
  Masks(params, history, mutation, z);
  const bool late = mutation == Mutation::kTemperatureAfterFilters;
  if (!early && !late) divide();
  if (late_bias) Bias(params, mutation, z);

  ReferenceResult result;
  for (const double x : z) {
    if (x > -kInfinity) result.max_abs_logit = std::max(result.max_abs_logit, std::abs(x));
  }
  result.probabilities.assign(z.size(), 0.0);
  if (*std::max_element(z.begin(), z.end()) == -kInfinity) return result;
  if (params.temperature == 0) {
    result.probabilities[std::max_element(z.begin(), z.end()) - z.begin()] = 1;
    return result;
  }
  Filter filter(params, mutation, z);
  const std::vector<int32_t> kept = filter.Run();
  result.margin = filter.margin();
  if (late) divide();
  std::vector<double> left(z.size(), -kInfinity);
  for (const int32_t token : kept) left[token] = z[token];
  result.probabilities = Softmax(left);
  return result;
}

int32_t ReferenceDraw(const std::vector<double>& probabilities, double u, double* clearance) {
  double cumulative = 0;
  *clearance = 1;
  int32_t drawn = -1;
  for (size_t i = 0; i < probabilities.size(); ++i) {
    if (probabilities[i] == 0) continue;
    cumulative += probabilities[i];
    *clearance = std::min(*clearance, std::abs(cumulative - u));
    if (drawn < 0 && u < cumulative) drawn = static_cast<int32_t>(i);
  }
  return drawn;
}

std::vector<double> ReferenceLogSoftmax(std::span<const float> logits, double divisor) {
  std::vector<double> z(logits.begin(), logits.end());
  for (double& x : z) x /= divisor;
  const double max = *std::max_element(z.begin(), z.end());
  double total = 0;
  for (const double x : z) total += std::exp(x - max);
  for (double& x : z) x = x - max - std::log(total);
  return z;
}

}  // namespace lockstep
