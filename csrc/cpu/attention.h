// SPDX-License-Identifier: Apache-2.0
// Attention of a block of query rows (some tokens x the query heads that share one KV head) over a
// paged KV cache. Mapping: keys go by tiles of 32 at absolute positions, and a tile meets all rows
// of the block. Where the rows are many, the lanes of a register are rows: the queries lie
// transposed, the tile becomes float32 once, nothing is added up across lanes. Where they are few,
// the lanes are keys, transposed tile by tile, and values are read where they lie. Cost: K and V of
// the visible keys once per block, 4 * head_dim operations per row and key. Numerics: float32,
// running maximum and sum per row (Milakov and Gimelshein 2018, arXiv 1805.02867), in powers of 2;
// the maximum follows only what exceeds it by kSlack. What a row sees is added up in order of
// position, tile by tile, and keys that it doesn't see add exact zeros: its result is the same bits
// in every block and layout, prefill or decode.
#pragma once
#include "cpu/attention_blocks.h"
#include "cpu/attention_tile.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kSlack = 8.0f;  // a row's maximum stays while no score is above it by more

// Where the keys and values of a tile lie.
template <class T>
struct TileRows {
  const T* keys[kTileKeys];  // those beyond the last are the last
  const T* values[kTileKeys];
};

// Of `count` keys from position `first` on, at least one.
template <class T>
void find_tile(const AttentionPrefillParams& p, const std::int32_t* page_table,
               std::int64_t kv_head, std::int64_t first, std::int64_t count, TileRows<T>* tile) {
  std::int64_t entry = first / p.page_size, in_page = first % p.page_size;
  for (std::int64_t key = 0; key < count; ++entry, in_page = 0) {
    const std::int64_t page = page_table[entry];
    const std::int64_t offset = (kv_head * p.page_size + in_page) * p.head_dim;
    const T* k = static_cast<const T*>(p.k_pages) + page * p.k_page_stride + offset;
    const T* v = static_cast<const T*>(p.v_pages) + page * p.v_page_stride + offset;
    const std::int64_t left = p.page_size - in_page, end = count - key < left ? count : key + left;
    for (; key < end; ++key, k += p.head_dim, v += p.head_dim) {
      tile->keys[key] = k;
      tile->values[key] = v;
    }
  }
  for (std::int64_t key = count; key < kTileKeys; ++key) {
    tile->keys[key] = tile->keys[count - 1];
    tile->values[key] = tile->values[count - 1];
  }
}

// Keys that lie transposed; a line of the next tile's keys is asked for, into L2, with each row:
// one by one they don't hold up the products. Measured on Zen 4 (2 threads, 8 rows of 64 to 512
// keys in memory): 0.42-0.85 of the time of asking for a tile at a time, where it lies in one page.
template <class T>
struct KeyColumns {
  const T* columns;
  const T* const* next;
  FULLBEAM_INLINE const T* row(std::int64_t k) const {
    __builtin_prefetch(next[k % kTileKeys] + k / kTileKeys * kTileKeys, 0, 2);
    return columns + k * kTileKeys;
  }
};

// Values where they lie, and the next tile's likewise.
template <class T>
struct ValueRows {
  const T* const* values;
  const T* const* next;
  std::int64_t col;
  FULLBEAM_INLINE const T* row(std::int64_t k) const {
    __builtin_prefetch(next[k] + col, 0, 2);
    return values[k] + col;
  }
};

// out of rows [row, row + num_rows) of the block += their weights of keys [key, key + count) of the
// tile * values.
template <class T>
void add_values(const AttentionPrefillParams& p, const TileRows<T>& tile, const TileRows<T>& next,
                const QueryRows& rows, std::int64_t row, std::int64_t num_rows, std::int64_t key,
                std::int64_t count, const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim;
  for (std::int64_t col = 0; col < dim; col += kRegCols) {
    float* out = b.out + row * dim + col;
    if (rows.are_many()) {
      const Strided<float> values{b.v_tile + col * kTileKeys + key * kRegCols, kRegCols};
      multiply_panel<true, Order::columns>(num_rows, dim - col, b.weights + key * kMaxRows + row,
                                           kMaxRows, values, count, out, dim);
    } else {
      const ValueRows<T> values{tile.values + key, next.values + key, col};
      multiply_panel<true, Order::rows>(num_rows, dim - col, b.weights + row * kTileKeys + key,
                                        kTileKeys, values, count, out, dim);
    }
  }
}

// A score, in powers of 2, from the product of a scaled query and a key.
inline F32 score_of(const AttentionPrefillParams& p, F32 product) {
  if (p.softcap == 0) return product;
  return mul(set1(p.softcap * kLog2E), tanh(div(product, set1(p.softcap))));
}

// The output of one row, whose maximum has grown, in terms of the new one.
inline void shrink_row(const AttentionPrefillParams& p, const AttentionBlock& b, std::int64_t row,
                       float shrink) {
  float* out = b.out + row * p.head_dim;
  for (std::int64_t i = 0; i < p.head_dim; i += kLanes)
    store(out + i, mul(load(out + i), set1(shrink)));
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
  for (int i = 0; i < kTileKeys; i += kLanes) {
    store(weights + i, score_of(p, load(weights + i)));
  }
  if (seen != ~std::uint32_t{0}) {
    for (int i = 0; i < kTileKeys; ++i)
      weights[i] = (seen >> i & 1u) != 0 ? weights[i] : -__builtin_inff();
  }
  F32 largest = set1(-__builtin_inff());
  for (int i = 0; i < kTileKeys; i += kLanes) largest = max(load(weights + i), largest);
  const float maximum = reduce_max(largest);
  if (maximum > b.maxima[row] + kSlack) {
    float lanes[kLanes];
    store(lanes, exp2(set1(b.maxima[row] - maximum)));
    shrink_row(p, b, row, lanes[0]);
    b.sums[row] *= lanes[0];
    b.maxima[row] = maximum;
  }
  F32 sums = set1(0.0f);
  for (int i = 0; i < kTileKeys; i += kLanes) {
    const F32 weight = exp2(sub(load(weights + i), set1(b.maxima[row])));
    store(weights + i, weight);
    sums = add(sums, weight);
  }
  b.sums[row] += reduce_add(sums);
}

// Scores of keys i, i + kStep .. of kLanes rows -> weights; their sum, in the order in which the
// lanes of a register are added up.
template <int kStep>
FULLBEAM_INLINE F32 weigh_keys(float* weights, int i, F32 maximum) {
  if constexpr (kStep < kLanes) {
    const F32 low = weigh_keys<2 * kStep>(weights, i, maximum);
    return add(low, weigh_keys<2 * kStep>(weights, i + kStep, maximum));
  } else {
    F32 sum = set1(0.0f);
    for (; i < kTileKeys; i += kStep) {
      const F32 weight = exp2(sub(load(weights + i * kMaxRows), maximum));
      store(weights + i * kMaxRows, weight);
      sum = add(sum, weight);
    }
    return sum;
  }
}

// update_row for kLanes rows of many, of which num_rows count. `seen` is null if they see all keys.
inline void update_rows(const AttentionPrefillParams& p, const AttentionBlock& b, std::int64_t row,
                        std::int64_t num_rows, const std::uint32_t* seen) {
  float* weights = b.weights + row;
  if (p.softcap > 0 || seen != nullptr) {
    for (int i = 0; i < kTileKeys; ++i) {
      const F32 score = score_of(p, load(weights + i * kMaxRows));
      store(weights + i * kMaxRows, seen == nullptr ? score : where_bit(score, seen, i));
    }
  }
  F32 largest[4];
  for (F32& part : largest) part = set1(-__builtin_inff());
  for (int i = 0; i < kTileKeys; i += 4) {
    for (int j = 0; j < 4; ++j) largest[j] = max(load(weights + (i + j) * kMaxRows), largest[j]);
  }
  float maxima[kLanes], shrinks[kLanes];
  store(maxima, max(max(largest[0], largest[1]), max(largest[2], largest[3])));
  bool has_grown = false;
  for (int i = 0; i < kLanes; ++i) has_grown |= maxima[i] > b.maxima[row + i] + kSlack;
  if (has_grown) {
    for (int i = 0; i < kLanes; ++i) {
      if (!(maxima[i] > b.maxima[row + i] + kSlack)) maxima[i] = b.maxima[row + i];
    }
    store(shrinks, exp2(sub(load(b.maxima + row), load(maxima))));
    for (std::int64_t i = 0; i < num_rows; ++i) {
      if (maxima[i] != b.maxima[row + i]) shrink_row(p, b, row + i, shrinks[i]);
    }
    for (std::int64_t i = 0; i < num_rows; ++i) {
      b.sums[row + i] *= shrinks[i];
      b.maxima[row + i] = maxima[i];
    }
  }
  float sums[kLanes];
  store(sums, weigh_keys<1>(weights, 0, load(b.maxima + row)));
  for (std::int64_t i = 0; i < num_rows; ++i) b.sums[row + i] += sums[i];
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

// The queries, scaled, in the layout of the block.
inline void load_queries(const AttentionPrefillParams& p, const QueryRows& rows,
                         const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim, count = rows.count();
  const auto query = [&](std::int64_t row) {
    return static_cast<const float*>(p.q) + (rows.token_begin + row / rows.num_heads) * p.q_stride +
           (rows.head_begin + row % rows.num_heads) * dim;
  };
  std::int64_t size = count * dim;
  if (rows.are_many()) {
    for (std::int64_t row = 0; row < count; ++row) {
      for (std::int64_t i = 0; i < dim; i += 16) __builtin_prefetch(query(row) + i);
    }
    // Lanes beyond the last row repeat it and are never looked at.
    const std::int64_t num_lanes = (count + kMinCols - 1) / kMinCols * kMinCols;
    for (std::int64_t row = 0; row < num_lanes; row += 8) {
      const float* q[8];
      for (std::int64_t j = 0; j < 8; ++j) q[j] = query(row + j < count ? row + j : count - 1);
      float* panel = b.q + row / kRegCols * kRegCols * dim + row % kRegCols;
      for (std::int64_t i = 0; i < dim; i += kTransposed)
        transpose(q, i, panel + i * kRegCols, kRegCols);
    }
    size = (num_lanes + kRegCols - 1) / kRegCols * kRegCols * dim;
  } else {
    for (std::int64_t row = 0; row < count; ++row)
      std::memcpy(b.q + row * dim, query(row), static_cast<std::size_t>(dim) * sizeof(float));
  }
  const F32 scale = set1(p.softcap > 0 ? p.scale : p.scale * kLog2E);
  for (std::int64_t i = 0; i < size; i += kLanes) store(b.q + i, mul(load(b.q + i), scale));
}

inline void begin_rows(const AttentionPrefillParams& p, const QueryRows& rows,
                       const AttentionBlock& b) {
  load_queries(p, rows, b);
  std::memset(b.out, 0, static_cast<std::size_t>(rows.count() * p.head_dim) * sizeof(float));
  for (int row = 0; row < kMaxRows; ++row) {
    b.maxima[row] = -__builtin_inff();
    b.sums[row] = 0.0f;
  }
}

// b.seen by rows; whether all rows see all keys of the tile.
inline bool spread_seen(const QueryRows& rows, const AttentionBlock& b) {
  std::uint32_t all = ~std::uint32_t{0};
  std::int64_t row = 0;
  for (std::int64_t token = 0; token < rows.num_tokens; ++token) {
    for (std::int64_t head = 0; head < rows.num_heads; ++head) b.row_seen[row++] = b.seen[token];
    all &= b.seen[token];
  }
  for (; row < kMaxRows; ++row) b.row_seen[row] = 0;
  return all == ~std::uint32_t{0};
}

// Keys from the first to the last that any of the rows [row, row + num_rows) sees.
struct KeyRange {
  std::int64_t begin, end;
};
inline KeyRange seen_by(const AttentionBlock& b, std::int64_t row, std::int64_t num_rows) {
  std::uint32_t any = 0;
  for (std::int64_t i = row; i < row + num_rows; ++i) any |= b.row_seen[i];
  if (any == 0) return {0, 0};
  return {__builtin_ctz(any), kTileKeys - __builtin_clz(any)};
}

// A tile of `count` keys -> weights of all rows, by b.seen. The keys, and the values of rows that
// are many, become float32; the next tile's are asked for.
template <class T>
void weigh_tile(const AttentionPrefillParams& p, const TileRows<T>& tile, const TileRows<T>& next,
                const QueryRows& rows, std::int64_t count, const AttentionBlock& b) {
  const std::int64_t dim = p.head_dim, num_rows = rows.count();
  const bool see_all = spread_seen(rows, b);
  if (!rows.are_many()) {
    T* columns = reinterpret_cast<T*>(b.k_tile);
    for (std::int64_t key = 0; key < count; key += 8) {
      for (std::int64_t i = 0; i < dim; i += kTransposed)
        transpose(tile.keys + key, i, columns + i * kTileKeys + key, kTileKeys);
    }
    for (std::int64_t col = 0; col < count; col += kRegCols) {
      multiply_panel<false, Order::rows>(num_rows, count - col, b.q, dim,
                                         KeyColumns<T>{columns + col, next.keys}, dim,
                                         b.weights + col, kTileKeys);
    }
    for (std::int64_t row = 0; row < num_rows; ++row) update_row(p, b, row, b.row_seen[row]);
    return;
  }
  for (std::int64_t key = 0; key < count; ++key) {
    for (std::int64_t i = 0; i < dim; i += kLanes) {
      __builtin_prefetch(next.keys[key] + i, 0, 2);
      __builtin_prefetch(next.values[key] + i, 0, 2);
      store(b.k_tile + key * dim + i, load(tile.keys[key] + i));
      const std::int64_t panel = i / kRegCols * kRegCols;
      store(b.v_tile + panel * kTileKeys + key * kRegCols + i - panel, load(tile.values[key] + i));
    }
  }
  for (std::int64_t row = 0; row < num_rows; row += kRegCols) {
    const std::int64_t num_keys = see_all ? count : seen_by(b, row, kRegCols).end;
    multiply_panel<false, Order::rows>(num_keys, num_rows - row, b.k_tile, dim,
                                       Strided<float>{b.q + row * dim, kRegCols}, dim,
                                       b.weights + row, kMaxRows);
  }
  for (std::int64_t row = 0; row < num_rows; row += kLanes) {
    const std::int64_t left = num_rows - row;
    update_rows(p, b, row, left < kLanes ? left : kLanes, see_all ? nullptr : b.row_seen + row);
  }
}

// The first key that a row at this position sees, or one of the same tile.
inline std::int64_t first_key(const AttentionPrefillParams& p, std::int64_t position) {
  const std::int64_t first = p.window > 0 && position >= p.window ? position - p.window + 1 : 0;
  return first / kTileKeys * kTileKeys;
}

// Keys begin .. num_keys - 1, at these positions: what b.positions lets each token see of them.
// `begin` is a tile's. `following` (may be null) is the tile that the thread will read next.
template <class T>
void add_keys(const AttentionPrefillParams& p, const std::int32_t* page_table,
              const QueryRows& rows, std::int64_t begin, std::int64_t num_keys,
              const TileRows<T>* following, const AttentionBlock& b) {
  std::int64_t earliest = b.positions[0];
  for (std::int64_t token = 1; token < rows.num_tokens; ++token)
    earliest = b.positions[token] < earliest ? b.positions[token] : earliest;
  const auto count_from = [&](std::int64_t first) {
    return num_keys - first < kTileKeys ? num_keys - first : kTileKeys;
  };
  TileRows<T> tile, next;
  std::int64_t first = first_key(p, earliest);
  if (first < begin) first = begin;
  if (first >= num_keys) return;
  find_tile(p, page_table, kv_head_of(p, rows), first, count_from(first), &next);
  for (; first < num_keys; first += kTileKeys) {
    const std::int64_t count = count_from(first), then = first + kTileKeys;
    for (std::int64_t token = 0; token < rows.num_tokens; ++token) {
      const std::int64_t end = b.positions[token] + 1;
      b.seen[token] = key_bits(p.window > 0 ? end - p.window - first : 0,
                               (end < num_keys ? end : num_keys) - first);
    }
    tile = next;
    if (then < num_keys) {
      find_tile(p, page_table, kv_head_of(p, rows), then, count_from(then), &next);
    } else if (following != nullptr) {
      next = *following;
    }
    weigh_tile(p, tile, next, rows, count, b);
    if (count == kTileKeys && spread_seen(rows, b)) {
      add_values(p, tile, next, rows, 0, rows.count(), 0, count, b);
    } else {
      for (std::int64_t row = 0; row < rows.count(); row += kRegRows) {
        const std::int64_t left = rows.count() - row, num_rows = left < kRegRows ? left : kRegRows;
        const KeyRange keys = seen_by(b, row, num_rows);
        add_values(p, tile, next, rows, row, num_rows, keys.begin, keys.end - keys.begin, b);
      }
    }
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
