// What requests' sinks are to receive, in order, kept until the device is at work again: so that nothing is handed over
// while it waits for its next step. Used by one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "rollout/worker/request.h"
#include "sampler/sampler.h"

namespace lockstep {

class Outbox {
 public:
  void Add(std::shared_ptr<RequestSink> to, PromptLogprobs what) {
    entries_.push_back({std::move(to), std::move(what)});
  }
  void Add(std::shared_ptr<RequestSink> to, int32_t sample, int64_t offset, SampledToken token) {
    entries_.push_back({std::move(to), Token{sample, offset, std::move(token)}});
  }
  void Add(std::shared_ptr<RequestSink> to, int32_t sample, SampleResult result) {
    entries_.push_back({std::move(to), Done{sample, std::move(result)}});
  }

  // Hands everything over.
  void Deliver() {
    for (Entry& entry : entries_) {
      if (auto* token = std::get_if<Token>(&entry.what)) {
        SampleTokens tokens{
            .sample = token->sample, .offset = token->offset, .tokens = {token->token.token}, .logprobs = {}};
        tokens.logprobs.push_back(std::move(token->token.logprobs));
        entry.to->OnTokens(std::move(tokens));
      } else if (auto* logprobs = std::get_if<PromptLogprobs>(&entry.what)) {
        entry.to->OnPromptLogprobs(std::move(*logprobs));
      } else {
        Done& done = std::get<Done>(entry.what);
        entry.to->OnSampleDone(done.sample, std::move(done.result));
      }
    }
    entries_.clear();
  }

 private:
  // Becomes a message when it is handed over, beside the device.
  struct Token {
    int32_t sample;
    int64_t offset;
    SampledToken token;
  };
  struct Done {
    int32_t sample;
    SampleResult result;
  };
  struct Entry {
    std::shared_ptr<RequestSink> to;
    std::variant<Token, PromptLogprobs, Done> what;
  };
  std::vector<Entry> entries_;
};

}  // namespace lockstep
