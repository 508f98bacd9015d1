// SPDX-License-Identifier: Apache-2.0
// What the ops on rows of logits share: block maxima, softmax weights, and selection without
// sorting the vocabulary. Selection takes two steps. The k-th largest of the block maxima is a
// lower bound of the k-th largest logit, so only the blocks that reach it are read again; among the
// few hundred candidates that gives, histograms find the exact edge. Everything is in an anonymous
// namespace, see cpu/vec.h.
#pragma once
#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr std::int64_t kBlock = 128;  // tokens that share a maximum and a partial sum
constexpr std::int64_t kBins = 2048;
constexpr std::int64_t kExactWeights = 2048;  // lists up to this long are weighed in float64
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;

// Some tokens of a row, in order of id.
struct TokenList {
  float* values;
  std::int32_t* ids;
  double* weights;  // e^((value - max) / temperature)
  std::int64_t size;
};

// The calling thread's memory for one row at a time.
struct RowMemory {
  float* block_max;    // [num_blocks]
  double* block_sums;  // [num_blocks]
  float* finite_row;   // [vocab_size], for rows with +infinity
  TokenList list;      // room for vocab_size
  float* edge_values;  // [vocab_size]
  double* edge_weights;
  double* mass;          // [kBins]
  std::int32_t* counts;  // [kBins]
};

inline std::int64_t num_blocks_of(std::int64_t size) { return (size + kBlock - 1) / kBlock; }

inline RowMemory row_memory(std::int64_t vocab_size) {
  const std::int64_t size = num_blocks_of(vocab_size) * kBlock, num_blocks = size / kBlock;
  auto* memory = static_cast<char*>(scratch(size * 32 + num_blocks * 12 + kBins * 12));
  const auto take = [&memory](std::int64_t bytes) {
    char* taken = memory;
    memory += bytes;
    return static_cast<void*>(taken);
  };
  RowMemory m;
  m.list.weights = static_cast<double*>(take(size * 8));
  m.edge_weights = static_cast<double*>(take(size * 8));
  m.block_sums = static_cast<double*>(take(num_blocks * 8));
  m.mass = static_cast<double*>(take(kBins * 8));
  m.list.values = static_cast<float*>(take(size * 4));
  m.list.ids = static_cast<std::int32_t*>(take(size * 4));
  m.finite_row = static_cast<float*>(take(size * 4));
  m.edge_values = static_cast<float*>(take(size * 4));
  m.block_max = static_cast<float*>(take(num_blocks * 4));
  m.counts = static_cast<std::int32_t*>(take(kBins * 4));
  m.list.size = 0;
  return m;
}

// A whole block of the row: in place, or copied to `padded` and filled up with -infinity.
inline const float* block_at(const float* row, std::int64_t size, std::int64_t block,
                             float* padded) {
  const std::int64_t begin = block * kBlock;
  if (begin + kBlock <= size) return row + begin;
  for (std::int64_t i = 0; i < kBlock; ++i) {
    padded[i] = begin + i < size ? row[begin + i] : -kInfinity;
  }
  return padded;
}

// The maximum of the row and of its blocks; NaN if the row has one.
inline float scan_row(const float* row, std::int64_t size, float* block_max) {
  constexpr int kChains =
      4;  // independent maxima and sums, or the latency of max and add would be the pace
  float padded[kBlock], best = -kInfinity;
  F32 sums[kChains];  // NaN after a NaN, or after infinities of both signs
  for (F32& sum : sums) sum = set1(0.0f);
  for (std::int64_t block = 0; block < num_blocks_of(size); ++block) {
    const float* x = block_at(row, size, block, padded);
    F32 largest[kChains];
    for (int c = 0; c < kChains; ++c) largest[c] = load(x + c * kLanes);
    for (std::int64_t i = 0; i < kBlock; i += kChains * kLanes) {
      for (int c = 0; c < kChains; ++c) {
        const F32 value = load(x + i + c * kLanes);
        largest[c] = max(largest[c], value);
        sums[c] = add(sums[c], value);
      }
    }
    const F32 of_pairs = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
    block_max[block] = reduce_max(of_pairs);
    best = block_max[block] > best ? block_max[block] : best;
  }
  const float sum = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  if (sum == sum) return best;
  for (std::int64_t i = 0; i < size; ++i) {
    if (row[i] != row[i]) return row[i];
  }
  return best;
}

// Makes +infinity 0 and all else -infinity: the same distribution, in finite numbers.
inline const float* finite_row(const float* row, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = row[i] == kInfinity ? 0.0f : -kInfinity;
  return out;
}

// 2^y for y <= 0 within 3 ulp; 0 below -126, and for NaN. Half the steps of vec.h's exp.
inline F32 exp2_negative(F32 y) {
  const F32 capped = max(y, set1(-126.0f));
  const F32 n = round(capped);
  const F32 r = sub(capped, n);
  F32 p = set1(1.535335759e-4f);  // our fit of (2^r - 1) / r on |r| <= 1/2, relative error 2e-9
  p = fma(p, r, set1(1.339887618e-3f));
  p = fma(p, r, set1(9.618437849e-3f));
  p = fma(p, r, set1(5.550332367e-2f));
  p = fma(p, r, set1(2.402264774e-1f));
  p = fma(p, r, set1(6.931471825e-1f));
  p = fma(p, r, set1(1.0f));
  return zero_below(mul(p, exp2_whole(n)), y, set1(-126.0f));
}

// The softmax weight e^((x - top) / temperature); `rate` is log2(e) / temperature.
inline F32 weight_of(F32 x, float top, float rate) {
  return exp2_negative(mul(sub(x, set1(top)), set1(rate)));
}

// The sum of the weights of a block: 16 partial sums whatever the register's width.
inline float block_weight(const float* x, float top, float rate) {
  constexpr int kRegisters = 16 / kLanes;
  F32 sums[kRegisters];
  for (F32& sum : sums) sum = set1(0.0f);
  for (std::int64_t i = 0; i < kBlock; i += 16) {
    for (int r = 0; r < kRegisters; ++r) {
      sums[r] = add(sums[r], weight_of(load(x + i + r * kLanes), top, rate));
    }
  }
  float lanes[16];
  for (int r = 0; r < kRegisters; ++r) store(lanes + r * kLanes, sums[r]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The same of a row, block by block in float64. `block_sums` may be null.
inline double row_weight(const float* row, std::int64_t size, float top, float rate,
                         double* block_sums) {
  float padded[kBlock];
  double total = 0.0;
  for (std::int64_t block = 0; block < num_blocks_of(size); ++block) {
    const double sum =
        static_cast<double>(block_weight(block_at(row, size, block, padded), top, rate));
    if (block_sums != nullptr) block_sums[block] = sum;
    total += sum;
  }
  return total;
}

// The tokens at or above `bound`.
inline void gather(const float* row, std::int64_t size, const float* block_max, float bound,
                   TokenList& list) {
  std::int64_t count = 0;
  for (std::int64_t block = 0; block < num_blocks_of(size); ++block) {
    if (!(block_max[block] >= bound)) continue;
    const std::int64_t begin = block * kBlock;
    const std::int64_t end = begin + kBlock < size ? begin + kBlock : size;
    for (std::int64_t i = begin; i < end; ++i) {
      list.values[count] = row[i];
      list.ids[count] = static_cast<std::int32_t>(i);
      count += row[i] >= bound ? 1 : 0;
    }
  }
  list.size = count;
}

// Larger floats have smaller keys; both zeros have the same.
inline std::uint32_t descending_key(float value) {
  const std::uint32_t bits = float_to_bits(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}

// The end of a prefix of tokens in order of value (larger first, ties by lower id): it holds what
// is above `value` and the first `num_ties` of those equal to it.
struct Edge {
  float value;
  std::int64_t num_ties;
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

template <class BinOf>
inline std::int64_t narrow(RowMemory& m, const float* values, const double* weights,
                           std::int64_t size, double target, double* reached, BinOf bin_of) {
  __builtin_memset(m.counts, 0, kBins * sizeof(std::int32_t));
  __builtin_memset(m.mass, 0, kBins * sizeof(double));
  for (std::int64_t i = 0; i < size; ++i) {
    const std::int64_t bin = bin_of(values[i]);
    ++m.counts[bin];
    m.mass[bin] += weights == nullptr ? 1.0 : weights[i];
  }
  const std::int64_t picked = pick_bin(m, target, reached);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < size; ++i) {
    const bool is_in = bin_of(values[i]) == picked;
    m.edge_values[count] = values[i];
    m.edge_weights[count] = weights == nullptr ? 1.0 : weights[i];
    count += is_in ? 1 : 0;
  }
  return count;
}

// The edge of the smallest prefix of at least one token whose weights (null: 1 each) sum to
// `target` or more. Equal values have equal weights. `top` is the largest value and finite; `scale`
// spreads the values below it over the bins of the first histogram, and only the speed depends on
// it.
inline Edge find_edge(RowMemory& m, const float* values, const double* weights, std::int64_t size,
                      double target, float top, float scale) {
  double reached = 0.0;
  std::int64_t count = narrow(m, values, weights, size, target, &reached, [=](float value) {
    const float place = (top - value) * scale;
    return place < static_cast<float>(kBins - 1) ? static_cast<std::int64_t>(place) : kBins - 1;
  });
  constexpr int kShifts[] = {21, 10, 0};
  for (const int shift : kShifts) {
    count = narrow(m, m.edge_values, m.edge_weights, count, target, &reached, [=](float value) {
      const std::uint32_t digits = descending_key(value) >> shift;
      return static_cast<std::int64_t>(digits & (shift == 0 ? 1023u : 2047u));
    });
  }
  std::int64_t num_ties = 1;
  const double weight = m.edge_weights[0];
  while (num_ties < count && reached + static_cast<double>(num_ties) * weight < target) ++num_ties;
  return {m.edge_values[0], num_ties};
}

// A bound that at least `count` tokens reach: the count-th largest block maximum.
inline float lower_bound_of(RowMemory& m, std::int64_t num_blocks, std::int64_t count, float top) {
  if (count > num_blocks) return -kInfinity;
  return find_edge(m, m.block_max, nullptr, num_blocks, static_cast<double>(count), top, 64.0f)
      .value;
}

inline void keep(TokenList& list, Edge edge) {
  std::int64_t count = 0, num_ties = 0;
  for (std::int64_t i = 0; i < list.size; ++i) {
    const bool is_tie = list.values[i] == edge.value;
    const bool is_kept = list.values[i] > edge.value || (is_tie && num_ties < edge.num_ties);
    num_ties += is_tie ? 1 : 0;
    list.values[count] = list.values[i];
    list.ids[count] = list.ids[i];
    list.weights[count] = list.weights[i];
    count += is_kept ? 1 : 0;
  }
  list.size = count;
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
