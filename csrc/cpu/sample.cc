// SPDX-License-Identifier: Apache-2.0
// Draws one token per row after its edits, temperature, min_p, top_k and top_p, and says how likely
// it was before them.
// Mapping: a thread takes whole rows, as it becomes free.
// Cost: one pass over the row for its maxima, from memory; all else finds it in the caches. A row
// with edits is copied to the thread's scratch in that pass and edited and scanned there, its
// history being a list. One pass with an exponential per token where the whole row's mass is needed
// (log-probabilities, no truncation, or top_p alone), one more where the row with its edits and
// temperature is not the row as it is. Candidates are read a second time, and the vocabulary is
// never sorted. Numerics: weights of up to kExactWeights candidates in float64, of more in float32
// (2 ulp); sums in float64, float32 within a block of kBlock tokens. The index is clamped to a
// token with mass, whatever the rounding. Source: inverse transform sampling; Holtzman et al. 2019
// (arXiv 1904.09751) for top_p, Nguyen et al. 2024 (arXiv 2407.01082) for min_p, Keskar et al. 2019
// (arXiv 1909.05858) for the repetition penalty.
#include "ops/sample.h"

#include "core/philox.h"
#include "cpu/edits.h"
#include "cpu/logprobs.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr std::int64_t kExactWeights = 2048;  // lists up to this long are weighed in float64

// The first token at the row's maximum.
std::int32_t first_best(const ScannedRow& row) {
  std::int64_t block = 0;
  while (!(row.block_max[block] == row.top)) ++block;
  std::int64_t id = block * kBlock;
  while (!(row.values[id] == row.top)) ++id;
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

Softmax softmax_of(float top, float temperature) {
  const float inverse = 1.0f / temperature < 1e38f ? 1.0f / temperature : 1e38f;
  return {top, temperature, kLog2E * inverse, 64.0f * inverse};
}

// The weights of a block, in float32.
void weigh_block(const float* x, const Softmax& softmax, double* weights) {
  for (std::int64_t i = 0; i < kBlock; i += kLanes) {
    float lanes[kLanes];
    store(lanes, weight_of(load(x + i), softmax.top, softmax.rate));
    for (int lane = 0; lane < kLanes; ++lane) weights[i + lane] = static_cast<double>(lanes[lane]);
  }
}

// Fills in m.weights and returns their sum.
double weigh(RowMemory& m, const TokenList& list, const Softmax& softmax) {
  if (list.size <= kExactWeights) {
    for (std::int64_t i = 0; i < list.size; ++i) {
      const double below = static_cast<double>(list.values[i]) - static_cast<double>(softmax.top);
      m.weights[i] = __builtin_exp(below / static_cast<double>(softmax.temperature));
    }
    return sum_of(m.weights, list.size);
  }
  float padded[kBlock];
  double total = 0.0;
  for (std::int64_t block = 0; block < num_blocks_of(list.size); ++block) {
    double* weights = m.weights + block * kBlock;  // there is room for whole blocks
    weigh_block(block_at(list.values, list.size, block, padded), softmax, weights);
    total += sum_of(weights, kBlock);
  }
  return total;
}

// The first place at which the sum of weights, from `sum` on, exceeds the target, or else the last
// one with a weight. `sum` becomes the sum before that place.
std::int64_t pick(const double* weights, std::int64_t size, double target, double* sum) {
  std::int64_t picked = 0;
  double reached = *sum;
  for (std::int64_t i = 0; i < size; ++i) {
    if (!(weights[i] > 0.0)) continue;
    picked = i;
    *sum = reached;
    reached += weights[i];
    if (reached > target) break;
  }
  return picked;
}

// The draw from a weighed list, and from a whole row whose m.block_sums are known: first the block,
// then the token in it.
std::int32_t draw(RowMemory& m, const TokenList& list, double uniform) {
  const std::int64_t num_blocks = num_blocks_of(list.size);
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    const std::int64_t begin = block * kBlock, rest = list.size - begin;
    m.block_sums[block] = sum_of(m.weights + begin, rest < kBlock ? rest : kBlock);
  }
  const double target = uniform * sum_of(m.block_sums, num_blocks);
  double sum = 0.0;
  const std::int64_t begin = pick(m.block_sums, num_blocks, target, &sum) * kBlock;
  const std::int64_t rest = list.size - begin;
  const std::int64_t place =
      begin + pick(m.weights + begin, rest < kBlock ? rest : kBlock, target, &sum);
  return list.ids == nullptr ? static_cast<std::int32_t>(place) : list.ids[place];
}

std::int32_t draw_from_row(const RowMemory& m, const ScannedRow& row, const Softmax& softmax,
                           double total, double uniform) {
  const double target = uniform * total;
  double sum = 0.0;
  const std::int64_t block = pick(m.block_sums, num_blocks_of(row.size), target, &sum);
  float padded[kBlock];
  double weights[kBlock];
  weigh_block(block_at(row.values, row.size, block, padded), softmax, weights);
  return static_cast<std::int32_t>(block * kBlock + pick(weights, kBlock, target, &sum));
}

// What a row asks for.
struct Truncation {
  float temperature, min_p;
  double top_p;
  std::int64_t top_k;  // at most vocab_size

  bool takes_the_best() const { return !(temperature > 0.0f) || top_k == 1 || top_p <= 0.0; }
  bool has_bound(std::int64_t size) const { return top_k < size || min_p > 0.0f; }
  // Whether the draw asks for the mass of the whole row.
  bool needs_mass(std::int64_t size) const {
    if (takes_the_best() || has_bound(size)) return false;
    return !(top_p < 1.0) || size > kExactWeights;
  }
};

Truncation truncation_of(const SampleParams& p, std::int64_t idx) {
  const std::int64_t k = p.top_k[idx];
  return {p.temperature[idx], p.min_p[idx], static_cast<double>(p.top_p[idx]),
          k > 0 && k < p.vocab_size ? k : p.vocab_size};
}

// The tokens that min_p and top_k leave.
TokenList find_candidates(RowMemory& m, const ScannedRow& row, const Softmax& softmax,
                          const Truncation& truncation) {
  const float of_min_p = truncation.min_p > 0.0f
                             ? min_p_bound(row.top, softmax.temperature, truncation.min_p)
                             : -kInfinity;
  const float of_top_k =
      truncation.top_k < row.size ? lower_bound_of(m, row, truncation.top_k) : -kInfinity;
  const float bound = of_top_k > of_min_p ? of_top_k : of_min_p;
  TokenList list = gather(m, row, bound < row.top ? bound : row.top);
  keep_first(m, list, truncation.top_k, row.top, softmax.scale);
  return list;
}

// top_p alone over a large vocabulary: the best few tokens, or all where those hold less than the
// mass that is wanted. `total` becomes the mass of the list, which is weighed.
TokenList find_nucleus_candidates(RowMemory& m, const ScannedRow& row, const Softmax& softmax,
                                  double wanted, double* total) {
  TokenList list = gather(m, row, lower_bound_of(m, row, num_blocks_of(row.size) / 8));
  *total = weigh(m, list, softmax);
  if (*total >= wanted) return list;
  list = {row.values, nullptr, row.size};
  *total = weigh(m, list, softmax);
  return list;
}

// `total`: the row's mass, where that is needed.
std::int32_t draw_token(RowMemory& m, const ScannedRow& row, const Softmax& softmax,
                        const Truncation& truncation, double total, double uniform) {
  const bool has_bound = truncation.has_bound(row.size), has_nucleus = truncation.top_p < 1.0;
  if (!has_bound && !has_nucleus) return draw_from_row(m, row, softmax, total, uniform);
  TokenList list;
  double wanted = truncation.top_p * total;
  if (!has_bound && row.size > kExactWeights) {
    list = find_nucleus_candidates(m, row, softmax, wanted, &total);
  } else {
    list = find_candidates(m, row, softmax, truncation);
    total = weigh(m, list, softmax);
    wanted = truncation.top_p * total;
  }
  if (has_nucleus) {
    zero_the_rest(
        m, list,
        find_edge(m, {list.values, m.weights, list.size}, total, wanted, row.top, softmax.scale));
  }
  return draw(m, list, uniform);
}

// A row's edits.
struct Edits {
  const std::uint32_t* mask;  // null allows all
  Entries bias, history;
  std::int32_t last;  // of the history, see SampleParams; -1: none
  Penalties penalties;

  bool is_any() const {
    return mask != nullptr || !bias.is_empty() || !history.is_empty() || last >= 0;
  }
};

Edits edits_of(const SampleParams& p, std::int64_t idx) {
  const std::int32_t mask = p.allowed_idx == nullptr ? -1 : p.allowed_idx[idx];
  const Penalties penalties{p.repetition_penalty == nullptr ? 1.0f : p.repetition_penalty[idx],
                            p.frequency_penalty == nullptr ? 0.0f : p.frequency_penalty[idx],
                            p.presence_penalty == nullptr ? 0.0f : p.presence_penalty[idx]};
  const bool is_neutral = penalties.are_neutral();
  return {mask >= 0 && mask < p.num_masks ? p.allowed + mask * p.num_words : nullptr,
          entries_of(p.bias_starts, idx, p.num_biases),
          entries_of(is_neutral ? nullptr : p.history_starts, idx, p.num_histories),
          is_neutral || p.history_last == nullptr ? -1 : p.history_last[idx], penalties};
}

void edit(const SampleParams& p, const Edits& edits, float* row) {
  if (edits.mask != nullptr) allow(row, p.vocab_size, edits.mask);
  add_bias(row, p.vocab_size, p.bias_ids, p.bias_values, edits.bias);
  penalize(row, p.vocab_size, p.history_ids, p.history_counts, edits.history, edits.last,
           edits.penalties);
}

// The draw from a row with a distribution. `mass`: the row's at temperature 1, with m.block_sums,
// or 0 where that isn't known. `log_sum`, where not null, becomes ln(sum(e^(x / temperature))).
std::int32_t draw_row(const SampleParams& p, std::int64_t idx, RowMemory& m, const ScannedRow& row,
                      double mass, double* log_sum) {
  const Truncation truncation = truncation_of(p, idx);
  const Softmax softmax =
      softmax_of(row.top, truncation.temperature > 0.0f ? truncation.temperature : 1.0f);
  const bool is_known = mass > 0.0 && softmax.temperature == 1.0f;
  if (!is_known && (log_sum != nullptr || truncation.needs_mass(row.size))) {
    mass = row_weight(row, softmax.rate, m.block_sums);
  }
  if (log_sum != nullptr) {
    const double top = static_cast<double>(row.top) / static_cast<double>(softmax.temperature);
    *log_sum = row.had_infinity ? kInfinity : top + __builtin_log(mass);
  }
  if (truncation.takes_the_best()) return first_best(row);
  const std::uint32_t* counter = p.counters + idx * 3;
  return draw_token(m, row, softmax, truncation, mass,
                    philox_uniform(p.seeds[idx], {{counter[0], counter[1], counter[2], 0}}));
}

void sample_row(const SampleParams& p, std::int64_t idx) {
  LogprobsOut out{};
  double* log_sums = nullptr;
  if (p.num_top != nullptr) {
    out = {p.logprobs + idx, p.ranks + idx, p.top_ids + idx * p.max_top,
           p.top_logprobs + idx * p.max_top, p.max_top};
    clear_logprobs(out);
    log_sums = p.log_sums + 2 * idx;
    log_sums[0] = log_sums[1] = __builtin_nan("");
  }
  const bool wants_logprobs = p.num_top != nullptr && p.num_top[idx] >= 0;
  p.token_ids[idx] = -1;
  const Edits edits = edits_of(p, idx);
  RowMemory m = row_memory(p.vocab_size);
  const ScannedRow raw =
      scan(static_cast<const float*>(p.logits) + idx * p.logits_stride, p.vocab_size, m.block_max,
           m.finite_row, edits.is_any() ? m.edited_row : nullptr);
  if (!raw.has_distribution()) return;
  double mass = 0.0, log_sum = 0.0;
  if (wants_logprobs) {
    mass = row_weight(raw, kLog2E, m.block_sums);
    log_sum = log_sum_of(raw, mass);
    log_sums[0] = raw.had_infinity ? kInfinity : log_sum;
  }
  ScannedRow row = raw;
  if (edits.is_any()) {
    edit(p, edits, m.edited_row);
    row = scan(m.edited_row, p.vocab_size, m.edited_max, m.edited_row);
    mass = 0.0;
  }
  if (row.has_distribution()) {
    p.token_ids[idx] = draw_row(p, idx, m, row, mass, wants_logprobs ? log_sums + 1 : nullptr);
  }
  if (wants_logprobs) {
    const std::int64_t num_top = p.num_top[idx] < p.max_top ? p.num_top[idx] : p.max_top;
    write_logprobs(m, raw, log_sum, p.token_ids[idx], num_top, out);
  }
}

}  // namespace

void sample(const SampleParams& p) {
  parallel_chunks(p.num_rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) sample_row(p, row);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
