// SPDX-License-Identifier: Apache-2.0
// Attention of a block of query rows (some tokens x the query heads that share one KV head) over a
// paged KV cache. Mapping: keys go by tiles of 32 at absolute positions; a tile is converted to
// float32 once, keys transposed, and meets all rows of the block, four rows by 16 columns at a time
// in registers. Cost: K and V of the visible keys once per block, 4 * head_dim operations per row
// and key. Numerics: float32, running maximum and sum per row (Milakov and Gimelshein 2018, arXiv
// 1805.02867). What a row sees is added up in order of position, tile by tile, and keys that it
// doesn't see add exact zeros: its result is the same bits in every block, prefill or decode.
#pragma once
#include "cpu/vec.h"
#include "ops/attention_prefill.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr int kTileKeys = 32;
constexpr int kMaxRows = 64;  // query rows of a block
constexpr int kRegRows = 4;   // rows of a register tile
constexpr int kRegCols = 16;
constexpr int kRegParts = kRegCols / kLanes;

// Memory of one thread's block.
struct AttentionBlock {
  float* q;        // [kMaxRows, head_dim], scaled
  float* out;      // [kMaxRows, head_dim]
  float* k_tile;   // [head_dim, kTileKeys]
  float* v_tile;   // [kTileKeys, head_dim]
  float* weights;  // [kMaxRows, kTileKeys]
  float* maxima;   // [kMaxRows]
  float* sums;     // [kMaxRows]

  static std::int64_t floats(std::int64_t head_dim) {
    return 2 * kMaxRows * head_dim + 2 * kTileKeys * head_dim + kMaxRows * kTileKeys + 2 * kMaxRows;
  }
  AttentionBlock(float* memory, std::int64_t head_dim) {
    q = memory;
    out = q + kMaxRows * head_dim;
    k_tile = out + kMaxRows * head_dim;
    v_tile = k_tile + kTileKeys * head_dim;
    weights = v_tile + kTileKeys * head_dim;
    maxima = weights + kMaxRows * kTileKeys;
    sums = maxima + kMaxRows;
  }
};

// c[rows, 16] (+)= a[rows, n] * b[n, 16], sums in order of n.
template <int kRows, bool kAdd>
inline void multiply_block(const float* a, std::int64_t a_stride, const float* b,
                           std::int64_t b_stride, std::int64_t n, float* c, std::int64_t c_stride) {
  F32 acc[kRows][kRegParts];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kRegParts; ++i)
      acc[r][i] = kAdd ? load(c + r * c_stride + i * kLanes) : set1(0.0f);
  }
  for (std::int64_t k = 0; k < n; ++k) {
    F32 row[kRegParts];
    for (int i = 0; i < kRegParts; ++i) row[i] = load(b + k * b_stride + i * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const F32 value = set1(a[r * a_stride + k]);
      for (int i = 0; i < kRegParts; ++i) acc[r][i] = fma(value, row[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kRegParts; ++i) store(c + r * c_stride + i * kLanes, acc[r][i]);
  }
}

template <bool kAdd>
inline void multiply(std::int64_t num_rows, const float* a, std::int64_t a_stride, const float* b,
                     std::int64_t b_stride, std::int64_t n, std::int64_t num_cols, float* c,
                     std::int64_t c_stride) {
  for (std::int64_t r = 0; r < num_rows; r += kRegRows) {
    for (std::int64_t col = 0; col < num_cols; col += kRegCols) {
      const float* ar = a + r * a_stride;
      float* cr = c + r * c_stride + col;
      switch (num_rows - r) {
        case 1:
          multiply_block<1, kAdd>(ar, a_stride, b + col, b_stride, n, cr, c_stride);
          break;
        case 2:
          multiply_block<2, kAdd>(ar, a_stride, b + col, b_stride, n, cr, c_stride);
          break;
        case 3:
          multiply_block<3, kAdd>(ar, a_stride, b + col, b_stride, n, cr, c_stride);
          break;
        default:
          multiply_block<kRegRows, kAdd>(ar, a_stride, b + col, b_stride, n, cr, c_stride);
      }
    }
  }
}

// Where a key of this position lies: element offset from the start of its pages.
inline std::int64_t page_offset(const AttentionPrefillParams& p, const std::int32_t* page_table,
                                std::int64_t page_stride, std::int64_t kv_head,
                                std::int64_t position) {
  const std::int64_t page = page_table[position / p.page_size];
  return page * page_stride + (kv_head * p.page_size + position % p.page_size) * p.head_dim;
}

// out[j * kTileKeys + r] = rows[r][begin + j], eight by eight.
template <class T>
inline void transpose_8x8(const T* const* rows, std::int64_t begin, float* out) {
#if defined(FULLBEAM_ISA_portable)
  for (int r = 0; r < 8; ++r) {
    for (int j = 0; j < 8; ++j) out[j * kTileKeys + r] = to_float(rows[r][begin + j]);
  }
#else
  __m256 a[8], b[8];
  for (int r = 0; r < 8; ++r) a[r] = load_8(rows[r] + begin);
  for (int r = 0; r < 8; r += 2) {  // pairs of rows, pairs of columns
    b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {  // four rows
    a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
    a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
    a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
    a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
  }
  for (int r = 0; r < 4; ++r) {  // all eight
    _mm256_storeu_ps(out + r * kTileKeys, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
    _mm256_storeu_ps(out + (r + 4) * kTileKeys, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
  }
#endif
}

// Keys [first, first + count) of one sequence and KV head as float32; the rest of the tile is not
// to be used.
template <class T>
void load_tile(const AttentionPrefillParams& p, const std::int32_t* page_table,
               std::int64_t kv_head, std::int64_t first, std::int64_t count,
               const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim;
  for (std::int64_t key = 0; key < count; ++key) {
    const std::int64_t at = page_offset(p, page_table, p.v_page_stride, kv_head, first + key);
    const T* v = static_cast<const T*>(p.v_pages) + at;
    for (std::int64_t i = 0; i < dim; i += kLanes) store(b.v_tile + key * dim + i, load(v + i));
  }
  for (std::int64_t key = 0; key < kTileKeys; key += 8) {
    const T* k[8];
    for (std::int64_t j = 0; j < 8; ++j) {
      // A key beyond the last is read as the last and never counts: its score is masked, whatever
      // it is.
      const std::int64_t wanted = key + j < count ? key + j : count - 1;
      k[j] = static_cast<const T*>(p.k_pages) +
             page_offset(p, page_table, p.k_page_stride, kv_head, first + wanted);
    }
    for (std::int64_t i = 0; i < dim; i += 8) transpose_8x8(k, i, b.k_tile + i * kTileKeys + key);
  }
}

// Scores of one row's tile -> weights; the row's running maximum, sum and output follow.
inline void update_row(const AttentionPrefillParams& p, const AttentionBlock& b, std::int64_t row,
                       std::int64_t first, std::int64_t position) {
  float* weights = b.weights + row * kTileKeys;
  const std::int64_t low =
      p.window > 0 && position - p.window + 1 > first ? position - p.window + 1 - first : 0;
  const std::int64_t high = position - first + 1 < kTileKeys ? position - first + 1 : kTileKeys;
  if (p.softcap > 0) {
    for (int i = 0; i < kTileKeys; i += kLanes) {
      store(weights + i, mul(set1(p.softcap), tanh(div(load(weights + i), set1(p.softcap)))));
    }
  }
  if (low >= high) {  // none of these keys is seen
    for (int i = 0; i < kTileKeys; ++i) weights[i] = 0.0f;
    return;
  }
  const float minus_infinity = -__builtin_inff();
  for (std::int64_t i = 0; i < low; ++i) weights[i] = minus_infinity;
  for (std::int64_t i = high; i < kTileKeys; ++i) weights[i] = minus_infinity;
  F32 largest = load(weights);
  for (int i = kLanes; i < kTileKeys; i += kLanes) largest = max(largest, load(weights + i));
  float maximum = reduce_max(largest);
  if (b.maxima[row] > maximum) maximum = b.maxima[row];
  F32 sums = set1(0.0f);
  for (int i = 0; i < kTileKeys; i += kLanes) {
    const F32 weight = exp(sub(load(weights + i), set1(maximum)));
    store(weights + i, weight);
    sums = add(sums, weight);
  }
  if (maximum != b.maxima[row]) {
    float lanes[kLanes];
    store(lanes, exp(set1(b.maxima[row] - maximum)));
    const float shrink = lanes[0];
    float* out = b.out + row * p.head_dim;
    for (std::int64_t i = 0; i < p.head_dim; i += kLanes)
      store(out + i, mul(load(out + i), set1(shrink)));
    b.sums[row] *= shrink;
    b.maxima[row] = maximum;
  }
  b.sums[row] += reduce_add(sums);
}

// Query tokens [token_begin, token_end) of one sequence (rows of q), heads [head_begin, head_end)
// of one KV head's group; the first token stands at first_position.
template <class T>
void attend(const AttentionPrefillParams& p, const std::int32_t* page_table,
            std::int64_t token_begin, std::int64_t token_end, std::int64_t head_begin,
            std::int64_t head_end, std::int64_t first_position, const AttentionBlock& b) {
  const std::int64_t num_heads = head_end - head_begin, dim = p.head_dim;
  const std::int64_t num_rows = (token_end - token_begin) * num_heads;
  const std::int64_t kv_head = head_begin / (p.num_q_heads / p.num_kv_heads);
  const std::int64_t last_position = first_position + (token_end - token_begin) - 1;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const float* q =
        p.q + (token_begin + row / num_heads) * p.q_stride + (head_begin + row % num_heads) * dim;
    for (std::int64_t i = 0; i < dim; ++i) {
      b.q[row * dim + i] = q[i] * p.scale;
      b.out[row * dim + i] = 0.0f;
    }
    b.maxima[row] = -__builtin_inff();
    b.sums[row] = 0.0f;
  }
  const std::int64_t first_seen =
      p.window > 0 && first_position >= p.window ? first_position - p.window + 1 : 0;
  for (std::int64_t first = first_seen / kTileKeys * kTileKeys; first <= last_position;
       first += kTileKeys) {
    const std::int64_t count =
        last_position - first + 1 < kTileKeys ? last_position - first + 1 : kTileKeys;
    load_tile<T>(p, page_table, kv_head, first, count, b);
    const std::int64_t num_cols = (count + kRegCols - 1) / kRegCols * kRegCols;
    multiply<false>(num_rows, b.q, dim, b.k_tile, kTileKeys, dim, num_cols, b.weights, kTileKeys);
    for (std::int64_t row = 0; row < num_rows; ++row)
      update_row(p, b, row, first, first_position + row / num_heads);
    multiply<true>(num_rows, b.weights, kTileKeys, b.v_tile, dim, count, dim, b.out, dim);
  }
  for (std::int64_t row = 0; row < num_rows; ++row) {
    float* out = p.out + (token_begin + row / num_heads) * p.out_stride +
                 (head_begin + row % num_heads) * dim;
    const F32 sum = set1(b.sums[row]);
    for (std::int64_t i = 0; i < dim; i += kLanes)
      store(out + i, div(load(b.out + row * dim + i), sum));
  }
}

inline void attend_any(const AttentionPrefillParams& p, const std::int32_t* page_table,
                       std::int64_t token_begin, std::int64_t token_end, std::int64_t head_begin,
                       std::int64_t head_end, std::int64_t first_position,
                       const AttentionBlock& b) {
  switch (p.kv_dtype) {
    case DType::f16:
      return attend<Half>(p, page_table, token_begin, token_end, head_begin, head_end,
                          first_position, b);
    case DType::bf16:
      return attend<BFloat>(p, page_table, token_begin, token_end, head_begin, head_end,
                            first_position, b);
    default:
      return attend<float>(p, page_table, token_begin, token_end, head_begin, head_end,
                           first_position, b);
  }
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
