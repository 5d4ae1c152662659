// Reference-counted page ids. A page is shared by the sequences forked from one prompt; it is free again when the last
// of them lets go.
#pragma once

#include <cstdint>
#include <vector>

namespace lockstep {

class PagePool {
 public:
  explicit PagePool(int64_t pages);

  int64_t total() const { return static_cast<int64_t>(references_.size()); }
  int64_t free() const { return static_cast<int64_t>(free_.size()); }
  int64_t used() const { return total() - free(); }

  // A page with one reference. There must be a free one.
  int32_t Take();
  void AddReference(int32_t page);
  void Drop(int32_t page);

 private:
  std::vector<int32_t> references_;  // by page id
  std::vector<int32_t> free_;        // a stack: the page used last is the one still in cache
};

}  // namespace lockstep
