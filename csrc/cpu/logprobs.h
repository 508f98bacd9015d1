// SPDX-License-Identifier: Apache-2.0
// log-softmax of a row at one token and at its best ones, for logprobs and sample: the same bits.
// Everything is in an anonymous namespace, see cpu/vec.h.
#pragma once
#include "cpu/select.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// ln(sum(e^x)), from the sum of the weights at temperature 1.
inline double log_sum_of(const ScannedRow& row, double weight) {
  return static_cast<double>(row.top) + __builtin_log(weight);
}

inline float logprob_of(const ScannedRow& row, double log_sum, std::int64_t id) {
  return static_cast<float>(static_cast<double>(row.values[id]) - log_sum);
}

// 1 + the number of larger values + the number of equal ones with a lower id.
inline std::int32_t rank_of(const ScannedRow& row, std::int64_t id) {
  const float value = row.values[id];
  std::int32_t rank = 1;
  for (std::int64_t block = 0; block < num_blocks_of(row.size); ++block) {
    if (!(row.block_max[block] >= value)) continue;
    const std::int64_t begin = block * kBlock;
    const std::int64_t end = begin + kBlock < row.size ? begin + kBlock : row.size;
    const std::int64_t split = id < begin ? begin : id < end ? id : end;
    for (std::int64_t i = begin; i < split; ++i) rank += row.values[i] >= value ? 1 : 0;
    for (std::int64_t i = split; i < end; ++i) rank += row.values[i] > value ? 1 : 0;
  }
  return rank;
}

inline void sift_down(std::uint64_t* keys, std::int64_t root, std::int64_t size) {
  for (;;) {
    std::int64_t child = 2 * root + 1;
    if (child >= size) return;
    if (child + 1 < size && keys[child + 1] > keys[child]) ++child;
    if (keys[root] >= keys[child]) return;
    const std::uint64_t swapped = keys[root];
    keys[root] = keys[child];
    keys[child] = swapped;
    root = child;
  }
}

// Heap sort, ascending.
inline void sort(std::uint64_t* keys, std::int64_t size) {
  for (std::int64_t root = size / 2 - 1; root >= 0; --root) sift_down(keys, root, size);
  for (std::int64_t last = size - 1; last > 0; --last) {
    const std::uint64_t swapped = keys[0];
    keys[0] = keys[last];
    keys[last] = swapped;
    sift_down(keys, 0, last);
  }
}

// One row's places in the outputs of logprobs and sample.
struct LogprobsOut {
  float* logprob;         // [1]
  std::int32_t* rank;     // [1]
  std::int32_t* top_ids;  // [max_top]
  float* top_logprobs;    // [max_top]
  std::int64_t max_top;
};

// NaN, rank 0 and ids of -1.
inline void clear_logprobs(const LogprobsOut& out) {
  *out.logprob = __builtin_nanf("");
  *out.rank = 0;
  for (std::int64_t i = 0; i < out.max_top; ++i) {
    out.top_ids[i] = -1;
    out.top_logprobs[i] = __builtin_nanf("");
  }
}

// The log-probability and rank of `id`, where it is a token, and the num_top best. The row has a
// distribution; the outputs are cleared.
inline void write_logprobs(RowMemory& m, const ScannedRow& row, double log_sum, std::int64_t id,
                           std::int64_t num_top, const LogprobsOut& out) {
  if (id >= 0 && id < row.size) {
    *out.logprob = logprob_of(row, log_sum, id);
    *out.rank = rank_of(row, id);
  }
  if (num_top == 0) return;
  TokenList list = gather(m, row, lower_bound_of(m, row, num_top));
  keep_first(m, list, num_top, row.top, 64.0f);
  auto* keys = reinterpret_cast<std::uint64_t*>(m.edge_weights);
  for (std::int64_t i = 0; i < num_top; ++i) {
    keys[i] = std::uint64_t{descending_key(list.values[i])} << 32 |
              static_cast<std::uint32_t>(list.ids[i]);
  }
  sort(keys, num_top);
  for (std::int64_t i = 0; i < num_top; ++i) {
    out.top_ids[i] = static_cast<std::int32_t>(keys[i] & 0xffffffffu);
    out.top_logprobs[i] = logprob_of(row, log_sum, out.top_ids[i]);
  }
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
