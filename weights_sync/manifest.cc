#include "weights_sync/manifest.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "rollout/base/tensor_shape.h"

namespace lockstep {
namespace {

constexpr size_t kShown = 10;

// What a name stands for: a slot, or one of its parts.
struct Meaning {
  size_t slot = 0;
  int64_t part = -1;  // -1: the whole
};

class Placer {
 public:
  Placer(const Manifest& manifest, std::span<const TensorSlot> slots) : manifest_(manifest), slots_(slots) {
    for (size_t s = 0; s < slots.size(); ++s) {
      names_[slots[s].name] = {s};
      for (const std::string& alias : slots[s].aliases) names_[alias] = {s};
      for (size_t p = 0; p < slots[s].parts.size(); ++p) names_[slots[s].parts[p]] = {s, static_cast<int64_t>(p)};
    }
  }

  absl::StatusOr<std::vector<TensorPlace>> Run() {
    places_.resize(manifest_.tensors.size());
    given_.resize(slots_.size());
    for (size_t i = 0; i < manifest_.tensors.size(); ++i) {
      const auto found = names_.find(manifest_.tensors[i].name);
      if (found == names_.end()) {
        Problem(absl::StrCat("unknown tensor ", manifest_.tensors[i].name));
        continue;
      }
      given_[found->second.slot].push_back({i, found->second.part});
    }
    for (size_t s = 0; s < slots_.size(); ++s) PlaceSlot(s);
    if (problems_.empty()) return std::move(places_);
    const size_t count = problems_.size();
    if (count > kShown) problems_.resize(kShown);
    return absl::InvalidArgumentError(
        absl::StrCat("manifest: ", count, " differences from the model's tensors: ", absl::StrJoin(problems_, "; "),
                     count > kShown ? absl::StrCat("; and ", count - kShown, " more") : ""));
  }

 private:
  struct Given {
    size_t tensor;
    int64_t part;
  };

  void Problem(std::string text) { problems_.push_back(std::move(text)); }
  const ManifestTensor& Tensor(const Given& given) const { return manifest_.tensors[given.tensor]; }

  void PlaceSlot(size_t s) {
    const TensorSlot& slot = slots_[s];
    std::vector<Given>& given = given_[s];
    if (given.empty()) {
      if (!manifest_.base_version && slot.tied_to < 0) Problem(absl::StrCat("missing ", slot.name));
      return;
    }
    // Its values would be taken for the other's, which no later check would miss.
    if (slot.tied_to >= 0 && manifest_.base_version && given_[slot.tied_to].empty()) {
      return Problem(absl::StrCat(slot.name, " is tied to ", slots_[slot.tied_to].name, "; want that one, or both"));
    }
    for (const Given& other : slot.tied_to >= 0 ? given_[slot.tied_to] : std::vector<Given>()) {
      if (Tensor(given[0]).dtype == Tensor(other).dtype) continue;
      const std::string dtype(DTypeName(Tensor(given[0]).dtype)), want(DTypeName(Tensor(other).dtype));
      return Problem(absl::StrCat(Tensor(given[0]).name, " is ", dtype, " and ", Tensor(other).name,
                                  ", to which it is tied, ", want, "; want one dtype"));
    }
    if (given[0].part < 0 || given.size() == 1) {
      if (given.size() > 1) {
        std::vector<std::string> names;
        for (const Given& g : given) names.push_back(Tensor(g).name);
        return Problem(absl::StrCat(slot.name, " is given more than once: ", absl::StrJoin(names, ", ")));
      }
      if (given[0].part < 0) return Place(given[0], s, slot.shape, 0);
    }
    PlaceParts(s);
  }

  void PlaceParts(size_t s) {
    const TensorSlot& slot = slots_[s];
    std::vector<Given> given = given_[s];
    std::sort(given.begin(), given.end(), [](const Given& a, const Given& b) { return a.part < b.part; });
    bool complete = given.size() == slot.parts.size();
    for (size_t p = 0; complete && p < given.size(); ++p) complete = given[p].part == static_cast<int64_t>(p);
    if (!complete) {
      return Problem(absl::StrCat(slot.name, " in parts needs each of ", absl::StrJoin(slot.parts, ", "),
                                  " once and not the whole beside them"));
    }
    std::vector<int64_t> found;
    for (const Given& g : given) found.push_back(Tensor(g).shape.empty() ? 0 : Tensor(g).shape[0]);
    const std::vector<int64_t>& rows = FittingCut(slot.part_rows, found);
    int64_t first = 0;
    for (size_t p = 0; p < given.size(); ++p) {
      std::vector<int64_t> shape = slot.shape;
      shape[0] = rows[p];
      Place(given[p], s, shape, first);
      first += rows[p];
    }
  }

  void Place(const Given& given, size_t slot, const std::vector<int64_t>& shape, int64_t first_row) {
    const ManifestTensor& tensor = Tensor(given);
    if (tensor.shape != shape) {
      return Problem(absl::StrCat(tensor.name, " is ", ShapeText(tensor.shape), ", want ", ShapeText(shape)));
    }
    int64_t bytes = DTypeBytes(tensor.dtype);
    for (const int64_t n : shape) bytes *= n;
    places_[given.tensor] = {slot, first_row, shape[0], bytes};
  }

  const Manifest& manifest_;
  const std::span<const TensorSlot> slots_;
  std::map<std::string, Meaning> names_;
  std::vector<std::vector<Given>> given_;  // by slot
  std::vector<TensorPlace> places_;
  std::vector<std::string> problems_;
};

}  // namespace

std::optional<size_t> SlotNamed(std::span<const TensorSlot> slots, const std::string& name) {
  const auto found = std::find_if(slots.begin(), slots.end(), [&](const TensorSlot& slot) {
    return slot.name == name || std::find(slot.aliases.begin(), slot.aliases.end(), name) != slot.aliases.end();
  });
  if (found == slots.end()) return std::nullopt;
  return found - slots.begin();
}

absl::StatusOr<std::vector<TensorPlace>> PlaceTensors(const Manifest& manifest, std::span<const TensorSlot> slots) {
  return Placer(manifest, slots).Run();
}

}  // namespace lockstep
