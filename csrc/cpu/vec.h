// SPDX-License-Identifier: Apache-2.0
// One register of floats for whichever instruction set this file is being compiled for. Everything
// is in an anonymous namespace: the linker must never keep one instruction set's copy of an inline
// function for another's caller.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#if defined(FULLBEAM_ISA_avx2) || defined(FULLBEAM_ISA_avx512)
#include <immintrin.h>
#endif

// For the innermost pieces of a kernel, whose registers must not go through memory.
#define FULLBEAM_INLINE inline __attribute__((always_inline))

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

struct Half {
  std::uint16_t bits;
};
struct BFloat {
  std::uint16_t bits;
};

[[maybe_unused]] inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
[[maybe_unused]] inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

[[maybe_unused]] inline float to_float(float value) { return value; }
[[maybe_unused]] inline float to_float(BFloat value) {
  return bits_to_float(std::uint32_t{value.bits} << 16);
}
[[maybe_unused]] inline float to_float(Half value) {
#if defined(FULLBEAM_ISA_portable)
  const std::uint32_t sign = std::uint32_t(value.bits & 0x8000u) << 16;
  const std::uint32_t rest = std::uint32_t(value.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_to_float(sign | (rest + 0x70000000u));  // infinity, NaN
  // Scaling by 2^112 moves the exponent and makes subnormal numbers normal, exactly.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest) * bits_to_float(0x77800000u)));
#else
  return _cvtsh_ss(value.bits);
#endif
}

template <class T>
inline T from_float(float value);
template <>
[[maybe_unused]] inline float from_float<float>(float value) {
  return value;
}
// Round to nearest even; NaN stays NaN.
template <>
[[maybe_unused]] inline BFloat from_float<BFloat>(float value) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>(bits >> 16 | 64)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
[[maybe_unused]] inline Half from_float<Half>(float value) {
#if defined(FULLBEAM_ISA_portable)
  const std::uint32_t bits = float_to_bits(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal: let the addition round
    const float shifted = bits_to_float(magnitude) + bits_to_float(0x3f000000u);
    return {static_cast<std::uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u))};
  }
  return {static_cast<std::uint16_t>(sign |
                                     ((magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13))};
#else
  return {static_cast<std::uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#endif
}

#if defined(FULLBEAM_ISA_avx512)

constexpr int kLanes = 16;
using F32 = __m512;
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32 load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32 load(const BFloat* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a); }
inline void store(Half* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 set1(float a) { return _mm512_set1_ps(a); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 round(F32 a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline bool has_nan(F32 a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
// a * 2^n for whole n, where neither a nor the product is subnormal, infinite or NaN
inline F32 times_exp2(F32 a, F32 n) {
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
// value where x >= bound, else zero (also where x is NaN)
inline F32 zero_below(F32 value, F32 x, F32 bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), value);
}
// value where this bit of the lane's word is set, else -infinity
inline F32 where_bit(F32 value, const std::uint32_t* words, int bit) {
  const __mmask16 is_set =
      _mm512_test_epi32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(1 << bit));
  return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), is_set, value);
}

#elif defined(FULLBEAM_ISA_avx2)

constexpr int kLanes = 8;
using F32 = __m256;
inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
inline F32 load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F32 load(const BFloat* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a); }
inline void store(Half* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 set1(float a) { return _mm256_set1_ps(a); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
inline F32 round(F32 a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline bool has_nan(F32 a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
inline F32 times_exp2(F32 a, F32 n) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
inline F32 zero_below(F32 value, F32 x, F32 bound) {
  return _mm256_and_ps(value, _mm256_cmp_ps(x, bound, _CMP_GE_OQ));
}
inline F32 where_bit(F32 value, const std::uint32_t* words, int bit) {
  const __m256i wanted = _mm256_set1_epi32(1 << bit);
  const __m256i found =
      _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), wanted);
  return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), value,
                          _mm256_castsi256_ps(_mm256_cmpeq_epi32(found, wanted)));
}

#else

constexpr int kLanes = 4;
typedef float F32 __attribute__((vector_size(16)));
typedef std::int32_t I32 __attribute__((vector_size(16)));
inline F32 load(const float* p) {
  F32 a;
  std::memcpy(&a, p, 16);
  return a;
}
inline F32 load(const Half* p) {
  return F32{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline F32 load(const BFloat* p) {
  return F32{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
inline void store(float* p, F32 a) { std::memcpy(p, &a, 16); }
inline void store(Half* p, F32 a) {
  for (int i = 0; i < 4; ++i) p[i] = from_float<Half>(a[i]);
}
inline F32 set1(float a) { return F32{a, a, a, a}; }
inline F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
inline F32 add(F32 a, F32 b) { return a + b; }
inline F32 sub(F32 a, F32 b) { return a - b; }
inline F32 mul(F32 a, F32 b) { return a * b; }
inline F32 div(F32 a, F32 b) { return a / b; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
// Adding and taking away 1.5 * 2^23 leaves the nearest whole number, for |a| < 2^22.
inline F32 round(F32 a) { return (a + set1(12582912.0f)) - set1(12582912.0f); }
inline bool has_nan(F32 a) { return a[0] != a[0] || a[1] != a[1] || a[2] != a[2] || a[3] != a[3]; }
inline F32 times_exp2(F32 a, F32 n) {
  std::uint32_t
      bits[4];  // without signs, since n may be far out of range where the result is not used
  std::memcpy(bits, &a, 16);
  const I32 exponents = __builtin_convertvector(n, I32);
  for (int i = 0; i < 4; ++i) bits[i] += static_cast<std::uint32_t>(exponents[i]) << 23;
  std::memcpy(&a, bits, 16);
  return a;
}
inline F32 zero_below(F32 value, F32 x, F32 bound) { return x >= bound ? value : set1(0.0f); }
inline F32 where_bit(F32 value, const std::uint32_t* words, int bit) {
  I32 lanes;
  std::memcpy(&lanes, words, 16);
  return (lanes >> bit & 1) != 0 ? value : set1(-__builtin_inff());
}

#endif

// Lanes are added in one fixed order, by halves.
#if defined(FULLBEAM_ISA_portable)
inline float reduce_add(F32 a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float reduce_max(F32 a) {
  const float low = a[0] > a[2] ? a[0] : a[2], high = a[1] > a[3] ? a[1] : a[3];
  return low > high ? low : high;
}
#else
inline float reduce_add_8(__m256 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float reduce_max_8(__m256 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#if defined(FULLBEAM_ISA_avx512)
inline float reduce_add(F32 a) {
  return reduce_add_8(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
inline float reduce_max(F32 a) {
  return reduce_max_8(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
#else
inline float reduce_add(F32 a) { return reduce_add_8(a); }
inline float reduce_max(F32 a) { return reduce_max_8(a); }
#endif
#endif

// e^x within 2 ulp; 0 below -87.3 (where the result would be subnormal) and for -infinity; x is
// capped at 88.3.
inline F32 exp(F32 x) {
  const F32 floor_x = set1(-87.3f);
  const F32 capped = max(min(x, set1(88.3f)), floor_x);
  const F32 n = round(mul(capped, set1(1.44269504f)));
  F32 r = fma(n, set1(-0.693145751953125f), capped);
  r = fma(n, set1(-1.42860677e-6f), r);
  F32 p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  return zero_below(times_exp2(p, n), x, floor_x);
}

// 2^y for y < 127 within 3 ulp; 0 below -126, and for NaN. Half the steps of exp.
inline F32 exp2(F32 y) {
  const F32 capped = max(y, set1(-126.0f));
  const F32 n = round(capped);
  const F32 r = sub(capped, n);
  F32 p = set1(1.535335759e-4f);  // our fit of (2^r - 1) / r on |r| <= 1/2, relative error 2e-9
  p = fma(p, r, set1(1.339887618e-3f));
  p = fma(p, r, set1(9.618437849e-3f));
  p = fma(p, r, set1(5.550332367e-2f));
  p = fma(p, r, set1(2.402264774e-1f));
  p = fma(p, r, set1(6.931471825e-1f));
  p = fma(p, r, set1(1.0f));
  return zero_below(times_exp2(p, n), y, set1(-126.0f));
}

// tanh(x) = 1 - 2 / (e^2x + 1)
inline F32 tanh(F32 x) {
  const F32 e = exp(mul(set1(2.0f), min(max(x, set1(-20.0f)), set1(20.0f))));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
