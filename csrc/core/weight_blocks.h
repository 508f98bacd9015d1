// SPDX-License-Identifier: Apache-2.0
// How the GGUF weight types store a row: blocks of 32 or 256 columns, little-endian, f16 scales
// (the GGUF specification's block_q4_0 ... block_q6_K). Packing and dequantise, on the CPU and
// on CUDA, read them by read_run. Everything is constexpr (callable from device code) and has
// internal linkage, because csrc/cpu compiles it once per instruction set.
#pragma once
#include <cstdint>

#include "core/weight.h"

namespace fullbeam {
namespace {

struct Block {
  int cols;
  int bytes;
};

[[maybe_unused]] constexpr Block block_of(WeightType type) {
  switch (type) {
    case WeightType::f32:
      return {1, 4};
    case WeightType::f16:
    case WeightType::bf16:
      return {1, 2};
    case WeightType::q8_0:
      return {32, 34};
    case WeightType::q4_0:
      return {32, 18};
    case WeightType::q4_1:
      return {32, 20};
    case WeightType::q5_0:
      return {32, 22};
    case WeightType::q5_1:
      return {32, 24};
    case WeightType::q4_k:
      return {256, 144};
    case WeightType::q5_k:
      return {256, 176};
    case WeightType::q6_k:
      return {256, 210};
  }
  return {1, 1};
}

// kCount neighbours of a row: value i is d * scale * (values[i] - zero_point) + m * minimum, d and
// m being f16 bits, zero_point that of layout_of(type).
template <int kCount>
struct WeightRun {
  std::uint8_t values[kCount];
  std::uint16_t d, m;
  int scale, minimum;
};

[[maybe_unused]] constexpr std::uint16_t u16_at(const std::uint8_t* p) {
  return static_cast<std::uint16_t>(p[0] | p[1] << 8);
}

// Of a quantised type; kCount divides 16, `col` is a multiple of it.
template <int kCount>
[[maybe_unused]] constexpr WeightRun<kCount> read_run(WeightType type, const std::uint8_t* row,
                                                      std::int64_t col) {
  WeightRun<kCount> run{{}, 0, 0, 1, 0};
  const Block block = block_of(type);
  const std::uint8_t* b = row + (block.cols == 32 ? col / 32 : col / 256) * block.bytes;
  const auto in32 = static_cast<int>(col % 32), in256 = static_cast<int>(col % 256);
  const int sub = in256 / 32;  // 32 columns of a block of 256
  const auto read = [&](auto value) {
    for (int i = 0; i < kCount; ++i) run.values[i] = static_cast<std::uint8_t>(value(i));
  };
  switch (type) {
    case WeightType::q4_0:
    case WeightType::q4_1:
    case WeightType::q5_0:
    case WeightType::q5_1: {
      run.d = u16_at(b);
      b += 2;
      if (type == WeightType::q4_1 || type == WeightType::q5_1) {
        run.m = u16_at(b);
        run.minimum = 1;
        b += 2;
      }
      const bool has_fifth = type == WeightType::q5_0 || type == WeightType::q5_1;
      const std::uint8_t* low = b + (has_fifth ? 4 : 0) + in32 % 16;
      const int shift = in32 / 16 * 4;
      if (has_fifth) {
        const std::uint8_t* high = b + in32 / 8;
        read([&](int i) { return (low[i] >> shift & 15) | (high[i / 8] >> i % 8 & 1) << 4; });
      } else {
        read([&](int i) { return low[i] >> shift & 15; });
      }
      break;
    }
    case WeightType::q4_k:
    case WeightType::q5_k: {
      run.d = u16_at(b);
      run.m = u16_at(b + 2);
      const std::uint8_t* s = b + 4;  // 6-bit scales and minima of the 8 sub-blocks in 12 bytes
      run.scale = sub < 4 ? s[sub] & 63 : (s[sub + 4] & 15) | (s[sub - 4] >> 6) << 4;
      run.minimum = -(sub < 4 ? s[sub + 4] & 63 : s[sub + 4] >> 4 | (s[sub] >> 6) << 4);
      const bool has_fifth = type == WeightType::q5_k;
      const std::uint8_t* high = b + 16 + in32;
      const std::uint8_t* low = b + (has_fifth ? 48 : 16) + sub / 2 * 32 + in32;
      const int shift = sub % 2 * 4;
      if (has_fifth) {
        read([&](int i) { return (low[i] >> shift & 15) | (high[i] >> sub & 1) << 4; });
      } else {
        read([&](int i) { return low[i] >> shift & 15; });
      }
      break;
    }
    case WeightType::q6_k: {
      run.d = u16_at(b + 208);
      run.scale = static_cast<std::int8_t>(b[192 + in256 / 16]);
      // 128 columns share 64 bytes of low halves and 32 of upper bits.
      const std::uint8_t* low = b + sub / 4 * 64 + sub % 2 * 32 + in32;
      const std::uint8_t* high = b + 128 + sub / 4 * 32 + in32;
      const int shift = sub % 4 / 2 * 4, high_shift = sub % 4 * 2;
      read([&](int i) { return (low[i] >> shift & 15) | (high[i] >> high_shift & 3) << 4; });
      break;
    }
    default:  // q8_0
      run.d = u16_at(b);
      read([&](int i) { return b[2 + in32 + i] ^ 0x80; });
  }
  return run;
}

}  // namespace
}  // namespace fullbeam
