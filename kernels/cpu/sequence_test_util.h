// For tests of operations with a sequence behind them: schedules that cut sequences into pieces, and a runner that lays
// the pieces of a step into one batch. A schedule must never show in the bits, so a test runs the same sequences
// through several and compares words.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/test_util.h"
#include "kernels/ops.h"

namespace lockstep::testing {

struct PieceSpec {
  int64_t sequence;
  int64_t rows;
};
using Schedule = std::vector<std::vector<PieceSpec>>;  // steps of pieces

// Every sequence whole, all in one step.
inline Schedule WholeSchedule(const std::vector<int64_t>& lengths) {
  Schedule schedule(1);
  for (size_t i = 0; i < lengths.size(); ++i) schedule[0].push_back({static_cast<int64_t>(i), lengths[i]});
  return schedule;
}

// Random steps: a shuffled subset of the unfinished sequences, each with 1 to `most` rows.
inline Schedule RandomSchedule(const std::vector<int64_t>& lengths, int64_t most, uint32_t seed) {
  std::mt19937 rng(seed);
  std::vector<int64_t> left = lengths;
  Schedule schedule;
  while (std::any_of(left.begin(), left.end(), [](int64_t n) { return n > 0; })) {
    std::vector<int64_t> order(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), rng);
    std::vector<PieceSpec> step;
    for (const int64_t s : order) {
      if (left[s] == 0 || rng() % 4 == 0) continue;
      const int64_t rows = std::min<int64_t>(left[s], 1 + static_cast<int64_t>(rng() % most));
      left[s] -= rows;
      step.push_back({s, rows});
    }
    if (!step.empty()) schedule.push_back(step);
  }
  return schedule;
}

// At most one token of a sequence in a step: decoding from the first token on.
inline Schedule TokenSchedule(const std::vector<int64_t>& lengths) {
  return RandomSchedule(lengths, 1, 7);
}

// By operand, then by sequence.
using SequenceInputs = std::vector<std::vector<Matrix>>;

// Gets a step's pieces (row range and position filled in), the sequence of each, and the batch of each operand; fills
// `out`.
using RunStep = std::function<void(std::vector<Piece>& pieces, const std::vector<int64_t>& sequences,
                                   std::vector<Matrix>& inputs, Matrix& out)>;

// Outputs by sequence. A batch also has rows that no piece owns: poison going in, and poison they must stay.
inline std::vector<Matrix> RunSchedule(const Schedule& schedule, const std::vector<int64_t>& lengths,
                                       SequenceInputs& inputs, int64_t out_width, const RunStep& run) {
  std::vector<Matrix> results;
  for (const int64_t length : lengths) results.emplace_back(length, out_width);
  std::vector<int64_t> done(lengths.size(), 0);
  for (const std::vector<PieceSpec>& specs : schedule) {
    std::vector<Piece> pieces;
    std::vector<int64_t> sequences;
    int64_t rows = 1;  // an unowned row before each piece and one at the end
    for (const PieceSpec& spec : specs) {
      pieces.push_back({.row_begin = rows, .row_count = spec.rows, .position = done[spec.sequence]});
      sequences.push_back(spec.sequence);
      rows += spec.rows + 1;
    }
    std::vector<Matrix> batch;
    for (std::vector<Matrix>& operand : inputs) {
      Matrix& all = batch.emplace_back(rows, operand[0].width());
      for (size_t p = 0; p < pieces.size(); ++p) {
        for (int64_t r = 0; r < pieces[p].row_count; ++r) {
          std::copy_n(operand[sequences[p]].row(pieces[p].position + r), all.width(), all.row(pieces[p].row_begin + r));
        }
      }
    }
    Matrix out(rows, out_width);
    run(pieces, sequences, batch, out);
    EXPECT_EQ(out.TouchedOutside(), 0);
    EXPECT_EQ(out.Unwritten(), (static_cast<int64_t>(pieces.size()) + 1) * out_width);
    for (size_t p = 0; p < pieces.size(); ++p) {
      for (int64_t r = 0; r < pieces[p].row_count; ++r) {
        std::copy_n(out.row(pieces[p].row_begin + r), out_width, results[sequences[p]].row(pieces[p].position + r));
      }
      done[sequences[p]] += pieces[p].row_count;
    }
  }
  return results;
}

// Rows, of all sequences, that differ in a bit.
inline int64_t DifferingRows(std::vector<Matrix>& a, std::vector<Matrix>& b) {
  int64_t differing = 0;
  for (size_t i = 0; i < a.size(); ++i) differing += DifferingRows(a[i], 0, b[i], 0, a[i].rows());
  return differing;
}

}  // namespace lockstep::testing
