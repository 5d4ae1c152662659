// What a learner is about to send, against what the worker has: checked whole before a byte moves.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/numerics.h"
#include "weights_sync/tensor_table.h"
#include "weights_sync/version.h"

namespace lockstep {

struct ManifestTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  bool operator==(const ManifestTensor&) const = default;
};

struct Manifest {
  std::vector<ManifestTensor> tensors;
  std::optional<WeightVersion> base_version;  // the tensors left out are those of this version; nullopt: it is complete
  bool operator==(const Manifest&) const = default;
};

// Where a manifest's tensor goes.
struct TensorPlace {
  size_t slot = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t bytes = 0;  // as sent
};

// The slot that has this name, or this alias; nullopt: none.
std::optional<size_t> SlotNamed(std::span<const TensorSlot> slots, const std::string& name);

// One place per tensor. INVALID_ARGUMENT lists the first ten of: unknown names, tensors given twice (under aliases, or
// whole and in parts), wrong shapes, missing tensors, a tied one without that to which it is tied, or in another dtype:
// the two are compared as sent.
absl::StatusOr<std::vector<TensorPlace>> PlaceTensors(const Manifest& manifest, std::span<const TensorSlot> slots);

}  // namespace lockstep
