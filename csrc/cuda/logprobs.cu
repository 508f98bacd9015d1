// SPDX-License-Identifier: Apache-2.0
// log-softmax of each row at one token and at its best tokens, and that token's rank.
// Mapping: as cuda/logits_row.cuh has it: a cluster per row, or a block per tile and the last one
// for the rest. Cost: the logits once, and once more (from shared memory or L2) the strips that
// reach the token or the bound of the best ones; memory-bound. Numerics: the sum of exponentials in
// float32 within a strip of 128 tokens, in whole numbers of 2^-42 of the largest across strips; the
// difference logit - log(sum) in float64, rounded once. Source: the definition.
#include "cuda/logits_kernel.cuh"
#include "cuda/logprobs.cuh"
#include "ops/logprobs.h"

namespace fullbeam::cuda {
namespace {

struct LogprobsRow {
  const LogprobsParams& p;
  std::int64_t idx;

  __device__ LogprobsRow(const LogprobsParams& params, std::int64_t row) : p(params), idx(row) {}

  __device__ void set(Row& row) const {
    row.logits = row_of(p.logits, p.dtype, idx * p.logits_stride);
    row.dtype = p.dtype;
    row.vocab_size = static_cast<int>(p.vocab_size);
  }
  __device__ void scan(RowShared& s) const {
    const Row& row = s.row;
    scan_share(s, [&](int strip, float (&x)[4], bool) {
      const float largest = strip_max(x), sum = strip_sum(x, largest, Softmax::of(1.0f).rate);
      if (threadIdx.x % 32 == 0) {
        row.stats[0][strip - row.stats_first] = largest;
        row.stats[1][strip - row.stats_first] = sum;
      }
    });
  }
  __device__ __noinline__ void finish(RowShared& s) const {
    const LogprobsOut out{p.logprobs + idx, p.ranks + idx, p.top_ids + idx * p.num_top,
                          p.top_logprobs + idx * p.num_top, p.num_top};
    const View& view = s.views[0];
    make_view(s.views[0], kRawView, s.row.stats[0], s.row.stats[1], 1.0f);
    if (!view.has_distribution()) {
      if (s.row.is_root()) clear_logprobs(out, 0);
      return;
    }
    const double log_sum = log_sum_of(view, mass_of_row(view, kRawMass));
    write_logprobs(s, view, log_sum, p.token_ids[idx], p.num_top, out);
  }
};

}  // namespace

void logprobs(const LogprobsParams& p) {
  if (p.num_rows == 0) return;
  const RowLaunch plan =
      choose_rows<LogprobsRow, LogprobsParams>("logprobs", p.num_rows, p.vocab_size);
  launch_rows<LogprobsRow>(plan, p, workspace(plan.stats_bytes), counters(p.num_rows));
}

}  // namespace fullbeam::cuda
