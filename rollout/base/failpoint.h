// Named places at which a process can be made to die, stand still, wait or report an error: how tests and tools/chaos
// reach the moments between two steps of a protocol. Part of every build; a place costs one relaxed load while none is
// armed.
//
//   LOCKSTEP_FAILPOINTS="weights.push.staged=kill@3;weights.verify.before=error(UNAVAILABLE)@2;weights.commit.before=sleep(500)"
//
// NAME=ACTION[@N], separated by ';'. ACTION: kill (SIGKILL), stop (SIGSTOP), sleep(MILLISECONDS), error(CODE) where the
// place can return a Status. @N: the N-th time only, from 1; without it, every time. A name may be given several times.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace lockstep {

struct FailpointPlace {
  std::string_view name;
  bool can_fail;  // error(CODE) has an effect there
};

// Every place there is, in the order in which an update passes them. A name that is not here does not compile.
inline constexpr std::array kFailpoints = {
    FailpointPlace{"weights.begin.before", true},
    FailpointPlace{"weights.begin.checked", true},  // the manifest is the model's; nothing is open yet
    FailpointPlace{"weights.begin.answer", true},   // open, not answered
    FailpointPlace{"weights.push.before", true},
    FailpointPlace{"weights.push.chunk", true},      // a chunk was read off the stream
    FailpointPlace{"weights.push.received", false},  // its bytes are in place
    FailpointPlace{"weights.push.staged", false},    // a tensor is whole and staged
    FailpointPlace{"weights.push.answer", true},     // the stream has ended, not answered
    FailpointPlace{"weights.join.before", true},
    FailpointPlace{"weights.join.answer", true},        // a rank of the communicator, not answered
    FailpointPlace{"weights.receive.before", true},     // the sender's first message was read
    FailpointPlace{"weights.receive.begun", true},      // has the inbox; the sender does not know
    FailpointPlace{"weights.receive.bucket", true},     // announced; the broadcast is not entered
    FailpointPlace{"weights.receive.converted", true},  // a bucket is, or will be, in the stage
    FailpointPlace{"weights.receive.arrived", true},    // all is staged; counts as received, not answered
    FailpointPlace{"weights.hold.before", true},        // direct: the first value is about to overwrite what serves
    FailpointPlace{"weights.hold.held", false},         // steps stand still; nothing is overwritten yet
    FailpointPlace{"weights.verify.before", true},
    FailpointPlace{"weights.verify.compared", true},  // digests are good; still RECEIVING
    FailpointPlace{"weights.verify.answer", true},    // VERIFIED, not answered
    FailpointPlace{"weights.commit.before", true},
    FailpointPlace{"weights.commit.policy", false},     // FINISH: new samples are held, those in flight go on
    FailpointPlace{"weights.commit.boundary", false},   // waits for the step boundary
    FailpointPlace{"weights.install.before", true},     // between two steps; an error is the device's: the worker ends
    FailpointPlace{"weights.install.slot", true},       // before each tensor; likewise
    FailpointPlace{"weights.install.after", true},      // all stored; likewise
    FailpointPlace{"weights.commit.installed", false},  // the new weights are in place under the old version
    FailpointPlace{"weights.commit.sample", false},     // before the policy is applied to each sample in flight
    FailpointPlace{"weights.commit.switched", false},   // the loop has the new version; nobody was told
    FailpointPlace{"weights.commit.serving", false},    // steps run under it; the update is still COMMITTING
    FailpointPlace{"weights.commit.answer", true},      // done, not answered
    FailpointPlace{"weights.rollback.before", true},
    FailpointPlace{"weights.rollback.answer", true},
    FailpointPlace{"weights.lease.expired", false},  // before the update is dropped
    // Direct: what was overwritten is put back; an error: it cannot be, and the worker ends.
    FailpointPlace{"weights.restore.before", true},
    FailpointPlace{"weights.restore.slot", true},   // before each tensor
    FailpointPlace{"weights.restore.after", true},  // all compared; steps stand still
    // Direct: the copy of what serves is written; an error is the device's: the worker ends.
    FailpointPlace{"weights.shadow.before", true},
    FailpointPlace{"weights.shadow.slot", true},  // before each tensor
    FailpointPlace{"weights.shadow.after", true},
    FailpointPlace{"control.pause.before", true},
    FailpointPlace{"control.pause.answer", true},
    FailpointPlace{"control.resume.before", true},
    FailpointPlace{"control.resume.answer", true},
    FailpointPlace{"keep.swap_out.before", false},  // a kept state goes to host memory
    FailpointPlace{"keep.swap_out.after", false},
    FailpointPlace{"keep.swap_in.before", false},  // and comes back
    FailpointPlace{"keep.swap_in.after", false},
};

// Its place in kFailpoints, found at compile time.
template <bool kCanFail>
class FailpointName {
 public:
  consteval FailpointName(const char* name) : index_(0) {  // NOLINT(google-explicit-constructor): written as a string
    while (kFailpoints.at(index_).name != name) ++index_;
    if (kFailpoints[index_].can_fail != kCanFail) throw "this place can fail: FailpointStatus; or cannot: Failpoint";
  }
  constexpr size_t index() const { return index_; }

 private:
  size_t index_;
};

namespace failpoint_internal {
inline std::atomic<bool> armed = false;
absl::Status Hit(size_t index);
}  // namespace failpoint_internal

inline void Failpoint(FailpointName<false> name) {
  if (failpoint_internal::armed.load(std::memory_order_relaxed)) [[unlikely]] {
    failpoint_internal::Hit(name.index()).IgnoreError();
  }
}

// Where the caller returns the error. From any thread, as the other.
inline absl::Status FailpointStatus(FailpointName<true> name) {
  if (failpoint_internal::armed.load(std::memory_order_relaxed)) [[unlikely]] {
    return failpoint_internal::Hit(name.index());
  }
  return absl::OkStatus();
}

// Arms what `spec` says, in place of what was armed; an empty one disarms. INVALID_ARGUMENT names what is wrong and
// lists the names there are; then nothing has changed. Not while other threads pass failpoints.
absl::Status ArmFailpoints(absl::string_view spec);
// From the environment variable LOCKSTEP_FAILPOINTS, with a warning in the log if it arms any.
absl::Status ArmFailpointsFromEnvironment();

}  // namespace lockstep
