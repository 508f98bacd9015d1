// SPDX-License-Identifier: Apache-2.0
// What linear.cc and linear_largest.h make products of: activations quantised and laid out by
// turns, and one panel of 16 rows against some of them, sums written to `out`.
#pragma once
#include "cpu/linear.h"
#include "ops/linear.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// Bytes of weights from use to prefetch, into L2: L1 has too few misses in flight to keep the
// memory busy while products run. Measured on Zen 4 (weights in memory, 2 threads), time against
// no prefetch: 0.75-0.88 at 1 token and 0.50-0.71 at 8; into L1 0.84-0.96 and 0.62-0.74.
constexpr std::int64_t kAhead = 8192;
// From there to L1, which pays for 4-bit tiles alone: Q4_K at 1 to 8 tokens 0.72-0.90, at 16 0.92;
// Q5_0, Q6_K and Q8_0 0.94-1.17.
constexpr std::int64_t kAhead4 = 2304;

// Quantised activations, by the turns in which tokens meet the panels and, inside a turn, by tiles:
// what a panel meets lies together, in the order of its tiles. Turns are about equally long, as two
// whose sums stay in registers beat a longer and a shorter one; above kMaxTokens they are multiples
// of it.
struct Activations {
  std::int8_t* values;    // 32 at each place
  float* scales;          // one at each place
  float* scaled_sums;     // scale * sum of the 32 values
  std::int32_t* offsets;  // kNumOffsets arrays, one value at each place
  std::int64_t num_tiles, num_tokens, turn_tokens;

  static std::int64_t bytes(std::int64_t num_tiles, std::int64_t num_tokens) {
    return num_tiles * num_tokens * (kTileCols + 4 + 4 + 4 * kNumOffsets) + 256;
  }
  Activations(void* memory, std::int64_t tiles, std::int64_t tokens)
      : num_tiles(tiles), num_tokens(tokens) {
    const std::int64_t most = tokens <= 2 * kMaxTokens ? kMaxTokens : kMaxTurn;
    const std::int64_t num_turns = (tokens + most - 1) / most;
    turn_tokens = tokens > 0 ? (tokens + num_turns - 1) / num_turns : 1;
    if (turn_tokens > kMaxTokens)
      turn_tokens = (turn_tokens + kMaxTokens - 1) / kMaxTokens * kMaxTokens;
    values = static_cast<std::int8_t*>(memory);
    offsets = reinterpret_cast<std::int32_t*>(values + num_places() * kTileCols);
    scales = reinterpret_cast<float*>(offsets + num_places() * kNumOffsets);
    scaled_sums = scales + num_places();
  }
  std::int64_t num_places() const { return num_tiles * num_tokens; }
  // Tokens of the turn that begins at token `begin`.
  std::int64_t turn_count(std::int64_t begin) const {
    return num_tokens - begin < turn_tokens ? num_tokens - begin : turn_tokens;
  }
  std::int64_t place(std::int64_t token, std::int64_t tile) const {
    const std::int64_t begin = token / turn_tokens * turn_tokens;
    return begin * num_tiles + tile * turn_count(begin) + (token - begin);
  }
};

// 32 activations -> their place.
FULLBEAM_INLINE void quantise_tile(const float* x, const Activations& a, std::int64_t at) {
  F32 largest = set1(0.0f), poison = set1(0.0f);  // poison: 0, or NaN where a value is not finite
  for (int i = 0; i < kTileCols; i += kLanes) {
    const F32 v = load(x + i);
    largest = max(max(v, sub(set1(0.0f), v)), largest);
    poison = fma(v, set1(0.0f), poison);
  }
  const float amax = reduce_max(largest);
  const float scale = has_nan(poison) ? __builtin_nanf("") : amax / 127.0f;
  const F32 inverse = set1(amax > 0.0f ? 127.0f / amax : 0.0f), limit = set1(127.0f);
  std::int32_t sums[2] = {0, 0};
  for (int i = 0; i < kTileCols; i += kLanes) {
    // min and max give their second operand where the first is NaN.
    const F32 value = max(min(mul(load(x + i), inverse), limit), sub(set1(0.0f), limit));
    sums[i / 16] += store_i8(a.values + at * kTileCols + i, value);
  }
  a.scales[at] = scale;
  write_offsets(a.offsets + at, a.num_places(), sums[0], sums[1]);
  a.scaled_sums[at] = scale * static_cast<float>(sums[0] + sums[1]);
}

// Tiles [begin, end) of `count` tokens of a turn: what lies together is written together.
void quantise_tiles(const LinearParams& p, std::int64_t token, std::int64_t count,
                    std::int64_t begin, std::int64_t end, const Activations& a) {
  for (std::int64_t tile = begin; tile < end; ++tile) {
    const std::int64_t at = a.place(token, tile);
    for (std::int64_t t = 0; t < count; ++t) {
      const float* x = p.x + (token + t) * p.x_stride + tile * kTileCols;
      __builtin_prefetch(x + 4 * kTileCols);  // so short a piece of a row starts no hardware's
      __builtin_prefetch(x + 4 * kTileCols + 16);
      quantise_tile(x, a, at + t);
    }
  }
}

// A thread's share of the tiles of all tokens, few tokens at a time.
void quantise_share(const LinearParams& p, const Activations& a, int thread_idx, int num_threads) {
  const std::int64_t few = a.turn_tokens < kMaxTokens ? a.turn_tokens : kMaxTokens;
  const std::int64_t count = (p.num_tokens + few - 1) / few * a.num_tiles;
  const std::int64_t end = count * (thread_idx + 1) / num_threads;
  for (std::int64_t i = count * thread_idx / num_threads; i < end;) {
    const std::int64_t token = i / a.num_tiles * few, tile = i % a.num_tiles;
    const std::int64_t left = p.num_tokens - token;
    const std::int64_t rest = a.num_tiles - tile < end - i ? a.num_tiles - tile : end - i;
    quantise_tiles(p, token, left < few ? left : few, tile, tile + rest, a);
    i += rest;
  }
}

constexpr bool has_super(ScaleKind scales) {
  return scales == ScaleKind::k || scales == ScaleKind::k16;
}

// What turns a tile's integer sums into floats: per row, in registers.
template <ScaleKind kScales>
struct TileScales {
  F32 d[kScales == ScaleKind::k16 ? 2 : 1][kParts];
  F32 m[kParts];

  // `super`: what precedes every 8 tiles.
  FULLBEAM_INLINE TileScales(const std::uint8_t* scales, const F32 (*super)[kParts]) {
    const auto* halves = reinterpret_cast<const Half*>(scales);
    for (int i = 0; i < kParts; ++i) {
      if constexpr (kScales == ScaleKind::d) {
        d[0][i] = load(halves + i * kLanes);
      } else if constexpr (kScales == ScaleKind::dm) {
        d[0][i] = load(halves + i * kLanes);
        m[i] = load(halves + 16 + i * kLanes);
      } else if constexpr (kScales == ScaleKind::k) {
        d[0][i] = mul(super[0][i], widen_u8(scales + i * kLanes));
        m[i] = mul(super[1][i], widen_u8(scales + 16 + i * kLanes));
      } else {
        d[0][i] = mul(super[0][i], widen_i8(scales + i * kLanes));
        d[1][i] = mul(super[0][i], widen_i8(scales + 16 + i * kLanes));
      }
    }
  }
};

template <int kBits, Form kForm, ScaleKind kScales, int kOffset, int kTokens>
FULLBEAM_INLINE void add_tile(const Tile<kBits, kForm>& tile, const TileScales<kScales>& scales,
                              const Activations& a, std::int64_t at, F32 (*acc)[kParts]) {
  constexpr bool kHalves = kScales == ScaleKind::k16;
  I32 sums[kHalves ? 2 : 1][kTokens][kParts];
  dot_tile<kBits, kForm, kHalves, kOffset, kTokens>(tile, a.values + at * kTileCols, a.offsets + at,
                                                    a.num_places(), sums);
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const F32 x_scale = set1(a.scales[at + t]);
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
      F32 sum;
      if constexpr (kHalves) {
        const F32 first = mul(to_f32(sums[0][t][i]), scales.d[0][i]);
        sum = fma(fma(to_f32(sums[1][t][i]), scales.d[1][i], first), x_scale, acc[t][i]);
      } else {
        sum = fma(to_f32(sums[0][t][i]), mul(scales.d[0][i], x_scale), acc[t][i]);
      }
      if constexpr (kScales == ScaleKind::dm || kScales == ScaleKind::k) {
        sum = fma(scales.m[i], set1(a.scaled_sums[at + t]), sum);
      }
      acc[t][i] = sum;
    }
  }
}

// A panel of weights.
struct Panel {
  const std::uint8_t *data, *low;

  Panel ahead() const { return {data + kAhead, low == nullptr ? low : low + kAhead}; }
};

// One panel of 16 rows against a turn's tokens [begin, begin + count), sums left in `out`; `ahead`
// is prefetched meanwhile. kFew: the count where the sums stay in registers, else 0. As bounds,
// sums are at least the true ones, as float32 gives them.
template <int kBits, Form kForm, ScaleKind kScales, int kFew>
__attribute__((noinline)) void some_tokens(const Panel& panel, const Activations& a,
                                           std::int64_t begin, std::int64_t count,
                                           const Panel& ahead, F32 (*out)[kParts]) {
  constexpr QuantLayout kLayout{kBits, kScales, 0, kForm == Form::halves};
  constexpr bool kHasZeroPoint = kScales == ScaleKind::d || kScales == ScaleKind::k16;
  constexpr int kOffset = kForm == Form::bounds ? kBoundOffset
                          : kHasZeroPoint       ? offset_place(kBits)
                                                : -1;
  const std::uint8_t *p = panel.data, *low = panel.low;
  const std::int64_t to_ahead = ahead.data - p, low_to_ahead = ahead.low - low;
  F32 few[kFew > 0 ? kFew : 1][kParts], super[2][kParts];
  [[maybe_unused]] F32 least = set1(0.0f);  // of the scales
#pragma GCC unroll 8
  for (int t = 0; t < kFew; ++t) {  // unrolled, or the sums would stay in memory
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) few[t][i] = set1(0.0f);
  }
  for (std::int64_t t = 0; t < (kFew > 0 ? 0 : count); ++t) {
    for (int i = 0; i < kParts; ++i) out[t][i] = set1(0.0f);
  }
  std::int64_t at = a.place(begin, 0);
  const std::int64_t stride = a.place(begin, 1) - at;
  const std::int64_t run = has_super(kScales) ? kTilesPerSuper : a.num_tiles;
  for (std::int64_t first = 0; first < a.num_tiles; first += run) {
    if constexpr (has_super(kScales)) {
      const auto* halves = reinterpret_cast<const Half*>(p);
      for (int i = 0; i < kParts; ++i) {
        super[0][i] = load(halves + i * kLanes);
        if constexpr (kScales == ScaleKind::k)
          super[1][i] = sub(set1(0.0f), load(halves + 16 + i * kLanes));
      }
      p += kLayout.super_bytes();
    }
    for (std::int64_t tile = 0; tile < run; ++tile) {
      for (std::int64_t line = 0; line < kLayout.tile_bytes(); line += 64) {
        __builtin_prefetch(p + to_ahead + line, 0, 2);
        if constexpr (kBits == 4) __builtin_prefetch(p + kAhead4 + line, 0, 3);
      }
      for (std::int64_t line = 0; line < kLayout.low_bytes(); line += 64)
        __builtin_prefetch(low + low_to_ahead + line, 0, 2);
      const Tile<kBits, kForm> values(p, low);
      TileScales<kScales> scales(p + kLayout.value_bytes(), super);
      if constexpr (kForm == Form::bounds) {
        for (int i = 0; i < kParts; ++i) {
          least = min(scales.d[0][i], least);
          scales.d[0][i] = mul(scales.d[0][i], set1(16.0f));
        }
      }
      if constexpr (kFew > 0) {
        add_tile<kBits, kForm, kScales, kOffset, kFew>(values, scales, a, at, few);
      } else {
        std::int64_t t = 0;
        for (; t + kMaxTokens <= count; t += kMaxTokens)
          add_tile<kBits, kForm, kScales, kOffset, kMaxTokens>(values, scales, a, at + t, out + t);
        for (; t < count; ++t)
          add_tile<kBits, kForm, kScales, kOffset, 1>(values, scales, a, at + t, out + t);
      }
      p += kLayout.tile_bytes();
      low += kLayout.low_bytes();
      at += stride;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kFew; ++t) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) out[t][i] = few[t][i];
  }
  if constexpr (kForm == Form::bounds) {
    // A scale below 0 makes the bounds lower ones, and one that is not finite no numbers.
    const bool is_bound = reduce_max(sub(set1(0.0f), least)) <= 0.0f;
    const F32 none = set1(__builtin_inff());
    for (std::int64_t t = 0; t < count; ++t) {
      for (int i = 0; i < kParts; ++i) out[t][i] = is_bound ? min(out[t][i], none) : none;
    }
  }
}

template <int kBits, Form kForm, ScaleKind kScales, int kFew = kMaxTokens>
void few_tokens(const Panel& panel, const Activations& a, std::int64_t begin, std::int64_t count,
                const Panel& ahead, F32 (*out)[kParts]) {
  if (count == kFew)
    return some_tokens<kBits, kForm, kScales, kFew>(panel, a, begin, count, ahead, out);
  if constexpr (kFew > 1)
    few_tokens<kBits, kForm, kScales, kFew - 1>(panel, a, begin, count, ahead, out);
}

// The same for any count.
template <int kBits, ScaleKind kScales, Form kForm = Form::whole>
void quantised_panel(const Panel& panel, const Activations& a, std::int64_t begin,
                     std::int64_t count, const Panel& ahead, F32 (*out)[kParts]) {
  if (count <= kMaxTokens)
    return few_tokens<kBits, kForm, kScales>(panel, a, begin, count, ahead, out);
  if constexpr (kMaxTurn > kMaxTokens)
    some_tokens<kBits, kForm, kScales, 0>(panel, a, begin, count, ahead, out);
}

// Float weights and float activations: sums over even and odd columns apart, joined at the end.
template <class T, int kTokens>
void float_tokens(const T* panel, const LinearParams& p, std::int64_t begin, F32 (*out)[kParts]) {
  F32 acc[2][kTokens][kParts];
  for (int parity = 0; parity < 2; ++parity) {
    for (int t = 0; t < kTokens; ++t) {
      for (int i = 0; i < kParts; ++i) acc[parity][t][i] = set1(0.0f);
    }
  }
  const float* x = p.x + begin * p.x_stride;
  for (std::int64_t col = 0; col < p.cols; ++col) {
    const bool is_odd = col & 1;
    for (int i = 0; i < kParts; ++i) {
      const F32 w = load(panel + col * kPanelRows + i * kLanes);
      for (int t = 0; t < kTokens; ++t) {
        F32& sum = is_odd ? acc[1][t][i] : acc[0][t][i];
        sum = fma(w, set1(x[t * p.x_stride + col]), sum);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < kParts; ++i) out[t][i] = add(acc[0][t][i], acc[1][t][i]);
  }
}

template <class T>
void float_panel(const std::uint8_t* data, const LinearParams& p, std::int64_t begin,
                 std::int64_t count, F32 (*out)[kParts]) {
  const T* panel = reinterpret_cast<const T*>(data);
  std::int64_t t = 0;
  for (; t + 2 <= count; t += 2) float_tokens<T, 2>(panel, p, begin + t, out + t);
  for (; t < count; ++t) float_tokens<T, 1>(panel, p, begin + t, out + t);
}

Panel panel_at(const WeightSegment& segment, std::int64_t panel) {
  return {segment.data + panel * segment.panel_bytes, segment.low + panel * segment.low_bytes};
}

void one_panel(const LinearParams& p, const WeightSegment& segment, std::int64_t idx,
               const Activations& a, std::int64_t begin, std::int64_t count, const Panel& ahead,
               F32 (*out)[kParts]) {
  const Panel panel = panel_at(segment, idx);
  switch (segment.type) {
    case WeightType::f32:
      return float_panel<float>(panel.data, p, begin, count, out);
    case WeightType::f16:
      return float_panel<Half>(panel.data, p, begin, count, out);
    case WeightType::bf16:
      return float_panel<BFloat>(panel.data, p, begin, count, out);
    case WeightType::q8_0:
      if (panel.low != nullptr)
        return quantised_panel<8, ScaleKind::d, Form::halves>(panel, a, begin, count, ahead, out);
      return quantised_panel<8, ScaleKind::d>(panel, a, begin, count, ahead, out);
    case WeightType::q4_0:
      return quantised_panel<4, ScaleKind::d>(panel, a, begin, count, ahead, out);
    case WeightType::q4_1:
      return quantised_panel<4, ScaleKind::dm>(panel, a, begin, count, ahead, out);
    case WeightType::q5_0:
      return quantised_panel<5, ScaleKind::d>(panel, a, begin, count, ahead, out);
    case WeightType::q5_1:
      return quantised_panel<5, ScaleKind::dm>(panel, a, begin, count, ahead, out);
    case WeightType::q4_k:
      return quantised_panel<4, ScaleKind::k>(panel, a, begin, count, ahead, out);
    case WeightType::q5_k:
      return quantised_panel<5, ScaleKind::k>(panel, a, begin, count, ahead, out);
    case WeightType::q6_k:
      return quantised_panel<6, ScaleKind::k16>(panel, a, begin, count, ahead, out);
  }
}

void write_panel(const LinearParams& p, const WeightSegment& segment, std::int64_t panel,
                 std::int64_t begin, std::int64_t count, const F32 (*acc)[kParts]) {
  const std::int64_t first = segment.row_begin + panel * kPanelRows;
  const std::int64_t left = segment.num_rows - panel * kPanelRows;
  for (std::int64_t t = 0; t < count; ++t) {
    float* out = p.out + (begin + t) * p.out_stride + first;
    const float* residual =
        p.residual == nullptr ? nullptr : p.residual + (begin + t) * p.residual_stride + first;
    if (left >= kPanelRows) {
      for (int i = 0; i < kParts; ++i) {
        F32 value = acc[t][i];
        if (p.bias != nullptr) value = add(value, load(p.bias + first + i * kLanes));
        if (residual != nullptr) value = add(value, load(residual + i * kLanes));
        store(out + i * kLanes, value);
      }
      continue;
    }
    float values[kPanelRows];
    for (int i = 0; i < kParts; ++i) store(values + i * kLanes, acc[t][i]);
    for (std::int64_t row = 0; row < left; ++row) {
      float value = values[row];
      if (p.bias != nullptr) value += p.bias[first + row];
      if (residual != nullptr) value += residual[row];
      out[row] = value;
    }
  }
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
