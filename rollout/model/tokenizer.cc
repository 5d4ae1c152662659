#include "rollout/model/tokenizer.h"

#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "rollout/base/status.h"
#include "rollout/model/mapped_file.h"
#include "rollout/model/strict_json.h"

namespace lockstep {
namespace {

using nlohmann::json;

// Ids above this are a damaged file: every id up to the largest takes a slot.
constexpr uint64_t kMaxTokenId = (1u << 22) - 1;

absl::Status Bad(std::string_view text) {
  return absl::InvalidArgumentError(absl::StrCat("tokenizer.json: ", std::string(text)));
}
absl::Status Unknown(std::string_view text) {
  return absl::UnimplementedError(absl::StrCat("tokenizer.json: ", std::string(text)));
}

// What a decoder does to one token's text. Steps that only matter across tokens (joining them, stripping the whole
// text's first space) are left out: bytes are those of a token in the middle of a text.
struct DecoderPlan {
  bool byte_level = false;
  bool byte_fallback = false;
  std::vector<std::pair<std::string, std::string>> replacements;  // before byte fallback
  bool fused = false;
};

std::string TypeOf(const json& value) {
  const auto found = value.is_object() ? value.find("type") : value.end();
  return found != value.end() && found->is_string() ? found->get<std::string>() : std::string();
}

absl::Status AddDecoder(const json& decoder, DecoderPlan& plan) {
  const std::string type = TypeOf(decoder);
  if (type == "Sequence") {
    const auto list = decoder.find("decoders");
    if (list == decoder.end() || !list->is_array()) return Bad("decoder.decoders: want a list");
    for (const json& step : *list) LOCKSTEP_RETURN_IF_ERROR(AddDecoder(step, plan));
    return absl::OkStatus();
  }
  if (type == "ByteLevel" && !plan.byte_fallback && !plan.fused && !plan.byte_level) {
    plan.byte_level = true;
    return absl::OkStatus();
  }
  if (type == "ByteFallback" && !plan.byte_level && !plan.fused) {
    plan.byte_fallback = true;
    return absl::OkStatus();
  }
  if (type == "Replace" && !plan.byte_level && !plan.byte_fallback && !plan.fused) {
    const json pattern = decoder.value("pattern", json());
    const json content = decoder.value("content", json());
    if (pattern.is_object() && pattern.contains("String") && pattern["String"].is_string() && content.is_string() &&
        !pattern["String"].get_ref<const std::string&>().empty()) {
      plan.replacements.emplace_back(pattern["String"].get<std::string>(), content.get<std::string>());
      return absl::OkStatus();
    }
  }
  if (type == "Fuse") {
    plan.fused = true;
    return absl::OkStatus();
  }
  // After Fuse there is one text, and this takes spaces off its ends.
  if (type == "Strip" && plan.fused) return absl::OkStatus();
  return Unknown(absl::StrCat("decoder ", JsonPreview(decoder),
                              "; want ByteLevel, or Replace, ByteFallback, Fuse and Strip in that order"));
}

// GPT-2's alphabet: each byte stands as one printable character. Printable Latin-1 bytes stand as themselves, the
// others as U+0100 and up in byte order.
std::array<int16_t, 0x144> ByteOfCharacter() {
  std::array<int16_t, 0x144> table;
  table.fill(-1);
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    table[itself ? byte : next++] = static_cast<int16_t>(byte);
  }
  return table;
}

// The bytes a token's characters stand for; a token with any other character is its own text. (JSON text is valid
// UTF-8.)
std::string DecodeByteLevel(const std::string& text) {
  static const auto kTable = ByteOfCharacter();
  std::string bytes;
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    uint32_t character = lead;
    if (lead >= 0xE0) return text;  // three bytes and more: beyond the table
    if (lead >= 0x80) character = (lead & 0x1Fu) << 6 | (static_cast<unsigned char>(text[i + 1]) & 0x3Fu);
    if (character >= kTable.size() || kTable[character] < 0) return text;
    bytes.push_back(static_cast<char>(kTable[character]));
    i += lead >= 0x80 ? 2 : 1;
  }
  return bytes;
}

// "<0x0A>" is the byte 10.
std::optional<char> FallbackByte(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text.back() != '>') return std::nullopt;
  int value = 0;
  for (char c : text.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return std::nullopt;
    value = value * 16 + digit;
  }
  return static_cast<char>(value);
}

std::string Decode(const DecoderPlan& plan, std::string text) {
  for (const auto& [from, to] : plan.replacements) text = absl::StrReplaceAll(text, {{from, to}});
  if (plan.byte_level) return DecodeByteLevel(text);
  if (const std::optional<char> byte = plan.byte_fallback ? FallbackByte(text) : std::nullopt)
    return std::string(1, *byte);
  return text;
}

absl::StatusOr<int32_t> ParseId(const json& value, const std::string& token) {
  if (!value.is_number_unsigned() || value.get<uint64_t>() > kMaxTokenId) {
    return Bad(absl::StrCat("token ", JsonPreview(token), ": id ", JsonPreview(value), ", want an integer from 0 to ",
                            kMaxTokenId));
  }
  return value.get<int32_t>();
}

struct Vocabulary {
  std::vector<std::optional<std::string>> tokens;  // by id; nullopt: a gap
  std::vector<bool> special;

  std::optional<std::string>& at(int32_t id) {
    if (id >= static_cast<int32_t>(tokens.size())) {
      tokens.resize(id + 1);
      special.resize(id + 1);
    }
    return tokens[id];
  }
};

absl::Status AddModelVocabulary(const json& root, Vocabulary& vocabulary) {
  const json model = root.value("model", json());
  const std::string type = TypeOf(model);
  if (type != "BPE") return Unknown(absl::StrCat("model.type: value \"", type, "\", want \"BPE\""));
  for (const char* field : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const json affix = model.value(field, json());
    if (!affix.is_null() && affix != "")
      return Unknown(absl::StrCat("model.", field, ": value ", JsonPreview(affix), ", want none"));
  }
  const auto vocab = model.find("vocab");
  if (vocab == model.end() || !vocab->is_object()) return Bad("model.vocab: want an object {token: id}");
  for (const auto& [token, id_value] : vocab->items()) {
    LOCKSTEP_ASSIGN_OR_RETURN(const int32_t id, ParseId(id_value, token));
    std::optional<std::string>& slot = vocabulary.at(id);
    if (slot.has_value()) {
      return Bad(
          absl::StrCat("model.vocab: id ", id, " is that of both ", JsonPreview(*slot), " and ", JsonPreview(token)));
    }
    slot = token;
  }
  return absl::OkStatus();
}

absl::Status AddAddedTokens(const json& root, Vocabulary& vocabulary) {
  const json added = root.value("added_tokens", json::array());
  if (!added.is_array()) return Bad(absl::StrCat("added_tokens: value ", JsonPreview(added), ", want a list"));
  const json& vocab = root["model"]["vocab"];
  std::vector<bool> seen;
  for (const json& entry : added) {
    if (!entry.is_object() || !entry.contains("content") || !entry["content"].is_string() || !entry.contains("id") ||
        !entry.value("special", json(false)).is_boolean()) {
      return Bad(absl::StrCat("added_tokens: value ", JsonPreview(entry), ", want {id, content, special, ...}"));
    }
    const auto content = entry["content"].get<std::string>();
    LOCKSTEP_ASSIGN_OR_RETURN(const int32_t id, ParseId(entry["id"], content));
    std::optional<std::string>& slot = vocabulary.at(id);
    if (slot.has_value() && *slot != content) {
      return Bad(absl::StrCat("added_tokens: id ", id, " is that of both ", JsonPreview(*slot), " and ",
                              JsonPreview(content)));
    }
    if (const auto other = vocab.find(content); other != vocab.end() && other->get<int32_t>() != id) {
      return Bad(absl::StrCat("added_tokens: ", JsonPreview(content), " has id ", id, ", but ", other->get<int32_t>(),
                              " in model.vocab"));
    }
    if (id >= static_cast<int32_t>(seen.size())) seen.resize(id + 1);
    if (seen[id]) return Bad(absl::StrCat("added_tokens: id ", id, " appears twice"));
    seen[id] = true;
    slot = content;
    vocabulary.special[id] = entry.value("special", false);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TokenBytes> TokenBytes::Parse(std::string_view tokenizer_json) {
  LOCKSTEP_ASSIGN_OR_RETURN(const json root, ParseStrictJson(tokenizer_json, "tokenizer.json"));
  if (!root.is_object()) return Bad("want an object");
  DecoderPlan plan;
  LOCKSTEP_RETURN_IF_ERROR(AddDecoder(root.value("decoder", json()), plan));
  if (!plan.byte_level && !plan.byte_fallback) return Unknown("decoder: neither ByteLevel nor ByteFallback is in it");
  Vocabulary vocabulary;
  LOCKSTEP_RETURN_IF_ERROR(AddModelVocabulary(root, vocabulary));
  LOCKSTEP_RETURN_IF_ERROR(AddAddedTokens(root, vocabulary));

  TokenBytes result;
  result.bytes_.resize(vocabulary.tokens.size());
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (!vocabulary.tokens[id].has_value() || vocabulary.special[id]) continue;
    result.bytes_[id] = Decode(plan, *std::move(vocabulary.tokens[id]));
  }
  return result;
}

absl::StatusOr<TokenBytes> TokenBytes::Load(const std::filesystem::path& tokenizer_json) {
  LOCKSTEP_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(tokenizer_json));
  absl::StatusOr<TokenBytes> parsed = Parse(file.text());
  if (parsed.ok()) return parsed;
  return absl::Status(parsed.status().code(), absl::StrCat(tokenizer_json.string(), ": ", parsed.status().message()));
}

}  // namespace lockstep
