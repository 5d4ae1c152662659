#include "rollout/model/strict_json.h"

#include <unordered_set>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "rollout/base/check.h"

namespace lockstep {
namespace {

using nlohmann::json;

std::string Cut(std::string text, size_t limit) {
  if (text.size() <= limit) return text;
  while (limit > 0 && (static_cast<unsigned char>(text[limit]) & 0xC0) == 0x80) --limit;  // not inside a UTF-8 sequence
  text.resize(limit);
  return text + "...";
}

// Looks at the events of one pass, builds nothing, and stops at the first thing that is wrong.
class StrictChecker : public nlohmann::json_sax<json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }

  bool start_object(std::size_t) override {
    keys_.emplace_back();
    return Enter();
  }
  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    error_ = absl::StrCat("key \"", Cut(name, 80), "\" appears twice in one object");
    return false;
  }
  bool end_object() override {
    keys_.pop_back();
    --depth_;
    return true;
  }
  bool start_array(std::size_t) override { return Enter(); }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    error_ = Cut(error.what(), 200);
    return false;
  }

  const std::string& error() const { return error_; }

 private:
  bool Enter() {
    if (++depth_ <= kMaxJsonDepth) return true;
    error_ = absl::StrCat("nested deeper than ", kMaxJsonDepth, " levels");
    return false;
  }

  int depth_ = 0;
  std::vector<std::unordered_set<std::string>> keys_;  // of the objects that are open
  std::string error_;
};

}  // namespace

absl::StatusOr<json> ParseStrictJson(std::string_view text, std::string_view what) {
  StrictChecker checker;
  if (!json::sax_parse(text, &checker)) {
    return absl::InvalidArgumentError(absl::StrCat(std::string(what), ": ", checker.error()));
  }
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  LOCKSTEP_CHECK(!value.is_discarded(), "JSON passed the checker but not the parser");
  return value;
}

std::string JsonPreview(const json& value) {
  return Cut(value.dump(-1, ' ', false, json::error_handler_t::replace), 80);
}

}  // namespace lockstep
