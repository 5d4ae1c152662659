// Traces a forward pass: every operation's output rows at chosen positions of one sequence, in docs/trace.md's format,
// to be compared bit for bit with the trainer's.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/ops.h"

namespace lockstep {

class Trace {
 public:
  // Names and widths of the columns of a fused operation.
  using Parts = std::vector<std::pair<std::string, int64_t>>;

  // `positions`: which to keep, ascending.
  explicit Trace(std::vector<int64_t> positions) : positions_(std::move(positions)) {}

  // The step that follows: the position of each of its rows, and which rows have logits.
  void BeginStep(std::span<const int64_t> positions, std::span<const int64_t> logit_rows);

  // An operation's output over the step's rows (padding after them is ignored). `layer`: -1 outside the layers.
  void Record(Ops& ops, int64_t layer, const std::string& name, Rows rows, DType dtype, const Parts& parts = {});
  // The same over the step's logit rows, from the `begin`-th on.
  void RecordLogitRows(Ops& ops, const std::string& name, Rows rows, DType dtype, int64_t begin);

  // Makes the folder.
  absl::Status Write(const std::filesystem::path& folder, const std::string& source,
                     std::span<const int32_t> tokens) const;

 private:
  struct Tensor {
    int64_t layer = 0;
    int64_t order = 0;
    std::string name;
    DType dtype = DType::kF32;
    int64_t width = 0;
    Parts parts;
    std::map<int64_t, std::vector<float>> rows;  // by position
  };
  void RecordRow(Ops& ops, Tensor& tensor, int64_t position, Rows row);
  Tensor& Get(int64_t layer, const std::string& name, const Rows& rows, DType dtype, const Parts& parts);

  const std::vector<int64_t> positions_;
  std::vector<int64_t> step_positions_;
  std::vector<int64_t> step_logit_rows_;
  std::map<std::pair<int64_t, std::string>, Tensor> tensors_;
};

}  // namespace lockstep
