// Where the ranks of a unique id meet: a thread of the process that made the id, as with NCCL. It ends when all have
// come, or when the last communicator of this process that was made with the id is gone.
#pragma once

#include <cstdint>
#include <vector>

#include "tests/fake_nccl/io.h"

namespace fake_nccl {

// Opens one and writes its address.
Result MakeUniqueId(lockstep::nccl::UniqueId* id);

// A communicator's part. In this order; Leave in any case.
void Join(const lockstep::nccl::UniqueId& id);
// Waits until all have come. ports: by rank, where each listens. kInvalidUsage: the ranks contradict one another.
Result Meet(const lockstep::nccl::UniqueId& id, int nranks, int rank, uint16_t port, const Stop& stop,
            std::vector<uint16_t>* ports);
void Leave(const lockstep::nccl::UniqueId& id);

uint64_t NonceOf(const lockstep::nccl::UniqueId& id);

}  // namespace fake_nccl
