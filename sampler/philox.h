// Philox4x32-10: the counter-based generator of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
#pragma once

#include <array>
#include <cstdint>

namespace lockstep {

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

// Ten rounds. For a fixed key this is a bijection of the counter.
PhiloxCounter Philox4x32(PhiloxCounter counter, PhiloxKey key);

}  // namespace lockstep
