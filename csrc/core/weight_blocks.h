// SPDX-License-Identifier: Apache-2.0
// How the GGUF weight types store a row: blocks of 32 or 256 columns, little-endian, f16 scales
// (the GGUF specification's block_q4_0 ... block_q6_K). Everything is constexpr (callable from
// device code) and has internal linkage, because csrc/cpu compiles it once per instruction set.
#pragma once
#include <cstdint>

#include "core/weight.h"

namespace fullbeam {
namespace {

// Eight neighbours of a row: value i is d * scale * q[i] + m * minimum, d and m being f16 bits.
struct WeightRun {
  int q[8];
  std::uint16_t d, m;
  int scale, minimum;
};

[[maybe_unused]] constexpr std::uint16_t u16_at(const std::uint8_t* p) {
  return static_cast<std::uint16_t>(p[0] | p[1] << 8);
}

// Of a quantised type; `col` is a multiple of 8.
[[maybe_unused]] constexpr WeightRun read_run(WeightType type, const std::uint8_t* row,
                                              std::int64_t col) {
  WeightRun run{{}, 0, 0, 1, 0};
  const auto in32 = static_cast<int>(col % 32), in256 = static_cast<int>(col % 256);
  const int sub = in256 / 32;  // 32 columns of a block of 256
  switch (type) {
    case WeightType::q4_0:
    case WeightType::q4_1:
    case WeightType::q5_0:
    case WeightType::q5_1: {
      const bool has_minimum = type == WeightType::q4_1 || type == WeightType::q5_1;
      const bool has_fifth = type == WeightType::q5_0 || type == WeightType::q5_1;
      const std::uint8_t* b = row + col / 32 * (18 + (has_minimum ? 2 : 0) + (has_fifth ? 4 : 0));
      run.d = u16_at(b);
      b += 2;
      if (has_minimum) {
        run.m = u16_at(b);
        run.minimum = 1;
        b += 2;
      }
      const int fifth = has_fifth ? b[in32 / 8] : 0;
      if (has_fifth) b += 4;
      const int zero_point = has_minimum ? 0 : has_fifth ? 16 : 8;
      for (int i = 0; i < 8; ++i) {
        run.q[i] =
            ((b[in32 % 16 + i] >> (in32 / 16 * 4) & 15) | (fifth >> i & 1) << 4) - zero_point;
      }
      break;
    }
    case WeightType::q4_k:
    case WeightType::q5_k: {
      const bool has_fifth = type == WeightType::q5_k;
      const std::uint8_t* b = row + col / 256 * (has_fifth ? 176 : 144);
      run.d = u16_at(b);
      run.m = u16_at(b + 2);
      const std::uint8_t* s = b + 4;  // 6-bit scales and minima of the 8 sub-blocks in 12 bytes
      run.scale = sub < 4 ? s[sub] & 63 : (s[sub + 4] & 15) | (s[sub - 4] >> 6) << 4;
      run.minimum = -(sub < 4 ? s[sub + 4] & 63 : s[sub + 4] >> 4 | (s[sub] >> 6) << 4);
      const std::uint8_t* low = b + (has_fifth ? 48 : 16) + sub / 2 * 32 + in32;
      for (int i = 0; i < 8; ++i) {
        run.q[i] = low[i] >> (sub % 2 * 4) & 15;
        if (has_fifth) run.q[i] |= (b[16 + in32 + i] >> sub & 1) << 4;
      }
      break;
    }
    case WeightType::q6_k: {
      const std::uint8_t* b = row + col / 256 * 210;
      run.d = u16_at(b + 208);
      run.scale = static_cast<std::int8_t>(b[192 + in256 / 16]);
      // 128 columns share 64 bytes of low halves and 32 of upper bits.
      const std::uint8_t* low = b + sub / 4 * 64 + sub % 2 * 32 + in32;
      const std::uint8_t* high = b + 128 + sub / 4 * 32 + in32;
      for (int i = 0; i < 8; ++i) {
        run.q[i] = ((low[i] >> (sub % 4 / 2 * 4) & 15) | (high[i] >> (sub % 4 * 2) & 3) << 4) - 32;
      }
      break;
    }
    default: {  // q8_0
      const std::uint8_t* b = row + col / 32 * 34;
      run.d = u16_at(b);
      for (int i = 0; i < 8; ++i) run.q[i] = static_cast<std::int8_t>(b[2 + in32 + i]);
    }
  }
  return run;
}

}  // namespace
}  // namespace fullbeam
