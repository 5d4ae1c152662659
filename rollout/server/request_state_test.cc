#include "rollout/server/request_state.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;
using Next = RequestState::Next;
using DetachReason = RequestState::DetachReason;

class NoteEvents final : public RequestEvents {
 public:
  void Wake(std::weak_ptr<Reader>) override { ++wakes; }
  void BytesGrew() override { ++grew; }
  int wakes = 0;
  int grew = 0;
};

class IdleReader final : public Reader {
 public:
  void Pump() override {}
};

RequestInfo Info(int32_t n = 1) {
  RequestInfo info{.request_id = "r", .worker_id = "r#0", .n = n};
  info.layout = {.raw = true, .temperature = false, .processed = false, .top_k = 0, .kept = false, .vocab_size = 100};
  info.prompt_layout = info.layout;
  return info;
}

constexpr int64_t kTokenBytes = 8;  // id and one log-probability

class RequestStateTest : public ::testing::Test {
 protected:
  void Make(RequestInfo info, int64_t stream_interval = 1) {
    state_ = std::make_unique<RequestState>(std::move(info), &pools_, &events_);
    ASSERT_TRUE(state_->Attach(reader_, stream_interval, {}).ok());
    ASSERT_TRUE(state_->BeginSubmit());
    ASSERT_TRUE(state_->EndSubmit().empty());
    ASSERT_EQ(state_->NextPiece(reader_.get(), &piece_, &end_), Next::kPiece);
    ASSERT_TRUE(piece_.accepted);
  }

  void Tokens(int64_t offset, int64_t count, int32_t sample = 0) {
    SampleTokens tokens{.sample = sample, .offset = offset, .tokens = {}, .logprobs = {}};
    for (int64_t i = 0; i < count; ++i) tokens.tokens.push_back(static_cast<int32_t>(offset + i));
    tokens.logprobs.resize(count);
    state_->OnTokens(std::move(tokens));
  }

  void Done(int32_t sample = 0) {
    SampleResult result;
    result.finish = FinishKind::kLength;
    state_->OnSampleDone(sample, std::move(result));
  }

  Next Step() { return state_->NextPiece(reader_.get(), &piece_, &end_); }
  // Of a request of two samples that was never submitted.
  void ExpectBothAbortedHere() {
    EXPECT_FALSE(state_->BeginSubmit()) << "it must not be submitted any more";
    ASSERT_EQ(Step(), Next::kPiece);
    EXPECT_TRUE(piece_.accepted);
    for (int i = 0; i < 2; ++i) {
      ASSERT_EQ(Step(), Next::kPiece);
      EXPECT_EQ(piece_.done->abort, AbortReason::kClient);
    }
    EXPECT_EQ(Step(), Next::kEnd);
  }
  int64_t buffered() const { return pools_.buffered; }
  int64_t retained() const { return pools_.retained; }

  BufferPools pools_;
  NoteEvents events_;
  std::shared_ptr<IdleReader> reader_ = std::make_shared<IdleReader>();
  std::unique_ptr<RequestState> state_;
  ResultPiece piece_;
  StreamEnd end_;
};

TEST_F(RequestStateTest, DeliversInOrderAndCountsBytes) {
  Make(Info());
  EXPECT_EQ(Step(), Next::kWait);
  Tokens(0, 3);
  EXPECT_EQ(buffered(), 3 * kTokenBytes);
  EXPECT_EQ(retained(), 0);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_THAT(piece_.slice.tokens, ElementsAre(0, 1, 2));
  EXPECT_FALSE(piece_.done);
  EXPECT_EQ(buffered(), 0);
  EXPECT_EQ(retained(), 3 * kTokenBytes);
  Tokens(3, 1);
  Done();
  EXPECT_TRUE(state_->finished());
  EXPECT_FALSE(state_->fully_delivered());
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_EQ(piece_.slice.offset, 3);
  EXPECT_TRUE(piece_.done);
  ASSERT_EQ(Step(), Next::kEnd);
  EXPECT_TRUE(end_.status.ok());
  EXPECT_TRUE(state_->fully_delivered());
  state_.reset();
  EXPECT_EQ(retained(), 0);
}

TEST_F(RequestStateTest, IntervalGathersTokens) {
  Make(Info(), /*stream_interval=*/3);
  const int before = events_.wakes;
  Tokens(0, 2);
  EXPECT_EQ(events_.wakes, before) << "nothing to send yet, so no one is woken";
  EXPECT_EQ(Step(), Next::kWait);
  Tokens(2, 2);
  EXPECT_GT(events_.wakes, before);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_EQ(piece_.slice.rows, 4);
  Tokens(4, 1);
  EXPECT_EQ(Step(), Next::kWait);
  Done();
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_EQ(piece_.slice.rows, 1);
}

TEST_F(RequestStateTest, FinalOnlyWaitsForEachSample) {
  Make(Info(2), /*stream_interval=*/0);
  Tokens(0, 5, 0);
  Tokens(0, 5, 1);
  EXPECT_EQ(Step(), Next::kWait);
  Done(1);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_EQ(piece_.sample, 1);
  EXPECT_TRUE(piece_.done);
  EXPECT_EQ(Step(), Next::kWait);
  Done(0);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_EQ(piece_.sample, 0);
  EXPECT_EQ(Step(), Next::kEnd);
}

TEST_F(RequestStateTest, SendsEarlyWhatThereIsAndWaitsAgain) {
  for (const int64_t interval : {0, 100}) {
    Make(Info(2), interval);
    Tokens(0, 5, 0);
    Tokens(0, 3, 1);
    EXPECT_EQ(Step(), Next::kWait);
    EXPECT_EQ(state_->SendEarly(), reader_);
    for (const int64_t rows : {5, 3}) {
      ASSERT_EQ(Step(), Next::kPiece);
      EXPECT_EQ(piece_.slice.rows, rows);
      EXPECT_FALSE(piece_.done);
    }
    EXPECT_EQ(Step(), Next::kWait);
    EXPECT_EQ(buffered(), 0);
    Tokens(5, 5, 0);
    EXPECT_EQ(Step(), Next::kWait) << "once only";
  }
}

TEST_F(RequestStateTest, SamplesTakeTurns) {
  Make(Info(3));
  for (int32_t sample = 0; sample < 3; ++sample) Tokens(0, 1, sample);
  std::vector<int32_t> order;
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(Step(), Next::kPiece);
    order.push_back(piece_.sample);
    Tokens(i + 1, 1, 0);  // the first sample always has more
  }
  EXPECT_THAT(order, ElementsAre(0, 1, 2));
}

TEST_F(RequestStateTest, NothingComesBeforeAccepted) {
  state_ = std::make_unique<RequestState>(Info(), &pools_, &events_);
  ASSERT_TRUE(state_->Attach(reader_, 1, {}).ok());
  ASSERT_TRUE(state_->BeginSubmit());
  Tokens(0, 1);  // the step loop may be faster than Submit's return
  EXPECT_EQ(Step(), Next::kWait);
  state_->EndSubmit();
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_TRUE(piece_.accepted);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_EQ(piece_.slice.rows, 1);
}

TEST_F(RequestStateTest, AcceptedComesWhileItWaits) {
  state_ = std::make_unique<RequestState>(Info(), &pools_, &events_);
  ASSERT_TRUE(state_->Attach(reader_, 1, {}).ok());
  EXPECT_EQ(Step(), Next::kWait) << "it may yet be refused";
  const int before = events_.wakes;
  state_->BeginWait();
  EXPECT_GT(events_.wakes, before);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_TRUE(piece_.accepted);
  EXPECT_EQ(Step(), Next::kWait);
  ASSERT_TRUE(state_->BeginSubmit());
  Tokens(0, 1);
  state_->EndSubmit();
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_FALSE(piece_.accepted);
  EXPECT_EQ(piece_.slice.rows, 1);
}

TEST_F(RequestStateTest, AbortsDuringSubmitAreHandedBack) {
  state_ = std::make_unique<RequestState>(Info(2), &pools_, &events_);
  bool in_flight = false;
  EXPECT_FALSE(state_->RequestAbort(1, AbortReason::kClient, &in_flight)) << "not with the worker yet";
  EXPECT_TRUE(in_flight);
  ASSERT_TRUE(state_->BeginSubmit());
  EXPECT_FALSE(state_->RequestAbort(std::nullopt, AbortReason::kCancelled, &in_flight));
  const auto aborts = state_->EndSubmit();
  ASSERT_EQ(aborts.size(), 2);
  EXPECT_EQ(aborts[0].sample, std::optional<int32_t>(1));
  EXPECT_EQ(aborts[1].reason, AbortReason::kCancelled);
  EXPECT_TRUE(state_->RequestAbort(0, AbortReason::kClient, &in_flight)) << "from now on the worker's";
  Done(0);
  EXPECT_FALSE(state_->RequestAbort(0, AbortReason::kClient, &in_flight));
  EXPECT_FALSE(in_flight);
}

TEST_F(RequestStateTest, AbortWhileWaitingEndsItHere) {
  state_ = std::make_unique<RequestState>(Info(2), &pools_, &events_);
  ASSERT_TRUE(state_->Attach(reader_, 0, {}).ok());
  bool in_flight = false;
  EXPECT_FALSE(state_->RequestAbort(std::nullopt, AbortReason::kClient, &in_flight));
  EXPECT_TRUE(in_flight && state_->finished());
  ExpectBothAbortedHere();
}

TEST_F(RequestStateTest, AbortsOfEverySampleWhileWaitingEndItHere) {
  state_ = std::make_unique<RequestState>(Info(2), &pools_, &events_);
  ASSERT_TRUE(state_->Attach(reader_, 0, {}).ok());
  bool in_flight = false;
  for (int i = 0; i < 2; ++i) {
    EXPECT_FALSE(state_->RequestAbort(1, AbortReason::kClient, &in_flight));
    EXPECT_TRUE(in_flight && !state_->finished()) << "sample 0 is still wanted";
  }
  EXPECT_FALSE(state_->RequestAbort(0, AbortReason::kClient, &in_flight));
  EXPECT_TRUE(in_flight && state_->finished());
  ExpectBothAbortedHere();
}

TEST_F(RequestStateTest, FailureReachesTheReader) {
  state_ = std::make_unique<RequestState>(Info(), &pools_, &events_);
  ASSERT_TRUE(state_->Attach(reader_, 0, {}).ok());
  state_->Fail({absl::ResourceExhaustedError("full"), 500});
  ASSERT_EQ(Step(), Next::kEnd);
  EXPECT_EQ(end_.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(end_.retry_after_ms, 500);
  EXPECT_TRUE(state_->Detach(reader_.get(), DetachReason::kStreamEnded, absl::Now()).forget);
}

TEST_F(RequestStateTest, DisconnectPolicies) {
  Make(Info());
  auto detached = state_->Detach(reader_.get(), DetachReason::kDisconnected, absl::Now());
  EXPECT_EQ(detached.abort, AbortReason::kCancelled);
  EXPECT_TRUE(detached.forget);

  Make(Info());
  detached = state_->Detach(reader_.get(), DetachReason::kDeadline, absl::Now());
  EXPECT_EQ(detached.abort, AbortReason::kDeadline);
  EXPECT_FALSE(detached.forget);

  RequestInfo info = Info();
  info.detach_on_disconnect = true;
  Make(std::move(info));
  Tokens(0, 4);
  EXPECT_EQ(buffered(), 4 * kTokenBytes);
  detached = state_->Detach(reader_.get(), DetachReason::kDisconnected, absl::Now());
  EXPECT_FALSE(detached.abort || detached.forget);
  EXPECT_EQ(buffered(), 0) << "without a reader, results are retained";
  EXPECT_EQ(retained(), 4 * kTokenBytes);
  Tokens(4, 1);
  EXPECT_EQ(retained(), 5 * kTokenBytes);
  ASSERT_TRUE(state_->Attach(reader_, 1, {.offsets = {{0, 2}}, .prompt_position = 0}).ok());
  EXPECT_EQ(buffered(), 3 * kTokenBytes);
  EXPECT_EQ(retained(), 2 * kTokenBytes);

  Make(Info());
  Done();
  detached = state_->Detach(reader_.get(), DetachReason::kDisconnected, absl::Now());
  EXPECT_FALSE(detached.abort || detached.forget) << "a finished result is kept, whoever hung up";

  info = Info();
  info.score = true;
  Make(std::move(info));
  detached = state_->Detach(reader_.get(), DetachReason::kDeadline, absl::Now());
  EXPECT_TRUE(detached.abort == AbortReason::kCancelled && detached.forget) << "scores are not kept";
}

TEST_F(RequestStateTest, AttachFromAnOffset) {
  Make(Info());
  Tokens(0, 10);
  Done();
  while (Step() == Next::kPiece) {
  }
  state_->Detach(reader_.get(), DetachReason::kStreamEnded, absl::Now());
  EXPECT_EQ(state_->Attach(reader_, 0, {.offsets = {{0, 11}}, .prompt_position = 0}).code(),
            absl::StatusCode::kOutOfRange);
  ASSERT_TRUE(state_->Attach(reader_, 0, {.offsets = {{0, 7}}, .prompt_position = 0}).ok());
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_TRUE(piece_.accepted);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_THAT(piece_.slice.tokens, ElementsAre(7, 8, 9));
  EXPECT_TRUE(piece_.done);
  EXPECT_EQ(Step(), Next::kEnd);
  EXPECT_EQ(buffered(), 0) << "a finished result stays in the retained pool";
}

TEST_F(RequestStateTest, IsDueAtTheDeadlineOfTheCallThatReadsIt) {
  const absl::Time first = absl::FromUnixSeconds(1);
  const absl::Time later = absl::FromUnixSeconds(2);
  state_ = std::make_unique<RequestState>(Info(), &pools_, &events_);
  ASSERT_TRUE(state_->Attach(reader_, 1, {}, first).ok());
  EXPECT_EQ(state_->due(), absl::InfiniteFuture()) << "it waits: the starter's to end";
  EXPECT_EQ(state_->deadline(), first);
  ASSERT_TRUE(state_->BeginSubmit());
  state_->EndSubmit();
  EXPECT_EQ(state_->due(), first);
  ASSERT_TRUE(state_->Attach(reader_, 1, {}, later).ok());
  EXPECT_EQ(state_->due(), later);
  Done();
  EXPECT_EQ(state_->due(), absl::InfiniteFuture());
}

TEST_F(RequestStateTest, ReplacedReaderIsTold) {
  Make(Info());
  const auto other = std::make_shared<IdleReader>();
  ASSERT_TRUE(state_->Attach(other, 1, {}).ok());
  ASSERT_EQ(Step(), Next::kEnd);
  EXPECT_EQ(end_.status.code(), absl::StatusCode::kAborted);
  EXPECT_FALSE(state_->Detach(reader_.get(), DetachReason::kDisconnected, absl::Now()).abort)
      << "it has no say any more";
  EXPECT_EQ(state_->NextPiece(other.get(), &piece_, &end_), Next::kPiece);
}

TEST_F(RequestStateTest, TrimFreesDeliveredChunks) {
  Make(Info());
  Tokens(0, 600);
  ASSERT_EQ(Step(), Next::kPiece);
  Tokens(600, 1);
  EXPECT_EQ(state_->Trim(), 512 * kTokenBytes);
  EXPECT_EQ(retained(), 88 * kTokenBytes);
  EXPECT_EQ(buffered(), kTokenBytes);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_THAT(piece_.slice.tokens, ElementsAre(600));
  const absl::Status gone = state_->Attach(reader_, 1, {.offsets = {{0, 100}}, .prompt_position = 0});
  EXPECT_EQ(gone.code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(gone.message()), ::testing::HasSubstr("512"));
}

TEST_F(RequestStateTest, CutEndsTheReaderAndKeepsTheResult) {
  Make(Info());
  Tokens(0, 5);
  state_->Cut();
  EXPECT_EQ(buffered(), 0);
  EXPECT_EQ(retained(), 5 * kTokenBytes);
  ASSERT_EQ(Step(), Next::kEnd);
  EXPECT_EQ(end_.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_GT(end_.retry_after_ms, 0);
  EXPECT_FALSE(state_->Detach(reader_.get(), DetachReason::kStreamEnded, absl::Now()).forget);
  ASSERT_TRUE(state_->Attach(reader_, 1, {}).ok());
  EXPECT_EQ(buffered(), 0) << "what was cut does not come back to the pool it overflowed";
  Tokens(5, 1);
  Done();
  ASSERT_EQ(Step(), Next::kPiece);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_EQ(piece_.slice.rows, 6);
}

TEST_F(RequestStateTest, DropFreesEverythingAndIgnoresWhatComes) {
  Make(Info());
  Tokens(0, 5);
  state_->Drop();
  EXPECT_EQ(buffered() + retained(), 0);
  Tokens(5, 5);
  Done();
  EXPECT_EQ(buffered() + retained(), 0);
  EXPECT_TRUE(state_->finished());
  ASSERT_EQ(Step(), Next::kEnd);
  EXPECT_EQ(end_.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(state_->Attach(reader_, 0, {}).code(), absl::StatusCode::kNotFound);
}

TEST_F(RequestStateTest, PromptLogprobsComeFirst) {
  RequestInfo info = Info();
  info.prompt_range = {.begin = 1, .end = 4};
  Make(std::move(info));
  state_->OnPromptLogprobs({.begin = 1, .logprobs = std::vector<RowLogprobs>(2)});
  state_->OnPromptLogprobs({.begin = 3, .logprobs = std::vector<RowLogprobs>(1)});
  Tokens(0, 1);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_TRUE(piece_.prompt);
  EXPECT_EQ(piece_.slice.offset, 1);
  EXPECT_EQ(piece_.slice.rows, 3);
  ASSERT_EQ(Step(), Next::kPiece);
  EXPECT_FALSE(piece_.prompt);
}

}  // namespace
}  // namespace lockstep
