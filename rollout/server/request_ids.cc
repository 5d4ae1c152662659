#include "rollout/server/request_ids.h"

#include <random>

#include "absl/strings/str_format.h"

namespace lockstep {

DrawnDefaults DrawDefaults() {
  // The operating system's generator: seeds of workers started together must differ, and ids must not be guessable.
  std::random_device device;
  const auto draw = [&device] { return (uint64_t{device()} << 32) | device(); };
  const uint64_t high = draw();
  const uint64_t low = draw();
  DrawnDefaults drawn;
  drawn.seed = draw();
  drawn.request_id = absl::StrFormat("%08x-%04x-4%03x-%04x-%012x", high >> 32, (high >> 16) & 0xffff, high & 0xfff,
                                     0x8000 | ((low >> 48) & 0x3fff), low & 0xffff'ffff'ffff);
  return drawn;
}

}  // namespace lockstep
