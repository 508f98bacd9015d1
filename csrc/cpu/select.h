// SPDX-License-Identifier: Apache-2.0
// Selection of the first tokens in order of logit, without sorting the vocabulary, in two steps.
// The k-th largest of the block maxima is a lower bound of the k-th largest logit, so only the
// blocks that reach it are read again; among the few hundred candidates that gives, histograms find
// the exact edge. A long list of candidates is first cut down to the part around the edge that a
// sample of it shows. Everything is in an anonymous namespace, see cpu/vec.h.
#pragma once
#include "cpu/logits.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr std::int64_t kLongList = 4 * kSample;
constexpr std::int64_t kFew = 32;  // lists up to this long are sorted

// The tokens at or above `bound`.
inline TokenList gather(RowMemory& m, const ScannedRow& row, float bound) {
  std::int64_t count = 0;
  for (std::int64_t block = 0; block < num_blocks_of(row.size); ++block) {
    if (!(row.block_max[block] >= bound)) continue;
    const std::int64_t begin = block * kBlock;
    const std::int64_t end = begin + kBlock < row.size ? begin + kBlock : row.size;
    count = append_places(row.values, begin, end, bound, kInfinity, m.ids, count, m.values);
  }
  return {m.values, m.ids, count};
}

// The end of a prefix of tokens in order of value (larger first, ties by lower id): it holds what
// is above `value` and the first `num_ties` of those equal to it.
struct Edge {
  float value;
  std::int64_t num_ties;
};

// Values and what each weighs (null: 1); equal ones weigh the same.
struct Pool {
  const float* values;
  const double* weights;
  std::int64_t size;
  double weight_of(std::int64_t i) const { return weights == nullptr ? 1.0 : weights[i]; }
};

// What is known of a pool: the sum of the weights above it, and that its values are in [low, high].
struct Span {
  double reached;
  float low, high;
};

// The first bin at which the sum of masses, from `reached` on, is at least `target`, or else the
// last one in use. `reached` becomes the sum before that bin.
inline std::int64_t pick_bin(const RowMemory& m, double target, double* reached) {
  std::int64_t picked = 0;
  double sum = *reached;
  for (std::int64_t bin = 0; bin < kBins; ++bin) {
    if (m.counts[bin] == 0) continue;
    picked = bin;
    *reached = sum;
    sum += m.mass[bin];
    if (sum >= target) break;
  }
  return picked;
}

// Leaves the bin that holds the edge, in m.edge_values and m.edge_weights.
template <class BinOf>
inline Pool narrow(RowMemory& m, Pool pool, double target, double* reached, BinOf bin_of) {
  __builtin_memset(m.counts, 0, kBins * sizeof(std::int32_t));
  __builtin_memset(m.mass, 0, kBins * sizeof(double));
  for (std::int64_t i = 0; i < pool.size; ++i) {
    const std::int64_t bin = bin_of(pool.values[i]);
    ++m.counts[bin];
    m.mass[bin] += pool.weight_of(i);
  }
  const std::int64_t picked = pick_bin(m, target, reached);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < pool.size; ++i) {
    const bool is_in = bin_of(pool.values[i]) == picked;
    const float value = pool.values[i];
    const double weight = pool.weight_of(i);
    m.edge_values[count] = value;
    m.edge_weights[count] = weight;
    count += is_in ? 1 : 0;
  }
  return {m.edge_values, m.edge_weights, count};
}

inline bool all_are_equal(Pool pool) {
  const float first = pool.values[0];
  std::int32_t num_others = 0;
  for (std::int64_t i = 0; i < pool.size; ++i) num_others += pool.values[i] != first ? 1 : 0;
  return num_others == 0;
}

// What spreads values in [low, high] over the bins; any number will do where low is not finite.
inline float spread(float low, float high) {
  return high > low && low > -kInfinity ? static_cast<float>(kBins - 1) / (high - low) : 1.0f;
}

inline double sum_of(const double* values, std::int64_t size) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < size; ++i) sum += values[i];
  return sum;
}

// The sum of the weights of the values above `bound`.
inline double sum_above(Pool pool, float bound) {
  double sum = 0.0;
  std::int32_t count = 0;
  if (pool.weights == nullptr) {
    for (std::int64_t i = 0; i < pool.size; ++i) count += pool.values[i] > bound ? 1 : 0;
    return static_cast<double>(count);
  }
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < pool.size; ++i) {
    const double weight = pool.weights[i];
    sum += pool.values[i] > bound ? weight : 0.0;
  }
  return sum;
}

// A few values and weights, by falling value.
inline void sort_few(float* values, double* weights, std::int64_t size) {
  for (std::int64_t i = 1; i < size; ++i) {
    const float value = values[i];
    const double weight = weights[i];
    std::int64_t place = i;
    for (; place > 0 && values[place - 1] < value; --place) {
      values[place] = values[place - 1];
      weights[place] = weights[place - 1];
    }
    values[place] = value;
    weights[place] = weight;
  }
}

inline bool narrow_by_sample(RowMemory& m, Pool* pool, double total, double target, Span* span);

// The edge of the smallest prefix of at least one token whose weights sum to `target` or more, of
// `total`. `top` is the largest value and finite; `scale` spreads the values below it over the bins
// of the first histogram, and only the speed depends on it.
inline Edge find_edge(RowMemory& m, Pool pool, double total, double target, float top,
                      float scale) {
  Span span{0.0, -kInfinity, top};
  if (pool.size > kLongList && narrow_by_sample(m, &pool, total, target, &span)) {
    scale = span.low > -kInfinity ? spread(span.low, span.high) : scale;
  }
  if (pool.size > kFew && span.low < span.high) {
    pool = narrow(m, pool, target, &span.reached, [=](float value) {
      const float place = (span.high - value) * scale;
      return place < static_cast<float>(kBins - 1) ? static_cast<std::int64_t>(place) : kBins - 1;
    });
    constexpr int kShifts[] = {21, 10, 0};
    for (const int shift : kShifts) {
      if (pool.size <= kFew || all_are_equal(pool)) break;
      pool = narrow(m, pool, target, &span.reached, [=](float value) {
        const std::uint32_t digits = descending_key(value) >> shift;
        return static_cast<std::int64_t>(digits & (shift == 0 ? 1023u : 2047u));
      });
    }
  }
  if (pool.size <= kFew) {  // else all are equal
    for (std::int64_t i = 0; i < pool.size; ++i) {
      m.edge_values[i] = pool.values[i];
      m.edge_weights[i] = pool.weight_of(i);
    }
    sort_few(m.edge_values, m.edge_weights, pool.size);
    pool = {m.edge_values, m.edge_weights, pool.size};
  }
  double reached = span.reached, weight = 0.0;
  std::int64_t begin = 0, end = 0;  // of the tokens with the same value
  for (;; begin = end) {
    end = begin + 1;
    while (end < pool.size && pool.values[end] == pool.values[begin]) ++end;
    weight = pool.weight_of(begin);
    const double sum = reached + static_cast<double>(end - begin) * weight;
    if (sum >= target || end == pool.size) break;
    reached = sum;
  }
  std::int64_t num_ties = 1;
  while (num_ties < end - begin && reached + static_cast<double>(num_ties) * weight < target) {
    ++num_ties;
  }
  return {pool.values[begin], num_ties};
}

// Leaves the part of a long list that holds the edge; false where it doesn't, which a sample makes
// unlikely. The sample's edge is off by about the square root of the number of its tokens below it,
// since none of those weighs more than the edge's: four times that is kept on either side.
inline bool narrow_by_sample(RowMemory& m, Pool* pool, double total, double target, Span* span) {
  constexpr std::int64_t kMargin = 256;  // 4 * sqrt(kSample)
  const float top = span->high;
  const std::int64_t size = pool->size, stride = size / kSample;
  float least = top;
  for (std::int64_t i = 0; i < kSample; ++i) {
    const float value = m.sample_values[i] = pool->values[i * stride];
    m.sample_weights[i] = pool->weight_of(i * stride);
    least = value < least && value > -kInfinity ? value : least;
  }
  const auto value_at = [&](const double* weights, double sum, double sum_wanted) {
    return find_edge(m, {m.sample_values, weights, kSample}, sum, sum_wanted, top,
                     spread(least, top))
        .value;
  };
  const double sum = sum_of(m.sample_weights, kSample);
  const double below = total > target ? (total - target) / static_cast<double>(stride) : 0.0;
  const float guess = value_at(m.sample_weights, sum, sum - below);
  std::int64_t above = 0;
  for (std::int64_t i = 0; i < kSample; ++i) above += m.sample_values[i] > guess ? 1 : 0;
  const auto value_of_rank = [&](std::int64_t rank) {
    return value_at(nullptr, static_cast<double>(kSample), static_cast<double>(rank));
  };
  const float high = above > kMargin ? value_of_rank(above - kMargin) : top;
  const float low = above + kMargin < kSample ? value_of_rank(above + kMargin) : -kInfinity;
  const double reached = high < top ? sum_above(*pool, high) : 0.0;
  const double* weights = pool->weights;
  const std::int64_t count =
      append_places(pool->values, 0, size, low, high, m.places, 0, m.edge_values);
  for (std::int64_t i = 0; i < count; ++i) {
    m.edge_weights[i] = weights == nullptr ? 1.0 : weights[m.places[i]];
  }
  const bool has_all_below = low == -kInfinity;
  if (reached >= target || (!has_all_below && reached + sum_of(m.edge_weights, count) < target)) {
    return false;
  }
  *pool = {m.edge_values, m.edge_weights, count};
  *span = {reached, low, high};
  return true;
}

// A bound that at least `count` tokens reach: the count-th largest block maximum.
inline float lower_bound_of(RowMemory& m, const ScannedRow& row, std::int64_t count) {
  const std::int64_t num_blocks = num_blocks_of(row.size);
  if (count > num_blocks) return -kInfinity;
  return find_edge(m, {row.block_max, nullptr, num_blocks}, static_cast<double>(num_blocks),
                   static_cast<double>(count), row.top, 64.0f)
      .value;
}

// The place of the first token at the edge's value that is beyond it, or the list's end.
inline std::int64_t end_of_ties(RowMemory& m, const TokenList& list, Edge edge) {
  const std::int64_t num_ties =
      append_places(list.values, 0, list.size, edge.value, edge.value, m.places, 0);
  return edge.num_ties < num_ties ? m.places[edge.num_ties] : list.size;
}

// Leaves the first `count` of a gathered list.
inline void keep_first(RowMemory& m, TokenList& list, std::int64_t count, float top, float scale) {
  if (list.size <= count) return;
  const Edge edge = find_edge(m, {list.values, nullptr, list.size}, static_cast<double>(list.size),
                              static_cast<double>(count), top, scale);
  const std::int64_t last = end_of_ties(m, list, edge);
  const float above = __builtin_nextafterf(edge.value, kInfinity);
  std::int64_t num_kept = append_places(m.values, 0, last, edge.value, kInfinity, m.places, 0);
  num_kept = append_places(m.values, last, list.size, above, kInfinity, m.places, num_kept);
  for (std::int64_t i = 0; i < num_kept; ++i) {
    m.values[i] = m.values[m.places[i]];
    m.ids[i] = m.ids[m.places[i]];
  }
  list.size = num_kept;
}

// Takes the weight of the tokens beyond the edge.
inline void zero_the_rest(RowMemory& m, const TokenList& list, Edge edge) {
  const std::int64_t last = end_of_ties(m, list, edge);
  for (std::int64_t i = 0; i < last; ++i) {
    const double weight = m.weights[i];
    m.weights[i] = list.values[i] >= edge.value ? weight : 0.0;
  }
  for (std::int64_t i = last; i < list.size; ++i) {
    const double weight = m.weights[i];
    m.weights[i] = list.values[i] > edge.value ? weight : 0.0;
  }
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
