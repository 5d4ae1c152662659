#include "rollout/scheduler/page_pool.h"

#include "rollout/base/check.h"

namespace lockstep {

PagePool::PagePool(int64_t pages) : references_(pages, 0) {
  free_.reserve(pages);
  for (int64_t p = pages - 1; p >= 0; --p) free_.push_back(static_cast<int32_t>(p));
}

int32_t PagePool::Take() {
  LOCKSTEP_CHECK(!free_.empty(), "no free page of {}", total());
  const int32_t page = free_.back();
  free_.pop_back();
  references_[page] = 1;
  return page;
}

void PagePool::AddReference(int32_t page) {
  LOCKSTEP_CHECK(references_[page] > 0, "page {} is free", page);
  ++references_[page];
}

void PagePool::Drop(int32_t page) {
  LOCKSTEP_CHECK(references_[page] > 0, "page {} is free", page);
  if (--references_[page] == 0) free_.push_back(page);
}

}  // namespace lockstep
