#include "rollout/model/tensor_resolver.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "rollout/base/status.h"
#include "rollout/base/tensor_shape.h"
#include "rollout/model/name_map.h"

namespace lockstep {
namespace {

class Problems {
 public:
  void Add(const std::string& kind, std::string what) { by_kind_[kind].push_back(std::move(what)); }

  absl::Status status() const {
    if (by_kind_.empty()) return absl::OkStatus();
    constexpr size_t kShown = 20;
    std::vector<std::string> texts;
    for (const auto& [kind, list] : by_kind_) {
      const auto end = list.begin() + static_cast<ptrdiff_t>(std::min(list.size(), kShown));
      std::string text = absl::StrCat(list.size(), " ", kind, ": ", absl::StrJoin(list.begin(), end, ", "));
      if (list.size() > kShown) absl::StrAppend(&text, ", and ", list.size() - kShown, " more");
      texts.push_back(std::move(text));
    }
    return absl::InvalidArgumentError(
        absl::StrCat("the checkpoint's tensors are not the model's: ", absl::StrJoin(texts, "; ")));
  }

 private:
  std::map<std::string, std::vector<std::string>> by_kind_;
};

class Resolver {
 public:
  Resolver(const ModelSpec& spec, const Checkpoint& checkpoint) : spec_(spec), checkpoint_(checkpoint) {}

  absl::StatusOr<ResolvedTensors> Run() {
    for (const TensorSpec& wanted : ExpectedTensors(spec_)) Resolve(wanted);
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      if (!used_.contains(name) && !IsIgnoredTensor(spec_, name)) problems_.Add("unexpected", name);
    }
    if (spec_.tied_embeddings) CheckTiedHead();
    LOCKSTEP_RETURN_IF_ERROR(problems_.status());
    return std::move(resolved_);
  }

 private:
  // Whether the checkpoint has the tensor; marks it as read.
  const CheckpointTensor* Use(const std::string& name) {
    const CheckpointTensor* found = checkpoint_.Find(name);
    if (found != nullptr) used_.insert(name);
    return found;
  }

  void Resolve(const TensorSpec& wanted) {
    // All the ways in which it is stored.
    std::vector<std::string> stored_as;
    std::vector<CheckpointTensor> whole;
    std::vector<std::string> names = {wanted.name};
    names.insert(names.end(), wanted.aliases.begin(), wanted.aliases.end());
    for (const std::string& name : names) {
      const CheckpointTensor* found = Use(name);
      if (found == nullptr) continue;
      stored_as.push_back(name);
      whole.push_back(*found);
    }
    std::vector<CheckpointTensor> parts;
    std::vector<std::string> missing_parts;
    for (const std::string& name : wanted.parts) {
      const CheckpointTensor* found = Use(name);
      if (found == nullptr) {
        missing_parts.push_back(name);
        continue;
      }
      stored_as.push_back(name);
      parts.push_back(*found);
    }

    if (!whole.empty() && (whole.size() > 1 || !parts.empty())) {
      problems_.Add("stored under several names", absl::StrCat(wanted.name, " (", absl::StrJoin(stored_as, ", "), ")"));
    } else if (!whole.empty()) {
      if (CheckShape(wanted.shape, whole[0])) resolved_[wanted.name] = std::move(whole);
    } else if (!parts.empty()) {
      for (const std::string& name : missing_parts) problems_.Add("missing", name);
      if (missing_parts.empty() && CheckParts(wanted, parts)) resolved_[wanted.name] = std::move(parts);
    } else if (!wanted.tied) {
      problems_.Add("missing", wanted.parts.empty()
                                   ? wanted.name
                                   : absl::StrCat(wanted.name, " (or ", absl::StrJoin(wanted.parts, ", "), ")"));
    }
  }

  bool CheckShape(const std::vector<int64_t>& wanted, const CheckpointTensor& tensor) {
    const TensorEntry& entry = *tensor.entry;
    if (!entry.dtype.has_value()) {
      problems_.Add("of a wrong dtype", absl::StrCat(entry.name, " (", entry.dtype_name, ", want BF16, F16 or F32)"));
      return false;
    }
    if (entry.shape != wanted) {
      problems_.Add("misshapen",
                    absl::StrCat(entry.name, " (", ShapeText(entry.shape), ", want ", ShapeText(wanted), ")"));
      return false;
    }
    return true;
  }

  bool CheckParts(const TensorSpec& wanted, const std::vector<CheckpointTensor>& parts) {
    std::vector<int64_t> found;
    for (const CheckpointTensor& part : parts) found.push_back(part.entry->shape.empty() ? 0 : part.entry->shape[0]);
    const std::vector<int64_t>& rows = FittingCut(wanted.part_rows, found);
    bool good = true;
    for (size_t i = 0; i < parts.size(); ++i) {
      std::vector<int64_t> shape = wanted.shape;
      shape[0] = rows[i];
      good = CheckShape(shape, parts[i]) && good;
    }
    return good;
  }

  void CheckTiedHead() {
    const auto head = resolved_.find(kHeadName);
    if (head == resolved_.end()) return;
    const auto embedding = resolved_.find(kEmbeddingName);
    if (embedding != resolved_.end()) {
      const CheckpointTensor& a = head->second[0];
      const CheckpointTensor& b = embedding->second[0];
      if (a.entry->dtype != b.entry->dtype || std::memcmp(a.data(), b.data(), a.entry->bytes()) != 0) {
        problems_.Add("different from the embedding although tie_word_embeddings is true", kHeadName);
      }
      a.Drop();
      b.Drop();
    }
    resolved_.erase(head);
  }

  const ModelSpec& spec_;
  const Checkpoint& checkpoint_;
  Problems problems_;
  std::set<std::string> used_;
  ResolvedTensors resolved_;
};

}  // namespace

absl::StatusOr<ResolvedTensors> ResolveTensors(const ModelSpec& spec, const Checkpoint& checkpoint) {
  return Resolver(spec, checkpoint).Run();
}

}  // namespace lockstep
