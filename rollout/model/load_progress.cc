#include "rollout/model/load_progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "spdlog/spdlog.h"

namespace lockstep {
namespace {

using std::chrono::duration;
using std::chrono::steady_clock;

constexpr int kBarWidth = 40;
constexpr int kLogStep = 10;  // percent
// A small model loads in a blink; nobody needs ten lines about that.
constexpr std::chrono::seconds kLogInterval{1};

LoadProgress::Output DefaultOutput() {
  if (::isatty(STDERR_FILENO) == 1) {
    return {true, [](std::string_view text) {
              std::fwrite(text.data(), 1, text.size(), stderr);
              std::fflush(stderr);
            }};
  }
  return {false, [](std::string_view line) { spdlog::info("{}", line); }};
}

}  // namespace

LoadProgress::LoadProgress(std::string_view label, uint64_t total_bytes)
    : LoadProgress(label, total_bytes, DefaultOutput(), steady_clock::now) {}

LoadProgress::LoadProgress(std::string_view label, uint64_t total_bytes, Output output, Clock clock)
    : label_(label),
      total_(total_bytes),
      output_(std::move(output)),
      clock_(std::move(clock)),
      begin_(clock_()),
      last_line_(begin_) {
  if (output_.terminal) DrawBar(0);
}

LoadProgress::~LoadProgress() {
  if (bar_open_) output_.write("\n");
}

int LoadProgress::percent() const {
  if (total_ == 0) return 100;
  return static_cast<int>(100.0 * static_cast<double>(std::min(done_, total_)) / static_cast<double>(total_));
}

std::string LoadProgress::Amount() const {
  const double unit = total_ >= 1'000'000'000 ? 1e9 : total_ >= 1'000'000 ? 1e6 : 1e3;
  const char* name = unit == 1e9 ? "GB" : unit == 1e6 ? "MB" : "kB";
  return absl::StrFormat("%.1f / %.1f %s", static_cast<double>(done_) / unit, static_cast<double>(total_) / unit, name);
}

void LoadProgress::DrawBar(int percent) {
  const int filled = percent * kBarWidth / 100;
  output_.write(absl::StrFormat("\r%s [%s%s] %3d%%  %s", label_, std::string(filled, '#'),
                                std::string(kBarWidth - filled, ' '), percent, Amount()));
  bar_open_ = true;
}

void LoadProgress::Advance(uint64_t bytes) {
  done_ += bytes;
  const int now = percent();
  if (output_.terminal) {
    if (now == shown_) return;
    DrawBar(now);
    shown_ = now;
    return;
  }
  if (now / kLogStep == shown_ / kLogStep || now >= 100 || clock_() - last_line_ < kLogInterval) return;
  output_.write(absl::StrFormat("%s: %d%% (%s)", label_, now, Amount()));
  shown_ = now;
  last_line_ = clock_();
}

void LoadProgress::Finish() {
  done_ = total_;
  const double seconds = duration<double>(clock_() - begin_).count();
  if (output_.terminal) {
    DrawBar(100);
    output_.write(absl::StrFormat(" in %.1f s\n", seconds));
    bar_open_ = false;
    return;
  }
  output_.write(absl::StrFormat("%s: done (%s in %.1f s)", label_, Amount(), seconds));
}

}  // namespace lockstep
