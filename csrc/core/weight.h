// SPDX-License-Identifier: Apache-2.0
// How a weight matrix lies in memory for the matrix products: the layout that core/packed_weight.cc
// writes, and cpu/linear and cpu/embedding read.
//
// Rows are grouped in panels of 16, columns of quantised types in tiles of 32; a panel is its tiles
// one after another. In a tile, step s (0..7) is the 64 values of 16 rows x 4 consecutive columns,
// value 4 * row + column % 4: a register of values against one broadcast group of 4 activations.
// Values are stored unsigned, `zero_point` to be taken away:
//
//   4 bits  256 bytes; byte i of chunk c (0..3) holds step c in its low and step c + 4 in its high
//           half
//   5 bits  the same, then 64 bytes whose bit s is bit 4 of step s
//   6 bits  the same as 4, then 128 bytes: chunk h (0..1) holds bits 4-5 of step 4 * h + j at bits
//           2 * j
//   8 bits  512 bytes, step after step; or in halves, so that cpu/linear can do without most of the
//           lower ones where only the largest value matters: the upper halves as 4 bits, the lower
//           ones likewise in memory of their own, 256 bytes a tile
//
// Scales follow the values of the tile, 16 rows each:
//
//   d    d as f16; Q4_0 Q5_0 Q8_0            value = d * (u - zero_point)
//   dm   d, m as f16; Q4_1 Q5_1              value = d * u + m
//   k    scale, minimum as u8; Q4_K Q5_K     value = d * scale * u - dmin * minimum
//        every 8 tiles are preceded by d, dmin as f16
//   k16  two times scale as i8 (columns 0-15, 16-31); Q6_K
//        every 8 tiles are preceded by d as f16
//                                            value = d * scale * (u - zero_point)
//
// Float types (F32, F16, BF16) keep their elements: [cols, 16] per panel.
#pragma once
#include <cstdint>

namespace fullbeam {

enum class WeightType : std::int32_t {
  f32,
  f16,
  bf16,
  q8_0,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q4_k,
  q5_k,
  q6_k
};
enum class ScaleKind : std::int32_t { d, dm, k, k16 };

constexpr std::int64_t kPanelRows = 16;
constexpr std::int64_t kTileCols = 32;
constexpr std::int64_t kTilesPerSuper = 8;

struct QuantLayout {
  int bits;
  ScaleKind scales;
  int zero_point;
  bool in_halves = false;
  constexpr std::int64_t value_bytes() const { return in_halves ? 256 : 64 * bits; }
  constexpr std::int64_t low_bytes() const { return in_halves ? 256 : 0; }  // of a tile
  constexpr std::int64_t tile_bytes() const {
    return value_bytes() + (scales == ScaleKind::dm ? 64 : 32);
  }
  constexpr std::int64_t super_bytes() const {
    return scales == ScaleKind::k ? 64 : scales == ScaleKind::k16 ? 32 : 0;
  }
};

constexpr bool is_quantised(WeightType type) {
  return static_cast<int>(type) >= static_cast<int>(WeightType::q8_0);
}

// `in_halves`: of a type of 8 bits.
constexpr QuantLayout layout_of(WeightType type, bool in_halves = false) {
  switch (type) {
    case WeightType::q4_0:
      return {4, ScaleKind::d, 8};
    case WeightType::q4_1:
      return {4, ScaleKind::dm, 0};
    case WeightType::q5_0:
      return {5, ScaleKind::d, 16};
    case WeightType::q5_1:
      return {5, ScaleKind::dm, 0};
    case WeightType::q4_k:
      return {4, ScaleKind::k, 0};
    case WeightType::q5_k:
      return {5, ScaleKind::k, 0};
    case WeightType::q6_k:
      return {6, ScaleKind::k16, 32};
    default:
      return {8, ScaleKind::d, 128, in_halves};
  }
}

// Rows [row_begin, row_begin + num_rows) of a matrix, all of one type.
struct WeightSegment {
  const std::uint8_t* data;  // panels, 64-byte aligned
  WeightType type;
  std::int64_t row_begin, num_rows;
  std::int64_t panel_begin, num_panels;  // among the panels of all segments
  std::int64_t panel_bytes;
  const std::uint8_t* low;  // the panels' lower halves; nullptr where values are whole
  std::int64_t low_bytes;   // of a panel
};

}  // namespace fullbeam
