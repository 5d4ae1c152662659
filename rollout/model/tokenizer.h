// The bytes of every token id, from a Hugging Face tokenizer.json: all the worker needs to match stop strings. Text is
// otherwise the client's business.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace lockstep {

class TokenBytes {
 public:
  // Understands BPE vocabularies with a ByteLevel decoder (GPT-2 byte alphabet) or with byte fallback ("<0x0A>", U+2581
  // for space), and added tokens. Another decoder is UNIMPLEMENTED and named.
  static absl::StatusOr<TokenBytes> Parse(std::string_view tokenizer_json);
  static absl::StatusOr<TokenBytes> Load(const std::filesystem::path& tokenizer_json);

  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }
  // Empty for ids the vocabulary does not have, and for special tokens (which add no text).
  std::string_view bytes(int32_t id) const {
    return id >= 0 && id < size() ? std::string_view(bytes_[id]) : std::string_view();
  }

 private:
  std::vector<std::string> bytes_;
};

}  // namespace lockstep
