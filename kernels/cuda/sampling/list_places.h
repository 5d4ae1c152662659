// Which request's token lists lie in which of the device's places, all of one size. No device here.
//
// A request's lists stay where they are until it ends, whichever of its samples run. Requests that have not ended may
// be more than there are places, since what memory pushes out waits: then the place of the one whose samples were away
// longest is taken, and its lists come again when they are back. A step never needs more places than sequences run at
// once, so with one for each of those there is always one to take.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace lockstep::cuda {

class ListPlaces {
 public:
  explicit ListPlaces(int64_t count) : places_(count) {}

  struct Found {
    int64_t place = 0;
    bool fresh = false;  // what lies there is not the request's yet
  };
  // The request's place, its own until the step ends at least. There is one if the step's requests are no more than the
  // places. request: not 0.
  Found Find(uint64_t request);
  // The request has ended. What the step in preparation found stays as it is until that ends.
  void Forget(uint64_t request);
  // The device has done all of the step that Find was called for.
  void EndStep() { ++step_; }

  int64_t used() const { return static_cast<int64_t>(by_request_.size()); }

 private:
  struct Place {
    uint64_t request = 0;  // 0: nobody's
    int64_t last_step = 0;
  };
  // One that the step does not use: nobody's, or the one longest unused.
  int64_t Free() const;

  std::vector<Place> places_;
  absl::flat_hash_map<uint64_t, int64_t> by_request_;
  int64_t step_ = 1;
};

}  // namespace lockstep::cuda
