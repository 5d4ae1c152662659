#include "rollout/server/request_state.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "rollout/base/check.h"
#include "rollout/base/status.h"

namespace lockstep {
namespace {

// Messages stay under 1 MiB; the rest is for `done` (whose spans and texts are small) and field headers.
constexpr int64_t kMaxPieceBytes = (1 << 20) - (1 << 16);
constexpr int64_t kCutRetryMs = 100;

absl::Status CheckCursor(const std::string& field, int64_t offset, const TokenBuffer& buffer) {
  if (offset >= buffer.begin() && offset <= buffer.end()) return absl::OkStatus();
  return absl::OutOfRangeError(absl::StrCat(field, ": value ", offset, "; want ", buffer.begin(),
                                            " (what is before it was dropped or never returned) to ", buffer.end(),
                                            " (what there is)"));
}

}  // namespace

RequestState::RequestState(RequestInfo info, BufferPools* pools, RequestEvents* events)
    : info_(std::move(info)),
      pools_(pools),
      events_(events),
      prompt_(info_.prompt_range.begin, info_.prompt_layout),
      prompt_cursor_(info_.prompt_range.begin),
      unfinished_(info_.n),
      idle_since_(absl::Now()) {
  for (int32_t i = 0; i < info_.n; ++i) {
    samples_.push_back(
        Sample{.tokens = TokenBuffer(info_.first_offset, info_.layout), .cursor = info_.first_offset, .result = {}});
  }
}

RequestState::~RequestState() {
  absl::MutexLock lock(&mutex_);
  SetHeld(0, 0);
}

void RequestState::OnPromptLogprobs(PromptLogprobs logprobs) {
  absl::MutexLock lock(&mutex_);
  if (dropped_) return;
  LOCKSTEP_CHECK(logprobs.begin == prompt_.end(), "request {}: prompt logprobs from {}, expected {}", info_.worker_id,
                 logprobs.begin, prompt_.end());
  const int64_t before = prompt_.end();
  prompt_.Append({}, logprobs.logprobs);
  Grow(prompt_.Bytes(before, prompt_.end()));
  WakeReader();
}

void RequestState::OnTokens(SampleTokens tokens) {
  absl::MutexLock lock(&mutex_);
  if (dropped_) return;
  Sample& sample = samples_.at(tokens.sample);
  LOCKSTEP_CHECK(tokens.offset == sample.tokens.end() && !sample.result,
                 "request {} sample {}: tokens from {}, expected {}", info_.worker_id, tokens.sample, tokens.offset,
                 sample.tokens.end());
  const int64_t before = sample.tokens.end();
  sample.tokens.Append(tokens.tokens, tokens.logprobs);
  Grow(sample.tokens.Bytes(before, sample.tokens.end()));
  if (stream_interval_ > 0 && sample.tokens.end() - sample.cursor >= stream_interval_) WakeReader();
}

void RequestState::OnSampleDone(int32_t sample, SampleResult result) {
  absl::MutexLock lock(&mutex_);
  FinishSample(sample, std::move(result));
  WakeReader();
}

void RequestState::FinishSample(int32_t sample, SampleResult result) {
  Sample& ended = samples_.at(sample);
  LOCKSTEP_CHECK(!ended.result, "request {}: sample {} ended twice", info_.worker_id, sample);
  ended.result = std::move(result);
  --unfinished_;
  if (Finished()) idle_since_ = absl::Now();
}

void RequestState::BeginWait() {
  absl::MutexLock lock(&mutex_);
  taken_ = true;
  WakeReader();
}

bool RequestState::BeginSubmit() {
  absl::MutexLock lock(&mutex_);
  if (phase_ != Phase::kWaiting || Finished()) return false;
  phase_ = Phase::kSubmitting;
  return true;
}

std::vector<PendingAbort> RequestState::EndSubmit() {
  absl::MutexLock lock(&mutex_);
  phase_ = Phase::kSubmitted;
  taken_ = true;
  WakeReader();
  return std::exchange(pending_aborts_, {});
}

void RequestState::Fail(StreamEnd end) {
  absl::MutexLock lock(&mutex_);
  if (Finished()) return;
  phase_ = Phase::kFailed;
  unfinished_ = 0;
  dropped_ = true;
  reader_end_ = std::move(end);
  WakeReader();
}

bool RequestState::RequestAbort(std::optional<int32_t> sample, AbortReason reason, bool* in_flight) {
  absl::MutexLock lock(&mutex_);
  *in_flight = !Finished() && (!sample || !samples_.at(*sample).result);
  if (!*in_flight) return false;
  if (!sample) deadline_ = absl::InfiniteFuture();  // it ends without it
  if (phase_ == Phase::kSubmitted) return true;
  const bool noted = std::any_of(pending_aborts_.begin(), pending_aborts_.end(),
                                 [&](const PendingAbort& abort) { return abort.sample == sample; });
  if (!noted) pending_aborts_.push_back({sample, reason});
  const bool all_named = !sample || static_cast<int32_t>(pending_aborts_.size()) == info_.n;
  if (phase_ == Phase::kSubmitting || !all_named) return false;
  // Still waiting for its weights: nothing to stop, it ends here.
  for (int32_t i = 0; i < info_.n; ++i) {
    SampleResult result;
    result.finish = FinishKind::kAborted;
    result.abort = reason;
    result.abort_message = "ended while it waited for min_weight_version";
    FinishSample(i, std::move(result));
  }
  WakeReader();
  return false;
}

absl::Status RequestState::Attach(std::weak_ptr<Reader> reader, int64_t stream_interval, const AttachPoint& point,
                                  absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  if (dropped_) {
    return absl::NotFoundError(
        absl::StrCat("request_id: \"", info_.request_id,
                     "\" has no result any more: it was cancelled, or dropped for lack of room"));
  }
  const int64_t prompt_cursor = point.prompt_position == 0 ? info_.prompt_range.begin : point.prompt_position;
  LOCKSTEP_RETURN_IF_ERROR(CheckCursor("attach.prompt_position", prompt_cursor, prompt_));
  std::vector<int64_t> cursors(info_.n, info_.first_offset);
  std::vector<std::string> names(info_.n);
  for (size_t i = 0; i < point.offsets.size(); ++i) {
    const auto& [sample, offset] = point.offsets[i];
    cursors.at(sample) = offset;
    names.at(sample) = absl::StrCat("attach.samples[", i, "].offset");
  }
  for (int32_t i = 0; i < info_.n; ++i) {
    const std::string name = names[i].empty()
                                 ? absl::StrCat("attach.samples: sample_index ", info_.first_sample_index + i,
                                                " is not listed, so its offset")
                                 : names[i];
    LOCKSTEP_RETURN_IF_ERROR(CheckCursor(name, cursors[i], samples_[i].tokens));
  }

  WakeReader();  // the one before, which then sees that it was replaced
  reader_key_ = reader.lock().get();
  reader_ = std::move(reader);
  stream_interval_ = stream_interval;
  deadline_ = deadline;
  send_early_ = false;
  accepted_sent_ = false;
  reader_end_.reset();
  prompt_cursor_ = prompt_cursor;
  for (int32_t i = 0; i < info_.n; ++i) {
    samples_[i].cursor = cursors[i];
    samples_[i].done_delivered = false;
  }
  // What no longer grows stays where it is: its bytes were given up to the retained pool before.
  if (!Finished() && !cut_) buffered_pool_ = true;
  Recount();
  WakeReader();
  return absl::OkStatus();
}

bool RequestState::TakeSample(int32_t index, ResultPiece* piece) {
  Sample& sample = samples_[index];
  const int64_t pending = sample.tokens.end() - sample.cursor;
  const bool done = sample.result && !sample.done_delivered;
  const int64_t enough = send_early_ ? 1 : stream_interval_;
  if (!done && (enough == 0 || pending < enough)) return false;
  piece->sample = index;
  piece->slice = sample.tokens.Copy(sample.cursor, kMaxPieceBytes);
  const int64_t bytes = sample.tokens.Bytes(sample.cursor, piece->slice.end());
  sample.cursor = piece->slice.end();
  if (sample.result && sample.cursor == sample.tokens.end()) {
    piece->done = sample.result;
    piece->prompt_end = prompt_.end();
    sample.done_delivered = true;
  }
  SetHeld(held_bytes_, undelivered_bytes_ - bytes);
  return true;
}

RequestState::Next RequestState::NextPiece(const Reader* reader, ResultPiece* piece, StreamEnd* end) {
  absl::MutexLock lock(&mutex_);
  if (reader != reader_key_) {
    *end = {absl::AbortedError(absl::StrCat("request_id: \"", info_.request_id, "\" is now read by another call"))};
    return Next::kEnd;
  }
  if (reader_end_) {
    *end = *reader_end_;
    return Next::kEnd;
  }
  *piece = ResultPiece();
  if (!taken_ && !Finished()) return Next::kWait;
  if (!accepted_sent_) {
    accepted_sent_ = true;
    piece->accepted = true;
    return Next::kPiece;
  }
  if (prompt_cursor_ < prompt_.end()) {
    piece->prompt = true;
    piece->slice = prompt_.Copy(prompt_cursor_, kMaxPieceBytes);
    const int64_t bytes = prompt_.Bytes(prompt_cursor_, piece->slice.end());
    prompt_cursor_ = piece->slice.end();
    SetHeld(held_bytes_, undelivered_bytes_ - bytes);
    return Next::kPiece;
  }
  for (int32_t i = 0; i < info_.n; ++i) {
    const int32_t index = (next_sample_ + i) % info_.n;
    if (!TakeSample(index, piece)) continue;
    next_sample_ = (index + 1) % info_.n;
    return Next::kPiece;
  }
  send_early_ = false;
  if (!Finished()) return Next::kWait;
  *end = {absl::OkStatus()};
  return Next::kEnd;
}

RequestState::Detached RequestState::Detach(const Reader* reader, DetachReason reason, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  if (reader != reader_key_) return {};
  reader_.reset();
  reader_key_ = nullptr;
  idle_since_ = now;
  buffered_pool_ = false;
  SetHeld(held_bytes_, undelivered_bytes_);
  if (info_.score || phase_ == Phase::kFailed) {
    return {.abort = Finished() ? std::nullopt : std::optional(AbortReason::kCancelled), .forget = true};
  }
  if (Finished() || reason == DetachReason::kStreamEnded) return {};
  if (info_.detach_on_disconnect) return {};
  if (reason == DetachReason::kDeadline) return {.abort = AbortReason::kDeadline};
  return {.abort = AbortReason::kCancelled, .forget = true};
}

std::shared_ptr<Reader> RequestState::SendEarly() {
  absl::MutexLock lock(&mutex_);
  send_early_ = true;
  return reader_.lock();
}

void RequestState::Cut() {
  absl::MutexLock lock(&mutex_);
  cut_ = true;
  buffered_pool_ = false;
  reader_end_ = StreamEnd{
      absl::ResourceExhaustedError(absl::StrCat(
          "undelivered results exceed the worker's budget and this stream was furthest behind (", undelivered_bytes_,
          " bytes); ",
          info_.score ? "score again"
                      : "attach to the request from the offsets received, or continue it with generated_prefix_ids")),
      kCutRetryMs};
  SetHeld(held_bytes_, undelivered_bytes_);
  WakeReader();
}

void RequestState::Drop() {
  absl::MutexLock lock(&mutex_);
  dropped_ = true;
  prompt_.Clear();
  prompt_cursor_ = prompt_.end();
  for (Sample& sample : samples_) {
    sample.tokens.Clear();
    sample.cursor = sample.tokens.end();
  }
  SetHeld(0, 0);
  if (!reader_end_)
    reader_end_ =
        StreamEnd{absl::ResourceExhaustedError("the result was dropped: no room for retained results"), kCutRetryMs};
  WakeReader();
}

int64_t RequestState::Trim() {
  absl::MutexLock lock(&mutex_);
  if (!buffered_pool_) return 0;
  const int64_t before = held_bytes_;
  prompt_.TrimBefore(prompt_cursor_);
  for (Sample& sample : samples_) sample.tokens.TrimBefore(sample.cursor);
  Recount();
  return before - held_bytes_;
}

bool RequestState::finished() const {
  absl::MutexLock lock(&mutex_);
  return Finished();
}

bool RequestState::has_reader() const {
  absl::MutexLock lock(&mutex_);
  return reader_key_ != nullptr;
}

int64_t RequestState::buffered_bytes() const {
  absl::MutexLock lock(&mutex_);
  return counted_buffered_;
}

int64_t RequestState::retained_bytes() const {
  absl::MutexLock lock(&mutex_);
  return counted_retained_;
}

bool RequestState::fully_delivered() const {
  absl::MutexLock lock(&mutex_);
  return Finished() && undelivered_bytes_ == 0;
}

absl::Time RequestState::deadline() const {
  absl::MutexLock lock(&mutex_);
  return deadline_;
}

absl::Time RequestState::due() const {
  absl::MutexLock lock(&mutex_);
  return phase_ == Phase::kSubmitted && !Finished() ? deadline_ : absl::InfiniteFuture();
}

absl::Time RequestState::idle_since() const {
  absl::MutexLock lock(&mutex_);
  return Finished() && reader_key_ == nullptr ? idle_since_ : absl::InfiniteFuture();
}

void RequestState::SetHeld(int64_t held, int64_t undelivered) {
  held_bytes_ = held;
  undelivered_bytes_ = undelivered;
  const int64_t buffered = buffered_pool_ ? undelivered : 0;
  const int64_t retained = held - buffered;
  pools_->buffered += buffered - counted_buffered_;
  pools_->retained += retained - counted_retained_;
  const bool grew = buffered > counted_buffered_ || retained > counted_retained_;
  counted_buffered_ = buffered;
  counted_retained_ = retained;
  if (grew) events_->BytesGrew();
}

void RequestState::Recount() {
  int64_t held = prompt_.Bytes(prompt_.begin(), prompt_.end());
  int64_t undelivered = prompt_.Bytes(prompt_cursor_, prompt_.end());
  for (const Sample& sample : samples_) {
    held += sample.tokens.Bytes(sample.tokens.begin(), sample.tokens.end());
    undelivered += sample.tokens.Bytes(sample.cursor, sample.tokens.end());
  }
  SetHeld(held, undelivered);
}

void RequestState::Grow(int64_t bytes) {
  SetHeld(held_bytes_ + bytes, undelivered_bytes_ + bytes);
}

void RequestState::WakeReader() {
  if (reader_key_ != nullptr) events_->Wake(reader_);
}

}  // namespace lockstep
