#include "kernels/cuda/sampling/list_places.h"

#include <algorithm>

#include "rollout/base/check.h"

namespace lockstep::cuda {

ListPlaces::Found ListPlaces::Find(uint64_t request) {
  LOCKSTEP_CHECK(request != 0, "token lists of a task that is no request's");
  const auto entry = by_request_.find(request);
  if (entry != by_request_.end()) {
    places_[entry->second].last_step = step_;
    return {.place = entry->second, .fresh = false};
  }
  const int64_t place = Free();
  if (places_[place].request != 0) by_request_.erase(places_[place].request);
  places_[place] = {.request = request, .last_step = step_};
  by_request_[request] = place;
  return {.place = place, .fresh = true};
}

void ListPlaces::Forget(uint64_t request) {
  const auto entry = by_request_.find(request);
  if (entry == by_request_.end()) return;
  places_[entry->second].request = 0;
  by_request_.erase(entry);
}

int64_t ListPlaces::Free() const {
  const auto best = std::min_element(places_.begin(), places_.end(), [this](const Place& a, const Place& b) {
    const auto rank = [this](const Place& place) { return place.last_step == step_ ? 2 : place.request != 0 ? 1 : 0; };
    return rank(a) != rank(b) ? rank(a) < rank(b) : a.last_step < b.last_step;
  });
  LOCKSTEP_CHECK(best != places_.end() && best->last_step != step_,
                 "a step of more requests with token lists than {} places", places_.size());
  return best - places_.begin();
}

}  // namespace lockstep::cuda
