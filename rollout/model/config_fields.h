// Typed, checked access to the fields of a config.json object. Every field must be asked for by name, named as without
// effect, or it is refused at the end: a field nobody knows may change the output.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "rollout/model/strict_json.h"

namespace lockstep {

// Collects what is wrong with a file, so that one run of the program names all of it.
class ConfigErrors {
 public:
  explicit ConfigErrors(std::string_view file) : file_(file) {}
  // "<file>: <field>: value <seen>, want <wanted>"
  void Add(std::string_view field, std::string_view seen, std::string_view wanted);
  bool empty() const { return messages_.empty(); }
  // OK, or INVALID_ARGUMENT with the first 20 messages and how many there are.
  absl::Status status() const;

 private:
  std::string file_;
  std::vector<std::string> messages_;
};

class ConfigFields {
 public:
  // `path`: what comes before a field's name in messages, "" at the top level, else "rope_parameters." and the like.
  // `object` and `errors` must outlive this.
  ConfigFields(const nlohmann::json& object, std::string_view path, ConfigErrors& errors)
      : object_(object), path_(path), errors_(errors) {}

  // Whether the field is there at all, and whether it is there and not null. Neither counts as having understood it.
  bool Present(std::string_view name) const { return object_.contains(std::string(name)); }
  bool Has(std::string_view name) const;

  // nullptr: absent or null.
  const nlohmann::json* Get(std::string_view name);
  // Absent or null: the fallback; without one that is an error. After an error the value is `low`, which the caller may
  // compute with.
  int64_t Int(std::string_view name, std::optional<int64_t> fallback, int64_t low, int64_t high);
  // low < value < high, finite.
  std::optional<double> Number(std::string_view name, double low, double high);
  bool Bool(std::string_view name, bool fallback);
  std::optional<std::string> String(std::string_view name);

  // If present, must be one of `allowed` (numbers compare by value). For fields of which only one value is implemented.
  void Expect(std::string_view name, std::initializer_list<nlohmann::json> allowed, std::string_view wanted);
  void Ignore(std::span<const std::string_view> names);
  void RefuseUnknown();

  void Error(std::string_view name, std::string_view wanted);  // shows the field's own value
  ConfigErrors& errors() { return errors_; }

 private:
  const nlohmann::json& object_;
  std::string path_;
  ConfigErrors& errors_;
  std::set<std::string, std::less<>> known_;
};

}  // namespace lockstep
