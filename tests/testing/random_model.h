// Small random models made in memory, for tests that need no checkpoint.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "rollout/worker/local_model.h"

namespace lockstep {

// Which mixers a model has and their variants. Widths are small but keep what matters: head sizes that are no multiple
// of the vector width, groups, tails.
enum class ModelKind { kHybrid, kHybridGroupedRope, kDenseSliding, kAllGdn };
std::vector<ModelKind> AllModelKinds();
std::string ModelKindName(ModelKind kind);

ModelSpec RandomSpec(ModelKind kind);
// The same kinds in the head sizes that CUDA kernels are compiled for: 96 and 192, 128.
ModelSpec RandomCudaSpec(ModelKind kind);

// Weights are drawn so that logits are far from flat and every gate is exercised. On CUDA of RandomCudaSpec; dies where
// the backend cannot be made.
std::unique_ptr<LocalModel> MakeRandomModel(ModelKind kind, const std::string& numerics, uint64_t seed, int threads,
                                            const BackendOptions& backend = {});

}  // namespace lockstep
