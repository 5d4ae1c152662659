// Random requests and schedules, and the comparison of their results bit for bit: what the invariance tests of every
// backend run.
#pragma once

#include <cstdint>
#include <vector>

#include "rollout/worker/local_model.h"

namespace lockstep {

struct Tally {
  int64_t schedules = 0, tokens = 0, scored = 0, preemptions = 0, forked = 0;
};

// Requests of many shapes: groups, prefixes, filters, penalties, token lists, stops, prompt log-probabilities.
std::vector<RequestSpec> RandomRequests(const ModelSpec& spec, uint64_t seed);

// The same tokens, teacher-forced: prompt ++ prefix ++ generated, all positions scored.
RequestSpec ScoreOf(const RequestSpec& request, const CollectedSample& sample);

// What teacher forcing can know of a row: the same bits in both.
bool SameScores(const RowLogprobs& a, const RowLogprobs& b);

// Runs random requests alone on `model`, scores their results teacher-forced, and runs them again in `schedules` random
// schedules on `model` or `other` (the same weights, run in another way); every token and log-probability must have the
// same bits. Reports through GoogleTest's fatal failures.
void CheckInvariance(LocalModel& model, LocalModel& other, uint64_t seed, int schedules, Tally& tally);

}  // namespace lockstep
