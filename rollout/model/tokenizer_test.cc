#include "rollout/model/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "rollout/model/safetensors_writer.h"

namespace lockstep {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

std::string Hex(std::string_view bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (unsigned char c : bytes) {
    out += kDigits[c >> 4];
    out += kDigits[c & 15];
  }
  return out;
}

json Fixture(const std::string& name) {
  std::ifstream file(LOCKSTEP_TEST_DATA "/model/tokenizer_" + name + ".json");
  return json::parse(file);
}

// tools/make_tokenizer_fixture.py: every id's bytes, checked there against the tokenizers library.
class TokenizerFixture : public ::testing::TestWithParam<std::string> {};

TEST_P(TokenizerFixture, AllBytesAreTheLibrarys) {
  const json fixture = Fixture(GetParam());
  const auto tokens = TokenBytes::Parse(fixture["tokenizer"].dump());
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  const json& bytes = fixture["bytes"];
  ASSERT_EQ(tokens->size(), static_cast<int64_t>(bytes.size()));
  ASSERT_GT(tokens->size(), 256);
  for (size_t id = 0; id < bytes.size(); ++id) {
    const std::string wanted = bytes[id].is_null() ? "" : bytes[id].get<std::string>();
    EXPECT_EQ(Hex(tokens->bytes(static_cast<int32_t>(id))), wanted) << "id " << id;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, TokenizerFixture, ::testing::Values("byte_level", "byte_fallback"));

json ByteLevel() {
  return {{"added_tokens", json::array()},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model", {{"type", "BPE"}, {"vocab", {{"a", 0}, {"Ġb", 1}, {"Ċ", 5}}}, {"merges", json::array()}}}};
}

TEST(TokenBytes, GapsSpecialsAndIdsOutsideAreEmpty) {
  json value = ByteLevel();
  value["added_tokens"] = {{{"id", 0}, {"content", "a"}, {"special", true}},
                           {{"id", 8}, {"content", "<x>"}, {"special", false}}};
  const auto tokens = TokenBytes::Parse(value.dump());
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  EXPECT_EQ(tokens->size(), 9);
  EXPECT_EQ(tokens->bytes(0), "");
  EXPECT_EQ(tokens->bytes(1), " b");
  EXPECT_EQ(tokens->bytes(2), "");
  EXPECT_EQ(tokens->bytes(5), "\n");
  EXPECT_EQ(tokens->bytes(8), "<x>");
  EXPECT_EQ(tokens->bytes(9), "");
  EXPECT_EQ(tokens->bytes(-1), "");
}

TEST(TokenBytes, SequenceAroundByteLevel) {
  json value = ByteLevel();
  value["decoder"] = {{"type", "Sequence"}, {"decoders", {{{"type", "ByteLevel"}}, {{"type", "Fuse"}}}}};
  const auto tokens = TokenBytes::Parse(value.dump());
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  EXPECT_EQ(tokens->bytes(1), " b");
}

TEST(TokenBytes, BadFilesAreRefusedByName) {
  struct Case {
    std::string pointer;  // what is replaced in ByteLevel()
    json value;
    absl::StatusCode code;
    std::string message;
  };
  constexpr auto kBad = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnknown = absl::StatusCode::kUnimplemented;
  for (const Case& c : std::vector<Case>{
           {"/decoder", nullptr, kUnknown, "decoder null"},
           {"/decoder", {{"type", "WordPiece"}, {"prefix", "##"}}, kUnknown, "\"type\":\"WordPiece\""},
           {"/decoder", {{"type", "Metaspace"}}, kUnknown, "Metaspace"},
           {"/decoder", {{"type", "Sequence"}}, kBad, "decoder.decoders"},
           {"/decoder",
            {{"type", "Sequence"}, {"decoders", json::array()}},
            kUnknown,
            "neither ByteLevel nor ByteFallback"},
           {"/decoder", {{"type", "Sequence"}, {"decoders", {{{"type", "Fuse"}}}}}, kUnknown, "neither"},
           {"/decoder",
            {{"type", "Sequence"}, {"decoders", {{{"type", "ByteFallback"}}, {{"type", "ByteLevel"}}}}},
            kUnknown,
            "ByteLevel"},
           {"/decoder",
            {{"type", "Sequence"}, {"decoders", {{{"type", "Strip"}, {"content", " "}}, {{"type", "ByteFallback"}}}}},
            kUnknown,
            "Strip"},
           {"/decoder",
            {{"type", "Sequence"}, {"decoders", {{{"type", "Fuse"}}, {{"type", "ByteFallback"}}}}},
            kUnknown,
            "ByteFallback"},
           {"/decoder",
            {{"type", "Sequence"},
             {"decoders",
              {{{"type", "Replace"}, {"pattern", {{"Regex", "x"}}}, {"content", ""}}, {{"type", "ByteFallback"}}}}},
            kUnknown,
            "Regex"},
           {"/model/type", "Unigram", kUnknown, "model.type: value \"Unigram\", want \"BPE\""},
           {"/model/type", nullptr, kUnknown, "model.type"},
           {"/model", nullptr, kUnknown, "model.type"},
           {"/model/end_of_word_suffix", "</w>", kUnknown, "model.end_of_word_suffix: value \"</w>\""},
           {"/model/continuing_subword_prefix", "##", kUnknown, "model.continuing_subword_prefix"},
           {"/model/vocab", {{"a", 1}}, absl::StatusCode::kOk, ""},
           {"/model/vocab", json::array(), kBad, "model.vocab"},
           {"/model/vocab", {{"a", 1}, {"b", 1}}, kBad, "id 1 is that of both \"a\" and \"b\""},
           {"/model/vocab", {{"a", -1}}, kBad, "token \"a\": id -1"},
           {"/model/vocab", {{"a", 1.5}}, kBad, "token \"a\": id 1.5"},
           {"/model/vocab", {{"a", "1"}}, kBad, "token \"a\": id \"1\""},
           {"/model/vocab", {{"a", 4194304}}, kBad, "id 4194304, want an integer from 0 to 4194303"},
           {"/model/vocab", {{"a", 18446744073709551615u}}, kBad, "id 18446744073709551615"},
           {"/added_tokens", {{"a", 1}}, kBad, "added_tokens"},
           {"/added_tokens", {3}, kBad, "added_tokens: value 3"},
           {"/added_tokens", {{{"content", "x"}}}, kBad, "want {id, content"},
           {"/added_tokens", {{{"id", 9}, {"content", 1}}}, kBad, "want {id, content"},
           {"/added_tokens", {{{"id", 9}, {"content", "x"}, {"special", 1}}}, kBad, "want {id, content, special"},
           {"/added_tokens", {{{"id", -9}, {"content", "x"}}}, kBad, "id -9"},
           {"/added_tokens", {{{"id", 1}, {"content", "x"}}}, kBad, "id 1 is that of both"},
           {"/added_tokens", {{{"id", 9}, {"content", "a"}}}, kBad, "\"a\" has id 9, but 0 in model.vocab"},
           {"/added_tokens",
            {{{"id", 9}, {"content", "x"}}, {{"id", 9}, {"content", "x"}}},
            kBad,
            "id 9 appears twice"},
       }) {
    json value = ByteLevel();
    value[json::json_pointer(c.pointer)] = c.value;
    const auto tokens = TokenBytes::Parse(value.dump());
    EXPECT_EQ(tokens.status().code(), c.code) << value.dump() << tokens.status();
    EXPECT_THAT(std::string(tokens.status().message()), HasSubstr(c.message));
  }
  EXPECT_THAT(std::string(TokenBytes::Parse(R"({"model":{"vocab":{"a":1,"a":2}}})").status().message()),
              HasSubstr("\"a\" appears twice"));
  EXPECT_THAT(std::string(TokenBytes::Parse("[]").status().message()), HasSubstr("want an object"));
}

TEST(TokenBytes, LoadNamesTheFile) {
  testing::TempDir dir;
  const auto path = dir.path() / "tokenizer.json";
  EXPECT_EQ(TokenBytes::Load(path).status().code(), absl::StatusCode::kNotFound);
  testing::WriteFile(path, "{}");
  EXPECT_THAT(std::string(TokenBytes::Load(path).status().message()), HasSubstr(path.string()));
  testing::WriteFile(path, ByteLevel().dump());
  EXPECT_TRUE(TokenBytes::Load(path).ok());
}

}  // namespace
}  // namespace lockstep
