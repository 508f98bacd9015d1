// SPDX-License-Identifier: Apache-2.0
// What the ops on rows of logits share: who works on a row, and the row in shared memory. Passes
// over its strips are in logits_passes.cuh, the kernel and its launch in logits_kernel.cuh.
//
// Mapping, two ways with the same results:
//   cluster   (Hopper) A cluster of kCluster blocks has a row; each keeps its share, edited,
//             in its shared memory, and all go through every later pass together.
//   portable  A block has a tile of a row, in which it finds maxima and sums of strips; the last
//             block of a row to come this far goes on alone, reads the few strips again that its
//             passes want, and edits them again.
// A row's and a view's state is the same for all threads and lies in shared memory.
// A row is cut into strips and tiles by the size of the vocabulary alone, and passes gather what no
// order of threads can change: integers, and floats from one strip, which is one warp's. So a row
// gives the same bits on both ways, in any batch and place.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/cluster.cuh"
#include "cuda/edits.cuh"
#include "cuda/launch.cuh"

namespace fullbeam::cuda {

constexpr int kListSize = 1024;  // tokens that are sorted at once
constexpr int kBins = 1024;
constexpr int kMaxTile = 64;  // strips
constexpr int kMaxWords = 512;
constexpr std::int64_t kMaxVocab = std::int64_t{kMaxWords} * 32 * kStrip;
constexpr unsigned kCluster = 8;
constexpr int kMaxRowThreads = 256;
constexpr double kLog2E = 1.4426950408889634;
// Softmax weights are summed as integers: the best token's is kUnit, so that kMaxVocab of them fit,
// sums never depend on their order, and a cumulative sum never falls.
constexpr double kUnit = 4398046511104.0;  // 2^42

// A token's place in the order of logits (larger first, then lower id): the descending key of its
// logit, then its id. Better tokens have smaller keys.
using Key = unsigned long long;
constexpr Key kLastKey = ~Key{0};
constexpr unsigned kInfinityKey = 0x007fffffu, kNothingKey = 0xff800000u;  // of infinities
constexpr Key kLastFinite = (Key{kNothingKey} << 32) - 1;

// Larger floats have smaller keys; both zeros have the same; kNan's is 0, the least of all.
__device__ inline unsigned descending_key(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}
__device__ inline float value_of(unsigned key) {
  return __uint_as_float((key & 0x80000000u) != 0 ? key : ~key & 0x7fffffffu);
}
__device__ inline float nan_of_key_0() { return __uint_as_float(0x7fffffffu); }
__device__ inline Key key_of(float value, int id) {
  return Key{descending_key(value)} << 32 | static_cast<unsigned>(id);
}
__device__ inline unsigned value_key(Key key) { return static_cast<unsigned>(key >> 32); }
__device__ inline int id_of(Key key) { return static_cast<int>(key & 0x7fffffffu); }

// Tokens, and what they weigh.
struct Amount {
  unsigned long long count, mass;
  __device__ Amount operator+(const Amount& other) const {
    return {count + other.count, mass + other.mass};
  }
  __device__ bool reaches(const Amount& wanted) const {
    return count >= wanted.count || mass >= wanted.mass;
  }
};
constexpr unsigned long long kNever = ~0ull;

// What a search through sums finds: the first item at which they reach what is wanted.
struct Found {
  int idx;
  bool is_reached;         // else `through` is the sum of all
  Amount before, through;  // the sums without and with that item
};

// How logits become weights: e^((x - top) / temperature) = 2^((x - top) * rate).
struct Softmax {
  float top, rate;
  double wide_rate;

  __device__ static Softmax of(float temperature) {
    const float inverse = 1.0f / temperature < 1e38f ? 1.0f / temperature : 1e38f;
    const double wide = 1.0 / static_cast<double>(temperature);
    return {0.0f, static_cast<float>(kLog2E) * inverse, kLog2E * (wide < 1e38 ? wide : 1e38)};
  }
};

// Below 2^-126, and for NaN, 0.
__device__ inline float weight_of(float x, float top, float rate) {
  const float y = (x - top) * rate;
  return y >= -126.0f ? exp2f(y) : 0.0f;
}

// Token masks of a row: in both masks, but not in the third; null: no such condition.
struct Masks {
  const std::uint32_t *in, *also_in, *not_in;

  // Of the four tokens from `id` on, those that pass.
  __device__ unsigned bits(int id, int vocab_size) const {
    if (id >= vocab_size) return 0;
    unsigned passed = id + 4 <= vocab_size ? 15u : 15u >> (id + 4 - vocab_size);
    if (in != nullptr) passed &= in[id / 32] >> (id % 32);
    if (also_in != nullptr) passed &= also_in[id / 32] >> (id % 32);
    if (not_in != nullptr) passed &= ~(not_in[id / 32] >> (id % 32));
    return passed;
  }
};

// A row as a pass sees it, in numbers that are finite or -infinity.
struct View {
  const float* max;      // [strips], the largest logit of each; key 0 where one is NaN
  float* sum;            // [strips], its weights, relative to max; null where not known
  int first;             // strip that max and sum begin with
  bool is_raw;           // as given, though the row has edits
  bool is_infinite;      // +infinity counts as 0 and all else as -infinity
  Masks masks;           // other tokens are -infinity
  unsigned best, worst;  // value keys of the largest and the least of max, without -infinity
  Softmax softmax;

  __device__ bool has_distribution() const { return best != 0 && best < kNothingKey; }
  __device__ float see(float x) const {
    return !is_infinite ? x : x == INFINITY ? 0.0f : -INFINITY;
  }
  __device__ float max_of(int strip) const { return see(max[strip - first]); }
  // The weight of a value, as a mass.
  __device__ unsigned long long mass_of(float value) const {
    return static_cast<unsigned long long>(
        static_cast<double>(weight_of(value, softmax.top, softmax.rate)) * kUnit);
  }
  __device__ unsigned long long mass_of_strip(int strip) const {
    const float largest = max_of(strip);
    if (largest == -INFINITY) return 0;
    const double below = static_cast<double>(largest) - static_cast<double>(softmax.top);
    return static_cast<unsigned long long>(static_cast<double>(sum[strip - first]) *
                                           exp2(below * softmax.wide_rate) * kUnit);
  }
};

// The blocks that share a row's later passes.
struct Team {
  unsigned rank, size;

  __device__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster_sync();
    }
  }
  template <class U>
  __device__ U* at(U* shared, unsigned of_rank) const {
    return size == 1 ? shared : map_shared(shared, of_rank);
  }
};

// A search for the end of a prefix of the tokens in order, see find_edge.
struct Search {
  Key low, high;          // the keys that are left
  Amount before, wanted;  // reached before `low`; what to reach
};

struct RowShared;

// A row and this block's share of it.
struct Row {
  const void* logits;  // [vocab_size], dtype
  DType dtype;
  int vocab_size, num_strips;
  Edits edits;
  int begin, end;   // the strips of this block's share
  float* stats[4];  // [strips], from strip stats_first on
  int stats_first;
  bool is_resident;  // all of the share stays in `resident`, edited
  float* resident;   // [end - begin, kStrip]
  float* tile;       // [tile_strips, kStrip], for later passes
  int tile_strips;
  Team team;
  RowShared* root;  // the team's first block's

  __device__ bool is_root() const { return team.rank == 0; }
};

// The address of logits from an element on.
__device__ inline const void* row_of(const void* logits, DType dtype, std::int64_t offset) {
  return static_cast<const char*>(logits) + offset * size_of(dtype);
}

// What a block's numbers are told to the team by, one for each purpose.
enum Part { kRawView, kRawMass, kDrawnView, kDrawnMass, kNucleusMass, kDrawMass, kNumParts };
enum Finding { kBound, kInList, kInBins, kNucleus, kInRow, kNumFindings };

// The fixed part of a block's shared memory; tiles and a cluster's stats follow.
struct RowShared {
  Row row;
  View views[2];
  Tile tile;
  Search search;
  Key list[kListSize];
  Amount scan[32];
  Found found[kNumFindings], narrowed;
  unsigned long long reduce[32], parts[kNumParts];
  Key best;
  unsigned list_size, count, num_marked, is_last;
  int token_id;
  unsigned counts[kBins], mass_low[kBins], mass_high[kBins];
  unsigned bitmap[kMaxWords], before[kMaxWords];
  int strips[kMaxTile];
};

// How a row is cut up: by the vocabulary and the way alone.
struct RowTuning {
  int threads;
  unsigned num_parts;  // blocks of a row: the cluster's, or one per tile
  int part_strips;     // strips of each; the tile of stage one
  int tile_strips;     // of later passes
  bool is_cluster;
};

// Not measured yet: 64 strips are 32 KB of float32, four blocks a multiprocessor.
inline RowTuning tune_rows(std::int64_t vocab_size, bool is_cluster) {
  const auto num_strips = static_cast<int>((vocab_size + kStrip - 1) / kStrip);
  const auto threads_of = [](int strips) {
    int threads = 32;
    while (threads < 32 * strips && threads < kMaxRowThreads) threads *= 2;
    return threads;
  };
  if (is_cluster) {
    const int each = (num_strips + static_cast<int>(kCluster) - 1) / static_cast<int>(kCluster);
    return {threads_of(each), kCluster, each, each < kMaxTile / 2 ? each : kMaxTile / 2, true};
  }
  const int strips = num_strips < kMaxTile ? (num_strips > 0 ? num_strips : 1) : kMaxTile;
  const int num_parts = num_strips > strips ? (num_strips + strips - 1) / strips : 1;
  return {threads_of(strips), static_cast<unsigned>(num_parts), strips, strips, false};
}

__device__ inline RowShared& row_shared() {
  return *reinterpret_cast<RowShared*>(dynamic_shared());
}

}  // namespace fullbeam::cuda
