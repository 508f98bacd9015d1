// SPDX-License-Identifier: Apache-2.0
// The edits of a row of logits before a draw, on the part of it that lies in shared memory. What
// the arrays hold may be anything: entries outside them and tokens outside the vocabulary are
// skipped. Products and sums are rounded one by one, as on the CPU.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/reduce.cuh"

namespace fullbeam::cuda {

constexpr int kStrip = 128;  // tokens that share a maximum and a partial sum: four of each lane

// A row's entries in compressed sparse rows.
struct Entries {
  std::int64_t begin, end;
  __device__ bool is_empty() const { return begin >= end; }
};

__device__ inline Entries entries_of(const std::int32_t* starts, std::int64_t row,
                                     std::int64_t count) {
  if (starts == nullptr) return {0, 0};
  return {starts[row] > 0 ? starts[row] : 0, starts[row + 1] < count ? starts[row + 1] : count};
}

struct Penalties {
  float repetition, frequency, presence;
  __device__ bool are_neutral() const {
    return repetition == 1.0f && frequency == 0.0f && presence == 0.0f;
  }
};

// A row's edits.
struct Edits {
  const std::uint32_t* mask;  // [(vocab_size + 31) / 32]; null allows all
  Entries bias;
  const std::int32_t* bias_ids;
  const float* bias_values;
  Entries history;
  const std::int32_t *history_ids, *history_counts;
  int last = -1;  // of the history, see SampleParams; -1: none
  Penalties penalties;

  __device__ bool is_any() const {
    return mask != nullptr || !bias.is_empty() || !history.is_empty() || last >= 0;
  }
};

// Strips of a row in shared memory: `count` of them from strip `first` on, or, with a bitmap, those
// that it marks, without the first `first` of them.
struct Tile {
  float* values;  // [count, kStrip]
  int count, first;
  const unsigned* bitmap;  // bit i of word w: strip begin + 32 w + i
  const unsigned* before;  // marked strips before each word
  const int* strips;       // [count], with a bitmap
  int begin, end;

  __device__ int strip_at(int place) const {
    return bitmap == nullptr ? first + place : strips[place];
  }
  // Where the token is in `values`, or -1.
  __device__ int place_of(int id) const {
    const int strip = id / kStrip;
    int place = strip - first;
    if (bitmap != nullptr) {
      if (strip < begin || strip >= end) return -1;
      const unsigned word = bitmap[(strip - begin) / 32], bit = 1u << (strip - begin) % 32;
      if ((word & bit) == 0) return -1;
      place = static_cast<int>(before[(strip - begin) / 32]) + __popc(word & (bit - 1)) - first;
    }
    return id >= 0 && place >= 0 && place < count ? place * kStrip + id % kStrip : -1;
  }
};

// Makes the tokens outside the mask -infinity.
__device__ inline void allow(const Tile& tile, int vocab_size, const std::uint32_t* mask) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  for (int place = warp; place < tile.count; place += num_warps) {
    const int id = tile.strip_at(place) * kStrip + 4 * lane;
    const unsigned bits = id < vocab_size ? mask[id / 32] >> (id % 32) & 15u : 15u;
    float* values = tile.values + place * kStrip + 4 * lane;
    for (int i = 0; i < 4; ++i) {
      if ((bits >> i & 1) == 0) values[i] = -INFINITY;
    }
  }
}

// In order of entries, since a token may have several: 32 at a time, the warps one after another.
__device__ inline void add_bias(const Tile& tile, const Edits& edits) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  for (std::int64_t first = edits.bias.begin; first < edits.bias.end; first += blockDim.x) {
    const std::int64_t entry = first + threadIdx.x;
    const bool is_one = entry < edits.bias.end;
    const int place = is_one ? tile.place_of(edits.bias_ids[entry]) : -1;
    const float value = place >= 0 ? edits.bias_values[entry] : 0.0f;
    if (__syncthreads_or(place >= 0) == 0) continue;
    const unsigned same = __match_any_sync(kWholeWarp, place);
    const int turn = place >= 0 ? __popc(same & ((1u << lane) - 1)) : -1;
    for (int w = 0; w < num_warps; ++w) {
      for (int t = 0; w == warp && __any_sync(kWholeWarp, turn >= t); ++t) {
        if (turn == t) {
          float& logit = tile.values[place];
          logit = value == -INFINITY ? value : logit + value;
        }
        __syncwarp();
      }
      __syncthreads();
    }
  }
}

__device__ inline void penalize(float& logit, float count, const Penalties& penalties) {
  logit = logit > 0.0f ? logit / penalties.repetition : logit * penalties.repetition;
  if (count > 0.0f) logit -= count * penalties.frequency + penalties.presence;
}

// The entries are distinct tokens.
__device__ inline void penalize(const Tile& tile, const Edits& edits) {
  bool is_listed = false;
  for (std::int64_t entry = edits.history.begin + threadIdx.x; entry < edits.history.end;
       entry += blockDim.x) {
    const int id = edits.history_ids[entry], place = tile.place_of(id);
    if (place < 0) continue;
    const bool is_last = id == edits.last;
    is_listed |= is_last;
    penalize(tile.values[place],
             static_cast<float>(edits.history_counts[entry]) + (is_last ? 1.0f : 0.0f),
             edits.penalties);
  }
  const int place = edits.last >= 0 ? tile.place_of(edits.last) : -1;  // same for all threads
  if (place >= 0 && __syncthreads_or(is_listed) == 0 && threadIdx.x == 0) {
    penalize(tile.values[place], 1.0f, edits.penalties);
  }
}

// All threads of the block, between barriers of their own.
__device__ inline void edit(const Tile& tile, int vocab_size, const Edits& edits) {
  if (edits.mask != nullptr) allow(tile, vocab_size, edits.mask);
  __syncthreads();
  add_bias(tile, edits);
  penalize(tile, edits);
}

}  // namespace fullbeam::cuda
