#include "rollout/model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "rollout/model/safetensors_writer.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;
using testing::SafetensorsBytes;
using testing::TempDir;
using testing::WriteFile;

std::string Shard(const std::vector<std::string>& names) {
  std::vector<std::pair<std::string, testing::StoredTensor>> tensors;
  for (const std::string& name : names) tensors.push_back({name, {"U8", {1}, name.substr(0, 1)}});
  return SafetensorsBytes(tensors);
}

std::string OpenError(const TempDir& dir) {
  const auto checkpoint = Checkpoint::Open(dir.path());
  return checkpoint.ok() ? "OK" : std::string(checkpoint.status().message());
}

constexpr char kIndex[] = "model.safetensors.index.json";

TEST(Checkpoint, SingleFile) {
  TempDir dir;
  EXPECT_THAT(OpenError(dir), HasSubstr("has neither model.safetensors nor model.safetensors.index.json"));
  WriteFile(dir.path() / "model.safetensors", Shard({"a", "b"}));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 2);
  ASSERT_NE(checkpoint->Find("b"), nullptr);
  EXPECT_EQ(static_cast<char>(*checkpoint->Find("b")->data()), 'b');
  EXPECT_EQ(checkpoint->Find("c"), nullptr);
}

TEST(Checkpoint, Shards) {
  TempDir dir;
  WriteFile(dir.path() / "one.safetensors", Shard({"a", "b"}));
  WriteFile(dir.path() / "two.safetensors", Shard({"c"}));
  WriteFile(
      dir.path() / kIndex,
      R"({"metadata":{"total_size":3},"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}})");
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->tensors().size(), 3);
  EXPECT_EQ(static_cast<char>(*checkpoint->Find("c")->data()), 'c');
  EXPECT_EQ(checkpoint->Find("c")->file->path().filename(), "two.safetensors");
  // A file that the index does not know: which of the two is the model?
  WriteFile(dir.path() / "model.safetensors", Shard({"a"}));
  EXPECT_THAT(OpenError(dir), HasSubstr("has both model.safetensors and"));
}

TEST(Checkpoint, IndexAndShardsMustAgree) {
  TempDir dir;
  WriteFile(dir.path() / "one.safetensors", Shard({"a", "b"}));
  WriteFile(dir.path() / "two.safetensors", Shard({"b", "c"}));
  WriteFile(dir.path() / kIndex,
            R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}})");
  EXPECT_THAT(OpenError(dir), ::testing::AllOf(HasSubstr("two.safetensors: holds tensor \"b\""),
                                               HasSubstr("lists in one.safetensors")));
  WriteFile(dir.path() / "two.safetensors", Shard({"c", "d"}));
  EXPECT_THAT(OpenError(dir), ::testing::AllOf(HasSubstr("holds tensor \"d\""), HasSubstr("does not list")));
  WriteFile(dir.path() / "two.safetensors", Shard({}));
  EXPECT_THAT(OpenError(dir),
              ::testing::AllOf(HasSubstr("lists tensor \"c\" in two.safetensors"), HasSubstr("does not hold it")));
  std::filesystem::remove(dir.path() / "two.safetensors");
  EXPECT_THAT(OpenError(dir), HasSubstr("two.safetensors"));
}

TEST(SafetensorsIndex, BadOnesAreRefusedByName) {
  for (const auto& [text, message] : std::vector<std::pair<std::string, std::string>>{
           {"", "parse error"},
           {"[]", "weight_map"},
           {"{}", "weight_map"},
           {R"({"weight_map":[]})", "weight_map"},
           {R"({"weight_map":{}})", "weight_map is empty"},
           {R"({"weight_map":{"a":1}})", "tensor \"a\": value 1"},
           {R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})", "\"a\" appears twice"},
           {R"({"weight_map":{"a":"../x.safetensors"}})",
            "tensor \"a\": value \"../x.safetensors\", want the plain name"},
           {R"({"weight_map":{"a":"/etc/x.safetensors"}})", "want the plain name"},
           {R"({"weight_map":{"a":"d\\x.safetensors"}})", "want the plain name"},
           {R"({"weight_map":{"a":"x\u0000.safetensors"}})", "want the plain name"},
           {R"({"weight_map":{"a":".safetensors"}})", "want the plain name"},
           {R"({"weight_map":{"a":"x.bin"}})", "want the plain name"},
           {R"({"weight_map":{"a":""}})", "want the plain name"},
       }) {
    const auto parsed = ParseSafetensorsIndex(text, "index");
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_THAT(std::string(parsed.status().message()), HasSubstr(message)) << text;
  }
}

}  // namespace
}  // namespace lockstep
