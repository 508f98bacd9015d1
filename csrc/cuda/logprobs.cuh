// SPDX-License-Identifier: Apache-2.0
// log-softmax of a row at one token and at its best ones, for logprobs and sample: the same bits.
#pragma once
#include "cuda/select.cuh"

namespace fullbeam::cuda {

// One row's places in the outputs of logprobs and sample.
struct LogprobsOut {
  float* logprob;         // [1]
  std::int32_t* rank;     // [1]
  std::int32_t* top_ids;  // [max_top]
  float* top_logprobs;    // [max_top]
  std::int64_t max_top;
};

__device__ inline float logprob_of(float value, double log_sum) {
  return static_cast<float>(static_cast<double>(value) - log_sum);
}

// NaN, rank 0 and ids of -1, from place `begin` of the best tokens on; by one block.
__device__ inline void clear_logprobs(const LogprobsOut& out, std::int64_t begin) {
  if (threadIdx.x == 0 && begin == 0) {
    *out.logprob = NAN;
    *out.rank = 0;
  }
  for (std::int64_t i = begin + threadIdx.x; i < out.max_top; i += blockDim.x) {
    out.top_ids[i] = -1;
    out.top_logprobs[i] = NAN;
  }
}

// The log-probability and rank of `id`, where it is a token, and the num_top best: all of `out`,
// where `view`, the row as it is given, has a distribution.
__device__ inline void write_logprobs(RowShared& s, const View& view, double log_sum, int id,
                                      std::int64_t num_top, const LogprobsOut& out) {
  const Row& row = s.row;
  const bool writes_one = row.is_root() && threadIdx.x == 0;
  if (writes_one) s.count = 0;
  if (row.is_root()) clear_logprobs(out, num_top);
  row.team.sync();
  const bool is_token = id >= 0 && id < row.vocab_size;
  const float value = is_token ? view.see(logit_at(row, id)) : NAN;
  if (is_token) {
    const Key key = key_of(value, id);
    visit(s, view, value_key(key), [&](int, int first, float (&x)[4]) {
      unsigned count = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) count += key_of(x[i], first + i) < key ? 1u : 0u;
      count = __reduce_add_sync(kWholeWarp, count);
      if (threadIdx.x % 32 == 0 && count != 0) atomicAdd(&row.root->count, count);
    });
    row.team.sync();
  }
  if (writes_one) {
    *out.logprob = logprob_of(value, log_sum);
    *out.rank = is_token ? static_cast<std::int32_t>(s.count) + 1 : 0;
  }
  for_each_first(s, view, kLastKey, static_cast<int>(num_top), [&](int i, Key key) {
    out.top_ids[i] = id_of(key);
    out.top_logprobs[i] = logprob_of(value_of(value_key(key)), log_sum);
  });
}

}  // namespace fullbeam::cuda
