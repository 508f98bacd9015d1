// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// One token per row, drawn from the row's distribution after temperature, min_p, top_k and top_p,
// in that order. Each keeps a prefix of the tokens in order of logit (larger first, ties by lower
// id); top_p renormalises over what top_k left and keeps the smallest prefix whose mass reaches it,
// at least one token. The uniform number of a row depends on its seed and counters only
// (core/philox.h); the token is the first, by id, whose cumulative mass exceeds it. Temperature 0
// is the largest logit, lowest id on ties. Logits of +infinity share all the mass equally.
struct SampleParams {
  const float* logits;            // [num_rows, vocab_size]; row stride logits_stride
  const float* temperature;       // [num_rows], at least 0
  const std::int32_t* top_k;      // [num_rows]; 0 or less keeps all
  const float* top_p;             // [num_rows] in [0, 1]; 0 keeps the top token, 1 keeps all
  const float* min_p;             // [num_rows] in [0, 1]; relative to the largest probability
  const std::uint64_t* seeds;     // [num_rows]
  const std::uint32_t* counters;  // [num_rows, 3]: prompt index, choice index, position
  std::int32_t*
      token_ids;  // [num_rows], out; -1 where the row has a NaN or nothing above -infinity
  std::int64_t num_rows, vocab_size, logits_stride;  // stride in elements
};

FULLBEAM_DECLARE_OP(sample, SampleParams)

}  // namespace fullbeam
