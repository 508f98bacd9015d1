// SPDX-License-Identifier: Apache-2.0
// The inner product of one tile: 16 rows x 32 columns of unsigned values against int8 activations
// of up to kMaxTokens tokens, in exact int32. One version per instruction set; everything else
// about the matrix product is in linear_panel.h and linear.cc.
#pragma once
#include "core/weight.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr int kParts =
    static_cast<int>(kPanelRows) / kLanes;  // registers that hold 16 rows of float32 or int32

// What the zero points of the types take off a tile's sum, per token: minus zero point times the
// sum of the activations, for zero points 8, 16 and 128, and 32 for each half of the columns.
static_assert(layout_of(WeightType::q4_0).zero_point == 8 &&
              layout_of(WeightType::q5_0).zero_point == 16 &&
              layout_of(WeightType::q8_0).zero_point == 128 &&
              layout_of(WeightType::q6_k).zero_point == 32);
constexpr int kNumOffsets = 6;  // the last: kBoundOffset
constexpr int offset_place(int bits) { return bits == 4 ? 0 : bits == 5 ? 1 : bits == 8 ? 2 : 3; }

// How 8-bit values are read: as bytes, as halves that lie apart, or their upper halves alone, as 4
// bits, for upper bounds of the sums.
enum class Form { whole, halves, bounds };

// What makes a tile's sum of the upper halves of 8-bit values u a bound of its true sum, in units
// of 16: with u between 16 upper and 16 upper + 15, (u - 128) x is at most (16 upper - 120.5) x
// + 7.5 |x|. The margin exceeds the roundings of float32 in both: for each of `num_tiles` sums, at
// most 512 times the |x| of its tile, 2^-24 of what was added up so far.
constexpr int kBoundOffset = 5;
inline std::int32_t bound_offset(const std::int8_t* x, std::int64_t num_tiles) {
  std::int32_t sum = 0, magnitude = 0;
  for (int i = 0; i < kTileCols; ++i) {
    sum += x[i];
    magnitude += x[i] < 0 ? -x[i] : x[i];
  }
  const auto margin = 1 + static_cast<std::int32_t>(magnitude * num_tiles >> 18);
  return ((15 * magnitude - 241 * sum + 31) >> 5) + margin;
}
// Array i of the offsets begins at p + i * stride.
inline void write_offsets(std::int32_t* p, std::int64_t stride, std::int32_t first_sum,
                          std::int32_t second_sum) {
  const std::int32_t sum = first_sum + second_sum;
  p[0] = -8 * sum;
  p[stride] = -16 * sum;
  p[2 * stride] = -128 * sum;
  p[3 * stride] = -32 * first_sum;
  p[4 * stride] = -32 * second_sum;
}

#if defined(FULLBEAM_ISA_avx512)

using I32 = __m512i;
constexpr int kMaxTokens = 8;
// Tokens that meet the panels of a chunk in one turn. Here a tile is unpacked for them alone, on
// pipes that the products leave free; elsewhere that takes too long.
constexpr int kMaxTurn = 8;

inline F32 to_f32(I32 a) { return _mm512_cvtepi32_ps(a); }
// Rounded to the nearest whole number, which int8 holds; returns their sum.
inline std::int32_t store_i8(std::int8_t* p, F32 a) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());
  return _mm_cvtsi128_si32(_mm_add_epi32(sums, _mm_unpackhi_epi64(sums, sums))) - 16 * 128;
}
inline F32 widen_u8(const std::uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F32 widen_i8(const std::uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

template <int kBits, Form kForm>
struct Tile {
  const std::uint8_t *p, *lower;

  FULLBEAM_INLINE Tile(const std::uint8_t* tile, const std::uint8_t* low) : p(tile), lower(low) {}
  FULLBEAM_INLINE __m512i step(int s) const {
    if constexpr (kBits == 8 && kForm == Form::whole) return _mm512_loadu_si512(p + 64 * s);
    const __m512i both = _mm512_loadu_si512(p + s % 4 * 64);
    if constexpr (kBits == 8) {
      const __m512i low = _mm512_loadu_si512(lower + s % 4 * 64);
      // The lower bits of the one, the upper bits of the other.
      return _mm512_ternarylogic_epi32(s < 4 ? low : _mm512_srli_epi16(low, 4),
                                       s < 4 ? _mm512_slli_epi16(both, 4) : both,
                                       _mm512_set1_epi8(15), 0xe4);
    }
    const __m512i low =
        _mm512_and_si512(s < 4 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
    if constexpr (kBits == 4) return low;
    // The bits above, to be moved to place 4.
    const __m512i high = _mm512_loadu_si512(p + 256 + (kBits == 6 ? s / 4 * 64 : 0));
    const int place = kBits == 6 ? s % 4 * 2 : s;
    const __m512i moved =
        place < 4 ? _mm512_slli_epi16(high, 4 - place) : _mm512_srli_epi16(high, place - 4);
    return _mm512_or_si512(low, _mm512_and_si512(moved, _mm512_set1_epi8(kBits == 6 ? 48 : 16)));
  }
};

// Inline assembly: GCC 12 copies every accumulator around the intrinsic, which halves the rate.
// Volatile, to stay in the order of the source, which unpacks a step between the products of the
// last: those take the two pipes that multiply, and a run of other instructions would get in there.
inline void dot_step(I32& sum, __m512i values, const std::int8_t* x) {
#ifdef FULLBEAM_PLAIN_INTRINSICS
  int four;
  std::memcpy(&four, x, 4);
  sum = _mm512_dpbusd_epi32(sum, values, _mm512_set1_epi32(four));
#else
  asm volatile("vpdpbusd %2%{1to16%}, %1, %0"
               : "+v"(sum)
               : "v"(values), "m"(*reinterpret_cast<const std::int32_t (*)[1]>(x)));
#endif
}

// Broadcast from memory: from a general register it takes a turn of the pipes that multiply.
inline I32 broadcast(const std::int32_t* p) {
#ifdef FULLBEAM_PLAIN_INTRINSICS
  return _mm512_set1_epi32(*p);
#else
  I32 a;
  asm("vpbroadcastd %1, %0" : "=v"(a) : "m"(*p));
  return a;
#endif
}

// sums[half][token] = sum over the half's steps of (value - zero point) * x; the two halves are
// added where the type has one scale for both. kOffset: which of the offsets belongs to the values
// (for halves, the next one too), or -1.
template <int kBits, Form kForm, bool kHalves, int kOffset, int kTokens>
FULLBEAM_INLINE void dot_tile(const Tile<kBits, kForm>& tile, const std::int8_t* x,
                              const std::int32_t* offsets, std::int64_t stride,
                              I32 (*sums)[kTokens][kParts]) {
  I32 chains[2][kTokens];  // of the halves of the columns: one of few tokens would wait for itself
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    const std::int32_t* offset = offsets + stride * kOffset + t;
    chains[0][t] = kOffset >= 0 ? broadcast(offset) : _mm512_setzero_si512();
    chains[1][t] = kHalves && kOffset >= 0 ? broadcast(offset + stride) : _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int s = kHalves ? i : i / 2 + i % 2 * 4;
    const __m512i values = tile.step(s);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) dot_step(chains[s / 4][t], values, x + kTileCols * t + 4 * s);
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    if constexpr (kHalves) {
      sums[0][t][0] = chains[0][t];
      sums[1][t][0] = chains[1][t];
    } else {
      sums[0][t][0] = _mm512_add_epi32(chains[0][t], chains[1][t]);
    }
  }
}

#elif defined(FULLBEAM_ISA_avx2)

using I32 = __m256i;
constexpr int kMaxTokens = 4;
constexpr int kMaxTurn = 64;

inline F32 to_f32(I32 a) { return _mm256_cvtepi32_ps(a); }
inline std::int32_t store_i8(std::int8_t* p, F32 a) {
  const __m256i ints = _mm256_cvtps_epi32(a);
  const __m128i low = _mm256_castsi256_si128(ints), high = _mm256_extracti128_si256(ints, 1);
  const __m128i words = _mm_packs_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  const __m128i four = _mm_add_epi32(low, high);
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_srli_epi64(two, 32)));
}
inline F32 widen_u8(const std::uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F32 widen_i8(const std::uint8_t* p) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline __m256i load_bytes(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

template <int kBits, Form kForm>
struct Tile {
  __m256i step[8][2];

  FULLBEAM_INLINE Tile(const std::uint8_t* p, const std::uint8_t* lower) {
    for (int half = 0; half < 2; ++half, p += 32) {
      // Signed here: _mm256_maddubs_epi16 would saturate on unsigned bytes.
      const __m256i flip = _mm256_set1_epi8(-128);
      if constexpr (kBits == 8 && kForm == Form::whole) {
        for (int s = 0; s < 8; ++s) step[s][half] = _mm256_xor_si256(load_bytes(p + 64 * s), flip);
        continue;
      }
      const __m256i low = _mm256_set1_epi8(15);
      for (int s = 0; s < 4; ++s) {
        const __m256i both = load_bytes(p + 64 * s);
        step[s][half] = _mm256_and_si256(both, low);
        step[s + 4][half] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      }
      if constexpr (kBits == 8) {
        for (int s = 0; s < 4; ++s) {
          const __m256i both = load_bytes(lower + 64 * s + 32 * half);
          const __m256i lows[] = {_mm256_and_si256(both, low),
                                  _mm256_and_si256(_mm256_srli_epi16(both, 4), low)};
          for (int h = 0; h < 2; ++h) {
            __m256i& value = step[s + 4 * h][half];
            value = _mm256_or_si256(_mm256_slli_epi16(value, 4), lows[h]);
            value = _mm256_xor_si256(value, flip);
          }
        }
      }
      if constexpr (kBits == 5) {
        const __m256i high = load_bytes(p + 256), bit = _mm256_set1_epi8(16);
        for (int s = 0; s < 8; ++s) {
          const __m256i moved =
              s < 4 ? _mm256_slli_epi16(high, 4 - s) : _mm256_srli_epi16(high, s - 4);
          step[s][half] = _mm256_or_si256(step[s][half], _mm256_and_si256(moved, bit));
        }
      }
      if constexpr (kBits == 6) {
        const __m256i bits = _mm256_set1_epi8(48);
        for (int h = 0; h < 2; ++h) {
          const __m256i high = load_bytes(p + 256 + 64 * h);
          for (int j = 0; j < 4; ++j) {
            const __m256i moved =
                j < 2 ? _mm256_slli_epi16(high, 4 - 2 * j) : _mm256_srli_epi16(high, 2 * j - 4);
            step[4 * h + j][half] =
                _mm256_or_si256(step[4 * h + j][half], _mm256_and_si256(moved, bits));
          }
        }
      }
    }
  }
};

inline __m256i broadcast4(const std::int8_t* x) {
  std::int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Pairs of products are added up in int16 for as many steps as cannot overflow (a pair is at most 2
// * 127 * (2^bits - 1)): eight steps for 4 bits, four for 5, two for 6; 8-bit values go as |value|
// * (x with the value's sign), a step at a time.
template <int kBits, Form kForm, bool kHalves, int kOffset, int kTokens>
FULLBEAM_INLINE void dot_tile(const Tile<kBits, kForm>& tile, const std::int8_t* x,
                              const std::int32_t* offsets, std::int64_t stride,
                              I32 (*sums)[kTokens][kParts]) {
  const __m256i ones = _mm256_set1_epi16(1);
  constexpr int kRun = kBits == 4 ? (kHalves ? 4 : 8) : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;
  I32 total[2][kTokens][2];
#pragma GCC unroll 8
  for (int run = 0; run < 8 / kRun; ++run) {
    __m256i pairs[kTokens][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRun; ++i) {
      const int s = run * kRun + i;
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const __m256i xs = broadcast4(x + kTileCols * t + 4 * s);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256i product;
          if constexpr (kBits == 8) {
            const __m256i value = tile.step[s][half];
            product = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(xs, value));
          } else {
            product = _mm256_maddubs_epi16(tile.step[s][half], xs);
          }
          pairs[t][half] = i == 0 ? product : _mm256_add_epi16(pairs[t][half], product);
        }
      }
    }
    constexpr int kRunsPerHalf = 4 / (kRun < 4 ? kRun : 4);
    const int part = kHalves ? run / kRunsPerHalf : 0;
    const bool is_first = kHalves ? run % kRunsPerHalf == 0 : run == 0;
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      for (int half = 0; half < 2; ++half) {
        const __m256i wide = _mm256_madd_epi16(pairs[t][half], ones);
        total[part][t][half] = is_first ? wide : _mm256_add_epi32(total[part][t][half], wide);
      }
    }
  }
  for (int part = 0; part < (kHalves ? 2 : 1); ++part) {
    for (int t = 0; t < kTokens; ++t) {
      const std::int32_t* place = offsets + stride * (kOffset + part) + t;
      constexpr bool kAdds = kOffset >= 0 && kBits != 8;  // 8-bit values are signed here
      const __m256i offset = kAdds ? _mm256_set1_epi32(*place) : _mm256_setzero_si256();
      for (int half = 0; half < 2; ++half)
        sums[part][t][half] = _mm256_add_epi32(total[part][t][half], offset);
    }
  }
}

#else

constexpr int kMaxTokens = 2;
constexpr int kMaxTurn = 64;

inline F32 to_f32(I32 a) { return __builtin_convertvector(a, F32); }
inline std::int32_t store_i8(std::int8_t* p, F32 a) {
  const F32 whole = round(a);
  std::int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    p[i] = static_cast<std::int8_t>(whole[i]);
    sum += p[i];
  }
  return sum;
}
inline F32 widen_u8(const std::uint8_t* p) {
  return F32{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
}
inline F32 widen_i8(const std::uint8_t* p) {
  const auto* s = reinterpret_cast<const std::int8_t*>(p);
  return F32{static_cast<float>(s[0]), static_cast<float>(s[1]), static_cast<float>(s[2]),
             static_cast<float>(s[3])};
}

template <int kBits, Form kForm>
struct Tile {
  std::uint8_t step[8][64];

  FULLBEAM_INLINE Tile(const std::uint8_t* p, [[maybe_unused]] const std::uint8_t* lower) {
    for (int s = 0; s < 8; ++s) {
      for (int i = 0; i < 64; ++i) {
        if constexpr (kBits == 8 && kForm == Form::whole) {
          step[s][i] = p[64 * s + i];
          continue;
        }
        int value = p[s % 4 * 64 + i] >> (s / 4 * 4) & 15;
        if constexpr (kBits == 5) value |= (p[256 + i] >> s & 1) << 4;
        if constexpr (kBits == 6) value |= (p[256 + s / 4 * 64 + i] >> (s % 4 * 2) & 3) << 4;
        if constexpr (kBits == 8) value = value << 4 | (lower[s % 4 * 64 + i] >> (s / 4 * 4) & 15);
        step[s][i] = static_cast<std::uint8_t>(value);
      }
    }
  }
};

template <int kBits, Form kForm, bool kHalves, int kOffset, int kTokens>
FULLBEAM_INLINE void dot_tile(const Tile<kBits, kForm>& tile, const std::int8_t* x,
                              const std::int32_t* offsets, std::int64_t stride,
                              I32 (*sums)[kTokens][kParts]) {
  for (int t = 0; t < kTokens; ++t) {
    const std::int32_t* offset = offsets + stride * kOffset + t;
    std::int32_t total[2][16];
    for (int part = 0; part < 2; ++part) {
      for (int row = 0; row < 16; ++row) {
        std::int32_t sum = kOffset >= 0 && (kHalves || part == 0) ? offset[stride * part] : 0;
        for (int s = 4 * part; s < 4 * part + 4; ++s) {
          for (int i = 0; i < 4; ++i)
            sum += tile.step[s][4 * row + i] * x[kTileCols * t + 4 * s + i];
        }
        total[part][row] = sum;
      }
    }
    for (int row = 0; row < 16; ++row) {
      if constexpr (kHalves) {
        sums[0][t][row / kLanes][row % kLanes] = total[0][row];
        sums[1][t][row / kLanes][row % kLanes] = total[1][row];
      } else {
        sums[0][t][row / kLanes][row % kLanes] = total[0][row] + total[1][row];
      }
    }
  }
}

#endif

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
