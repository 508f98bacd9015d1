// SPDX-License-Identifier: Apache-2.0
// What the CUDA kernels of attention_decode and attention_prefill share, on tensor cores
// (attention_matrix.cuh) and without (attention_plain.cuh): how a block's rows are numbered, where
// keys lie, which of them a row sees, and how scores are scaled.
#pragma once
#include "cuda/exp2.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "ops/attention_prefill.h"

namespace fullbeam::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = __builtin_huge_valf();

// Query rows of one block: row r is query head kv_head * group + (first_row + r) % group of token
// first_token + (first_row + r) / group.
struct QueryRows {
  int first_token, first_row, num_rows, kv_head, group;
  __device__ int token(int row) const { return first_token + (first_row + row) / group; }
  __device__ int head(int row) const { return kv_head * group + (first_row + row) % group; }
};

// Of the scale without its sign, which is the query's; of 0 it makes a little, since 0 times the
// -infinity of a hidden score would be NaN.
__device__ inline float scale_of(const AttentionPrefillParams& p) {
  return fmaxf(fabsf(p.scale), 1e-30f);
}
// What brings a score, capped where softcap > 0, into base 2.
__device__ inline float log2_scale(const AttentionPrefillParams& p) {
  return (p.softcap > 0 ? 1.0f : scale_of(p)) * kLog2e;
}
// softcap * tanh(scale * score / softcap) of several scores, where tanh(x) = 1 - 2 / (e^2x + 1)
template <int kCount>
__device__ inline void cap_scores(const AttentionPrefillParams& p, float (&scores)[kCount]) {
  const float inner = scale_of(p) / p.softcap * (2 * kLog2e);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = exp2_fast(fminf(scores[i] * inner, 64.0f));
    scores[i] = p.softcap - 2 * p.softcap * __fdividef(1.0f, e + 1.0f);
  }
}

// Query heads of a KV head; 64-bit divisions would be calls.
__device__ inline int group_of(const AttentionPrefillParams& p) {
  return static_cast<int>(p.num_q_heads) / static_cast<int>(p.num_kv_heads);
}

__device__ inline int window_of(const AttentionPrefillParams& p) {
  return p.window > 0x3fffffff ? 0 : static_cast<int>(p.window);
}

// Where a key lies: page -1 where it is not to be read, since it is outside [begin, end) or the
// page table is broken there.
struct KeyPlace {
  int page = -1, offset = 0;
  __device__ KeyPlace(const AttentionPrefillParams& p, int seq, int key, int begin, int end) {
    if (key < begin || key >= end) return;
    const auto page_size = static_cast<unsigned>(p.page_size), at = static_cast<unsigned>(key);
    page = __ldg(p.page_table + seq * p.max_pages + at / page_size);
    offset = static_cast<int>(at % page_size);
    if (page >= p.num_pages) page = -1;
  }
};

// Bit i: key i of a tile.
using SeenKeys = std::uint64_t;

// Bits [low, high) of a tile; both may lie outside it.
template <int kKeys>
__device__ inline SeenKeys key_bits(int low, int high) {
  low = max(low, 0);
  high = min(high, kKeys);
  return low < high ? ~SeenKeys{0} >> (64 - (high - low)) << low : 0;
}

// Keys of the tile at `first` that a row at `position` sees.
template <int kTileKeys>
__device__ inline SeenKeys seen_keys(const AttentionPrefillParams& p, int position, int first,
                                     int end) {
  const int window = window_of(p);
  return key_bits<kTileKeys>(window > 0 ? position + 1 - window - first : 0,
                             min(position + 1, end) - first);
}

}  // namespace
}  // namespace fullbeam::cuda
