// SPDX-License-Identifier: Apache-2.0
// Counter-based random bits: Philox 4x32 with 10 rounds, the same on every backend.
// Source: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
// Everything is constexpr (callable from device code) and has internal linkage, because csrc/cpu
// compiles it once per instruction set.
#pragma once
#include <cstdint>

namespace fullbeam {
namespace {

struct Philox {
  std::uint32_t word[4];
};

[[maybe_unused]] constexpr Philox philox(std::uint64_t seed, Philox counter) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter.word[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<std::uint32_t>(product1),
                static_cast<std::uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<std::uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// 53 random bits of the first two words, in [0, 1).
[[maybe_unused]] constexpr double philox_uniform(std::uint64_t seed, Philox counter) {
  const Philox bits = philox(seed, counter);
  return ((bits.word[0] >> 5) * 67108864.0 + (bits.word[1] >> 6)) / 9007199254740992.0;
}

// Known answers, published with Random123.
static_assert(philox(0, {{0, 0, 0, 0}}).word[0] == 0x6627e8d5u);
static_assert(philox(~std::uint64_t{0}, {{~0u, ~0u, ~0u, ~0u}}).word[3] == 0x6d5451fdu);

}  // namespace
}  // namespace fullbeam
