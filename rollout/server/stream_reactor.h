// The server side of a Generate or Score call: writes a request's results, one message at a time, as fast as the client
// takes them.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "rollout/server/open_streams.h"
#include "rollout/server/request_registry.h"
#include "rollout/server/request_starter.h"
#include "rollout/server/request_state.h"
#include "rollout/server/respond.h"

namespace lockstep {

inline grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

inline void AddRetryHint(grpc::CallbackServerContext* context, int64_t retry_after_ms) {
  if (retry_after_ms > 0) context->AddTrailingMetadata("retry-after-ms", std::to_string(retry_after_ms));
}

// Owns itself until gRPC is done with the call. Messages are built and encoded on the task thread (Pump) or gRPC's,
// never on the step loop's.
template <class Response>
class StreamReactor final : public grpc::ServerWriteReactor<Response>,
                            public Reader,
                            public std::enable_shared_from_this<StreamReactor<Response>> {
 public:
  // `deadline`: a disconnect from then on is the client's deadline, not a cancellation.
  static std::shared_ptr<StreamReactor> Create(grpc::CallbackServerContext* context, RequestRegistry* registry,
                                               OpenStreams* open, std::shared_ptr<RequestState> state,
                                               absl::Time deadline) {
    std::shared_ptr<StreamReactor> reactor(new StreamReactor(context, registry, open, std::move(state), deadline));
    reactor->self_ = reactor;
    open->Add();
    return reactor;
  }

  // Instead of ever pumping: the attachment failed.
  void Refuse(const absl::Status& status) {
    {
      absl::MutexLock lock(&mutex_);
      finished_ = true;
    }
    AddRetryHint(context_, RetryAfterMs(status));
    this->Finish(ToGrpc(status));
  }

  void Pump() override {
    StreamEnd end;
    bool finish = false;
    {
      absl::MutexLock lock(&mutex_);
      if (writing_ || finished_) return;  // OnWriteDone pumps again
      if (disconnected_) {
        finish = true;
        end.status = absl::CancelledError("the call was cancelled");
      } else {
        ResultPiece piece;
        switch (state_->NextPiece(this, &piece, &end)) {
          case RequestState::Next::kWait:
            return;
          case RequestState::Next::kPiece:
            response_.Clear();
            FillResponse(state_->info(), piece, &response_);
            writing_ = true;
            break;
          case RequestState::Next::kEnd:
            finish = true;
            break;
        }
      }
      finished_ = finish;
    }
    // Outside the lock: gRPC may react at once, on this thread.
    if (finish) {
      // Before the client can see the end, so that it may use the id again at once.
      registry_->Detach(*state_, this, RequestState::DetachReason::kStreamEnded);
      AddRetryHint(context_, end.retry_after_ms);
      this->Finish(ToGrpc(end.status));
    } else {
      this->StartWrite(&response_);
    }
  }

  void OnWriteDone(bool ok) override {
    {
      absl::MutexLock lock(&mutex_);
      writing_ = false;
      if (!ok) disconnected_ = true;
    }
    if (!ok) Disconnect();
    Pump();
  }

  void OnCancel() override {
    {
      absl::MutexLock lock(&mutex_);
      disconnected_ = true;
    }
    Disconnect();
    Pump();
  }

  void OnDone() override {
    open_->Remove();
    self_.reset();
  }

 private:
  StreamReactor(grpc::CallbackServerContext* context, RequestRegistry* registry, OpenStreams* open,
                std::shared_ptr<RequestState> state, absl::Time deadline)
      : context_(context), registry_(registry), open_(open), state_(std::move(state)), deadline_(deadline) {}

  void Disconnect() {
    registry_->Detach(
        *state_, this,
        absl::Now() >= deadline_ ? RequestState::DetachReason::kDeadline : RequestState::DetachReason::kDisconnected);
  }

  grpc::CallbackServerContext* const context_;
  RequestRegistry* const registry_;
  OpenStreams* const open_;
  const std::shared_ptr<RequestState> state_;
  const absl::Time deadline_;
  std::shared_ptr<StreamReactor> self_;

  absl::Mutex mutex_;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool disconnected_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  Response response_;  // the write in progress
};

}  // namespace lockstep
