// What the benchmark found, as tables on stdout and as JSON.
#pragma once

#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "tools/bench/kernel_table.h"
#include "tools/bench/point.h"
#include "tools/bench/rl_run.h"

namespace lockstep {

void PrintPointHeader();
void PrintPoint(const PointShape& shape, const PointTimes& times);
nlohmann::json PointJson(const std::string& model, const PointShape& shape, const PointTimes& times);

// The ten kernels that take longest. `step_ms`: of a step that was timed without a recorder, of which shares are
// counted; 0: of the kernels' own sum.
void PrintKernels(const std::string& title, const KernelTable& table, double step_ms);
nlohmann::json KernelsJson(const KernelTable& table, double step_ms);

// One run, whole or sampled, of one response length.
struct RlRow {
  std::string model;
  RlOptions options;
  int64_t response = 0;  // the longest; all, if sigma is 0
  double sigma = 0;
  int64_t fits = 0;  // sequences of full length that memory holds at once
  RlResult result;
};
void PrintRlHeader(const RlOptions& options);
void PrintRl(const RlRow& row);
nlohmann::json RlJson(const RlRow& row);

}  // namespace lockstep
