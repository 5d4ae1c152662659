#include "rollout/worker/stop.h"

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gtest/gtest.h"

namespace lockstep {
namespace {

constexpr int32_t kEosToken = 9;

// Token 0 .. 8 have these bytes; kEosToken has none. 3 and 4 are the two halves of "é" (C3 A9), 5 begins with its
// second half.
std::string_view Bytes(int32_t token) {
  static const std::vector<std::string> bytes = {"a", "b", "ab", "\xC3", "\xA9", "\xA9xyz", "stop", "ba", "abcd"};
  return token >= 0 && token < static_cast<int32_t>(bytes.size()) ? std::string_view(bytes[token]) : std::string_view();
}

StopMatcher Matcher(const StopSpec& spec, int64_t min_tokens = 0) {
  return StopMatcher(spec, min_tokens, TokenBytesFn(Bytes));
}

StopSpec Strings(std::vector<std::string> strings) {
  StopSpec spec;
  spec.stop_strings = std::move(strings);
  return spec;
}

StopSpec Sequences(std::vector<std::vector<int32_t>> sequences) {
  StopSpec spec;
  spec.stop_token_sequences = std::move(sequences);
  return spec;
}

// Expects that only the last of `tokens` matches, and returns that match.
StopMatch OnlyLast(StopMatcher matcher, const std::vector<int32_t>& tokens) {
  for (size_t i = 0; i + 1 < tokens.size(); ++i) EXPECT_FALSE(matcher.Append(tokens[i]).has_value()) << "token " << i;
  const std::optional<StopMatch> match = matcher.Append(tokens.back());
  EXPECT_TRUE(match.has_value());
  return match.value_or(StopMatch{});
}

void ExpectNever(StopMatcher matcher, const std::vector<int32_t>& tokens) {
  for (size_t i = 0; i < tokens.size(); ++i) EXPECT_FALSE(matcher.Append(tokens[i]).has_value()) << "token " << i;
}

TEST(StopMatcherTest, EmptySpecNeverStops) {
  ExpectNever(StopMatcher(StopSpec{}, 0, static_cast<const TokenBytes*>(nullptr)), {0, 1, 2, kEosToken, 6});
}

TEST(StopMatcherTest, EosAndStopTokens) {
  StopSpec spec;
  spec.eos_token_ids = {kEosToken};
  spec.stop_token_ids = {4, 6};
  const StopMatch eos = OnlyLast(Matcher(spec), {0, 1, kEosToken});
  EXPECT_EQ(eos.kind, StopKind::kEos);
  EXPECT_EQ(eos.token_id, kEosToken);
  const StopMatch stop = OnlyLast(Matcher(spec), {0, 6});
  EXPECT_EQ(stop.kind, StopKind::kTokenId);
  EXPECT_EQ(stop.token_id, 6);
}

TEST(StopMatcherTest, EosWinsOverTheSameStopToken) {
  StopSpec spec;
  spec.eos_token_ids = {kEosToken};
  spec.stop_token_ids = {kEosToken};
  EXPECT_EQ(OnlyLast(Matcher(spec), {kEosToken}).kind, StopKind::kEos);
}

TEST(StopMatcherTest, SequenceNeedsAllItsTokensInOrder) {
  const StopMatch match = OnlyLast(Matcher(Sequences({{7, 7}, {0, 1, 2}})), {1, 0, 0, 1, 1, 0, 1, 2});
  EXPECT_EQ(match.kind, StopKind::kTokenSequence);
  EXPECT_EQ(match.index, 1);
}

TEST(StopMatcherTest, SequenceIsFoundAfterAFailedStartThatOverlapsIt) {
  OnlyLast(Matcher(Sequences({{0, 0, 1}})), {0, 0, 0, 0, 1});
  OnlyLast(Matcher(Sequences({{0, 1, 0, 1, 2}})), {0, 1, 0, 1, 0, 1, 2});
}

TEST(StopMatcherTest, OfSequencesThatEndTogetherTheLongestThenTheFirst) {
  EXPECT_EQ(OnlyLast(Matcher(Sequences({{1}, {0, 1}, {0, 1}, {7, 1}})), {0, 1}).index, 1);
}

TEST(StopMatcherTest, TokensOfASequenceAreNotTheirBytes) {
  // "ab" as one token is not the sequence "a", "b".
  ExpectNever(Matcher(Sequences({{0, 1}})), {2, 2});
  EXPECT_EQ(OnlyLast(Matcher(Strings({"ab"})), {2}).kind, StopKind::kString);
}

TEST(StopMatcherTest, StringInsideOneToken) {
  const StopMatch match = OnlyLast(Matcher(Strings({"top"})), {0, 6});
  EXPECT_EQ(match.kind, StopKind::kString);
  EXPECT_EQ(match.index, 0);
  EXPECT_EQ(match.last_token_text_offset, 4);
}

TEST(StopMatcherTest, OffsetLeavesOutWhatFollowsTheMatch) {
  EXPECT_EQ(OnlyLast(Matcher(Strings({"bc"})), {8}).last_token_text_offset, 3);
  EXPECT_EQ(OnlyLast(Matcher(Strings({"a"})), {8}).last_token_text_offset, 1);
}

TEST(StopMatcherTest, StringAcrossTokens) {
  const StopMatch match = OnlyLast(Matcher(Strings({"bstopab"})), {0, 1, 6, 8});
  EXPECT_EQ(match.last_token_text_offset, 2);
}

TEST(StopMatcherTest, StringAcrossTheBytesOfOneCharacter) {
  const StopMatch joined = OnlyLast(Matcher(Strings({"\xC3\xA9"})), {0, 3, 4});
  EXPECT_EQ(joined.last_token_text_offset, 1);
  const StopMatch inside = OnlyLast(Matcher(Strings({"a\xC3\xA9x"})), {0, 3, 5});
  EXPECT_EQ(inside.last_token_text_offset, 2);
  // The second byte alone is not the character.
  ExpectNever(Matcher(Strings({"\xC3\xA9"})), {4, 5, 3, 0, 4});
}

TEST(StopMatcherTest, TokensWithoutBytesDoNotBreakAString) {
  EXPECT_EQ(OnlyLast(Matcher(Strings({"ab"})), {0, kEosToken, -1, 1}).last_token_text_offset, 1);
}

TEST(StopMatcherTest, StringIsFoundAfterAFailedStartThatOverlapsIt) {
  OnlyLast(Matcher(Strings({"aab"})), {0, 0, 0, 0, 1});
  OnlyLast(Matcher(Strings({"abab\xC3"})), {2, 2, 2, 3});
}

TEST(StopMatcherTest, TheStringThatEndsFirstWins) {
  // In "abcd": "bc" ends at 3, "abcd" at 4, although "abcd" begins first.
  const StopMatch match = OnlyLast(Matcher(Strings({"abcd", "bc"})), {8});
  EXPECT_EQ(match.index, 1);
  EXPECT_EQ(match.last_token_text_offset, 3);
}

TEST(StopMatcherTest, OfStringsThatEndTogetherTheLongestThenTheFirst) {
  EXPECT_EQ(OnlyLast(Matcher(Strings({"b", "ab", "ab", "xb"})), {0, 1}).index, 1);
}

TEST(StopMatcherTest, AStringThatEndsInsideTheTokenWinsOverTheToken) {
  StopSpec spec = Strings({"bc", "d"});
  spec.stop_token_ids = {8};
  EXPECT_EQ(OnlyLast(Matcher(spec), {8}).kind, StopKind::kString);
}

TEST(StopMatcherTest, WhatEndsAtTheSameByteGoesByKind) {
  StopSpec spec = Strings({"d"});
  spec.stop_token_sequences = {{8}};
  EXPECT_EQ(OnlyLast(Matcher(spec), {8}).kind, StopKind::kTokenSequence);
  spec.stop_token_ids = {8};
  EXPECT_EQ(OnlyLast(Matcher(spec), {8}).kind, StopKind::kTokenId);
  spec.eos_token_ids = {8};
  EXPECT_EQ(OnlyLast(Matcher(spec), {8}).kind, StopKind::kEos);
}

TEST(StopMatcherTest, NothingStopsBeforeMinTokens) {
  StopSpec spec = Strings({"ab"});
  spec.eos_token_ids = {kEosToken};
  spec.stop_token_ids = {6};
  spec.stop_token_sequences = {{0, 1}};
  ExpectNever(Matcher(spec, 6), {kEosToken, 6, 0, 1, 2});
  // The min_tokens-th token itself may stop.
  EXPECT_EQ(OnlyLast(Matcher(spec, 3), {kEosToken, 6, kEosToken}).kind, StopKind::kEos);
  EXPECT_EQ(OnlyLast(Matcher(spec, 3), {kEosToken, 6, 6}).kind, StopKind::kTokenId);
  EXPECT_EQ(OnlyLast(Matcher(spec, 3), {2, 0, 1}).kind, StopKind::kTokenSequence);
  EXPECT_EQ(OnlyLast(Matcher(Strings({"ab"}), 3), {0, 0, 1}).kind, StopKind::kString);
}

TEST(StopMatcherTest, AMatchPassedOverIsNotFoundAgainLater) {
  ExpectNever(Matcher(Strings({"ab"}), 3), {0, 1, 0, 0, 0});
  ExpectNever(Matcher(Sequences({{0, 1}}), 3), {0, 1, 1, 1});
}

TEST(StopMatcherTest, AMatchPassedOverMayOverlapTheNext) {
  const StopMatch match = OnlyLast(Matcher(Strings({"aba"}), 5), {0, 1, 0, 1, 0});
  EXPECT_EQ(match.index, 0);
}

TEST(StopMatcherTest, ReplayedPrefixCountsAndItsTailTakesPart) {
  StopSpec spec = Strings({"stopab"});
  spec.stop_token_sequences = {{7, 6, 7, 7}};
  spec.eos_token_ids = {kEosToken};
  StopMatcher matcher = Matcher(spec, 4);
  for (const int32_t token : {kEosToken, 7, 6}) matcher.Replay(token);
  EXPECT_EQ(matcher.generated(), 3);
  StopMatcher copy = matcher;
  StopMatcher eos = matcher;
  EXPECT_EQ(matcher.Append(2)->kind, StopKind::kString);
  EXPECT_FALSE(copy.Append(7).has_value());
  EXPECT_EQ(copy.Append(7)->kind, StopKind::kTokenSequence);
  EXPECT_EQ(eos.Append(kEosToken)->kind, StopKind::kEos);
}

TEST(StopMatcherTest, AMatchInsideTheReplayedPrefixDoesNotStop) {
  StopMatcher matcher = Matcher(Strings({"ab"}));
  for (const int32_t token : {0, 1}) matcher.Replay(token);
  EXPECT_FALSE(matcher.Append(0).has_value());
  EXPECT_TRUE(matcher.Append(1).has_value());
}

// Against searching the whole text again after every token.
TEST(StopMatcherTest, AgreesWithNaiveSearchOnRandomText) {
  std::mt19937 random(7);
  const auto pick = [&](int n) { return static_cast<int>(random() % n); };
  int stopped = 0;
  for (int round = 0; round < 3000; ++round) {
    StopSpec spec;
    for (int i = pick(4); i > 0; --i) {
      std::string text;
      for (int length = 1 + pick(6); length > 0; --length) text += "ab"[pick(2)];
      spec.stop_strings.push_back(text);
    }
    for (int i = pick(3); i > 0; --i) {
      std::vector<int32_t> sequence(1 + pick(4));
      for (int32_t& token : sequence) token = std::vector<int32_t>{0, 1, 2, 7}[pick(4)];
      spec.stop_token_sequences.push_back(sequence);
    }
    const int64_t min_tokens = pick(8);
    StopMatcher matcher = Matcher(spec, min_tokens);
    std::vector<int32_t> tokens;
    std::string text;
    for (int step = 0; step < 24; ++step) {
      tokens.push_back(std::vector<int32_t>{0, 1, 2, 7}[pick(4)]);
      const size_t before = text.size();
      text += Bytes(tokens.back());

      // Best (end, kind, -length, index) of all matches that end with this token.
      std::optional<std::tuple<size_t, int, int, int>> best;
      const auto offer = [&](size_t end, int kind, size_t length, size_t index) {
        const std::tuple<size_t, int, int, int> candidate(end, kind, -static_cast<int>(length),
                                                          static_cast<int>(index));
        if (!best.has_value() || candidate < *best) best = candidate;
      };
      for (size_t s = 0; s < spec.stop_strings.size(); ++s) {
        const std::string& stop = spec.stop_strings[s];
        for (size_t end = before + 1; end <= text.size(); ++end) {
          if (end >= stop.size() && text.compare(end - stop.size(), stop.size(), stop) == 0) {
            offer(end, 1, stop.size(), s);
          }
        }
      }
      for (size_t s = 0; s < spec.stop_token_sequences.size(); ++s) {
        const std::vector<int32_t>& stop = spec.stop_token_sequences[s];
        if (tokens.size() >= stop.size() && std::equal(stop.begin(), stop.end(), tokens.end() - stop.size())) {
          offer(text.size(), 0, stop.size(), s);
        }
      }
      if (static_cast<int64_t>(tokens.size()) < min_tokens) best.reset();

      const std::optional<StopMatch> match = matcher.Append(tokens.back());
      ASSERT_EQ(match.has_value(), best.has_value());
      if (!match.has_value()) continue;
      ++stopped;
      const auto [end, kind, minus_length, index] = *best;
      ASSERT_EQ(match->kind, kind == 0 ? StopKind::kTokenSequence : StopKind::kString);
      ASSERT_EQ(match->index, index);
      if (kind == 1) {
        ASSERT_EQ(match->last_token_text_offset, static_cast<int64_t>(end - before));
      }
    }
  }
  EXPECT_GT(stopped, 10000);
}

TEST(StopMatcherDeathTest, RefusesBrokenSpecs) {
  EXPECT_DEATH(Matcher(Strings({""})), "");
  EXPECT_DEATH(StopMatcher(Strings({"a"}), 0, static_cast<const TokenBytes*>(nullptr)), "");
}

}  // namespace
}  // namespace lockstep
