// SPDX-License-Identifier: Apache-2.0
// Products of small matrices, in registers, and the transposing of rows: what attention.h is made
// of. Every sum runs in order of its index: the same bits in every tile and layout.
#pragma once
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// Rows and columns of a register tile. 16 sums keep two 512-bit multiply-adds a cycle in flight; on
// Zen 4, which starts one, 4 x 16 is as fast.
#if defined(FULLBEAM_ISA_avx512)
constexpr int kRegRows = 8;
constexpr int kRegCols = 32;
#else
constexpr int kRegRows = 4;
constexpr int kRegCols = 16;
#endif
constexpr int kMinCols = 16;

// How `a` lies: a[row * stride + k], or by columns a[k * stride + row].
enum class Order { rows, columns };

// Rows of `b`, one behind the other.
template <class T>
struct Strided {
  const T* data;
  std::int64_t stride;
  FULLBEAM_INLINE const T* row(std::int64_t k) const { return data + k * stride; }
};

// c[kRows, kCols] (+)= a[kRows, n] * b[n, kCols].
template <int kRows, int kCols, bool kAdd, Order kOrder, class B>
FULLBEAM_INLINE void multiply_tile(const float* a, std::int64_t a_stride, const B& b,
                                   std::int64_t n, float* c, std::int64_t c_stride) {
  constexpr int kParts = kCols / kLanes;
  F32 acc[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i)
      acc[r][i] = kAdd ? load(c + r * c_stride + i * kLanes) : set1(0.0f);
  }
  for (std::int64_t k = 0; k < n; ++k) {
    const auto* b_row = b.row(k);
    F32 row[kParts];
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) row[i] = load(b_row + i * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 value = set1(kOrder == Order::rows ? a[r * a_stride + k] : a[k * a_stride + r]);
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) acc[r][i] = fma(value, row[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) store(c + r * c_stride + i * kLanes, acc[r][i]);
  }
}

// c[num_rows, kCols] (+)= a * b: kRows rows at a time, then the rest.
template <int kCols, bool kAdd, Order kOrder, int kRows = kRegRows, class B>
void multiply_rows(std::int64_t num_rows, const float* a, std::int64_t a_stride, const B& b,
                   std::int64_t n, float* c, std::int64_t c_stride) {
  for (; num_rows >= kRows; num_rows -= kRows, c += kRows * c_stride) {
    multiply_tile<kRows, kCols, kAdd, kOrder>(a, a_stride, b, n, c, c_stride);
    a += kRows * (kOrder == Order::rows ? a_stride : 1);
  }
  if constexpr (kRows > 1) {
    if (num_rows > 0)
      multiply_rows<kCols, kAdd, kOrder, kRows - 1>(num_rows, a, a_stride, b, n, c, c_stride);
  }
}

// c[num_rows, num_cols] (+)= a * b of a panel: kMinCols columns, or kRegCols where there are more.
template <bool kAdd, Order kOrder, class B>
inline void multiply_panel(std::int64_t num_rows, std::int64_t num_cols, const float* a,
                           std::int64_t a_stride, const B& b, std::int64_t n, float* c,
                           std::int64_t c_stride) {
  if (num_cols > kMinCols) {
    multiply_rows<kRegCols, kAdd, kOrder>(num_rows, a, a_stride, b, n, c, c_stride);
  } else {
    multiply_rows<kMinCols, kAdd, kOrder>(num_rows, a, a_stride, b, n, c, c_stride);
  }
}

// out[j * stride + r] = rows[r][begin + j], eight rows, kTransposed columns.
#if defined(FULLBEAM_ISA_portable)
constexpr int kTransposed = 8;
template <class T>
inline void transpose(const T* const* rows, std::int64_t begin, T* out, std::int64_t stride) {
  for (int r = 0; r < 8; ++r) {
    for (int j = 0; j < 8; ++j) out[j * stride + r] = rows[r][begin + j];
  }
}
#else
constexpr int kTransposed = 16;
template <class T>
FULLBEAM_INLINE void transpose(const T* const* rows, std::int64_t begin, T* out,
                               std::int64_t stride) {
  static_assert(sizeof(T) == 2);
  __m256i a[8], b[8];
  for (int r = 0; r < 8; ++r)
    a[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + begin));
  for (int r = 0; r < 8; r += 2) {  // pairs of rows; low and high 8 columns stay apart
    b[r] = _mm256_unpacklo_epi16(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi16(a[r], a[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {  // four rows
    a[r] = _mm256_unpacklo_epi32(b[r], b[r + 2]);
    a[r + 1] = _mm256_unpackhi_epi32(b[r], b[r + 2]);
    a[r + 2] = _mm256_unpacklo_epi32(b[r + 1], b[r + 3]);
    a[r + 3] = _mm256_unpackhi_epi32(b[r + 1], b[r + 3]);
  }
  for (int r = 0; r < 4; ++r) {  // all eight: columns 2 r and 2 r + 1
    const __m256i even = _mm256_unpacklo_epi64(a[r], a[r + 4]),
                  odd = _mm256_unpackhi_epi64(a[r], a[r + 4]);
    const auto store_column = [&](int column, __m128i values) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (2 * r + column) * stride), values);
    };
    store_column(0, _mm256_castsi256_si128(even));
    store_column(1, _mm256_castsi256_si128(odd));
    store_column(8, _mm256_extracti128_si256(even, 1));
    store_column(9, _mm256_extracti128_si256(odd, 1));
  }
}
template <>
inline void transpose<float>(const float* const* rows, std::int64_t begin, float* out,
                             std::int64_t stride) {
  for (int half = 0; half < 2; ++half, begin += 8, out += 8 * stride) {
    __m256 a[8], b[8];
    for (int r = 0; r < 8; ++r) a[r] = _mm256_loadu_ps(rows[r] + begin);
    for (int r = 0; r < 8; r += 2) {
      b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
      b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
      a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
      a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
      a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
      a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
    }
    for (int r = 0; r < 4; ++r) {
      _mm256_storeu_ps(out + r * stride, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
      _mm256_storeu_ps(out + (r + 4) * stride, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
    }
  }
}
#endif

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
