// SPDX-License-Identifier: Apache-2.0
// Embedding look-up: out[i] = scale * table[token_ids[i]] [+ residual[i]], from the packed layout
// of core/weight.h. Mapping: a token is a row; its 32 values per tile are gathered from the tile's
// steps. Cost: cols bytes and scales of scattered loads per token, never more than a few
// microseconds. Numerics: exact products in float32, d * scale first; the same values as the matrix
// product of a tied head sees.
#include "ops/embedding.h"

#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

float half_at(const std::uint8_t* p, std::int64_t idx) {
  Half value;
  std::memcpy(&value, p + 2 * idx, 2);
  return to_float(value);
}

int value_at(const QuantLayout& layout, const std::uint8_t* tile, const std::uint8_t* low, int step,
             int at) {
  if (layout.bits == 8 && !layout.in_halves) return tile[step * 64 + at];
  int value = tile[step % 4 * 64 + at] >> (step / 4 * 4) & 15;
  if (layout.bits == 5) value |= (tile[256 + at] >> step & 1) << 4;
  if (layout.bits == 6) value |= (tile[256 + step / 4 * 64 + at] >> (step % 4 * 2) & 3) << 4;
  if (layout.in_halves) value = value << 4 | (low[step % 4 * 64 + at] >> (step / 4 * 4) & 15);
  return value;
}

void quantised_row(const WeightSegment& segment, std::int64_t row, std::int64_t cols, float scale,
                   float* out) {
  const QuantLayout layout = layout_of(segment.type, segment.low != nullptr);
  const std::uint8_t* tile = segment.data + row / kPanelRows * segment.panel_bytes;
  const std::uint8_t* low = segment.low + row / kPanelRows * segment.low_bytes;
  const auto lane = static_cast<int>(row % kPanelRows);
  const std::uint8_t* super = tile;
  for (std::int64_t t = 0; t < cols / kTileCols; ++t) {
    if (layout.super_bytes() > 0 && t % kTilesPerSuper == 0) {
      super = tile;
      tile += layout.super_bytes();
    }
    const std::uint8_t* scales = tile + layout.value_bytes();
    float d[2], m = 0.0f;
    switch (layout.scales) {
      case ScaleKind::k:
        d[0] = d[1] = half_at(super, lane) * static_cast<float>(scales[lane]);
        m = -half_at(super + 32, lane) * static_cast<float>(scales[16 + lane]);
        break;
      case ScaleKind::k16:
        d[0] = half_at(super, lane) * static_cast<float>(static_cast<std::int8_t>(scales[lane]));
        d[1] =
            half_at(super, lane) * static_cast<float>(static_cast<std::int8_t>(scales[16 + lane]));
        break;
      default:
        d[0] = d[1] = half_at(scales, lane);
        if (layout.scales == ScaleKind::dm) m = half_at(scales + 32, lane);
    }
    for (int i = 0; i < kTileCols; ++i) {
      const int value = value_at(layout, tile, low, i / 4, lane * 4 + i % 4) - layout.zero_point;
      out[t * kTileCols + i] = (d[i / 16] * static_cast<float>(value) + m) * scale;
    }
    tile += layout.tile_bytes();
    low += layout.low_bytes();
  }
}

template <class T>
void float_row(const WeightSegment& segment, std::int64_t row, std::int64_t cols, float scale,
               float* out) {
  const T* panel =
      reinterpret_cast<const T*>(segment.data + row / kPanelRows * segment.panel_bytes);
  for (std::int64_t i = 0; i < cols; ++i)
    out[i] = to_float(panel[i * kPanelRows + row % kPanelRows]) * scale;
}

template <class T>
void dense_row(const EmbeddingParams& p, std::int64_t row, float* out) {
  const T* from = static_cast<const T*>(p.table) + row * p.table_stride;
  for (std::int64_t i = 0; i < p.cols; ++i) out[i] = to_float(from[i]) * p.scale;
}

void look_up(const EmbeddingParams& p, std::int64_t token_id, float* out) {
  if (token_id >= 0 && token_id < p.table_rows) {
    switch (p.table_dtype) {
      case DType::f16:
        return dense_row<Half>(p, token_id, out);
      case DType::bf16:
        return dense_row<BFloat>(p, token_id, out);
      default:
        return dense_row<float>(p, token_id, out);
    }
  }
  for (std::int64_t s = 0; s < p.num_segments; ++s) {
    const WeightSegment& segment = p.segments[s];
    const std::int64_t row = token_id - segment.row_begin;
    if (row < 0 || row >= segment.num_rows) continue;
    switch (segment.type) {
      case WeightType::f32:
        return float_row<float>(segment, row, p.cols, p.scale, out);
      case WeightType::f16:
        return float_row<Half>(segment, row, p.cols, p.scale, out);
      case WeightType::bf16:
        return float_row<BFloat>(segment, row, p.cols, p.scale, out);
      default:
        return quantised_row(segment, row, p.cols, p.scale, out);
    }
  }
  for (std::int64_t i = 0; i < p.cols; ++i) out[i] = 0.0f;
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  parallel_for(p.num_tokens, 4, [&](std::int64_t begin, std::int64_t end) {
    float* spare = p.residual == nullptr
                       ? nullptr
                       : static_cast<float*>(scratch(p.cols * std::int64_t{sizeof(float)}));
    for (std::int64_t token = begin; token < end; ++token) {
      float* out = static_cast<float*>(p.out) + token * p.out_stride;
      if (p.residual == nullptr) {
        look_up(p, p.token_ids[token], out);
        continue;
      }
      const float* residual = static_cast<const float*>(p.residual) + token * p.residual_stride;
      look_up(p, p.token_ids[token], spare);
      for (std::int64_t i = 0; i < p.cols; ++i) out[i] = spare[i] + residual[i];
    }
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
