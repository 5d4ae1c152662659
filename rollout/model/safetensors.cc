#include "rollout/model/safetensors.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "rollout/base/status.h"
#include "rollout/base/tensor_shape.h"
#include "rollout/model/strict_json.h"

namespace lockstep {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian and are read in place");

using nlohmann::json;

struct FileDType {
  std::string_view name;
  uint64_t bits;
  std::optional<DType> dtype;
};

// All types of the format. Sizes of the ones that cannot be loaded are known too, so that a file with an unused int64
// buffer is still checked in full.
constexpr FileDType kFileDTypes[] = {
    {"BF16", 16, DType::kBF16},   {"F16", 16, DType::kF16},     {"F32", 32, DType::kF32},
    {"F64", 64, std::nullopt},    {"BOOL", 8, std::nullopt},    {"U8", 8, std::nullopt},
    {"I8", 8, std::nullopt},      {"U16", 16, std::nullopt},    {"I16", 16, std::nullopt},
    {"U32", 32, std::nullopt},    {"I32", 32, std::nullopt},    {"U64", 64, std::nullopt},
    {"I64", 64, std::nullopt},    {"C64", 64, std::nullopt},    {"F8_E4M3", 8, std::nullopt},
    {"F8_E5M2", 8, std::nullopt}, {"F8_E8M0", 8, std::nullopt}, {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt}, {"F4", 4, std::nullopt},
};

const FileDType* FindFileDType(std::string_view name) {
  const auto* found =
      std::find_if(std::begin(kFileDTypes), std::end(kFileDTypes), [&](const FileDType& t) { return t.name == name; });
  return found == std::end(kFileDTypes) ? nullptr : found;
}

// Errors about one file, and about one tensor of it.
class Reporter {
 public:
  explicit Reporter(std::string_view what) : what_(what) {}
  template <typename... Args>
  absl::Status File(const Args&... args) const {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": ", args...));
  }
  template <typename... Args>
  absl::Status Tensor(const std::string& name, const Args&... args) const {
    return absl::InvalidArgumentError(absl::StrCat(what_, ": tensor \"", name, "\": ", args...));
  }

 private:
  std::string what_;
};

absl::Status CheckMetadata(const json& value, const Reporter& report) {
  if (!value.is_object()) return report.File("__metadata__: value ", JsonPreview(value), ", want an object of strings");
  for (const auto& [key, entry] : value.items()) {
    if (!entry.is_string()) return report.File("__metadata__.", key, ": value ", JsonPreview(entry), ", want a string");
  }
  return absl::OkStatus();
}

// Fills shape and elements. Returns the tensor's size in bits.
absl::StatusOr<uint64_t> ParseShape(const json& value, const FileDType& dtype, const Reporter& report,
                                    TensorEntry& tensor) {
  if (!value.is_array()) {
    return report.Tensor(tensor.name, "shape: value ", JsonPreview(value), ", want a list of sizes");
  }
  // A dimension of 0 makes the product 0, whatever stands beside it; sizes that would overflow without it are refused
  // all the same.
  uint64_t product = dtype.bits;
  bool empty = false;
  for (const json& size : value) {
    if (!size.is_number_unsigned()) {
      return report.Tensor(tensor.name, "shape: value ", JsonPreview(value), ", want non-negative integers");
    }
    const auto n = size.get<uint64_t>();
    empty = empty || n == 0;
    if (n > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) ||
        __builtin_mul_overflow(product, n == 0 ? 1 : n, &product)) {
      return report.Tensor(tensor.name, "shape: value ", JsonPreview(value), ", want a size in bits below 2^64");
    }
    tensor.shape.push_back(static_cast<int64_t>(n));
  }
  tensor.elements = empty ? 0 : static_cast<int64_t>(product / dtype.bits);
  return empty ? 0 : product;
}

absl::StatusOr<TensorEntry> ParseTensor(const std::string& name, const json& value, uint64_t data_begin,
                                        uint64_t data_size, const Reporter& report) {
  TensorEntry tensor;
  tensor.name = name;
  if (name.empty()) return report.File("a tensor has an empty name");
  if (!value.is_object())
    return report.Tensor(name, "value ", JsonPreview(value), ", want {dtype, shape, data_offsets}");
  for (const auto& [key, unused] : value.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets") {
      return report.Tensor(name, "unknown key \"", key, "\", want dtype, shape and data_offsets");
    }
  }
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.contains(key)) return report.Tensor(name, "has no ", key);
  }

  const json& dtype_value = value["dtype"];
  const FileDType* dtype = dtype_value.is_string() ? FindFileDType(dtype_value.get_ref<const std::string&>()) : nullptr;
  if (dtype == nullptr) {
    return report.Tensor(name, "dtype: value ", JsonPreview(dtype_value),
                         ", want one of the format's types (BF16, F16, F32, ...)");
  }
  tensor.dtype_name = dtype->name;
  tensor.dtype = dtype->dtype;
  LOCKSTEP_ASSIGN_OR_RETURN(const uint64_t bits, ParseShape(value["shape"], *dtype, report, tensor));

  const json& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return report.Tensor(name, "data_offsets: value ", JsonPreview(offsets), ", want [begin, end]");
  }
  const auto begin = offsets[0].get<uint64_t>();
  const auto end = offsets[1].get<uint64_t>();
  if (begin > end || end > data_size) {
    return report.Tensor(name, "data_offsets: value [", begin, ", ", end, "], want begin <= end <= ", data_size,
                         ", the size of the data section");
  }
  if (bits % 8 != 0 || end - begin != bits / 8) {
    return report.Tensor(name, "data_offsets: value [", begin, ", ", end, "] spans ", end - begin, " bytes, want ",
                         bits % 8 == 0 ? absl::StrCat(bits / 8) : absl::StrCat(bits, " bits"), " for ",
                         tensor.dtype_name, " ", ShapeText(tensor.shape));
  }
  tensor.begin = data_begin + begin;
  tensor.end = data_begin + end;
  return tensor;
}

// Sorted by begin, every tensor must start where the one before it ends, and the last must end with the file.
absl::Status CheckCoverage(const std::vector<TensorEntry>& sorted, uint64_t data_begin, uint64_t file_size,
                           const Reporter& report) {
  uint64_t covered = data_begin;
  const std::string* previous = nullptr;
  for (const TensorEntry& tensor : sorted) {
    if (tensor.begin != covered) {
      return report.Tensor(tensor.name, "begins at data offset ", tensor.begin - data_begin, ", want ",
                           covered - data_begin, tensor.begin < covered ? ": it overlaps " : ": there is a hole after ",
                           previous == nullptr ? "the header" : absl::StrCat("tensor \"", *previous, "\""));
    }
    covered = tensor.end;
    previous = &tensor.name;
  }
  if (covered != file_size) {
    return report.File("tensors cover ", covered - data_begin, " bytes of the data section, want all ",
                       file_size - data_begin);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<TensorEntry>> ParseSafetensorsHeader(std::string_view file, uint64_t file_size,
                                                                std::string_view what) {
  const Reporter report(what);
  if (file_size < 8 || file.size() < 8)
    return report.File("size ", file_size, " bytes, want at least 8: the header's length");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(file[i]);
  if (length > kMaxSafetensorsHeader) {
    return report.File("header length ", length, ", want at most ", kMaxSafetensorsHeader);
  }
  if (length > file_size - 8 || length > file.size() - 8) {
    return report.File("header length ", length, ", want at most ", file_size - 8, ", what the file holds after it");
  }
  const std::string_view header = file.substr(8, length);
  if (header.empty() || header.front() != '{') return report.File("the header does not begin with '{'");

  LOCKSTEP_ASSIGN_OR_RETURN(const json root, ParseStrictJson(header, absl::StrCat(std::string(what), ": header")));
  const uint64_t data_begin = 8 + length;
  std::vector<TensorEntry> tensors;
  for (const auto& [name, value] : root.items()) {
    if (name == "__metadata__") {
      LOCKSTEP_RETURN_IF_ERROR(CheckMetadata(value, report));
      continue;
    }
    LOCKSTEP_ASSIGN_OR_RETURN(TensorEntry tensor, ParseTensor(name, value, data_begin, file_size - data_begin, report));
    tensors.push_back(std::move(tensor));
  }
  // Empty tensors sort before the tensor that begins where they stand.
  std::sort(tensors.begin(), tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  LOCKSTEP_RETURN_IF_ERROR(CheckCoverage(tensors, data_begin, file_size, report));
  return tensors;
}

SafetensorsFile::SafetensorsFile(std::filesystem::path path, MappedFile file, std::vector<TensorEntry> tensors)
    : path_(std::move(path)), file_(std::move(file)), tensors_(std::move(tensors)) {
  for (size_t i = 0; i < tensors_.size(); ++i) index_.emplace(tensors_[i].name, i);
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::filesystem::path& path) {
  LOCKSTEP_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  LOCKSTEP_ASSIGN_OR_RETURN(std::vector<TensorEntry> tensors,
                            ParseSafetensorsHeader(file.text(), file.size(), path.string()));
  return SafetensorsFile(path, std::move(file), std::move(tensors));
}

const TensorEntry* SafetensorsFile::Find(const std::string& name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &tensors_[found->second];
}

}  // namespace lockstep
