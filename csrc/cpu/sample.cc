// SPDX-License-Identifier: Apache-2.0
// Draws one token per row after temperature, min_p, top_k and top_p.
// Mapping: a thread takes whole rows, as it becomes free.
// Cost: one pass over the row for its maxima; one more with an exponential per token where the
// whole row's mass is needed (no truncation, or top_p alone); candidates are read a second time,
// and the vocabulary is never sorted. Numerics: weights of up to kExactWeights candidates in
// float64, of more in float32 (2 ulp); sums in float64, float32 within a block of kBlock tokens.
// The index is clamped to a token with mass, whatever the rounding. Source: inverse transform
// sampling; Holtzman et al. 2019 (arXiv 1904.09751) for top_p, Nguyen et al. 2024 (arXiv
// 2407.01082) for min_p.
#include "ops/sample.h"

#include "core/philox.h"
#include "cpu/logits.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// The first token at the row's maximum.
std::int32_t first_best(const float* row, const float* block_max, float top) {
  std::int64_t block = 0;
  while (!(block_max[block] == top)) ++block;
  std::int64_t id = block * kBlock;
  while (!(row[id] == top)) ++id;
  return static_cast<std::int32_t>(id);
}

// The smallest float at or above max + temperature * ln(min_p).
float min_p_bound(float top, float temperature, float min_p) {
  const double bound = static_cast<double>(top) +
                       static_cast<double>(temperature) * __builtin_log(static_cast<double>(min_p));
  const float rounded = static_cast<float>(bound);
  const bool is_low = static_cast<double>(rounded) < bound;
  return is_low ? __builtin_nextafterf(rounded, kInfinity) : rounded;
}

// How logits become weights.
struct Softmax {
  float top;          // the largest logit
  float temperature;  // above 0
  float rate;         // log2(e) / temperature, finite
  float scale;        // for find_edge
};

// Fills in the weights and returns their sum.
double weigh(TokenList& list, const Softmax& softmax) {
  double total = 0.0;
  if (list.size <= kExactWeights) {
    for (std::int64_t i = 0; i < list.size; ++i) {
      const double below = static_cast<double>(list.values[i]) - static_cast<double>(softmax.top);
      list.weights[i] = __builtin_exp(below / static_cast<double>(softmax.temperature));
      total += list.weights[i];
    }
    return total;
  }
  for (std::int64_t i = 0; i < list.size; i += kLanes) {  // the list has room for whole registers
    float lanes[kLanes];
    store(lanes, weight_of(load(list.values + i), softmax.top, softmax.rate));
    for (int lane = 0; lane < kLanes; ++lane) {
      list.weights[i + lane] = static_cast<double>(lanes[lane]);
    }
  }
  for (std::int64_t i = 0; i < list.size; ++i) total += list.weights[i];
  return total;
}

std::int32_t draw(const TokenList& list, double uniform) {
  double total = 0.0, sum = 0.0;
  for (std::int64_t i = 0; i < list.size; ++i) total += list.weights[i];
  std::int32_t id = list.ids[0];
  for (std::int64_t i = 0; i < list.size; ++i) {
    if (list.weights[i] > 0.0) id = list.ids[i];
    sum += list.weights[i];
    if (sum > uniform * total) break;
  }
  return id;
}

// The draw from a whole row: first the block, then the token in it.
std::int32_t draw_from_row(RowMemory& m, const float* row, std::int64_t size,
                           const Softmax& softmax, double uniform) {
  const double target = uniform * row_weight(row, size, softmax.top, softmax.rate, m.block_sums);
  double sum = 0.0, before = 0.0;
  std::int64_t block = 0;
  for (std::int64_t b = 0; b < num_blocks_of(size); ++b) {
    if (!(m.block_sums[b] > 0.0)) continue;
    block = b;
    before = sum;
    sum += m.block_sums[b];
    if (sum > target) break;
  }
  float padded[kBlock], weights[kBlock];
  const float* x = block_at(row, size, block, padded);
  for (std::int64_t i = 0; i < kBlock; i += kLanes) {
    store(weights + i, weight_of(load(x + i), softmax.top, softmax.rate));
  }
  sum = before;
  std::int64_t token = block * kBlock;
  for (std::int64_t i = 0; i < kBlock; ++i) {
    if (weights[i] > 0.0f) token = block * kBlock + i;
    sum += static_cast<double>(weights[i]);
    if (sum > target) break;
  }
  return static_cast<std::int32_t>(token);
}

// A logit that the nucleus is likely to end above, from a sample of the row.
float guess_bound(RowMemory& m, const float* row, std::int64_t size, const Softmax& softmax,
                  double top_p) {
  const std::int64_t stride = size / kExactWeights;
  for (std::int64_t i = 0; i < kExactWeights; ++i) m.list.values[i] = row[i * stride];
  m.list.size = kExactWeights;
  const double target = (0.25 + 0.75 * top_p) * weigh(m.list, softmax);
  return find_edge(m, m.list.values, m.list.weights, m.list.size, target, softmax.top,
                   softmax.scale)
      .value;
}

// top_p alone over a large vocabulary: tries ever more candidates until they hold the mass that is
// wanted.
void keep_nucleus(RowMemory& m, const float* row, std::int64_t size, const Softmax& softmax,
                  double top_p) {
  const std::int64_t num_blocks = num_blocks_of(size);
  const double wanted = top_p * row_weight(row, size, softmax.top, softmax.rate, nullptr);
  for (int attempt = 0; attempt < 3; ++attempt) {
    const float bound = attempt == 0   ? lower_bound_of(m, num_blocks, num_blocks / 8, softmax.top)
                        : attempt == 1 ? guess_bound(m, row, size, softmax, top_p)
                                       : -kInfinity;
    gather(row, size, m.block_max, bound, m.list);
    const double mass = weigh(m.list, softmax);
    if (mass < wanted && m.list.size < size) continue;
    return keep(m.list, find_edge(m, m.list.values, m.list.weights, m.list.size, wanted,
                                  softmax.top, softmax.scale));
  }
}

// The candidates that min_p, top_k and then top_p leave.
void keep_candidates(RowMemory& m, const float* row, std::int64_t size, const Softmax& softmax,
                     std::int64_t top_k, double top_p, float min_p) {
  const float top = softmax.top;
  float bound = min_p > 0.0f ? min_p_bound(top, softmax.temperature, min_p) : -kInfinity;
  if (top_k < size) {
    const float of_blocks = lower_bound_of(m, num_blocks_of(size), top_k, top);
    bound = of_blocks > bound ? of_blocks : bound;
  }
  gather(row, size, m.block_max, bound < top ? bound : top, m.list);
  if (m.list.size > top_k) {
    keep(m.list, find_edge(m, m.list.values, nullptr, m.list.size, static_cast<double>(top_k), top,
                           softmax.scale));
  }
  const double total = weigh(m.list, softmax);
  if (top_p < 1.0) {
    keep(m.list, find_edge(m, m.list.values, m.list.weights, m.list.size, top_p * total, top,
                           softmax.scale));
  }
}

std::int32_t sample_row(const SampleParams& p, std::int64_t row_idx) {
  const float* row = p.logits + row_idx * p.logits_stride;
  const std::int64_t size = p.vocab_size;
  RowMemory m = row_memory(size);
  float top = scan_row(row, size, m.block_max);
  if (!(top > -kInfinity)) return -1;
  const float temperature = p.temperature[row_idx], min_p = p.min_p[row_idx];
  const double top_p = static_cast<double>(p.top_p[row_idx]);
  const std::int64_t wanted_k = p.top_k[row_idx];
  const std::int64_t top_k = wanted_k > 0 && wanted_k < size ? wanted_k : size;
  if (!(temperature > 0.0f) || top_k == 1 || top_p <= 0.0) {
    return first_best(row, m.block_max, top);
  }
  if (top == kInfinity) {
    row = finite_row(row, size, m.finite_row);
    top = scan_row(row, size, m.block_max);
  }
  const float inverse = 1.0f / temperature < 1e38f ? 1.0f / temperature : 1e38f;
  const Softmax softmax{top, temperature, kLog2E * inverse, 64.0f * inverse};
  const std::uint32_t* counter = p.counters + row_idx * 3;
  const double uniform =
      philox_uniform(p.seeds[row_idx], {{counter[0], counter[1], counter[2], 0}});
  const bool has_bound = top_k < size || min_p > 0.0f;
  if (!has_bound && !(top_p < 1.0)) return draw_from_row(m, row, size, softmax, uniform);
  if (!has_bound && size > kExactWeights) {
    keep_nucleus(m, row, size, softmax, top_p);
  } else {
    keep_candidates(m, row, size, softmax, top_k, top_p, min_p);
  }
  return draw(m.list, uniform);
}

}  // namespace

void sample(const SampleParams& p) {
  parallel_chunks(p.num_rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) p.token_ids[row] = sample_row(p, row);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
