#include "rollout/model/config_fields.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace lockstep {

using nlohmann::json;

void ConfigErrors::Add(std::string_view field, std::string_view seen, std::string_view wanted) {
  messages_.push_back(
      absl::StrCat(file_, ": ", std::string(field), ": value ", std::string(seen), ", want ", std::string(wanted)));
}

absl::Status ConfigErrors::status() const {
  if (messages_.empty()) return absl::OkStatus();
  constexpr size_t kShown = 20;
  const auto shown = messages_.begin() + static_cast<ptrdiff_t>(std::min(messages_.size(), kShown));
  std::string text = absl::StrJoin(messages_.begin(), shown, "; ");
  if (messages_.size() > kShown) absl::StrAppend(&text, "; and ", messages_.size() - kShown, " more");
  return absl::InvalidArgumentError(text);
}

bool ConfigFields::Has(std::string_view name) const {
  const auto found = object_.find(std::string(name));
  return found != object_.end() && !found->is_null();
}

const json* ConfigFields::Get(std::string_view name) {
  known_.emplace(name);
  return Has(name) ? &object_[std::string(name)] : nullptr;
}

int64_t ConfigFields::Int(std::string_view name, std::optional<int64_t> fallback, int64_t low, int64_t high) {
  const json* value = Get(name);
  if (value == nullptr && fallback.has_value()) return *fallback;
  // Integers beyond int64 arrive as unsigned or as floats; both fail here.
  if (value != nullptr && value->is_number_integer() &&
      !(value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(high))) {
    const auto number = value->get<int64_t>();
    if (number >= low && number <= high) return number;
  }
  Error(name, absl::StrCat("an integer from ", low, " to ", high));
  return low;
}

std::optional<double> ConfigFields::Number(std::string_view name, double low, double high) {
  const json* value = Get(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_number()) {
    const auto number = value->get<double>();
    if (std::isfinite(number) && number > low && number < high) return number;
  }
  Error(name, absl::StrCat("a number above ", low, " and below ", high));
  return std::nullopt;
}

bool ConfigFields::Bool(std::string_view name, bool fallback) {
  known_.emplace(name);
  if (!Present(name)) return fallback;
  const json& value = object_[std::string(name)];
  if (value.is_boolean()) return value.get<bool>();
  Error(name, "true or false");
  return fallback;
}

std::optional<std::string> ConfigFields::String(std::string_view name) {
  const json* value = Get(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) return value->get<std::string>();
  Error(name, "a string");
  return std::nullopt;
}

void ConfigFields::Expect(std::string_view name, std::initializer_list<json> allowed, std::string_view wanted) {
  known_.emplace(name);
  if (!Present(name)) return;
  const json& value = object_[std::string(name)];
  if (std::find(allowed.begin(), allowed.end(), value) == allowed.end()) Error(name, wanted);
}

void ConfigFields::Ignore(std::span<const std::string_view> names) {
  known_.insert(names.begin(), names.end());
}

void ConfigFields::RefuseUnknown() {
  for (const auto& [name, value] : object_.items()) {
    if (!known_.contains(name)) {
      errors_.Add(path_ + name, JsonPreview(value), "no such field: it is not known here and might change the output");
    }
  }
}

void ConfigFields::Error(std::string_view name, std::string_view wanted) {
  errors_.Add(path_ + std::string(name), Present(name) ? JsonPreview(object_[std::string(name)]) : "missing", wanted);
}

}  // namespace lockstep
