// SPDX-License-Identifier: Apache-2.0
// Attention of a block's query rows (rows of q x the query heads that share one KV head) over tiles
// of keys at absolute positions, for prefill and decode alike.
//
// Mapping: 128 threads. Tiles come into a ring in shared memory by asynchronous 16-byte copies,
// each warp a quarter of a tile's keys, page numbers looked up one tile ahead; rows are padded by
// 16 bytes, which keeps ldmatrix free of bank conflicts for every head size. A warp owns 16 rows
// (or 32 of a prefill) and meets all keys of a tile; where a block has at most 16 rows, its warps
// share them: 16 keys each for the scores, which go through shared memory, then some of the
// output's columns each. Both ways do the same operations on a row in the same order, so the same
// bits come out. Cost: K and V of the visible keys once per block; 4 * head_dim operations per row
// and key. Numerics: float32 sums of products of 16-bit floats; weights are rounded to the pages'
// type for the second product. Running maximum in base 2 with the scale folded in, in float32. Keys
// that a row doesn't see weigh exactly 0. Source: Dao 2023 (arXiv 2307.08691) for the tiles in
// registers; Milakov and Gimelshein 2018 (arXiv 1805.02867) for the running maximum.
#pragma once
#include "cuda/async_copy.cuh"
#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

namespace fullbeam::cuda {
namespace {

// Tiles of 32 KB of keys and values at most.
template <int kDim>
struct TileShape {
  static constexpr int kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kStride = kDim + 8;                // elements from key to key
  static constexpr int kValues = kKeys * kStride;         // where the values begin
  static constexpr int kBytes = 2 * 2 * kKeys * kStride;  // keys and values
};

// A ring of tiles from byte kOffset of the shared memory on, filled ahead of their use. `Walk` says
// which tiles: its members seq, kv_head,
// first (a tile's first key; those outside [begin, end) are zeros), has_tile() and advance(p).
template <class T, int kDim, int kOffset, class Walk>
class Ring {
  using Tile = TileShape<kDim>;
  static constexpr int kWarpKeys = Tile::kKeys / kWarps;

 public:
  template <class Params>
  __device__ Ring(const Params& p, const Walk& walk, int num_stages)
      : walk_(walk), num_stages_(num_stages), place_(look_up(p)) {
    for (int i = 1; i < num_stages; ++i) fill(p);
  }

  // The next tile: its keys, and Tile::kValues elements on its values. It holds until the next
  // call, which all threads make at the same time.
  template <class Params>
  __device__ T* next(const Params& p) {
    switch (num_stages_) {
      case 2:
        async_copy_wait<0>();
        break;
      case 3:
        async_copy_wait<1>();
        break;
      default:
        async_copy_wait<2>();
    }
    __syncthreads();
    fill(p);  // where the tile before was
    T* tile = stage(used_);
    used_ = used_ + 1 == num_stages_ ? 0 : used_ + 1;
    return tile;
  }

 private:
  __device__ T* stage(int idx) const {
    return reinterpret_cast<T*>(dynamic_shared() + kOffset + idx * Tile::kBytes);
  }

  template <class Params>
  __device__ KeyPlace look_up(const Params& p) const {
    const int key = threadIdx.x / 32 * kWarpKeys + threadIdx.x % kWarpKeys;
    return {p, walk_.seq, walk_.first + key, walk_.begin, walk_.has_tile() ? walk_.end : 0};
  }

  template <class Params>
  __device__ void fill(const Params& p) {
    if (walk_.has_tile()) {
      constexpr int kPieces = kDim / 8;  // of 16 bytes
      const int lane = threadIdx.x % 32, dim = static_cast<int>(p.head_dim);
      const auto* k_pages = static_cast<const T*>(p.k_pages);
      const auto* v_pages = static_cast<const T*>(p.v_pages);
      T* tile = stage(filled_) + threadIdx.x / 32 * kWarpKeys * Tile::kStride;
#pragma unroll
      for (int i = 0; i < kWarpKeys * kPieces; i += 32) {
        const int key = (i + lane) / kPieces, col = (i + lane) % kPieces * 8;
        const int page = __shfl_sync(kWholeWarp, place_.page, key);
        const int offset = __shfl_sync(kWholeWarp, place_.offset, key);
        const bool is_valid = page >= 0 && col < dim;
        const std::int64_t at =
            (walk_.kv_head * p.page_size + offset) * static_cast<std::int64_t>(dim) + col;
        T* to = tile + key * Tile::kStride + col;
        async_copy16(to, is_valid ? k_pages + page * p.k_page_stride + at : k_pages, is_valid);
        async_copy16(to + Tile::kValues, is_valid ? v_pages + page * p.v_page_stride + at : v_pages,
                     is_valid);
      }
      walk_.advance(p);
      place_ = look_up(p);
    }
    async_copy_commit();
    filled_ = filled_ + 1 == num_stages_ ? 0 : filled_ + 1;
  }

  Walk walk_;
  int num_stages_, filled_ = 0, used_ = 0;
  KeyPlace place_;  // of this lane's key in the tile that is filled next
};

// A tile's scores on their way between warps that have the same rows: [16, kStride].
template <int kDim>
constexpr int kScoreStride = TileShape<kDim>::kKeys + 8;  // two words per lane without conflicts

// The rows of one warp: queries, output so far, running maximum (in base 2) and sum. A thread's
// share is that of mma.cuh: rows lane / 4 and lane / 4 + 8 of each 16, columns 2 * (lane % 4) and
// the next one of each 8. kSplitRows: each warp has rows of its own, else all have the same 16, and
// different keys and columns. kQuery: byte in shared memory where the queries are, rows of
// Tile::kStride elements; -1: they are in registers.
template <class T, int kDim, int kRowTiles, bool kSplitRows, int kQuery>
class MatrixRows {
  using Tile = TileShape<kDim>;
  static constexpr int kSteps = kDim / 16;
  static constexpr int kScoreTiles = Tile::kKeys / 8;
  static constexpr int kPairs = kSplitRows ? kSteps : (kDim + 63) / 64;  // of 8 columns each
  static constexpr SeenKeys kAllKeys = ~SeenKeys{0} >> (64 - Tile::kKeys);
  static_assert(kSplitRows || kRowTiles == 1);

 public:
  static constexpr int kBlockRows = 16 * kRowTiles * (kSplitRows ? kWarps : 1);

  // Loads the queries; in shared memory nobody else uses their place any more, and they are there
  // after the next barrier.
  __device__ MatrixRows(const AttentionPrefillParams& p, const QueryRows& rows)
      : log2_scale_(log2_scale(p)) {
    const unsigned flip = p.scale < 0 ? 0x80008000u : 0u;
    const int dim = static_cast<int>(p.head_dim);
    const auto query_of = [&](int row) {
      return static_cast<const T*>(p.q) + rows.token(row) * p.q_stride +
             rows.head(row) * p.head_dim;
    };
    const auto pair = [&](const T* from, int col) {
      return __ldg(reinterpret_cast<const unsigned*>(from + col)) ^ flip;
    };
    if constexpr (kQuery >= 0) {
      T* query = shared_query();
      for (int row = threadIdx.x / 32; row < kBlockRows; row += kWarps) {
        const T* from = query_of(row);
        for (int col = threadIdx.x % 32 * 2; col < kDim; col += 64) {
          *reinterpret_cast<unsigned*>(query + row * Tile::kStride + col) =
              row < rows.num_rows && col < dim ? pair(from, col) : 0u;
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const T* from = query_of(row(0, half));
        const bool is_row = row(0, half) < rows.num_rows;
#pragma unroll
        for (int i = 0; i < 2 * kSteps; ++i) {
          const int col = 8 * i + 2 * t();
          query_[i / 2][i % 2 * 2 + half] = is_row && col < dim ? pair(from, col) : 0u;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) out_[r][i][j] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maxima_[r][half] = -kInfinity;
        sums_[r][half] = 0.0f;
      }
    }
  }

  // The block's row that this thread has in row tile r.
  __device__ static int row(int r, int half) {
    return (kSplitRows ? threadIdx.x / 32 * 16 * kRowTiles : 0) + 16 * r + 8 * half + g();
  }

  // Adds a tile of keys and values; seen(r, half) tells which of its keys row(r, half) sees.
  // `exchange` [16, kScoreStride<kDim>] is used where the warps share rows: not again before the
  // next barrier.
  template <class Seen>
  __device__ void add(const AttentionPrefillParams& p, const T* tile, float* exchange,
                      const Seen& seen) {
    float scores[kRowTiles][kScoreTiles][4];
    if constexpr (kSplitRows) {
      multiply_keys<Tile::kKeys / 16>(tile, scores);
    } else {
      share_scores(tile, exchange, scores[0]);
    }
    unsigned weights[kRowTiles][kScoreTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (p.softcap > 0) {
#pragma unroll
        for (int i = 0; i < kScoreTiles; ++i) cap_scores(p, scores[r][i]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        hide(seen(r, half), half, scores[r]);
        weigh(r, half, scores[r]);
      }
#pragma unroll
      for (int i = 0; i < 2 * kScoreTiles; ++i)
        weights[r][i / 2][i % 2] =
            pack<T>(scores[r][i / 2][i % 2 * 2], scores[r][i / 2][i % 2 * 2 + 1]);
    }
    multiply_values(tile + Tile::kValues, weights);
  }

  // Of the values of a tile, what is no number would reach all rows, seen or not. Whether this
  // thread's share of them has any; adding those, alone, to the rows that see them; making them 0.
  __device__ static bool has_no_number(const T* tile) {
    bool found = false;
    for_each_value(tile, [&](const T& value) { found = found || !is_number(value); });
    return found;
  }
  template <class Seen>
  __device__ void add_no_numbers(const T* tile, const Seen& seen) {
    for (int key = 0; key < Tile::kKeys; ++key) {
#pragma unroll
      for (int i = 0; i < 4 * kPairs; ++i) {
        if (!has_pair(i / 4)) continue;
        const T& value = tile[Tile::kValues + key * Tile::kStride + column(i / 2) + i % 2];
        if (is_number(value)) continue;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if ((seen(r, half) >> key & 1) != 0)
              out_[r][i / 2][2 * half + i % 2] += to_float(value);
          }
        }
      }
    }
  }
  __device__ static void clear_no_numbers(T* tile) {
    for_each_value(tile, [](T& value) {
      if (!is_number(value)) value = from_float<T>(0.0f);
    });
  }

  // Of each of this thread's rows below num_rows fn_row(row, is_first, maximum, sum), is_first in
  // one thread only, then fn(col, a, b) for its pairs of neighbours in the output, not yet divided
  // by the sum.
  template <class FnRow, class Fn>
  __device__ void for_each_output(int num_rows, int head_dim, const FnRow& fn_row,
                                  const Fn& fn) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sums_[r][half];
        sum += __shfl_xor_sync(kWholeWarp, sum, 1);
        sum += __shfl_xor_sync(kWholeWarp, sum, 2);
        if (row(r, half) >= num_rows) continue;
        fn_row(row(r, half), t() == 0 && (kSplitRows || warp() == 0), maxima_[r][half], sum);
#pragma unroll
        for (int i = 0; i < 2 * kPairs; ++i) {
          if (column(i) < head_dim) fn(column(i), out_[r][i][2 * half], out_[r][i][2 * half + 1]);
        }
      }
    }
  }

 private:
  __device__ static T* shared_query() { return reinterpret_cast<T*>(dynamic_shared() + kQuery); }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int g() { return threadIdx.x % 32 / 4; }
  __device__ static int t() { return threadIdx.x % 4; }
  // The pairs of 8 columns that this warp has of the output; there may be fewer than kPairs.
  __device__ static int pair_of(int i) { return kSplitRows ? i : warp() + kWarps * i; }
  __device__ static bool has_pair(int i) {
    return (kSplitRows || kSteps % kWarps == 0) || pair_of(i) < kSteps;
  }
  __device__ static int column(int i) { return pair_of(i / 2) * 16 + i % 2 * 8 + 2 * t(); }

  // scores = queries times keys, of 16 * kCount keys from `keys` on
  template <int kCount>
  __device__ void multiply_keys(const T* keys, float (&scores)[kRowTiles][2 * kCount][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRowTiles * kCount * 8; ++i)
      scores[i / (kCount * 8)][i / 4 % (2 * kCount)][i % 4] = 0.0f;
    const T* from = keys + (lane % 8 + lane / 16 * 8) * Tile::kStride + lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned query[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if constexpr (kQuery >= 0) {
          load_matrices(shared_query() + (row(r, 0) - g() + lane % 16) * Tile::kStride + 16 * step +
                            lane / 16 * 8,
                        query[r]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) query[r][i] = query_[step][i];
        }
      }
#pragma unroll
      for (int pair = 0; pair < kCount; ++pair) {
        unsigned both[4];
        load_matrices(from + 16 * pair * Tile::kStride + 16 * step, both);
        const unsigned left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(query[r], left, scores[r][2 * pair]);
          multiply_add<T>(query[r], right, scores[r][2 * pair + 1]);
        }
      }
    }
  }

  // The same by all warps together: each computes those of 16 keys, and gets all.
  __device__ void share_scores(const T* tile, float* exchange,
                               float (&scores)[kScoreTiles][4]) const {
    constexpr int kStride = kScoreStride<kDim>;
    float* at = exchange + g() * kStride + 2 * t();
    if (warp() < Tile::kKeys / 16) {
      float own[1][2][4];
      multiply_keys<1>(tile + warp() * 16 * Tile::kStride, own);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* to = at + 16 * warp() + 8 * i;
        *reinterpret_cast<float2*>(to) = make_float2(own[0][i][0], own[0][i][1]);
        *reinterpret_cast<float2*>(to + 8 * kStride) = make_float2(own[0][i][2], own[0][i][3]);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kScoreTiles; ++i) {
      const float2 upper = *reinterpret_cast<const float2*>(at + 8 * i);
      const float2 lower = *reinterpret_cast<const float2*>(at + 8 * i + 8 * kStride);
      scores[i][0] = upper.x, scores[i][1] = upper.y;
      scores[i][2] = lower.x, scores[i][3] = lower.y;
    }
  }

  __device__ static void hide(SeenKeys seen, int half, float (&scores)[kScoreTiles][4]) {
    if (seen == kAllKeys) return;
    seen >>= 2 * t();
#pragma unroll
    for (int i = 0; i < 2 * kScoreTiles; ++i) {
      if ((seen >> (i / 2 * 8 + i % 2) & 1) == 0) scores[i / 2][2 * half + i % 2] = -kInfinity;
    }
  }

  // Scores -> weights, in place; the row's maximum, sum and output follow.
  __device__ void weigh(int r, int half, float (&scores)[kScoreTiles][4]) {
    float maximum = scores[0][2 * half];
#pragma unroll
    for (int i = 1; i < 2 * kScoreTiles; ++i)
      maximum = fmaxf(maximum, scores[i / 2][2 * half + i % 2]);
    maximum = fmaxf(maximum, __shfl_xor_sync(kWholeWarp, maximum, 1));
    maximum = fmaxf(maximum, __shfl_xor_sync(kWholeWarp, maximum, 2));
    maximum = fmaxf(maxima_[r][half], maximum * log2_scale_);
    const float base = maximum == -kInfinity ? 0.0f : maximum;  // the row sees nothing yet
    const float shrink = exp2_fast(maxima_[r][half] - base);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kScoreTiles; ++i) {
      float& score = scores[i / 2][2 * half + i % 2];
      score = exp2_fast(fmaf(score, log2_scale_, -base));
      sum += score;
    }
    maxima_[r][half] = maximum;
    sums_[r][half] = fmaf(sums_[r][half], shrink, sum);
    if (__any_sync(kWholeWarp, shrink != 1.0f)) {
#pragma unroll
      for (int i = 0; i < 4 * kPairs; ++i) out_[r][i / 2][2 * half + i % 2] *= shrink;
    }
  }

  // output += weights times values
  __device__ void multiply_values(const T* values,
                                  const unsigned (&weights)[kRowTiles][kScoreTiles][2]) {
    const int lane = threadIdx.x % 32;
    const T* from = values + lane % 16 * Tile::kStride + lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < Tile::kKeys / 16; ++step) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (!has_pair(i)) continue;
        unsigned both[4];
        load_matrices_transposed(from + 16 * step * Tile::kStride + 16 * pair_of(i), both);
        const unsigned left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const unsigned own[4] = {weights[r][2 * step][0], weights[r][2 * step][1],
                                   weights[r][2 * step + 1][0], weights[r][2 * step + 1][1]};
          multiply_add<T>(own, left, out_[r][2 * i]);
          multiply_add<T>(own, right, out_[r][2 * i + 1]);
        }
      }
    }
  }

  // fn(value) for this thread's share of a tile's values
  template <class Values, class Fn>
  __device__ static void for_each_value(Values* tile, const Fn& fn) {
    for (int i = threadIdx.x; i < Tile::kKeys * kDim; i += kThreads)
      fn(tile[Tile::kValues + i / kDim * Tile::kStride + i % kDim]);
  }
  __device__ static bool is_number(const T& value) { return fabsf(to_float(value)) < kInfinity; }

  float log2_scale_;
  unsigned query_[kQuery >= 0 ? 1 : kSteps][4];
  float out_[kRowTiles][2 * kPairs][4];
  float maxima_[kRowTiles][2], sums_[kRowTiles][2];
};

// Whether the tensor cores serve this call: queries of the pages' 16-bit type, at addresses that
// allow 16-byte copies of keys and 4-byte accesses to rows.
inline bool fits_matrices(const AttentionPrefillParams& p) {
  return p.dtype != DType::f32 && p.dtype == p.kv_dtype && p.head_dim <= 256 &&
         is_aligned16({address_of(p.k_pages), address_of(p.v_pages), 2 * p.k_page_stride,
                       2 * p.v_page_stride}) &&
         address_of(p.q) % 4 == 0 && address_of(p.out) % 4 == 0 && p.q_stride % 2 == 0 &&
         p.out_stride % 2 == 0;
}

// Calls fn<kDim>() for the least size that holds head_dim; columns beyond it are zeros. Each size
// takes seconds to compile, so 80 shares that of 96, or of 128 where memory is what bounds it.
template <bool kHas96, class Fn>
inline bool dispatch_dim(std::int64_t head_dim, const Fn& fn) {
  if (head_dim <= 64) return fn.template operator()<64>();
  if constexpr (kHas96) {
    if (head_dim <= 96) return fn.template operator()<96>();
  }
  if (head_dim <= 128) return fn.template operator()<128>();
  return fn.template operator()<256>();
}

}  // namespace
}  // namespace fullbeam::cuda
