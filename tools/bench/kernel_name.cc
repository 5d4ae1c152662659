#include "tools/bench/kernel_name.h"

#include <cxxabi.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace lockstep {
namespace {

constexpr size_t kLongest = 48;

std::string Demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                    std::free);
  return status == 0 ? text.get() : name;
}

bool InName(char c) {
  return std::isalnum(static_cast<unsigned char>(c)) || c == '_';
}

// Without the arguments: the first parenthesis outside <> opens them, unless it opens a cast.
std::string_view WithoutArguments(std::string_view name) {
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    if (name[i] == '<') ++depth;
    if (name[i] == '>') --depth;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

// "(int)2" to "2"; true and false stay words.
std::string WithoutCasts(std::string_view name) {
  std::string out;
  for (size_t i = 0; i < name.size(); ++i) {
    const size_t close = name[i] == '(' ? name.find(')', i) : std::string_view::npos;
    if (close == std::string_view::npos) {
      out += name[i];
      continue;
    }
    const std::string_view type = name.substr(i + 1, close - i - 1), value = name.substr(close + 1);
    if (type == "bool" && !value.empty() && (value[0] == '0' || value[0] == '1')) {
      out += value[0] == '1' ? "true" : "false";
      i = close + 1;
    } else {
      i = close;
    }
  }
  return out;
}

// "a::b::C<a::D>" to "C<D>".
std::string WithoutNamespaces(std::string_view name) {
  std::string out;
  for (size_t i = 0; i < name.size();) {
    if (name.substr(i, 2) == "::") {
      while (!out.empty() && InName(out.back())) out.pop_back();
      i += 2;
    } else {
      out += name[i++];
    }
  }
  return out;
}

// As many template arguments as fit.
std::string Shortened(const std::string& name) {
  if (name.size() <= kLongest) return name;
  const std::string ending = ", ...>";
  const size_t comma = name.rfind(", ", kLongest - ending.size());
  const size_t open = name.find('<');
  if (open == std::string::npos) return absl::StrCat(name.substr(0, kLongest - 3), "...");
  // Inside a nested list, a cut would leave brackets open.
  const auto nested = [&](size_t end) {
    const auto opened = std::count(name.begin(), name.begin() + static_cast<std::ptrdiff_t>(end), '<');
    return opened - std::count(name.begin(), name.begin() + static_cast<std::ptrdiff_t>(end), '>') != 1;
  };
  size_t cut = comma;
  while (cut != std::string::npos && cut > open && nested(cut)) cut = name.rfind(", ", cut - 1);
  if (cut == std::string::npos || cut <= open) return absl::StrCat(name.substr(0, open), "<...>");
  return absl::StrCat(name.substr(0, cut), ending);
}

}  // namespace

std::string ShortKernelName(std::string_view name) {
  const std::string text =
      absl::StrReplaceAll(Demangled(std::string(name)), {{"(anonymous namespace)::", ""}, {"__nv_bfloat16", "bf16"}});
  std::string_view rest = WithoutArguments(text);
  if (rest.starts_with("void ")) rest.remove_prefix(5);
  return Shortened(WithoutNamespaces(WithoutCasts(rest)));
}

std::string_view KernelBaseName(std::string_view short_name) {
  return short_name.substr(0, short_name.find('<'));
}

}  // namespace lockstep
