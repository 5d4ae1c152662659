// One request's results between the step loop, which produces them, and a stream, which may be slow, gone or replaced.
// The buffer is all they share: the step loop appends and goes on.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "rollout/server/token_buffer.h"
#include "rollout/worker/request.h"

namespace lockstep {

// What is fixed about a request once it is accepted.
struct RequestInfo {
  std::string request_id;  // as the client knows it
  std::string worker_id;   // as the worker knows it: unique even where a client uses an id again
  bool score = false;      // no samples; the end of the prompt's scores is sample 0's
  int32_t n = 1;
  int32_t first_sample_index = 0;
  int64_t first_offset = 0;  // length of the generated prefix
  uint64_t seed = 0;
  int64_t max_tokens = 0;
  LogprobLayout layout;         // of generated tokens
  LogprobLayout prompt_layout;  // of prompt positions
  PromptLogprobRange prompt_range;
  bool detach_on_disconnect = false;
};

// A stream that delivers a request's results. Pump sends what there is to send; it runs on the task thread.
class Reader {
 public:
  virtual ~Reader() = default;
  virtual void Pump() = 0;
};

// How requests report to the registry. Called with the request's lock held: must only note the event.
class RequestEvents {
 public:
  virtual ~RequestEvents() = default;
  virtual void Wake(std::weak_ptr<Reader> reader) = 0;
  virtual void BytesGrew() = 0;
};

// Bytes over all requests: `buffered` are undelivered results with a reader, `retained` everything else that is held.
struct BufferPools {
  std::atomic<int64_t> buffered{0};
  std::atomic<int64_t> retained{0};
};

struct StreamEnd {
  absl::Status status;
  int64_t retry_after_ms = 0;  // 0: no hint
};

// One message's worth of results.
struct ResultPiece {
  bool accepted = false;  // the stream's first message; nothing else is set
  bool prompt = false;    // `slice` is of prompt positions
  int32_t sample = 0;     // 0 .. n-1
  TokenSlice slice;
  std::optional<SampleResult> done;
  int64_t prompt_end = 0;  // with `done`: one past the last prompt position that has log-probabilities
};

struct AttachPoint {
  std::vector<std::pair<int32_t, int64_t>>
      offsets;                  // (sample 0 .. n-1, offset); samples not named: from what the request began with
  int64_t prompt_position = 0;  // 0: from the range's begin
};

struct PendingAbort {
  std::optional<int32_t> sample;
  AbortReason reason;
};

// Thread-safe. The sink's methods are called by the step loop, Next by the reader, the rest by the service and the
// registry.
class RequestState final : public RequestSink {
 public:
  RequestState(RequestInfo info, BufferPools* pools, RequestEvents* events);
  ~RequestState() override;

  const RequestInfo& info() const { return info_; }

  void OnPromptLogprobs(PromptLogprobs logprobs) override;
  void OnTokens(SampleTokens tokens) override;
  void OnSampleDone(int32_t sample, SampleResult result) override;

  // It waits for its weights before BeginSubmit; its reader learns that it was accepted.
  void BeginWait();
  // Before the worker's Submit: false if the request has ended meanwhile and must not be submitted.
  bool BeginSubmit();
  // After it succeeded: aborts that came in between, to be passed on.
  std::vector<PendingAbort> EndSubmit();
  // The request never ran: its reader ends with `end`.
  void Fail(StreamEnd end);

  // Asks for an early end. True if the caller must pass it to the worker, which is then in possession of the request;
  // otherwise it was noted here, or, once it names every sample of a request that waits, has ended the request.
  // `*in_flight`: whether the sample (or any) had not ended.
  bool RequestAbort(std::optional<int32_t> sample, AbortReason reason, bool* in_flight);

  // Makes `reader` the one that delivers, from `point`. A reader that did so before finds out at its next Next.
  // `stream_interval`: 0 delivers a sample's tokens when it is done, k when k are new. `deadline`: of the samples from
  // now on.
  absl::Status Attach(std::weak_ptr<Reader> reader, int64_t stream_interval, const AttachPoint& point,
                      absl::Time deadline = absl::InfiniteFuture());

  enum class Next { kPiece, kWait, kEnd };
  Next NextPiece(const Reader* reader, ResultPiece* piece, StreamEnd* end);

  enum class DetachReason { kStreamEnded, kDisconnected, kDeadline };
  struct Detached {
    std::optional<AbortReason> abort;  // to be passed on with RequestAbort
    bool forget = false;               // the result is not to be kept
  };
  Detached Detach(const Reader* reader, DetachReason reason, absl::Time now);

  // What there is now is enough to be delivered, whatever the interval. Returns the reader, to be pumped, or null.
  std::shared_ptr<Reader> SendEarly();
  // Ends the reader for being behind; its undelivered bytes become retained.
  void Cut();
  // Frees everything and ends a reader that is still there.
  void Drop();
  // Frees what has been delivered. Returns the bytes freed.
  int64_t Trim();

  bool finished() const;  // every sample has ended
  bool has_reader() const;
  int64_t buffered_bytes() const;
  int64_t retained_bytes() const;
  bool fully_delivered() const;
  // That of the call that reads it, or read it last.
  absl::Time deadline() const;
  // When to end its samples for that; InfiniteFuture while there is nothing to end at the worker.
  absl::Time due() const;
  // When it last had a reader or grew; InfiniteFuture while it still may.
  absl::Time idle_since() const;

 private:
  struct Sample {
    TokenBuffer tokens;
    int64_t cursor = 0;  // next offset to deliver
    std::optional<SampleResult> result;
    bool done_delivered = false;
  };
  enum class Phase : uint8_t { kWaiting, kSubmitting, kSubmitted, kFailed };

  void FinishSample(int32_t sample, SampleResult result) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SetHeld(int64_t held, int64_t undelivered) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Recount() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Grow(int64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void WakeReader() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool TakeSample(int32_t sample, ResultPiece* piece) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool Finished() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return unfinished_ == 0; }

  const RequestInfo info_;
  BufferPools* const pools_;
  RequestEvents* const events_;

  mutable absl::Mutex mutex_;
  Phase phase_ ABSL_GUARDED_BY(mutex_) = Phase::kWaiting;
  std::vector<PendingAbort> pending_aborts_ ABSL_GUARDED_BY(mutex_);
  TokenBuffer prompt_ ABSL_GUARDED_BY(mutex_);
  int64_t prompt_cursor_ ABSL_GUARDED_BY(mutex_);
  std::vector<Sample> samples_ ABSL_GUARDED_BY(mutex_);
  int32_t unfinished_ ABSL_GUARDED_BY(mutex_);
  int32_t next_sample_ ABSL_GUARDED_BY(mutex_) = 0;  // whose turn it is

  std::weak_ptr<Reader> reader_ ABSL_GUARDED_BY(mutex_);
  const Reader* reader_key_ ABSL_GUARDED_BY(mutex_) = nullptr;
  int64_t stream_interval_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time deadline_ ABSL_GUARDED_BY(mutex_) = absl::InfiniteFuture();
  bool send_early_ ABSL_GUARDED_BY(mutex_) = false;  // until nothing is left to send
  bool taken_ ABSL_GUARDED_BY(mutex_) = false;       // `accepted` may be sent
  bool accepted_sent_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<StreamEnd> reader_end_ ABSL_GUARDED_BY(mutex_);
  bool dropped_ ABSL_GUARDED_BY(mutex_) = false;
  bool cut_ ABSL_GUARDED_BY(mutex_) = false;
  bool buffered_pool_ ABSL_GUARDED_BY(mutex_) = true;  // undelivered bytes count as buffered, not as retained
  absl::Time idle_since_ ABSL_GUARDED_BY(mutex_);

  int64_t held_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t undelivered_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t counted_buffered_ ABSL_GUARDED_BY(mutex_) = 0;  // what the pools have of this request
  int64_t counted_retained_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace lockstep
