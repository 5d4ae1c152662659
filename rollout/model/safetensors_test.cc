#include "rollout/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "rollout/model/safetensors_writer.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using testing::SafetensorsBytes;
using testing::StoredTensor;
using testing::TempDir;
using testing::WriteFile;

absl::StatusOr<std::vector<TensorEntry>> Parse(const std::string& bytes) {
  return ParseSafetensorsHeader(bytes, bytes.size(), "f.safetensors");
}

TEST(Safetensors, ReadsEntriesInFileOrder) {
  const std::string bytes = SafetensorsBytes(
      R"({"b":{"dtype":"F32","shape":[2,1],"data_offsets":[6,14]},"__metadata__":{"format":"pt"},)"
      R"("a":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]},"e":{"dtype":"F16","shape":[0,5],"data_offsets":[6,6]},)"
      R"("s":{"dtype":"I64","shape":[],"data_offsets":[14,22]}}   )",
      std::string(22, 'x'));
  const auto parsed = Parse(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  ASSERT_EQ(parsed->size(), 4);
  const uint64_t data = bytes.size() - 22;
  EXPECT_EQ((*parsed)[0], (TensorEntry{"a", "BF16", DType::kBF16, {3}, 3, data, data + 6}));
  EXPECT_EQ((*parsed)[1], (TensorEntry{"e", "F16", DType::kF16, {0, 5}, 0, data + 6, data + 6}));
  EXPECT_EQ((*parsed)[2], (TensorEntry{"b", "F32", DType::kF32, {2, 1}, 2, data + 6, data + 14}));
  EXPECT_EQ((*parsed)[3], (TensorEntry{"s", "I64", std::nullopt, {}, 1, data + 14, data + 22}));
}

TEST(Safetensors, NoTensorsIsAFile) {
  const auto parsed = Parse(SafetensorsBytes("{}", ""));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_TRUE(parsed->empty());
}

TEST(Safetensors, KnowsTheSizeOfEveryDType) {
  for (const auto& [dtype, bits] : std::vector<std::pair<std::string, int>>{
           {"BOOL", 8},    {"U8", 8},   {"I8", 8},   {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6},
           {"F6_E3M2", 6}, {"F4", 4},   {"U16", 16}, {"I16", 16},    {"F16", 16},    {"BF16", 16},   {"U32", 32},
           {"I32", 32},    {"F32", 32}, {"U64", 64}, {"I64", 64},    {"F64", 64},    {"C64", 64}}) {
    const int bytes = 4 * bits / 8;
    const std::string header =
        R"({"t":{"dtype":")" + dtype + R"(","shape":[4],"data_offsets":[0,)" + std::to_string(bytes) + "]}}";
    EXPECT_TRUE(Parse(SafetensorsBytes(header, std::string(bytes, 'x'))).ok()) << dtype;
    EXPECT_FALSE(Parse(SafetensorsBytes(header, std::string(bytes + 1, 'x'))).ok()) << dtype;
  }
}

struct BadHeader {
  std::string name;
  std::string header;
  size_t data_bytes;
  std::vector<std::string> message;  // all of these are in it
};

class BadSafetensors : public ::testing::TestWithParam<BadHeader> {};

TEST_P(BadSafetensors, IsRefusedByName) {
  const auto parsed = Parse(SafetensorsBytes(GetParam().header, std::string(GetParam().data_bytes, 'x')));
  ASSERT_FALSE(parsed.ok());
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr("f.safetensors"));
  for (const std::string& part : GetParam().message)
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(part));
}

std::string One(const std::string& fields) {
  return R"({"t":{)" + fields + "}}";
}

INSTANTIATE_TEST_SUITE_P(
    Table, BadSafetensors,
    ::testing::ValuesIn(std::vector<BadHeader>{
        {"empty_header", "", 0, {"does not begin with '{'"}},
        {"leading_space", " {}", 0, {"does not begin with '{'"}},
        {"array", "[]", 0, {"does not begin with '{'"}},
        {"syntax", "{\"t\":", 0, {"header", "parse error"}},
        {"text_after", "{} x", 0, {"parse error"}},
        {"not_utf8", "{\"\xff\":1}", 0, {"parse error"}},
        {"lone_surrogate", R"({"\ud800":1})", 0, {"parse error"}},
        {"duplicate_tensor",
         R"({"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
         1,
         {"\"t\" appears twice"}},
        {"duplicate_escaped",
         R"({"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"\u0074":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})",
         0,
         {"\"t\" appears twice"}},
        {"duplicate_field",
         One(R"("dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1])"),
         1,
         {"\"dtype\" appears twice"}},
        {"duplicate_metadata", R"({"__metadata__":{"a":"1","a":"2"}})", 0, {"\"a\" appears twice"}},
        {"too_deep", R"({"t":)" + std::string(40, '[') + std::string(40, ']') + "}", 0, {"nested deeper than 32"}},
        {"metadata_list", R"({"__metadata__":[]})", 0, {"__metadata__", "[]", "object of strings"}},
        {"metadata_number", R"({"__metadata__":{"step":3}})", 0, {"__metadata__.step", "3", "want a string"}},
        {"tensor_number", R"({"t":3})", 0, {"\"t\"", "3", "want {dtype, shape, data_offsets}"}},
        {"empty_name", R"({"":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1, {"empty name"}},
        {"unknown_key",
         One(R"("dtype":"U8","shape":[1],"data_offsets":[0,1],"stride":[1])"),
         1,
         {"\"t\"", "unknown key \"stride\""}},
        {"no_dtype", One(R"("shape":[1],"data_offsets":[0,1])"), 1, {"\"t\"", "has no dtype"}},
        {"no_shape", One(R"("dtype":"U8","data_offsets":[0,1])"), 1, {"\"t\"", "has no shape"}},
        {"no_offsets", One(R"("dtype":"U8","shape":[1])"), 1, {"\"t\"", "has no data_offsets"}},
        {"dtype_unknown",
         One(R"("dtype":"F128","shape":[1],"data_offsets":[0,16])"),
         16,
         {"\"t\"", "dtype", "\"F128\""}},
        {"dtype_lower", One(R"("dtype":"f32","shape":[1],"data_offsets":[0,4])"), 4, {"dtype", "\"f32\""}},
        {"dtype_number", One(R"("dtype":32,"shape":[1],"data_offsets":[0,4])"), 4, {"dtype", "value 32"}},
        {"shape_number",
         One(R"("dtype":"U8","shape":1,"data_offsets":[0,1])"),
         1,
         {"shape", "value 1", "list of sizes"}},
        {"shape_negative",
         One(R"("dtype":"U8","shape":[-1],"data_offsets":[0,1])"),
         1,
         {"shape", "[-1]", "non-negative"}},
        {"shape_minus_zero", One(R"("dtype":"U8","shape":[-0],"data_offsets":[0,0])"), 0, {"shape"}},
        {"shape_float", One(R"("dtype":"U8","shape":[1.0],"data_offsets":[0,1])"), 1, {"shape", "[1.0]", "integers"}},
        {"shape_string", One(R"("dtype":"U8","shape":["1"],"data_offsets":[0,1])"), 1, {"shape", "integers"}},
        {"shape_overflow",
         One(R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])"),
         0,
         {"shape", "2^64"}},
        {"shape_overflow_to_small",
         One(R"("dtype":"U8","shape":[2305843009213693953],"data_offsets":[0,1])"),
         1,
         {"shape", "2^64"}},
        {"shape_overflow_behind_zero",
         One(R"("dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0])"),
         0,
         {"shape", "2^64"}},
        {"shape_huge", One(R"("dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,0])"), 0, {"shape"}},
        {"shape_beyond_u64",
         One(R"("dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,0])"),
         0,
         {"shape", "integers"}},
        {"offsets_one",
         One(R"("dtype":"U8","shape":[1],"data_offsets":[1])"),
         1,
         {"data_offsets", "[1]", "[begin, end]"}},
        {"offsets_three",
         One(R"("dtype":"U8","shape":[1],"data_offsets":[0,1,2])"),
         1,
         {"data_offsets", "[begin, end]"}},
        {"offsets_negative", One(R"("dtype":"U8","shape":[1],"data_offsets":[-1,0])"), 1, {"data_offsets", "[-1,0]"}},
        {"offsets_float", One(R"("dtype":"U8","shape":[1],"data_offsets":[0.0,1.0])"), 1, {"data_offsets"}},
        {"offsets_reversed",
         One(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"),
         1,
         {"data_offsets", "[1, 0]", "begin <= end <= 1"}},
        {"offsets_beyond",
         One(R"("dtype":"U8","shape":[2],"data_offsets":[0,2])"),
         1,
         {"data_offsets", "[0, 2]", "<= 1"}},
        {"offsets_huge",
         One(R"("dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615])"),
         1,
         {"data_offsets"}},
        {"size_small",
         One(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"),
         4,
         {"\"t\"", "spans 4 bytes, want 8", "F32 [2]"}},
        {"size_large",
         One(R"("dtype":"BF16","shape":[2],"data_offsets":[0,8])"),
         8,
         {"spans 8 bytes, want 4", "BF16 [2]"}},
        {"size_scalar", One(R"("dtype":"F32","shape":[],"data_offsets":[0,0])"), 0, {"spans 0 bytes, want 4"}},
        {"size_empty", One(R"("dtype":"F32","shape":[0],"data_offsets":[0,4])"), 4, {"spans 4 bytes, want 0"}},
        {"half_a_byte", One(R"("dtype":"F4","shape":[3],"data_offsets":[0,1])"), 1, {"spans 1 bytes, want 12 bits"}},
        {"hole_at_start",
         One(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"),
         2,
         {"\"t\"", "begins at data offset 1, want 0", "hole after the header"}},
        {"hole",
         R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
         3,
         {"\"b\"", "begins at data offset 2, want 1", "hole after tensor \"a\""}},
        {"overlap",
         R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
         3,
         {"\"b\"", "begins at data offset 1, want 2", "overlaps tensor \"a\""}},
        {"same_place",
         R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
         2,
         {"\"b\"", "overlaps tensor \"a\""}},
        {"inside",
         R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})",
         4,
         {"\"b\"", "overlaps tensor \"a\""}},
        {"data_left_over", One(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), 3, {"cover 1 bytes", "want all 3"}},
        {"data_without_tensors", "{}", 3, {"cover 0 bytes", "want all 3"}},
    }),
    [](const auto& test) { return test.param.name; });

TEST(Safetensors, HeaderLengthIsLimited) {
  for (size_t size : {0, 1, 7}) {
    const auto parsed = Parse(std::string(size, '\0'));
    ASSERT_FALSE(parsed.ok());
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr("want at least 8"));
  }
  std::string bytes = SafetensorsBytes("{}", "");
  bytes[0] = 3;
  EXPECT_THAT(std::string(Parse(bytes).status().message()), HasSubstr("header length 3, want at most 2"));
  bytes[7] = '\xff';
  EXPECT_THAT(std::string(Parse(bytes).status().message()), HasSubstr("want at most 100000000"));
  // The limit itself, in a file that claims to be large enough.
  const uint64_t limit = kMaxSafetensorsHeader + 1;
  std::memcpy(bytes.data(), &limit, 8);
  EXPECT_THAT(std::string(ParseSafetensorsHeader(bytes, uint64_t{1} << 40, "f").status().message()),
              HasSubstr("want at most 100000000"));
}

// Whatever is cut off or flipped, a header that passes describes the file it came with.
TEST(Safetensors, DamagedFilesNeverPassWithWrongBounds) {
  const std::string good =
      SafetensorsBytes({{"a", {"F32", {2, 2}, std::string(16, 'a')}}, {"b", {"BF16", {3}, std::string(6, 'b')}}});
  ASSERT_TRUE(Parse(good).ok());
  for (size_t size = 0; size < good.size(); ++size) EXPECT_FALSE(Parse(good.substr(0, size)).ok()) << size;
  std::mt19937 random(1);
  for (int i = 0; i < 20000; ++i) {
    std::string bad = good;
    for (int flips = 1 + static_cast<int>(random() % 3); flips > 0; --flips)
      bad[random() % bad.size()] ^= static_cast<char>(1 << random() % 8);
    const auto parsed = Parse(bad);
    if (!parsed.ok()) continue;
    uint64_t covered = 0;
    for (const TensorEntry& tensor : *parsed) {
      ASSERT_LE(tensor.begin, tensor.end);
      ASSERT_LE(tensor.end, bad.size());
      covered += tensor.bytes();
    }
    EXPECT_LE(covered, bad.size() - 8);
  }
}

TEST(SafetensorsFile, MapsFindsAndDrops) {
  TempDir dir;
  const auto path = dir.path() / "model.safetensors";
  std::string large(100'000, '\0');
  for (size_t i = 0; i < large.size(); ++i) large[i] = static_cast<char>(i * 7);
  WriteFile(path, SafetensorsBytes({{"small", {"U8", {3}, "xyz"}}, {"large", {"U8", {100'000}, large}}}));
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->Find("absent"), nullptr);
  const TensorEntry* small = file->Find("small");
  const TensorEntry* entry = file->Find("large");
  ASSERT_NE(small, nullptr);
  ASSERT_NE(entry, nullptr);
  EXPECT_EQ(std::memcmp(file->Data(*entry), large.data(), large.size()), 0);
  file->Drop(*entry);
  EXPECT_EQ(std::memcmp(file->Data(*entry), large.data(), large.size()), 0);
  EXPECT_EQ(std::memcmp(file->Data(*small), "xyz", 3), 0);
}

// Resident pages of mapped files, in bytes: the third field of statm.
int64_t ResidentFileBytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t size = 0, resident = 0, shared = 0;
  statm >> size >> resident >> shared;
  return shared * ::sysconf(_SC_PAGESIZE);
}

TEST(SafetensorsFile, DropGivesThePagesBack) {
  constexpr int64_t kBytes = 32 << 20;
  TempDir dir;
  const auto path = dir.path() / "model.safetensors";
  WriteFile(path, SafetensorsBytes({{"t", {"U8", {kBytes}, std::string(kBytes, 'x')}}}));
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const TensorEntry* tensor = file->Find("t");
  const std::byte* data = file->Data(*tensor);
  const int64_t before = ResidentFileBytes();
  EXPECT_EQ(std::count(data, data + kBytes, std::byte{'x'}), kBytes);
  const int64_t read = ResidentFileBytes();
  EXPECT_GT(read - before, kBytes * 9 / 10);
  file->Drop(*tensor);
  EXPECT_LT(ResidentFileBytes() - before, kBytes / 10);
}

TEST(SafetensorsFile, WhatIsNotAFileIsRefused) {
  TempDir dir;
  EXPECT_EQ(SafetensorsFile::Open(dir.path() / "absent").status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(SafetensorsFile::Open(dir.path()).status().message()), HasSubstr("not a regular file"));
  WriteFile(dir.path() / "empty", "");
  EXPECT_THAT(std::string(SafetensorsFile::Open(dir.path() / "empty").status().message()),
              HasSubstr("want at least 8"));
}

}  // namespace
}  // namespace lockstep
