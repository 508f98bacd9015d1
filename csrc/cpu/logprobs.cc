// SPDX-License-Identifier: Apache-2.0
// log-softmax of each row at one token and at its best tokens, and that token's rank.
// Mapping: a thread takes whole rows, as it becomes free.
// Cost: two passes over the row (maxima, then one exponential per token); blocks that reach the
// token or the bound of the best ones are read again. Numerics: the sum of exponentials in float32
// within a block of kBlock tokens and float64 across blocks; the difference logit - log(sum) in
// float64, rounded once. Source: the definition.
#include "ops/logprobs.h"

#include "cpu/logits.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// 1 + the number of larger values + the number of equal ones with a lower id.
std::int32_t rank_of(const float* row, std::int64_t size, const float* block_max, std::int64_t id) {
  const float value = row[id];
  std::int32_t rank = 1;
  for (std::int64_t block = 0; block < num_blocks_of(size); ++block) {
    if (!(block_max[block] >= value)) continue;
    const std::int64_t begin = block * kBlock;
    const std::int64_t end = begin + kBlock < size ? begin + kBlock : size;
    const std::int64_t split = id < begin ? begin : id < end ? id : end;
    for (std::int64_t i = begin; i < split; ++i) rank += row[i] >= value ? 1 : 0;
    for (std::int64_t i = split; i < end; ++i) rank += row[i] > value ? 1 : 0;
  }
  return rank;
}

void sift_down(std::uint64_t* keys, std::int64_t root, std::int64_t size) {
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
void sort(std::uint64_t* keys, std::int64_t size) {
  for (std::int64_t root = size / 2 - 1; root >= 0; --root) sift_down(keys, root, size);
  for (std::int64_t last = size - 1; last > 0; --last) {
    const std::uint64_t swapped = keys[0];
    keys[0] = keys[last];
    keys[last] = swapped;
    sift_down(keys, 0, last);
  }
}

void logprobs_row(const LogprobsParams& p, std::int64_t row_idx) {
  const float* row = p.logits + row_idx * p.logits_stride;
  const std::int64_t size = p.vocab_size, id = p.token_ids[row_idx];
  std::int32_t* top_ids = p.top_ids + row_idx * p.num_top;
  float* top_logprobs = p.top_logprobs + row_idx * p.num_top;
  p.logprobs[row_idx] = __builtin_nanf("");
  p.ranks[row_idx] = 0;
  RowMemory m = row_memory(size);
  float top = scan_row(row, size, m.block_max);
  if (!(top > -kInfinity)) {
    for (std::int64_t i = 0; i < p.num_top; ++i) {
      top_ids[i] = -1;
      top_logprobs[i] = __builtin_nanf("");
    }
    return;
  }
  if (top == kInfinity) {
    row = finite_row(row, size, m.finite_row);
    top = scan_row(row, size, m.block_max);
  }
  const double log_sum =
      static_cast<double>(top) + __builtin_log(row_weight(row, size, top, kLog2E, nullptr));
  const auto logprob = [=](std::int64_t token) {
    return static_cast<float>(static_cast<double>(row[token]) - log_sum);
  };
  if (id >= 0 && id < size) {
    p.logprobs[row_idx] = logprob(id);
    p.ranks[row_idx] = rank_of(row, size, m.block_max, id);
  }
  if (p.num_top == 0) return;
  gather(row, size, m.block_max, lower_bound_of(m, num_blocks_of(size), p.num_top, top), m.list);
  if (m.list.size > p.num_top) {
    keep(m.list, find_edge(m, m.list.values, nullptr, m.list.size, static_cast<double>(p.num_top),
                           top, 64.0f));
  }
  auto* keys = reinterpret_cast<std::uint64_t*>(m.edge_weights);
  for (std::int64_t i = 0; i < p.num_top; ++i) {
    keys[i] = std::uint64_t{descending_key(m.list.values[i])} << 32 |
              static_cast<std::uint32_t>(m.list.ids[i]);
  }
  sort(keys, p.num_top);
  for (std::int64_t i = 0; i < p.num_top; ++i) {
    top_ids[i] = static_cast<std::int32_t>(keys[i] & 0xffffffffu);
    top_logprobs[i] = logprob(top_ids[i]);
  }
}

}  // namespace

void logprobs(const LogprobsParams& p) {
  parallel_chunks(p.num_rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) logprobs_row(p, row);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
