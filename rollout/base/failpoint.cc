#include "rollout/base/failpoint.h"

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "rollout/base/status.h"
#include "spdlog/spdlog.h"

namespace lockstep {
namespace {

constexpr char kVariable[] = "LOCKSTEP_FAILPOINTS";
constexpr int64_t kMaxSleepMs = 3'600'000;

enum class Action : uint8_t { kKill, kStop, kSleep, kError };

struct Armed {
  size_t index = 0;
  std::string text;  // as given
  Action action = Action::kKill;
  int64_t at = 0;  // the hit it is for; 0: every one
  absl::Duration sleep;
  absl::StatusCode code = absl::StatusCode::kOk;
};

// Written before failpoint_internal::armed is set, and constant then; the counters are the places' own.
std::vector<Armed>& ArmedList() {
  static auto* list = new std::vector<Armed>;
  return *list;
}
std::array<std::atomic<int64_t>, kFailpoints.size()> hits;

absl::Status Wrong(absl::string_view entry, absl::string_view what) {
  std::string names;
  for (const FailpointPlace& place : kFailpoints) {
    absl::StrAppend(&names, "\n  ", std::string(place.name), place.can_fail ? "" : " (no error)");
  }
  return absl::InvalidArgumentError(absl::StrCat(kVariable, ": \"", entry, "\": ", what,
                                                 "; want NAME=ACTION[@N], ACTION one of kill, stop, sleep(MS), "
                                                 "error(CODE), NAME one of",
                                                 names));
}

bool CodeOf(absl::string_view text, absl::StatusCode* code) {
  for (int i = 1; i <= 16; ++i) {
    *code = static_cast<absl::StatusCode>(i);
    if (text == absl::StatusCodeToString(*code)) return true;
  }
  return false;
}

absl::StatusOr<Armed> Parse(absl::string_view entry) {
  const std::pair<absl::string_view, absl::string_view> parts = absl::StrSplit(entry, absl::MaxSplits('=', 1));
  Armed armed{.text = std::string(parts.second)};
  while (armed.index < kFailpoints.size() &&
         absl::string_view(kFailpoints[armed.index].name.data(), kFailpoints[armed.index].name.size()) != parts.first) {
    ++armed.index;
  }
  if (armed.index == kFailpoints.size()) return Wrong(entry, absl::StrCat("no failpoint \"", parts.first, "\""));
  absl::string_view action = parts.second;
  if (const size_t at = action.rfind('@'); at != absl::string_view::npos) {
    if (!absl::SimpleAtoi(action.substr(at + 1), &armed.at) || armed.at < 1) {
      return Wrong(entry, absl::StrCat("@", action.substr(at + 1), ", want a number from 1"));
    }
    action = action.substr(0, at);
  }
  absl::string_view argument = action;
  if (action == "kill") {
    armed.action = Action::kKill;
  } else if (action == "stop") {
    armed.action = Action::kStop;
  } else if (absl::ConsumePrefix(&argument, "sleep(") && absl::ConsumeSuffix(&argument, ")")) {
    int64_t ms = -1;
    if (!absl::SimpleAtoi(argument, &ms) || ms < 0 || ms > kMaxSleepMs) {
      return Wrong(entry, absl::StrCat("sleep(", argument, "), want 0 to ", kMaxSleepMs, " milliseconds"));
    }
    armed.action = Action::kSleep;
    armed.sleep = absl::Milliseconds(ms);
  } else if (absl::ConsumePrefix(&argument, "error(") && absl::ConsumeSuffix(&argument, ")")) {
    if (!CodeOf(argument, &armed.code)) return Wrong(entry, absl::StrCat("no status code \"", argument, "\""));
    if (!kFailpoints[armed.index].can_fail) return Wrong(entry, "this place cannot return an error");
    armed.action = Action::kError;
  } else {
    return Wrong(entry, absl::StrCat("no action \"", action, "\""));
  }
  return armed;
}

}  // namespace

absl::Status failpoint_internal::Hit(size_t index) {
  const int64_t hit = hits[index].fetch_add(1, std::memory_order_relaxed) + 1;
  absl::Status status;
  for (const Armed& entry : ArmedList()) {
    if (entry.index != index || (entry.at != 0 && entry.at != hit)) continue;
    // tools/chaos counts these lines.
    spdlog::warn("failpoint {}={} at hit {}", kFailpoints[index].name, entry.text, hit);
    switch (entry.action) {
      case Action::kKill:
        std::raise(SIGKILL);
        break;
      case Action::kStop:
        std::raise(SIGSTOP);  // of this thread, so that it goes no further; the whole process stops
        break;
      case Action::kSleep:
        absl::SleepFor(entry.sleep);
        break;
      case Action::kError:
        status = absl::Status(entry.code, absl::StrCat("failpoint ", std::string(kFailpoints[index].name)));
        break;
    }
  }
  return status;
}

absl::Status ArmFailpoints(absl::string_view spec) {
  std::vector<Armed> list;
  for (const absl::string_view entry : absl::StrSplit(spec, ';', absl::SkipWhitespace())) {
    LOCKSTEP_ASSIGN_OR_RETURN(Armed armed, Parse(absl::StripAsciiWhitespace(entry)));
    list.push_back(std::move(armed));
  }
  failpoint_internal::armed = false;
  ArmedList() = std::move(list);
  for (std::atomic<int64_t>& hit : hits) hit = 0;
  failpoint_internal::armed = !ArmedList().empty();
  return absl::OkStatus();
}

absl::Status ArmFailpointsFromEnvironment() {
  const char* spec = std::getenv(kVariable);
  if (spec == nullptr) return absl::OkStatus();
  LOCKSTEP_RETURN_IF_ERROR(ArmFailpoints(spec));
  if (failpoint_internal::armed) spdlog::warn("{} is set: this process will fail on purpose: {}", kVariable, spec);
  return absl::OkStatus();
}

}  // namespace lockstep
