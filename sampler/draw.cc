// The random number of one generated position.
#include "sampler/philox.h"
#include "sampler/sampler.h"

namespace lockstep {
namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection that mixes all bits.
uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace

uint64_t PromptHash(std::span<const int32_t> tokens) {
  uint64_t hash = tokens.size();
  for (const int32_t token : tokens) hash = Mix(hash ^ (static_cast<uint32_t>(token) + 0x9E3779B97F4A7C15u));
  return hash;
}

double UniformDraw(const DrawKey& key) {
  // All 192 bits of the key enter, each in its own place: two different keys never share a Philox block.
  const PhiloxCounter block = Philox4x32({key.position, key.sample_index, static_cast<uint32_t>(key.prompt_hash),
                                          static_cast<uint32_t>(key.prompt_hash >> 32)},
                                         {static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32)});
  const uint64_t bits = (static_cast<uint64_t>(block[0]) << 32 | block[1]) >> 12;
  return static_cast<double>(2 * bits + 1) * 0x1p-53;
}

}  // namespace lockstep
