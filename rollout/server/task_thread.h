// One thread that runs short tasks in order, and delayed ones when they are due. Deliveries, buffer reclaiming and
// timers run here, so that neither the step loop nor gRPC's threads do. Thread-safe.
#pragma once

#include <deque>
#include <map>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace lockstep {

class TaskThread {
 public:
  using Task = absl::AnyInvocable<void()>;

  TaskThread();
  // Tasks not yet begun are dropped.
  ~TaskThread();

  void Add(Task task);
  void AddAt(absl::Time when, Task task);
  // Ends the thread after the task in progress; later tasks are dropped. Not from a task.
  void Stop();

 private:
  void Run();

  absl::Mutex mutex_;
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  std::multimap<absl::Time, Task> timed_ ABSL_GUARDED_BY(mutex_);
  absl::CondVar changed_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace lockstep
