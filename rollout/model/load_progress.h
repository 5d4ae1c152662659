// Shows how far a load is: a bar on a terminal, log lines elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace lockstep {

class LoadProgress {
 public:
  using Clock = std::function<std::chrono::steady_clock::time_point()>;
  struct Output {
    bool terminal = false;
    std::function<void(std::string_view)> write;  // terminal: text to print as it is; else one log line
  };

  // `label`: "loading weights". The bar goes to stderr if that is a terminal, else lines go to the log.
  LoadProgress(std::string_view label, uint64_t total_bytes);
  LoadProgress(std::string_view label, uint64_t total_bytes, Output output, Clock clock);
  // Ends the bar's line if Finish was not reached: what is printed next is an error.
  ~LoadProgress();
  LoadProgress(const LoadProgress&) = delete;
  LoadProgress& operator=(const LoadProgress&) = delete;

  void Advance(uint64_t bytes);
  void Finish();

 private:
  int percent() const;
  std::string Amount() const;  // "1.2 / 14.1 GB"
  void DrawBar(int percent);

  std::string label_;
  uint64_t total_;
  Output output_;
  Clock clock_;
  std::chrono::steady_clock::time_point begin_;
  std::chrono::steady_clock::time_point last_line_;
  uint64_t done_ = 0;
  int shown_ = 0;  // percent last drawn or logged
  bool bar_open_ = false;
};

}  // namespace lockstep
