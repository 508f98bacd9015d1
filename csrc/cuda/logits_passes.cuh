// SPDX-License-Identifier: Apache-2.0
// Passes over a row of logits: bringing strips into shared memory, edited; the maxima and sums of
// strips, and what follows from them for the row; visits of the strips that matter. What differs by
// the logits' type is in load_tile alone.
#pragma once
#include <type_traits>

#include "cuda/logits_row.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace fullbeam::cuda {

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
  if (total == 0) __syncthreads();
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

}  // namespace fullbeam::cuda
