// SPDX-License-Identifier: Apache-2.0
// Causal attention of many query tokens per sequence over paged keys.
//
// Mapping: a block takes up to 128 query rows (tokens x the query heads that share one KV head; 64
// for some head sizes) of one sequence and goes over the keys that they see, from the first to
// the last, by the tiles of attention_matrix.cuh: 32 rows a warp, so that a tile read from shared
// memory serves two tensor-core operations each. Blocks are numbered so that the last rows of a
// sequence, which see most keys, come first, and the KV heads of the same rows side by side. Which
// sequence a block's number belongs to follows from query_starts alone, by bisection: nothing is
// planned. Cost: 4 * head_dim operations per row and visible key: bound by arithmetic from about
// 300 rows on (half of the Hopper tensor cores' rate is out of this instruction's reach; wgmma is
// to come). Numerics: those of attention_matrix.cuh. Tiles begin at multiples of 64 keys (32 for
// head sizes above 128), so that a row is the same bits in any chunk of a prompt and in any batch,
// and the same as attention_decode's where that has one chunk of keys (up to 256). Source:
// FlashAttention-2 (Dao 2023, arXiv 2307.08691); rows of a group side by side as in FA3.
#include <algorithm>

#include "cuda/attention_matrix.cuh"
#include "cuda/attention_plain.cuh"
#include "cuda/device.h"
#include "ops/attention_prefill.h"

namespace fullbeam::cuda {
namespace {

// One block's rows and the tiles that they see.
template <int kTileKeys, int kBlockRows>
struct PrefillWalk {
  int seq, kv_head;
  int first, begin, end;  // the tile's first key; those that any row sees
  int first_token, num_rows, first_row;
  int last_position;  // of the sequence's last token, which is last_token
  int last_token;

  // num_rows is 0 where this number has no rows.
  __device__ explicit PrefillWalk(const AttentionPrefillParams& p) {
    const int group = group_of(p);
    const int num_heads = static_cast<int>(p.num_kv_heads);
    const int number = static_cast<int>(gridDim.x - 1 - blockIdx.x) / num_heads;
    kv_head = kv_head_of(p);
    // Numbers of a sequence's blocks begin at that of its first row, in blocks, plus its own.
    const auto first_number = [&](int s) {
      return static_cast<int>(static_cast<std::int64_t>(start_of(p, s)) * group / kBlockRows) + s;
    };
    seq = 0;
    for (int beyond = static_cast<int>(p.num_seqs); beyond - seq > 1;) {
      const int middle = (seq + beyond) / 2;
      (first_number(middle) <= number ? seq : beyond) = middle;
    }
    first_token = start_of(p, seq);
    last_token = start_of(p, seq + 1) - 1;
    first_row = (number - first_number(seq)) * kBlockRows;
    num_rows = min((last_token + 1 - first_token) * group - first_row, kBlockRows);
    const int room = static_cast<int>(min(p.max_pages * p.page_size, std::int64_t{0x7fffffff}));
    const int seq_len = min(max(__ldg(p.seq_lens + seq), 0), room), window = window_of(p);
    last_position = seq_len - 1;
    const QueryRows block = rows(p);
    end = min(position(block.token(num_rows - 1)) + 1, seq_len);
    begin = window > 0 ? max(position(block.token(0)) + 1 - window, 0) : 0;
    first = begin / kTileKeys * kTileKeys;
  }

  __device__ QueryRows rows(const AttentionPrefillParams& p) const {
    return {first_token, first_row, num_rows, kv_head, group_of(p)};
  }
  __device__ static int kv_head_of(const AttentionPrefillParams& p) {
    return static_cast<int>(blockIdx.x % static_cast<unsigned>(p.num_kv_heads));
  }
  __device__ int position(int token) const { return last_position - (last_token - token); }
  __device__ bool has_tile() const { return first < end; }
  __device__ void advance(const AttentionPrefillParams&) { first += kTileKeys; }

 private:
  __device__ static int start_of(const AttentionPrefillParams& p, int s) {
    return min(max(__ldg(p.query_starts + s), 0), static_cast<int>(p.num_tokens));
  }
};

constexpr int kStages = 2;  // one tile under way
template <int kRowTiles>
constexpr int kPrefillRows = 16 * kWarps * kRowTiles;
// Shared memory: the queries, and from here on, in bytes, the ring of tiles.
template <int kDim, int kRowTiles>
constexpr int kRing = kPrefillRows<kRowTiles> * TileShape<kDim>::kStride * 2;

template <class T, int kDim, int kRowTiles>
__global__ void __launch_bounds__(kThreads)
    prefill_matrix(const __grid_constant__ AttentionPrefillParams p) {
  constexpr int kTileKeys = TileShape<kDim>::kKeys;
  using Walk = PrefillWalk<kTileKeys, kPrefillRows<kRowTiles>>;
  using Rows = MatrixRows<T, kDim, kRowTiles, true, 0>;
  Walk walk(p);
  if (walk.num_rows <= 0) return;
  Ring<T, kDim, kRing<kDim, kRowTiles>, Walk> ring(p, walk, kStages);
  const QueryRows block = walk.rows(p);
  // Kept for the end behind the first query's columns: registers are scarce until then.
  int* kept = reinterpret_cast<int*>(dynamic_shared() + 2 * kDim);
  if (threadIdx.x == 0) {
    kept[0] = block.first_token;
    kept[1] = block.first_row;
    kept[2] = block.num_rows;
  }
  Rows rows(p, block);
  int positions[kRowTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    positions[i / 2][i % 2] =
        walk.position(block.token(min(Rows::row(i / 2, i % 2), block.num_rows - 1)));
  }
  for (; walk.has_tile(); walk.advance(p)) {
    const T* tile = ring.next(p);
    rows.add(p, tile, nullptr, [&](int r, int half) {
      return seen_keys<kTileKeys>(p, positions[r][half], walk.first, walk.end);
    });
  }
  async_copy_wait<0>();
  __syncthreads();
  const QueryRows done{kept[0], kept[1], kept[2], Walk::kv_head_of(p), group_of(p)};
  float inverse = 0.0f;
  T* out = nullptr;
  rows.for_each_output(
      done.num_rows, static_cast<int>(p.head_dim),
      [&](int row, bool, float, float sum) {
        inverse = 1.0f / sum;
        out = static_cast<T*>(p.out) + done.token(row) * p.out_stride + done.head(row) * p.head_dim;
      },
      [&](int col, float a, float b) {
        *reinterpret_cast<unsigned*>(out + col) = pack<T>(a * inverse, b * inverse);
      });
}

template <class T, int kCols>
__global__ void __launch_bounds__(kThreads, 4)
    prefill_plain(const __grid_constant__ AttentionPrefillParams p) {
  PrefillWalk<kPlainKeys, kPlainRows> walk(p);
  if (walk.num_rows <= 0) return;
  const QueryRows block = walk.rows(p);
  PlainRows<T, kCols> rows(p, block, reinterpret_cast<float*>(dynamic_shared()));
  for (; walk.has_tile(); walk.advance(p)) {
    rows.add(p, walk.seq, walk.kv_head, walk.first, walk.begin, walk.end, [&](int i) {
      const int token = block.token(min(rows.row(i), block.num_rows - 1));
      return seen_keys<kPlainKeys>(p, walk.position(token), walk.first, walk.end);
    });
  }
  float inverse = 0.0f;
  std::int64_t at = 0;
  rows.for_each_output(
      block.num_rows, static_cast<int>(p.head_dim),
      [&](int row, bool, float, float sum) {
        inverse = 1.0f / sum;
        at = block.token(row) * p.out_stride + block.head(row) * p.head_dim;
      },
      [&](int col, float value) { store_any(p.out, p.dtype, at + col, value * inverse); });
}

// More numbers than there are blocks of rows, by at most one per sequence: see PrefillWalk.
Shape prefill_shape(const AttentionPrefillParams& p, std::int64_t block_rows,
                    std::int64_t shared_bytes) {
  const std::int64_t rows = p.num_tokens * (p.num_q_heads / p.num_kv_heads);
  return {.grid = static_cast<unsigned>((rows / block_rows + p.num_seqs) * p.num_kv_heads),
          .block = kThreads,
          .shared_bytes = shared_bytes};
}

template <class T, int kDim, int kRowTiles>
bool try_prefill(const AttentionPrefillParams& p) {
  constexpr std::int64_t kBytes = kRing<kDim, kRowTiles> + kStages * TileShape<kDim>::kBytes;
  if (kBytes > device_info().max_shared_bytes) return false;
  launch(&prefill_matrix<T, kDim, kRowTiles>, prefill_shape(p, kPrefillRows<kRowTiles>, kBytes), p);
  return true;
}

// 32 rows a warp, where registers (not for 96 columns on sm_80) and shared memory (99 KB don't for
// 128 columns) hold them.
template <class T>
bool prefill_on_matrices(const AttentionPrefillParams& p) {
  return dispatch_dim<true>(p.head_dim, [&]<int kDim>() {
    if constexpr (kDim == 64 || kDim == 128) {
      if (try_prefill<T, kDim, 2>(p)) return true;
    }
    if constexpr (kDim > 64) {
      if (try_prefill<T, kDim, 1>(p)) return true;
    }
    return false;
  });
}

}  // namespace

void attention_prefill(const AttentionPrefillParams& p) {
  if (p.num_tokens == 0 || p.num_seqs == 0) return;
  if (fits_matrices(p) &&
      (p.dtype == DType::f16 ? prefill_on_matrices<Half>(p) : prefill_on_matrices<BFloat>(p))) {
    return;
  }
  dispatch_plain(p, [&]<class T, int kCols>() {
    launch(&prefill_plain<T, kCols>, prefill_shape(p, kPlainRows, plain_shared(p.head_dim) * 4), p);
  });
}

}  // namespace fullbeam::cuda
