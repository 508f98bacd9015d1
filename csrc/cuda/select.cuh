// SPDX-License-Identifier: Apache-2.0
// Selection of the first tokens in the order of logits, by number or by mass, without sorting the
// vocabulary. The n-th largest of the strips' maxima is a lower bound of the n-th largest logit, so
// few strips are read again, and what they hold at or above the bound is sorted. Where that is too
// long for the list, or too little mass, histograms over the keys narrow the edge down, kBins to
// one at each pass, until the rest fits. The first block of a row's team holds lists and
// histograms.
#pragma once
#include "cuda/logits_passes.cuh"

namespace fullbeam::cuda {

// The sums of the threads before this one; `total` becomes that of all.
__device__ inline Amount block_sums_before(Amount mine, Amount* shared, Amount* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  Amount sum = mine;
#pragma unroll
  for (int delta = 1; delta < 32; delta *= 2) {
    const Amount other{__shfl_up_sync(kWholeWarp, sum.count, delta),
                       __shfl_up_sync(kWholeWarp, sum.mass, delta)};
    if (lane >= delta) sum = sum + other;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  Amount before{0, 0};
  *total = {0, 0};
  for (int w = 0; w < num_warps; ++w) {
    if (w < warp) before = before + shared[w];
    *total = *total + shared[w];
  }
  __syncthreads();
  return {before.count + sum.count - mine.count, before.mass + sum.mass - mine.mass};
}

// The first of `size` items, each an Amount, at which the sums from `before` on reach what is
// wanted. All threads of a block; `before` does not reach it.
template <class Item>
__device__ inline void find_first(RowShared& s, int size, Amount before, Amount wanted,
                                  Found& found, Item&& item) {
  const int each = (size + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int own = static_cast<int>(threadIdx.x) * each;
  const int begin = own < size ? own : size, end = begin + each < size ? begin + each : size;
  Amount sum{0, 0}, total;
  for (int i = begin; i < end; ++i) sum = sum + item(i);
  Amount reached = before + block_sums_before(sum, s.scan, &total);
  if (threadIdx.x == 0) found = {size, false, before, before + total};
  __syncthreads();
  for (int i = begin; i < end; ++i) {
    const Amount next = reached + item(i);
    if (!reached.reaches(wanted) && next.reaches(wanted)) found = {i, true, reached, next};
    reached = next;
  }
  __syncthreads();
}

// find_first by the team's root, which all find there.
template <class Item>
__device__ inline void team_find_first(RowShared& s, Finding finding, int size, Amount before,
                                       Amount wanted, Item&& item) {
  if (s.row.is_root()) find_first(s, size, before, wanted, s.found[finding], item);
  s.row.team.sync();
}

// Sorts the root's list, of up to kListSize keys, ascending (bitonic).
__device__ __noinline__ inline void sort_list(int size) {
  Key* const keys = row_shared().list;
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  int padded = 2;
  while (padded < size) padded *= 2;
  for (int i = size + thread; i < padded; i += step) keys[i] = kLastKey;
  __syncthreads();
  for (int run = 2; run <= padded; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int i = thread; i < padded / 2; i += step) {
        const int a = 2 * i - (i & (apart - 1)), b = a + apart;
        const Key key_a = keys[a], key_b = keys[b];
        if ((key_a > key_b) == ((a & run) == 0)) {
          keys[a] = key_b;
          keys[b] = key_a;
        }
      }
      __syncthreads();
    }
  }
}

// Puts the tokens with keys in [low, high] on the root's list, in order where they fit, and returns
// how many there are: more than kListSize are not all on it.
__device__ __noinline__ inline int gather(const View& view, Key low, Key high) {
  RowShared& s = row_shared();
  RowShared* const root = s.row.root;
  if (s.row.is_root() && threadIdx.x == 0) s.list_size = 0;
  s.row.team.sync();
  const unsigned lanes_before = (1u << threadIdx.x % 32) - 1;
  visit(s, view, value_key(high), [&](int, int id, float (&x)[4]) {
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Key key = key_of(x[i], id + i);
      const bool is_in = key >= low && key <= high && id + i < s.row.vocab_size;
      wanted |= is_in ? 1u << i : 0u;
    }
    if (__any_sync(kWholeWarp, wanted != 0) == 0) return;
    const auto count = static_cast<unsigned>(__popc(wanted));
    unsigned place = 0, total = 0;
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) {
      const unsigned lanes = __ballot_sync(kWholeWarp, count >> bit & 1);
      place += static_cast<unsigned>(__popc(lanes & lanes_before)) << bit;
      total += static_cast<unsigned>(__popc(lanes)) << bit;
    }
    unsigned first = 0;
    if (threadIdx.x % 32 == 0) first = atomicAdd(&root->list_size, total);
    place += __shfl_sync(kWholeWarp, first, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((wanted >> i & 1) == 0) continue;
      if (place < kListSize) root->list[place] = key_of(x[i], id + i);
      ++place;
    }
  });
  s.row.team.sync();
  const auto size = static_cast<int>(root->list_size);
  if (s.row.is_root() && size <= kListSize) sort_list(size);
  return size;
}

// In the list of `size` tokens, the first at which the sums reach what the search wants.
__device__ inline void find_in_list(RowShared& s, const View& view, Finding finding, int size) {
  team_find_first(s, finding, size, s.search.before, s.search.wanted,
                  [&](int i) { return Amount{1, view.mass_of(value_of(value_key(s.list[i])))}; });
}

__device__ inline void add_mass(RowShared& s, int bin, unsigned low, unsigned high) {
  const unsigned before = atomicAdd(&s.mass_low[bin], low);
  const unsigned carry = before + low < before ? 1u : 0u;
  if (high + carry != 0) atomicAdd(&s.mass_high[bin], high + carry);
}

// How far to shift numbers up to `span` so that they are bins.
__device__ inline int shift_of(Key span) {
  const int bits = 64 - __clzll(static_cast<long long>(span));
  return bits > 10 ? bits - 10 : 0;
}
static_assert(kBins == 1 << 10);

__device__ inline void clear_bins(RowShared& s) {
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += static_cast<int>(blockDim.x)) {
    s.counts[bin] = s.mass_low[bin] = s.mass_high[bin] = 0;
  }
}

// A key that at least `count` tokens reach, from the maxima of the strips.
__device__ inline Key bound_of(RowShared& s, const View& view, unsigned long long count) {
  const Row& row = s.row;
  if (row.vocab_size <= kListSize || count > static_cast<unsigned>(row.num_strips)) return kLastKey;
  const int shift = shift_of(view.worst - view.best);
  clear_bins(s);
  row.team.sync();
  for (int strip = row.begin + static_cast<int>(threadIdx.x); strip < row.end;
       strip += static_cast<int>(blockDim.x)) {
    const unsigned key = descending_key(view.max_of(strip));
    if (key < kNothingKey) atomicAdd(&row.root->counts[(key - view.best) >> shift], 1u);
  }
  row.team.sync();
  team_find_first(s, kBound, kBins, {0, 0}, {count, kNever},
                  [&](int bin) { return Amount{s.counts[bin], 0}; });
  const Found& found = row.root->found[kBound];
  if (!found.is_reached) return kLastKey;
  const Key last = (static_cast<Key>(found.idx + 1) << shift) - 1 + view.best;
  return last << 32 | 0xffffffffu;
}

// One pass of narrowing the block's search down, to the bin that holds the edge.
__device__ __noinline__ inline void narrow(const View& view, Found& found) {
  RowShared& s = row_shared();
  const Row& row = s.row;
  Search& search = s.search;
  if (threadIdx.x == 0 && value_key(search.low) == value_key(search.high)) {
    const Key last = Key{value_key(search.high)} << 32 | static_cast<unsigned>(row.vocab_size - 1);
    search.high = search.high < last ? search.high : last;  // equal logits: by id
  }
  clear_bins(s);
  row.team.sync();
  const int shift = shift_of(search.high - search.low);
  visit(s, view, value_key(search.high), [&](int, int id, float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Key key = key_of(x[i], id + i);
      if (key < search.low || key > search.high || id + i >= row.vocab_size) continue;
      const auto bin = static_cast<int>((key - search.low) >> shift);
      const unsigned long long mass = view.mass_of(x[i]);
      atomicAdd(&s.counts[bin], 1u);
      if (mass != 0) {
        add_mass(s, bin, static_cast<unsigned>(mass), static_cast<unsigned>(mass >> 32));
      }
    }
  });
  if (!row.is_root()) {
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins;
         bin += static_cast<int>(blockDim.x)) {
      if (s.counts[bin] == 0) continue;
      atomicAdd(&row.root->counts[bin], s.counts[bin]);
      add_mass(*row.root, bin, s.mass_low[bin], s.mass_high[bin]);
    }
  }
  row.team.sync();
  team_find_first(s, kInBins, kBins, search.before, search.wanted, [&](int bin) {
    return Amount{s.counts[bin], Key{s.mass_high[bin]} << 32 | s.mass_low[bin]};
  });
  if (threadIdx.x == 0) {
    found = row.root->found[kInBins];
    if (found.is_reached) {
      search.low += static_cast<Key>(found.idx) << shift;
      const Key last = search.low + ((Key{1} << shift) - 1);
      search.high = last < search.high ? last : search.high;
      search.before = found.before;
    }
  }
  __syncthreads();
}

// The end of a prefix of the tokens in order.
struct Edge {
  Key key;         // of its last token, or the limit where there are not enough
  Amount through;  // of all its tokens
  bool is_listed;  // the list begins with them
};

// The smallest prefix that reaches what is wanted, by number or by mass, of the tokens with keys in
// [low, limit].
__device__ __noinline__ inline Edge find_edge(const View& view, Key low, Key limit, Amount wanted) {
  RowShared& s = row_shared();
  Search& search = s.search;
  __syncthreads();  // others may still read the last one
  if (threadIdx.x == 0) search = {low, limit, {0, 0}, wanted};
  __syncthreads();
  if (low == 0) {
    // A nucleus seldom holds more than the tokens that an eighth of the strips would give.
    const bool is_number = search.wanted.count != kNever;
    const auto an_eighth = static_cast<unsigned long long>(s.row.num_strips / 8 + 1);
    const Key bound = bound_of(s, view, is_number ? search.wanted.count : an_eighth);
    const bool is_all = bound >= search.high;
    const int size = gather(view, 0, is_all ? search.high : bound);
    if (size <= kListSize) {
      find_in_list(s, view, kInList, size);
      const Found& found = s.row.root->found[kInList];
      if (found.is_reached) return {s.row.root->list[found.idx], found.through, true};
      if (is_all) return {search.high, found.through, true};
      __syncthreads();
      if (threadIdx.x == 0) {
        search.before = found.through;
        search.low = bound + 1;
      }
    } else if (is_number && threadIdx.x == 0 && !is_all) {
      search.high = bound;
    }
  }
  if (threadIdx.x == 0) {
    const Key best = Key{view.best} << 32;
    search.low = search.low > best ? search.low : best;
  }
  do {
    __syncthreads();
    narrow(view, s.narrowed);
    if (!s.narrowed.is_reached) return {search.high, s.narrowed.through, false};
  } while (s.narrowed.through.count - s.narrowed.before.count > kListSize);
  const int size = gather(view, search.low, search.high);
  find_in_list(s, view, kInList, size < kListSize ? size : kListSize);
  const Found& found = s.row.root->found[kInList];
  return {found.is_reached ? s.row.root->list[found.idx] : search.high, found.through, false};
}

// Calls fn(i, key) for the first `count` tokens with keys up to `limit`, by threads of the root;
// returns how many there are.
template <class Fn>
__device__ inline int for_each_first(RowShared& s, const View& view, Key limit, int count,
                                     Fn&& fn) {
  int done = 0;
  for (Key low = 0; done < count;) {
    const int wanted = count - done < kListSize ? count - done : kListSize;
    const Edge edge =
        find_edge(view, low, limit, {static_cast<unsigned long long>(wanted), kNever});
    int found = edge.through.count < static_cast<unsigned>(wanted)
                    ? static_cast<int>(edge.through.count)
                    : wanted;
    if (!edge.is_listed) {
      const int size = gather(view, low, edge.key);
      found = size < found ? size : found;
    }
    if (s.row.is_root()) {
      for (int i = static_cast<int>(threadIdx.x); i < found; i += static_cast<int>(blockDim.x)) {
        fn(done + i, s.list[i]);
      }
    }
    done += found;
    if (found < wanted || edge.key >= limit) break;
    low = edge.key + 1;
  }
  s.row.team.sync();  // before the list changes
  return done;
}

}  // namespace fullbeam::cuda
