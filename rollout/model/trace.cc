#include "rollout/model/trace.h"

#include <algorithm>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/float_bits.h"
#include "nlohmann/json.hpp"
#include "rollout/base/check.h"

namespace lockstep {

void Trace::BeginStep(std::span<const int64_t> positions, std::span<const int64_t> logit_rows) {
  step_positions_.assign(positions.begin(), positions.end());
  step_logit_rows_.assign(logit_rows.begin(), logit_rows.end());
}

Trace::Tensor& Trace::Get(int64_t layer, const std::string& name, const Rows& rows, DType dtype, const Parts& parts) {
  const auto [entry, created] = tensors_.try_emplace({layer, name});
  Tensor& tensor = entry->second;
  if (created) {
    tensor = {.layer = layer,
              .order = static_cast<int64_t>(tensors_.size()) - 1,
              .name = name,
              .dtype = dtype,
              .width = rows.width,
              .parts = parts};
  }
  return tensor;
}

void Trace::RecordRow(Ops& ops, Tensor& tensor, int64_t position, Rows row) {
  if (!std::binary_search(positions_.begin(), positions_.end(), position)) return;
  tensor.rows[position] = ops.Download(row);
}

void Trace::Record(Ops& ops, int64_t layer, const std::string& name, Rows rows, DType dtype, const Parts& parts) {
  Tensor& tensor = Get(layer, name, rows, dtype, parts);
  for (size_t r = 0; r < step_positions_.size(); ++r) RecordRow(ops, tensor, step_positions_[r], rows.slice(r, 1));
}

void Trace::RecordLogitRows(Ops& ops, const std::string& name, Rows rows, DType dtype, int64_t begin) {
  Tensor& tensor = Get(-1, name, rows, dtype, {});
  const int64_t count = std::min(rows.rows, static_cast<int64_t>(step_logit_rows_.size()) - begin);
  for (int64_t i = 0; i < count; ++i) {
    RecordRow(ops, tensor, step_positions_[step_logit_rows_[begin + i]], rows.slice(i, 1));
  }
}

absl::Status Trace::Write(const std::filesystem::path& folder, const std::string& source,
                          std::span<const int32_t> tokens) const {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat("cannot make ", folder.string(), ": ", error.message()));
  std::vector<const Tensor*> ordered;
  for (const auto& [key, tensor] : tensors_) ordered.push_back(&tensor);
  std::sort(ordered.begin(), ordered.end(), [](const Tensor* a, const Tensor* b) { return a->order < b->order; });

  nlohmann::json index = nlohmann::json::array();
  for (const Tensor* tensor : ordered) {
    const std::string file = tensor->layer < 0
                                 ? absl::StrFormat("%04d_%s.bin", tensor->order, tensor->name)
                                 : absl::StrFormat("%04d_layer%d_%s.bin", tensor->order, tensor->layer, tensor->name);
    std::ofstream out(folder / file, std::ios::binary);
    std::vector<int64_t> positions;
    for (const auto& [position, values] : tensor->rows) {
      positions.push_back(position);
      for (const float value : values) {
        if (tensor->dtype == DType::kF32) {
          out.write(reinterpret_cast<const char*>(&value), sizeof(value));
        } else {
          const uint16_t bits = F32ToBf16(value);
          out.write(reinterpret_cast<const char*>(&bits), sizeof(bits));
        }
      }
    }
    if (!out.flush()) return absl::InternalError(absl::StrCat("cannot write ", (folder / file).string()));
    nlohmann::json entry = {{"layer", tensor->layer},
                            {"order", tensor->order},
                            {"name", tensor->name},
                            {"dtype", tensor->dtype == DType::kF32 ? "f32" : "bf16"},
                            {"width", tensor->width},
                            {"positions", positions},
                            {"file", file}};
    if (!tensor->parts.empty()) entry["parts"] = tensor->parts;
    index.push_back(std::move(entry));
  }
  std::ofstream out(folder / "index.json");
  out << nlohmann::json{{"format", 1},
                        {"source", source},
                        {"tokens", std::vector<int32_t>(tokens.begin(), tokens.end())},
                        {"tensors", index}}
             .dump(1)
      << "\n";
  if (!out.flush()) return absl::InternalError(absl::StrCat("cannot write ", (folder / "index.json").string()));
  return absl::OkStatus();
}

}  // namespace lockstep
