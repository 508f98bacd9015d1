// SPDX-License-Identifier: Apache-2.0
// Runs the avx512 kernels on a processor that has AVX2 only. With -DFULLBEAM_SIMULATE_AVX512=ON,
// CMake compiles the avx512 version of csrc/cpu/*.cc with this folder ahead of the compiler's own
// headers and with AVX2's flags: a register is two AVX2 ones, and an intrinsic is the same AVX2
// instruction twice or, where AVX2 has none, its definition in plain C++. What it shows: registers'
// widths, lane orders, layouts, tails and the order of every sum. What it can't show: the
// compiler's own AVX-512 instructions, and the inline assembly of cpu/linear.h
// (FULLBEAM_PLAIN_INTRINSICS takes its place). An intrinsic that is missing here doesn't compile;
// add it.
#pragma once
#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {
namespace simulated {

struct alignas(64) F {
  __m256 half[2];
};
struct alignas(64) I {
  __m256i half[2];
};
using Mask = std::uint16_t;

inline F of_halves(__m256 low, __m256 high) { return {{low, high}}; }
inline I of_halves(__m256i low, __m256i high) { return {{low, high}}; }

template <class To, class From>
inline To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline F loadu_ps(const void* p) {
  F a;
  std::memcpy(&a, p, 64);
  return a;
}
inline I loadu_si512(const void* p) {
  I a;
  std::memcpy(&a, p, 64);
  return a;
}
inline void storeu_ps(void* p, F a) { std::memcpy(p, &a, 64); }
inline void storeu_si512(void* p, I a) { std::memcpy(p, &a, 64); }

inline F set1_ps(float a) { return of_halves(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
inline I set1_epi32(int a) { return of_halves(_mm256_set1_epi32(a), _mm256_set1_epi32(a)); }
inline I set1_epi8(char a) { return of_halves(_mm256_set1_epi8(a), _mm256_set1_epi8(a)); }

inline __m256 castps512_ps256(F a) { return a.half[0]; }
template <int kHalf>
inline __m256 extractf32x8_ps(F a) {
  return a.half[kHalf];
}
inline I setzero_si512() { return set1_epi32(0); }
inline __m128i cvtepi32_epi8(I a) {
  std::int32_t from[16];
  std::int8_t to[16];
  std::memcpy(from, &a, 64);
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::int8_t>(from[i]);
  return cast<__m128i>(to);
}
inline int reduce_add_epi32(I a) {
  std::int32_t lanes[16], sum = 0;
  std::memcpy(lanes, &a, 64);
  for (int lane : lanes) sum += lane;
  return sum;
}
inline F add_ps(F a, F b) {
  return of_halves(_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1]));
}
inline F sub_ps(F a, F b) {
  return of_halves(_mm256_sub_ps(a.half[0], b.half[0]), _mm256_sub_ps(a.half[1], b.half[1]));
}
inline F mul_ps(F a, F b) {
  return of_halves(_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1]));
}
inline F div_ps(F a, F b) {
  return of_halves(_mm256_div_ps(a.half[0], b.half[0]), _mm256_div_ps(a.half[1], b.half[1]));
}
inline F max_ps(F a, F b) {
  return of_halves(_mm256_max_ps(a.half[0], b.half[0]), _mm256_max_ps(a.half[1], b.half[1]));
}
inline F min_ps(F a, F b) {
  return of_halves(_mm256_min_ps(a.half[0], b.half[0]), _mm256_min_ps(a.half[1], b.half[1]));
}
inline F fmadd_ps(F a, F b, F c) {
  return of_halves(_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]),
                   _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1]));
}
// A scale of 2^(imm / 16) is AVX-512's own; below 16 the immediate is that of _mm256_round_ps.
template <int kImm>
inline F roundscale_ps(F a) {
  static_assert(kImm >= 0 && kImm < 16);
  return of_halves(_mm256_round_ps(a.half[0], kImm), _mm256_round_ps(a.half[1], kImm));
}
template <int kPredicate>
inline Mask cmp_ps_mask(F a, F b) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.half[0], b.half[0], kPredicate));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.half[1], b.half[1], kPredicate));
  return static_cast<Mask>(low | high << 8);
}
template <class T, class Register>
inline Register maskz_compress(Mask mask, const Register& a) {
  T from[16], to[16] = {};
  std::memcpy(from, &a, 64);
  int count = 0;
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i & 1) != 0) to[count++] = from[i];
  }
  return cast<Register>(to);
}
inline F maskz_mov_ps(Mask mask, F a) {
  float lanes[16];
  storeu_ps(lanes, a);
  for (int i = 0; i < 16; ++i) lanes[i] = (mask >> i & 1) != 0 ? lanes[i] : 0.0f;
  return loadu_ps(lanes);
}

inline F mask_mov_ps(F otherwise, Mask mask, F a) {
  float lanes[16], kept[16];
  storeu_ps(lanes, otherwise);
  storeu_ps(kept, a);
  for (int i = 0; i < 16; ++i) lanes[i] = (mask >> i & 1) != 0 ? kept[i] : lanes[i];
  return loadu_ps(lanes);
}
inline Mask test_epi32_mask(I a, I b) {
  std::int32_t words_a[16], words_b[16];
  std::memcpy(words_a, &a, 64);
  std::memcpy(words_b, &b, 64);
  Mask mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<Mask>((words_a[i] & words_b[i]) != 0) << i;
  return mask;
}

inline I add_epi32(I a, I b) {
  return of_halves(_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1]));
}
inline I sub_epi32(I a, I b) {
  return of_halves(_mm256_sub_epi32(a.half[0], b.half[0]), _mm256_sub_epi32(a.half[1], b.half[1]));
}
inline I and_si512(I a, I b) {
  return of_halves(_mm256_and_si256(a.half[0], b.half[0]), _mm256_and_si256(a.half[1], b.half[1]));
}
inline I or_si512(I a, I b) {
  return of_halves(_mm256_or_si256(a.half[0], b.half[0]), _mm256_or_si256(a.half[1], b.half[1]));
}
inline I slli_epi16(I a, unsigned count) {
  const auto bits = static_cast<int>(count);
  return of_halves(_mm256_slli_epi16(a.half[0], bits), _mm256_slli_epi16(a.half[1], bits));
}
inline I srli_epi16(I a, unsigned count) {
  const auto bits = static_cast<int>(count);
  return of_halves(_mm256_srli_epi16(a.half[0], bits), _mm256_srli_epi16(a.half[1], bits));
}
inline I slli_epi32(I a, unsigned count) {
  const auto bits = static_cast<int>(count);
  return of_halves(_mm256_slli_epi32(a.half[0], bits), _mm256_slli_epi32(a.half[1], bits));
}

// Each int32 of sum takes the four products of its bytes: unsigned of a, signed of b; no
// saturation.
inline I dpbusd_epi32(I sum, I a, I b) {
  std::int32_t sums[16];
  std::uint8_t bytes_a[64];
  std::int8_t bytes_b[64];
  std::memcpy(sums, &sum, 64);
  std::memcpy(bytes_a, &a, 64);
  std::memcpy(bytes_b, &b, 64);
  for (int i = 0; i < 16; ++i) {
    std::int32_t four = 0;
    for (int j = 0; j < 4; ++j) four += bytes_a[4 * i + j] * bytes_b[4 * i + j];
    sums[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[i]) +
                                        static_cast<std::uint32_t>(four));
  }
  return loadu_si512(sums);
}

inline F cvtepi32_ps(I a) {
  return of_halves(_mm256_cvtepi32_ps(a.half[0]), _mm256_cvtepi32_ps(a.half[1]));
}
inline I cvtps_epi32(F a) {
  return of_halves(_mm256_cvtps_epi32(a.half[0]), _mm256_cvtps_epi32(a.half[1]));
}
inline I cvtepu8_epi32(__m128i a) {
  return of_halves(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
inline I cvtepi8_epi32(__m128i a) {
  return of_halves(_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8)));
}
inline I cvtepu16_epi32(__m256i a) {
  return of_halves(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                   _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline F cvtph_ps(__m256i a) {
  return of_halves(_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                   _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
template <int kRounding>
inline __m256i cvtps_ph(F a) {
  return _mm256_set_m128i(_mm256_cvtps_ph(a.half[1], kRounding),
                          _mm256_cvtps_ph(a.half[0], kRounding));
}

}  // namespace simulated
}  // namespace

#define __m512 simulated::F
#define __m512i simulated::I
#define __mmask16 simulated::Mask
#define _mm512_add_epi32 simulated::add_epi32
#define _mm512_add_ps simulated::add_ps
#define _mm512_and_si512 simulated::and_si512
#define _mm512_castps_si512 simulated::cast<simulated::I>
#define _mm512_castsi512_ps simulated::cast<simulated::F>
#define _mm512_castps512_ps256 simulated::castps512_ps256
#define _mm512_cmp_ps_mask(a, b, predicate) simulated::cmp_ps_mask<predicate>(a, b)
#define _mm512_cvtepi32_epi8 simulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps simulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 simulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 simulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 simulated::cvtepu8_epi32
#define _mm512_cvtph_ps simulated::cvtph_ps
#define _mm512_cvtps_epi32 simulated::cvtps_epi32
#define _mm512_cvtps_ph(a, rounding) simulated::cvtps_ph<rounding>(a)
#define _mm512_div_ps simulated::div_ps
#define _mm512_dpbusd_epi32 simulated::dpbusd_epi32
#define _mm512_extractf32x8_ps(a, half) simulated::extractf32x8_ps<half>(a)
#define _mm512_fmadd_ps simulated::fmadd_ps
#define _mm512_loadu_ps simulated::loadu_ps
#define _mm512_loadu_si512 simulated::loadu_si512
#define _mm512_mask_mov_ps simulated::mask_mov_ps
#define _mm512_maskz_compress_epi32 (simulated::maskz_compress<int, simulated::I>)
#define _mm512_maskz_compress_ps (simulated::maskz_compress<float, simulated::F>)
#define _mm512_maskz_mov_ps simulated::maskz_mov_ps
#define _mm512_max_ps simulated::max_ps
#define _mm512_min_ps simulated::min_ps
#define _mm512_mul_ps simulated::mul_ps
#define _mm512_or_si512 simulated::or_si512
#define _mm512_reduce_add_epi32 simulated::reduce_add_epi32
#define _mm512_roundscale_ps(a, imm) simulated::roundscale_ps<imm>(a)
#define _mm512_set1_epi32 simulated::set1_epi32
#define _mm512_set1_epi8 simulated::set1_epi8
#define _mm512_set1_ps simulated::set1_ps
#define _mm512_setzero_si512 simulated::setzero_si512
#define _mm512_slli_epi16 simulated::slli_epi16
#define _mm512_slli_epi32 simulated::slli_epi32
#define _mm512_srli_epi16 simulated::srli_epi16
#define _mm512_storeu_ps simulated::storeu_ps
#define _mm512_storeu_si512 simulated::storeu_si512
#define _mm512_sub_epi32 simulated::sub_epi32
#define _mm512_sub_ps simulated::sub_ps
#define _mm512_test_epi32_mask simulated::test_epi32_mask
