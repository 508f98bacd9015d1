// SPDX-License-Identifier: Apache-2.0
// log-softmax of each row at one token and at its best tokens, and that token's rank.
// Mapping: a thread takes whole rows, as it becomes free.
// Cost: two passes over the row (maxima, then one exponential per token); blocks that reach the
// token or the bound of the best ones are read again. Numerics: the sum of exponentials in float32
// within a block of kBlock tokens and float64 across blocks; the difference logit - log(sum) in
// float64, rounded once. Source: the definition.
#include "ops/logprobs.h"

#include "cpu/logprobs.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

void logprobs_row(const LogprobsParams& p, std::int64_t idx) {
  const LogprobsOut out{p.logprobs + idx, p.ranks + idx, p.top_ids + idx * p.num_top,
                        p.top_logprobs + idx * p.num_top, p.num_top};
  clear_logprobs(out);
  RowMemory m = row_memory(p.vocab_size);
  const ScannedRow row = scan(static_cast<const float*>(p.logits) + idx * p.logits_stride,
                              p.vocab_size, m.block_max, m.finite_row);
  if (!row.has_distribution()) return;
  const double log_sum = log_sum_of(row, row_weight(row, kLog2E, nullptr));
  write_logprobs(m, row, log_sum, p.token_ids[idx], p.num_top, out);
}

}  // namespace

void logprobs(const LogprobsParams& p) {
  parallel_chunks(p.num_rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) logprobs_row(p, row);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
