#include "rollout/server/task_thread.h"

#include <utility>

#include "absl/time/clock.h"

namespace lockstep {

TaskThread::TaskThread() : thread_([this] { Run(); }) {}

TaskThread::~TaskThread() {
  Stop();
}

void TaskThread::Add(Task task) {
  absl::MutexLock lock(&mutex_);
  if (stop_) return;
  tasks_.push_back(std::move(task));
  changed_.Signal();
}

void TaskThread::AddAt(absl::Time when, Task task) {
  absl::MutexLock lock(&mutex_);
  if (stop_) return;
  timed_.emplace(when, std::move(task));
  changed_.Signal();
}

void TaskThread::Stop() {
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
    changed_.Signal();
  }
  if (thread_.joinable()) thread_.join();
  absl::MutexLock lock(&mutex_);
  tasks_.clear();
  timed_.clear();
}

void TaskThread::Run() {
  while (true) {
    Task task;
    {
      absl::MutexLock lock(&mutex_);
      while (true) {
        if (stop_) return;
        if (!timed_.empty() && timed_.begin()->first <= absl::Now()) {
          task = std::move(timed_.begin()->second);
          timed_.erase(timed_.begin());
          break;
        }
        if (!tasks_.empty()) {
          task = std::move(tasks_.front());
          tasks_.pop_front();
          break;
        }
        changed_.WaitWithDeadline(&mutex_, timed_.empty() ? absl::InfiniteFuture() : timed_.begin()->first);
      }
    }
    task();
  }
}

}  // namespace lockstep
