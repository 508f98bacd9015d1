// SPDX-License-Identifier: Apache-2.0
// What the ops on rows of logits share: who works on a row, the row in shared memory, the maxima
// and sums of its strips, and passes over the strips that matter.
//
// Mapping, two ways with the same results:
//   cluster   (Hopper) A cluster of kCluster blocks has a row; each keeps its share, edited,
//             in its shared memory, and all go through every later pass together.
//   portable  A block has a tile of a row, in which it finds maxima and sums of strips; the last
//             block of a row to come this far goes on alone, reads the few strips again that its
//             passes want, and edits them again.
// A row's and a view's state is the same for all threads and lies in shared memory; what differs by
// the logits' type is in load_tile alone.
// A row is cut into strips and tiles by the size of the vocabulary alone, and passes gather what no
// order of threads can change: integers, and floats from one strip, which is one warp's. So a row
// gives the same bits on both ways, in any batch and place.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <new>
#include <string>
#include <type_traits>

#include "core/dispatch.h"
#include "cuda/cluster.cuh"
#include "cuda/edits.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

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

// How a row is cut up: printable, and chosen by the vocabulary and the device alone.
struct RowTuning {
  int threads;
  unsigned num_parts;  // blocks of a row: the cluster's, or one per tile
  int part_strips;     // strips of each; the tile of stage one
  int tile_strips;     // of later passes
  bool is_cluster;
};

inline RowTuning choose_rows(const DeviceInfo& device, std::int64_t vocab_size) {
  const auto num_strips = static_cast<int>((vocab_size + kStrip - 1) / kStrip);
  const auto threads_of = [](int strips, int most) {
    int threads = 32;
    while (threads < 32 * strips && threads < most) threads *= 2;
    return threads;
  };
  // Not measured yet: 64 strips are 32 KB of float32, four blocks a multiprocessor.
  const int each = (num_strips + static_cast<int>(kCluster) - 1) / static_cast<int>(kCluster);
  const int tile = each < kMaxTile / 2 ? each : kMaxTile / 2;
  const std::int64_t bytes =
      std::int64_t{sizeof(RowShared)} + 1024 + (each * (kStrip + 4) + tile * kStrip) * 4;
  if (device.is_hopper && num_strips > static_cast<int>(kCluster) &&
      bytes <= device.max_shared_bytes) {
    return {threads_of(each, kMaxRowThreads), kCluster, each, tile, true};
  }
  const int strips = num_strips < kMaxTile ? (num_strips > 0 ? num_strips : 1) : kMaxTile;
  const int num_parts = num_strips > strips ? (num_strips + strips - 1) / strips : 1;
  return {threads_of(strips, kMaxRowThreads), static_cast<unsigned>(num_parts), strips, strips,
          false};
}

__device__ inline RowShared& row_shared() {
  return *reinterpret_cast<RowShared*>(dynamic_shared());
}

// Global memory that no one writes meanwhile, in one access.
template <class V>
__device__ inline V load_once(const void* from) {
  using Bits = std::conditional_t<sizeof(V) == 16, uint4,
                                  std::conditional_t<sizeof(V) == 4, unsigned, unsigned short>>;
  static_assert(sizeof(V) == sizeof(Bits));
  const Bits bits = __ldg(static_cast<const Bits*>(from));
  return *reinterpret_cast<const V*>(&bits);
}

// kAhead loads of kItems floats each are under way before the first is stored.
template <int kItems, class T>
__device__ inline void load_strips(const T* logits, int vocab_size, const Tile& tile) {
  constexpr int kParts = kStrip / kItems, kAhead = kItems > 1 ? 4 : 8;
  const int num_parts = tile.count * kParts, step = static_cast<int>(blockDim.x);
  float* const values = tile.values;
  for (int first = static_cast<int>(threadIdx.x); first < num_parts; first += kAhead * step) {
    Vec<T, kItems> ahead[kAhead];
    int ids[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int part = first + a * step;
      ids[a] = part < num_parts ? tile.strip_at(part / kParts) * kStrip + part % kParts * kItems
                                : vocab_size;
      if (ids[a] + kItems <= vocab_size) ahead[a] = load_once<Vec<T, kItems>>(logits + ids[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (first + a * step >= num_parts) break;
      float floats[kItems];
      if (ids[a] + kItems <= vocab_size) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) floats[i] = to_float(ahead[a].items[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          floats[i] = ids[a] + i < vocab_size ? to_float(logits[ids[a] + i]) : -INFINITY;
        }
      }
      store_floats(floats, values + (first + a * step) * kItems);
    }
  }
}

// The tile in the block's RowShared, as the row is given. The end of the last strip is -infinity.
template <class T>
__device__ inline void load_tile(const Row& row, const Tile& tile) {
  const T* logits = static_cast<const T*>(row.logits);
  if (reinterpret_cast<std::uintptr_t>(logits) % 16 == 0) {
    load_strips<16 / sizeof(T)>(logits, row.vocab_size, tile);
  } else {
    load_strips<1>(logits, row.vocab_size, tile);
  }
}
__device__ __noinline__ inline void load_tile() {
  const RowShared& s = row_shared();
  switch (s.row.dtype) {
    case DType::f16:
      return load_tile<Half>(s.row, s.tile);
    case DType::bf16:
      return load_tile<BFloat>(s.row, s.tile);
    default:
      return load_tile<float>(s.row, s.tile);
  }
}
__device__ inline float logit_at(const Row& row, int id) {
  switch (row.dtype) {
    case DType::f16:
      return to_float(static_cast<const Half*>(row.logits)[id]);
    case DType::bf16:
      return to_float(static_cast<const BFloat*>(row.logits)[id]);
    default:
      return static_cast<const float*>(row.logits)[id];
  }
}

__device__ __noinline__ inline void edit_tile() {
  const RowShared& s = row_shared();
  edit(s.tile, s.row.vocab_size, s.row.edits);
}

// The first pass over this block's share: fn(strip, values, is_edited) with the four tokens of each
// lane, a warp for every strip, as the row is and again with its edits where it has any.
template <class Fn>
__device__ inline void scan_share(RowShared& s, Fn&& fn) {
  const Row& row = s.row;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  if (threadIdx.x == 0) {
    s.tile = {row.resident, row.end - row.begin, row.begin, nullptr, nullptr, nullptr, 0, 0};
  }
  __syncthreads();
  load_tile();
  __syncthreads();
  for (bool is_edited = false;; is_edited = true) {
    for (int strip = row.begin + warp; strip < row.end; strip += num_warps) {
      float x[4];
      load_floats(row.resident + (strip - row.begin) * kStrip + 4 * lane, x);
      fn(strip, x, is_edited);
    }
    __syncthreads();
    if (is_edited || !row.edits.is_any()) return;
    edit_tile();
    __syncthreads();
  }
}

// The largest logit of a strip and the sum of its weights relative to it, for a whole warp.
struct StripStats {
  float max, sum;
};

__device__ inline float strip_max(const float (&x)[4]) {
  bool is_nan = false;
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    is_nan = is_nan || x[i] != x[i];
    largest = fmaxf(largest, x[i]);
  }
  const unsigned key = __reduce_min_sync(kWholeWarp, is_nan ? 0u : descending_key(largest));
  return key == 0 ? nan_of_key_0() : value_of(key);
}

__device__ inline float strip_sum(const float (&x)[4], float largest, float rate) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum += largest == INFINITY ? (x[i] == INFINITY ? 1.0f : 0.0f) : weight_of(x[i], largest, rate);
  }
  return warp_reduce(sum, Sum());
}

// Marks the strips of [begin, end) whose largest logit has a value key up to `last`, in the bitmap
// of the block's RowShared; returns how many there are.
__device__ __noinline__ inline int mark_strips(const View& view, int begin, int end,
                                               unsigned last) {
  RowShared& s = row_shared();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const int num_words = (end - begin + 31) / 32;
  for (int word = warp; word < num_words; word += num_warps) {
    const int strip = begin + 32 * word + lane;
    const unsigned bits =
        __ballot_sync(kWholeWarp, strip < end && descending_key(view.max_of(strip)) <= last);
    if (lane == 0) s.bitmap[word] = bits;
  }
  if (threadIdx.x == 0) s.num_marked = 0;
  __syncthreads();
  for (int word = static_cast<int>(threadIdx.x); word < num_words;
       word += static_cast<int>(blockDim.x)) {
    unsigned before = 0;
    for (int i = 0; i < word; ++i) before += static_cast<unsigned>(__popc(s.bitmap[i]));
    s.before[word] = before;
    if (word == num_words - 1) {
      s.num_marked = before + static_cast<unsigned>(__popc(s.bitmap[word]));
    }
  }
  __syncthreads();
  return static_cast<int>(s.num_marked);
}

// Brings up to `count` marked strips, without the first `first` of them, into row.tile.
__device__ __noinline__ inline void bring_strips(bool is_raw, int begin, int end, int first,
                                                 int count) {
  RowShared& s = row_shared();
  const int num_words = (end - begin + 31) / 32;
  if (threadIdx.x == 0) {
    s.tile = {s.row.tile, count, first, s.bitmap, s.before, s.strips, begin, end};
  }
  for (int word = static_cast<int>(threadIdx.x); word < num_words;
       word += static_cast<int>(blockDim.x)) {
    int place = static_cast<int>(s.before[word]) - first;
    for (unsigned bits = s.bitmap[word]; bits != 0; bits &= bits - 1, ++place) {
      if (place >= 0 && place < count) {
        s.strips[place] = begin + 32 * word + __ffs(static_cast<int>(bits)) - 1;
      }
    }
  }
  __syncthreads();
  load_tile();
  __syncthreads();
  if (is_raw || !s.row.edits.is_any()) return;
  edit_tile();
  __syncthreads();
}

// Calls fn(strip, id, values) for those strips of [begin, end) in this block's share whose largest
// logit has a value key up to `last`: a whole warp each, the lane's four tokens from `id` on. All
// threads of the block must call it; ends with a barrier.
template <class Fn>
__device__ inline void visit(RowShared& s, const View& view, int begin, int end, unsigned last,
                             Fn&& fn) {
  const Row& row = s.row;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  const bool is_here = row.is_resident && !view.is_raw;
  const int total = is_here ? end - begin : mark_strips(view, begin, end, last);
  for (int first = 0; first < total;) {
    int count = total - first;
    if (!is_here) {
      count = count < row.tile_strips ? count : row.tile_strips;
      bring_strips(view.is_raw, begin, end, first, count);
    }
    for (int place = warp; place < count; place += num_warps) {
      const int strip = is_here ? begin + place : s.strips[place];
      if (is_here && descending_key(view.max_of(strip)) > last) continue;
      const float* values =
          is_here ? row.resident + (strip - row.begin) * kStrip : row.tile + place * kStrip;
      const int id = strip * kStrip + 4 * lane;
      float x[4];
      load_floats(values + 4 * lane, x);
      const unsigned bits = view.masks.bits(id, row.vocab_size);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = (bits >> i & 1) != 0 ? view.see(x[i]) : -INFINITY;
      fn(strip, id, x);
    }
    __syncthreads();
    first += count;
  }
}

// The same over the whole of this block's share.
template <class Fn>
__device__ inline void visit(RowShared& s, const View& view, unsigned last, Fn&& fn) {
  visit(s, view, s.row.begin, s.row.end, last, fn);
}

// combine() of a number of every thread of every block of the team, told to all.
template <class Combine>
__device__ inline unsigned long long team_reduce(RowShared& s, Part part, unsigned long long value,
                                                 Combine combine) {
  value = block_reduce(value, s.reduce, combine);
  const Team team = s.row.team;
  if (team.size == 1) return value;
  if (threadIdx.x == 0) s.parts[part] = value;
  team.sync();
  value = *team.at(&s.parts[part], 0);
  for (unsigned rank = 1; rank < team.size; ++rank) {
    value = combine(value, *team.at(&s.parts[part], rank));
  }
  return value;
}

// Fills in the view whose strips have these maxima and sums: its best and worst, and whether it has
// +infinity.
__device__ __noinline__ inline void make_view(View& view, Part part, const float* max, float* sum,
                                              float temperature) {
  RowShared& s = row_shared();
  const Row& row = s.row;
  unsigned best = kNothingKey, above_worst = kNothingKey;  // kNothingKey - the worst
  for (int strip = row.begin + static_cast<int>(threadIdx.x); strip < row.end;
       strip += static_cast<int>(blockDim.x)) {
    const unsigned key = descending_key(max[strip - row.stats_first]);
    if (key >= kNothingKey) continue;
    best = key < best ? key : best;
    above_worst = kNothingKey - key < above_worst ? kNothingKey - key : above_worst;
  }
  const auto both = team_reduce(
      s, part, static_cast<unsigned long long>(best) << 32 | above_worst,
      [](unsigned long long a, unsigned long long b) {
        const unsigned long long high = (a >> 32) < (b >> 32) ? a >> 32 : b >> 32;
        const unsigned low_a = static_cast<unsigned>(a), low_b = static_cast<unsigned>(b);
        return high << 32 | (low_a < low_b ? low_a : low_b);
      });
  if (threadIdx.x == 0) {
    View made{};
    made.max = max;
    made.sum = sum;
    made.first = row.stats_first;
    made.best = static_cast<unsigned>(both >> 32);
    made.worst = kNothingKey - static_cast<unsigned>(both);
    made.is_infinite = made.best == kInfinityKey;
    if (made.is_infinite) made.best = made.worst = descending_key(0.0f);
    made.softmax = Softmax::of(temperature);
    made.softmax.top = value_of(made.best);
    view = made;
  }
  __syncthreads();
}

// The mass of all strips.
__device__ __noinline__ inline unsigned long long mass_of_row(const View& view, Part part) {
  RowShared& s = row_shared();
  unsigned long long mass = 0;
  for (int strip = s.row.begin + static_cast<int>(threadIdx.x); strip < s.row.end;
       strip += static_cast<int>(blockDim.x)) {
    mass += view.mass_of_strip(strip);
  }
  return team_reduce(s, part, mass, Sum());
}

// ln(sum(e^x)) at temperature 1, from the mass of the row.
__device__ inline double log_sum_of(const View& view, unsigned long long mass) {
  return static_cast<double>(view.softmax.top) + log(static_cast<double>(mass) / kUnit);
}

// One kernel for every op on rows: `Op` is built from the params and the row's number, in shared
// memory, and has set(Row&) for the row's address, size and edits, scan(RowShared&) for the first
// pass and finish(RowShared&) for all the rest.
template <class Op>
constexpr std::int64_t bytes_before_tiles() {
  return (std::int64_t{sizeof(RowShared)} + std::int64_t{sizeof(Op)} + 127) / 128 * 128;
}

template <class Op, class Params>
__global__ void __launch_bounds__(kMaxRowThreads, 2)
    row_kernel(const __grid_constant__ Params p, const __grid_constant__ RowTuning tuning,
               float* const stats, unsigned* const counters) {
  const std::int64_t idx = blockIdx.x / tuning.num_parts;
  const auto part = static_cast<int>(blockIdx.x % tuning.num_parts);
  RowShared& s = row_shared();
  Op& op = *reinterpret_cast<Op*>(&s + 1);
  if (threadIdx.x == 0) {
    new (&op) Op(p, idx);
    Row& row = s.row;
    row = {};
    op.set(row);
    row.num_strips = (row.vocab_size + kStrip - 1) / kStrip;
    row.begin = part * tuning.part_strips;
    row.end = row.begin + tuning.part_strips;
    row.begin = row.begin < row.num_strips ? row.begin : row.num_strips;
    row.end = row.end < row.num_strips ? row.end : row.num_strips;
    row.resident = reinterpret_cast<float*>(reinterpret_cast<char*>(&s) + bytes_before_tiles<Op>());
    row.tile_strips = tuning.tile_strips;
    if (tuning.is_cluster) {
      row.team = {cluster_rank(), cluster_size()};
      row.is_resident = true;
      row.root = row.team.at(&s, 0);
      row.stats_first = row.begin;
      row.tile = row.resident + tuning.part_strips * kStrip;
      for (int i = 0; i < 4; ++i) {
        row.stats[i] = row.tile + row.tile_strips * kStrip + i * tuning.part_strips;
      }
    } else {
      row.team = {0, 1};
      row.root = &s;
      row.tile = row.resident;
      for (int i = 0; i < 4; ++i) row.stats[i] = stats + (idx * 4 + i) * row.num_strips;
    }
  }
  __syncthreads();
  op.scan(s);
  if (!tuning.is_cluster) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      // Wraps to 0 at the last block, for the next launch.
      s.is_last = tuning.num_parts == 1 ||
                  atomicInc(counters + idx, tuning.num_parts - 1) == tuning.num_parts - 1;
      s.row.begin = 0;
      s.row.end = s.row.num_strips;
    }
    __syncthreads();
    if (s.is_last == 0) return;
    __threadfence();
  }
  op.finish(s);
  s.row.team.sync();  // others may still read this block's memory, and what `op` refers to
}

// Of one launch, for `num_rows` rows.
struct RowLaunch {
  RowTuning tuning;
  std::int64_t num_rows, num_floats;  // of tiles and stats in shared memory
  std::int64_t stats_bytes;           // of stats in global memory
};

inline RowLaunch plan_rows(const char* op, std::int64_t num_rows, std::int64_t vocab_size) {
  if (vocab_size > kMaxVocab) {
    throw NotImplemented(std::string(op) + ": vocab_size must be at most " +
                         std::to_string(kMaxVocab) + " on CUDA, got " + std::to_string(vocab_size));
  }
  const RowTuning tuning = choose_rows(device_info(), vocab_size);
  const std::int64_t num_strips = (vocab_size + kStrip - 1) / kStrip;
  const std::int64_t own = tuning.is_cluster ? tuning.part_strips * (kStrip + 4) : 0;
  return {tuning, num_rows, own + tuning.tile_strips * kStrip,
          tuning.is_cluster ? 0 : num_rows * 4 * num_strips * 4};
}

// Runs the op on rows; `stats` has plan.stats_bytes, and each row a counter.
template <class Op, class Params>
inline void launch_rows(const RowLaunch& plan, const Params& p, void* stats,
                        unsigned* row_counters) {
  const RowTuning& tuning = plan.tuning;
  launch(&row_kernel<Op, Params>,
         {.grid = static_cast<unsigned>(plan.num_rows * tuning.num_parts),
          .block = static_cast<unsigned>(tuning.threads),
          .shared_bytes = bytes_before_tiles<Op>() + plan.num_floats * 4,
          .cluster = tuning.is_cluster ? tuning.num_parts : 1},
         p, tuning, static_cast<float*>(stats), row_counters);
}

}  // namespace fullbeam::cuda
