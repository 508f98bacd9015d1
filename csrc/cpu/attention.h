// SPDX-License-Identifier: Apache-2.0
// Attention of a block of query rows (some tokens x the query heads that share one KV head) over a
// paged KV cache. Mapping: keys go by tiles of 32 at absolute positions; a tile is converted to
// float32 once, keys transposed, and meets all rows of the block, some rows by some columns at a
// time in registers. Cost: K and V of the visible keys once per block, 4 * head_dim operations per
// row and key. Numerics: float32, running maximum and sum per row (Milakov and Gimelshein 2018,
// arXiv 1805.02867). What a row sees is added up in order of position, tile by tile, and keys that
// it doesn't see add exact zeros: its result is the same bits in every block, prefill or decode.
#pragma once
#include "core/parallel.h"
#include "cpu/vec.h"
#include "ops/attention_prefill.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr int kTileKeys = 32;  // a bit each in a word
constexpr int kMaxRows = 64;   // query rows of a block
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

// Query rows of one block: tokens of one sequence (rows of q) x some heads of one KV head's group.
struct QueryRows {
  std::int64_t token_begin, num_tokens, head_begin, num_heads;
  std::int64_t count() const { return num_tokens * num_heads; }
};

// Memory of one thread's block.
struct AttentionBlock {
  float* q;                 // [kMaxRows, head_dim], scaled
  float* out;               // [kMaxRows, head_dim]
  float* k_tile;            // [head_dim, kTileKeys]
  float* v_tile;            // [kTileKeys, head_dim]
  float* weights;           // [kMaxRows, kTileKeys]
  float* maxima;            // [kMaxRows]
  float* sums;              // [kMaxRows]
  std::int32_t* positions;  // [kMaxRows], of the tokens
  std::uint32_t* seen;      // [kMaxRows], of the tokens: bit i is key i of the tile

  static std::int64_t floats(std::int64_t head_dim) {
    return 2 * kMaxRows * head_dim + 2 * kTileKeys * head_dim + kMaxRows * kTileKeys + 4 * kMaxRows;
  }
  AttentionBlock(float* memory, std::int64_t head_dim) {
    q = memory;
    out = q + kMaxRows * head_dim;
    k_tile = out + kMaxRows * head_dim;
    v_tile = k_tile + kTileKeys * head_dim;
    weights = v_tile + kTileKeys * head_dim;
    maxima = weights + kMaxRows * kTileKeys;
    sums = maxima + kMaxRows;
    positions = reinterpret_cast<std::int32_t*>(sums + kMaxRows);
    seen = reinterpret_cast<std::uint32_t*>(positions + kMaxRows);
  }
};

// c[rows, cols] (+)= a[rows, n] * b[n, cols], sums in order of n: the same bits in every tile.
template <int kRows, int kCols, bool kAdd, class T>
FULLBEAM_INLINE void multiply_tile(const float* a, std::int64_t a_stride, const T* b,
                                   std::int64_t b_stride, std::int64_t n, float* c,
                                   std::int64_t c_stride) {
  constexpr int kParts = kCols / kLanes;
  F32 acc[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i)
      acc[r][i] = kAdd ? load(c + r * c_stride + i * kLanes) : set1(0.0f);
  }
  for (std::int64_t k = 0; k < n; ++k) {
    F32 row[kParts];
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) row[i] = load(b + k * b_stride + i * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F32 value = set1(a[r * a_stride + k]);
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

template <int kRows, bool kAdd, class T>
inline void multiply_rows(const float* a, std::int64_t a_stride, const T* b, std::int64_t b_stride,
                          std::int64_t n, std::int64_t num_cols, float* c, std::int64_t c_stride) {
  std::int64_t col = 0;
  for (; col + kRegCols <= num_cols; col += kRegCols)
    multiply_tile<kRows, kRegCols, kAdd>(a, a_stride, b + col, b_stride, n, c + col, c_stride);
  if (col < num_cols)
    multiply_tile<kRows, kMinCols, kAdd>(a, a_stride, b + col, b_stride, n, c + col, c_stride);
}

// kRows rows at a time, then the rest; num_cols is a multiple of kMinCols.
template <bool kAdd, int kRows = kRegRows, class T>
void multiply(std::int64_t num_rows, const float* a, std::int64_t a_stride, const T* b,
              std::int64_t b_stride, std::int64_t n, std::int64_t num_cols, float* c,
              std::int64_t c_stride) {
  for (; num_rows >= kRows; num_rows -= kRows, a += kRows * a_stride, c += kRows * c_stride)
    multiply_rows<kRows, kAdd>(a, a_stride, b, b_stride, n, num_cols, c, c_stride);
  if constexpr (kRows > 1) {
    if (num_rows > 0)
      multiply<kAdd, kRows - 1>(num_rows, a, a_stride, b, b_stride, n, num_cols, c, c_stride);
  }
}

// Where a key of this position lies: element offset from the start of its pages.
inline std::int64_t page_offset(const AttentionPrefillParams& p, const std::int32_t* page_table,
                                std::int64_t page_stride, std::int64_t kv_head,
                                std::int64_t position) {
  const std::int64_t page = page_table[position / p.page_size];
  return page * page_stride + (kv_head * p.page_size + position % p.page_size) * p.head_dim;
}

// out[j * kTileKeys + r] = rows[r][begin + j], eight rows, kTransposed columns.
#if defined(FULLBEAM_ISA_portable)
constexpr int kTransposed = 8;
template <class T>
inline void transpose(const T* const* rows, std::int64_t begin, float* out) {
  for (int r = 0; r < 8; ++r) {
    for (int j = 0; j < 8; ++j) out[j * kTileKeys + r] = to_float(rows[r][begin + j]);
  }
}
#else
constexpr int kTransposed = 16;
// Values of 16 bits change places before they are widened: half the shuffles.
template <class T>
inline void transpose(const T* const* rows, std::int64_t begin, float* out) {
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
    float* column = out + 2 * r * kTileKeys;
    _mm256_storeu_ps(column, widen_8<T>(_mm256_castsi256_si128(even)));
    _mm256_storeu_ps(column + kTileKeys, widen_8<T>(_mm256_castsi256_si128(odd)));
    _mm256_storeu_ps(column + 8 * kTileKeys, widen_8<T>(_mm256_extracti128_si256(even, 1)));
    _mm256_storeu_ps(column + 9 * kTileKeys, widen_8<T>(_mm256_extracti128_si256(odd, 1)));
  }
}
template <>
inline void transpose<float>(const float* const* rows, std::int64_t begin, float* out) {
  for (int half = 0; half < 2; ++half, begin += 8, out += 8 * kTileKeys) {
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
      _mm256_storeu_ps(out + r * kTileKeys, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
      _mm256_storeu_ps(out + (r + 4) * kTileKeys, _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
    }
  }
}
#endif

// Keys [first, first + count) of one sequence and KV head as float32, transposed; the rest of the
// tile is not to be used.
template <class T>
void load_keys(const AttentionPrefillParams& p, const std::int32_t* page_table,
               std::int64_t kv_head, std::int64_t first, std::int64_t count,
               const AttentionBlock& b) {
  for (std::int64_t key = 0; key < kTileKeys; key += 8) {
    const T* k[8];
    for (std::int64_t j = 0; j < 8; ++j) {
      // A key beyond the last is read as the last and never counts: its score is masked, whatever
      // it is.
      const std::int64_t wanted = key + j < count ? key + j : count - 1;
      k[j] = static_cast<const T*>(p.k_pages) +
             page_offset(p, page_table, p.k_page_stride, kv_head, first + wanted);
    }
    for (std::int64_t i = 0; i < p.head_dim; i += kTransposed)
      transpose(k, i, b.k_tile + i * kTileKeys + key);
  }
}

// The values of the same keys: where they lie, if that is in one piece and so few rows meet them
// that each is widened once all the same; else null, and as float32 in v_tile.
template <class T>
const T* load_values(const AttentionPrefillParams& p, const std::int32_t* page_table,
                     std::int64_t kv_head, std::int64_t first, std::int64_t count,
                     std::int64_t num_rows, const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim;
  const T* pages = static_cast<const T*>(p.v_pages);
  if (num_rows <= kRegRows && first % p.page_size + count <= p.page_size)
    return pages + page_offset(p, page_table, p.v_page_stride, kv_head, first);
  for (std::int64_t key = 0; key < count; ++key) {
    const T* v = pages + page_offset(p, page_table, p.v_page_stride, kv_head, first + key);
    for (std::int64_t i = 0; i < dim; i += kLanes) store(b.v_tile + key * dim + i, load(v + i));
  }
  return nullptr;
}

// out of rows [row, row + num_rows) += their weights of keys [key, key + count) of the tile *
// values.
template <class T>
void add_values(const AttentionPrefillParams& p, const T* values, std::int64_t row,
                std::int64_t num_rows, std::int64_t key, std::int64_t count,
                const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim;
  const float* weights = b.weights + row * kTileKeys + key;
  float* out = b.out + row * dim;
  if (values != nullptr) {
    multiply<true>(num_rows, weights, kTileKeys, values + key * dim, dim, count, dim, out, dim);
  } else {
    multiply<true>(num_rows, weights, kTileKeys, b.v_tile + key * dim, dim, count, dim, out, dim);
  }
}

// Asks for a tile's keys and values, into L2, if they lie in one piece. Measured on Zen 4 with KV
// in memory: decode in 0.79-0.96 of the time. (Inlined: GCC drops calls that only prefetch.)
template <class T>
FULLBEAM_INLINE void prefetch_tile(const AttentionPrefillParams& p, const std::int32_t* page_table,
                                   std::int64_t kv_head, std::int64_t first) {
  if (first % p.page_size + kTileKeys > p.page_size) return;
  const std::int64_t num_bytes = kTileKeys * p.head_dim * static_cast<std::int64_t>(sizeof(T));
  const auto* k =
      reinterpret_cast<const char*>(static_cast<const T*>(p.k_pages) +
                                    page_offset(p, page_table, p.k_page_stride, kv_head, first));
  const auto* v =
      reinterpret_cast<const char*>(static_cast<const T*>(p.v_pages) +
                                    page_offset(p, page_table, p.v_page_stride, kv_head, first));
  for (std::int64_t i = 0; i < num_bytes; i += 64) {
    __builtin_prefetch(k + i, 0, 2);
    __builtin_prefetch(v + i, 0, 2);
  }
}

// Scores of one row's tile -> weights; the row's running maximum, sum and output follow. Keys that
// the row doesn't see weigh exactly 0, whatever their score is.
inline void update_row(const AttentionPrefillParams& p, const AttentionBlock& b, std::int64_t row,
                       std::uint32_t seen) {
  float* weights = b.weights + row * kTileKeys;
  if (seen == 0) {
    for (int i = 0; i < kTileKeys; ++i) weights[i] = 0.0f;
    return;
  }
  if (p.softcap > 0) {
    for (int i = 0; i < kTileKeys; i += kLanes) {
      store(weights + i, mul(set1(p.softcap), tanh(div(load(weights + i), set1(p.softcap)))));
    }
  }
  if (seen != ~std::uint32_t{0}) {
    for (int i = 0; i < kTileKeys; ++i)
      weights[i] = (seen >> i & 1u) != 0 ? weights[i] : -__builtin_inff();
  }
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

// Bits [low, high) of a tile; both may lie outside it.
inline std::uint32_t key_bits(std::int64_t low, std::int64_t high) {
  if (low < 0) low = 0;
  if (high > kTileKeys) high = kTileKeys;
  return low < high ? ~std::uint32_t{0} >> (kTileKeys - (high - low)) << low : 0;
}

inline std::int64_t kv_head_of(const AttentionPrefillParams& p, const QueryRows& rows) {
  return rows.head_begin / (p.num_q_heads / p.num_kv_heads);
}

inline void begin_rows(const AttentionPrefillParams& p, const QueryRows& rows,
                       const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim;
  for (std::int64_t row = 0; row < rows.count(); ++row) {
    const float* q = static_cast<const float*>(p.q) +
                     (rows.token_begin + row / rows.num_heads) * p.q_stride +
                     (rows.head_begin + row % rows.num_heads) * dim;
    for (std::int64_t i = 0; i < dim; ++i) {
      b.q[row * dim + i] = q[i] * p.scale;
      b.out[row * dim + i] = 0.0f;
    }
    b.maxima[row] = -__builtin_inff();
    b.sums[row] = 0.0f;
  }
}

// The tile of keys [first, first + count) -> weights of all rows, by b.seen.
template <class T>
void weigh_tile(const AttentionPrefillParams& p, const std::int32_t* page_table,
                const QueryRows& rows, std::int64_t first, std::int64_t count,
                const AttentionBlock& b) {
  load_keys<T>(p, page_table, kv_head_of(p, rows), first, count, b);
  const std::int64_t num_cols = (count + kMinCols - 1) / kMinCols * kMinCols;
  multiply<false>(rows.count(), b.q, p.head_dim, b.k_tile, kTileKeys, p.head_dim, num_cols,
                  b.weights, kTileKeys);
  for (std::int64_t token = 0, row = 0; token < rows.num_tokens; ++token) {
    for (std::int64_t head = 0; head < rows.num_heads; ++head, ++row)
      update_row(p, b, row, b.seen[token]);
  }
}

// Keys 0 .. num_keys - 1, at these positions: what b.positions lets each token see of them.
template <class T>
void add_keys(const AttentionPrefillParams& p, const std::int32_t* page_table,
              const QueryRows& rows, std::int64_t num_keys, const AttentionBlock& b) {
  std::int64_t earliest = b.positions[0];
  for (std::int64_t token = 1; token < rows.num_tokens; ++token)
    earliest = b.positions[token] < earliest ? b.positions[token] : earliest;
  const std::int64_t first_seen =
      p.window > 0 && earliest >= p.window ? earliest - p.window + 1 : 0;
  for (std::int64_t first = first_seen / kTileKeys * kTileKeys; first < num_keys;
       first += kTileKeys) {
    const std::int64_t count = num_keys - first < kTileKeys ? num_keys - first : kTileKeys;
    for (std::int64_t token = 0; token < rows.num_tokens; ++token) {
      const std::int64_t end = b.positions[token] + 1;
      b.seen[token] = key_bits(p.window > 0 ? end - p.window - first : 0,
                               (end < num_keys ? end : num_keys) - first);
    }
    if (first + kTileKeys < num_keys)
      prefetch_tile<T>(p, page_table, kv_head_of(p, rows), first + kTileKeys);
    weigh_tile<T>(p, page_table, rows, first, count, b);
    const T* values =
        load_values<T>(p, page_table, kv_head_of(p, rows), first, count, rows.count(), b);
    add_values(p, values, 0, rows.count(), 0, count, b);
  }
}

inline void finish_rows(const AttentionPrefillParams& p, const QueryRows& rows,
                        const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim;
  for (std::int64_t row = 0; row < rows.count(); ++row) {
    float* out = static_cast<float*>(p.out) +
                 (rows.token_begin + row / rows.num_heads) * p.out_stride +
                 (rows.head_begin + row % rows.num_heads) * dim;
    const F32 sum = set1(b.sums[row]);
    for (std::int64_t i = 0; i < dim; i += kLanes)
      store(out + i, div(load(b.out + row * dim + i), sum));
  }
}

// Calls fn(s, end, rows, b) for blocks of the query rows of each sequence s, whose last row is end
// -
// 1. A work item is (sequence, block of tokens, KV head), its query heads cut in parts where they
// are more than a block holds or where there are fewer items than threads. Threads take items as
// they become free, last tokens first, since those see most keys. Each thread has a block of its
// own in the caller's scratch memory.
template <class Fn>
void for_each_block(const AttentionPrefillParams& p, const Fn& fn) {
  const std::int64_t group = p.num_q_heads / p.num_kv_heads;
  const auto row_of = [&](std::int64_t s) {
    return p.query_starts == nullptr ? s : std::int64_t{p.query_starts[s]};
  };
  const int threads = num_threads();
  std::int64_t parts = (group + kMaxRows - 1) / kMaxRows, num_heads, num_tokens, num_items;
  const auto blocks_of = [&](std::int64_t s) {
    return (row_of(s + 1) - row_of(s) + num_tokens - 1) / num_tokens;
  };
  for (;; ++parts) {
    num_heads = (group + parts - 1) / parts;
    num_tokens = kMaxRows / num_heads;
    num_items = 0;
    for (std::int64_t s = 0; s < p.num_seqs; ++s) num_items += blocks_of(s);
    num_items *= p.num_kv_heads * parts;
    if (parts >= group || num_items >= threads) break;
  }
  const std::int64_t block_floats = AttentionBlock::floats(p.head_dim);
  auto* memory = static_cast<float*>(scratch(threads * block_floats * 4));
  int next_block = 0;
  std::int64_t next = 0;
  parallel_for(threads, 1, [&](std::int64_t, std::int64_t) {
    const int idx = __atomic_fetch_add(&next_block, 1, __ATOMIC_RELAXED);
    const AttentionBlock b(memory + idx * block_floats, p.head_dim);
    for (;;) {
      const std::int64_t item = num_items - 1 - __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item < 0) return;
      const std::int64_t head = item % (p.num_kv_heads * parts);
      std::int64_t block = item / (p.num_kv_heads * parts), s = 0;
      for (; block >= blocks_of(s); ++s) block -= blocks_of(s);
      const std::int64_t begin = row_of(s) + block * num_tokens, end = row_of(s + 1);
      const std::int64_t head_begin = head / parts * group + head % parts * num_heads,
                         group_end = (head / parts + 1) * group;
      if (head_begin >= group_end) continue;
      fn(s, end,
         QueryRows{begin, begin + num_tokens < end ? num_tokens : end - begin, head_begin,
                   head_begin + num_heads < group_end ? num_heads : group_end - head_begin},
         b);
    }
  });
}

// Calls fn<T>() with the type of the pages.
template <class Fn>
inline void dispatch_pages(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f16:
      return fn.template operator()<Half>();
    case DType::bf16:
      return fn.template operator()<BFloat>();
    default:
      return fn.template operator()<float>();
  }
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
