// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// log-softmax of each row at one token and at the num_top best (larger first, ties by lower id). A
// token has the same bits in both places. Its rank is its place in that order, from 1. A row with a
// NaN or nothing above -infinity gives NaN, rank 0 and top ids -1; logits of +infinity share all
// the mass equally.
struct LogprobsParams {
  const void* logits;             // [num_rows, vocab_size], dtype; row stride logits_stride
  const std::int32_t* token_ids;  // [num_rows]; outside [0, vocab_size) gives NaN and rank 0
  float* logprobs;                // [num_rows], out
  std::int32_t* ranks;            // [num_rows], out
  std::int32_t* top_ids;          // [num_rows, num_top], out
  float* top_logprobs;            // [num_rows, num_top], out
  DType dtype;                    // of logits: f32; on CUDA also f16 or bf16
  std::int64_t num_rows, vocab_size, num_top, logits_stride;  // stride in elements
};

FULLBEAM_DECLARE_OP(logprobs, LogprobsParams)

}  // namespace fullbeam
