// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// One token per row, drawn from the row's distribution after its edits and then temperature, min_p,
// top_k and top_p, in that order. Each of the last three keeps a prefix of the tokens in order of
// logit (larger first, ties by lower id); top_p renormalises over what top_k left and keeps the
// smallest prefix whose mass reaches it, at least one token. The uniform number of a row depends on
// its seed and counters only (core/philox.h); the token is the first, by id, whose cumulative mass
// exceeds it. Temperature 0 is the largest logit, lowest id on ties. Logits of +infinity share all
// the mass equally.
//
// The edits, in float32 and in this order, each null where no row has it:
//   allowed     logits of other tokens become -infinity
//   bias        is added; -infinity bans, whatever the logit
//   repetition  every token of the history: a positive logit is divided by it, others multiplied
//   frequency, presence  tokens of the history with a count: logit -= count * frequency + presence
// A row's history_last counts as one more generated token: where the list has it, its count is one
// higher, else it is one more entry, of count 1.
// The caller's logits are never written.
//
// With num_top, the log-probabilities that logprobs gives of the drawn token: those of the logits
// as they are, before the edits.
struct SampleParams {
  const void* logits;             // [num_rows, vocab_size], dtype; row stride logits_stride
  const float* temperature;       // [num_rows], at least 0
  const std::int32_t* top_k;      // [num_rows]; 0 or less keeps all
  const float* top_p;             // [num_rows] in [0, 1]; 0 keeps the top token, 1 keeps all
  const float* min_p;             // [num_rows] in [0, 1]; relative to the largest probability
  const std::uint64_t* seeds;     // [num_rows]
  const std::uint32_t* counters;  // [num_rows, 3]: prompt index, choice index, position

  const std::uint32_t* allowed;        // [num_masks, num_words]; bit i of word w: token 32 w + i
  const std::int32_t* allowed_idx;     // [num_rows]; -1 allows all
  const std::int32_t* bias_starts;     // [num_rows + 1]; a row's entries are [its start, the next)
  const std::int32_t* bias_ids;        // [num_biases]
  const float* bias_values;            // [num_biases], below +infinity
  const std::int32_t* history_starts;  // [num_rows + 1]
  const std::int32_t* history_ids;     // [num_histories], distinct within a row
  const std::int32_t* history_counts;  // [num_histories]; 0: in the prompt only
  const std::int32_t* history_last;    // [num_rows]; -1: none; null: none in any row
  const float* repetition_penalty;     // [num_rows], above 0; null 1
  const float* frequency_penalty;      // [num_rows]; null 0
  const float* presence_penalty;       // [num_rows]; null 0

  const std::int32_t* num_top;  // [num_rows]; best tokens wanted, -1: no log-probabilities at all
  std::int32_t* token_ids;      // [num_rows], out; -1 where the row has a NaN, or, edited, nothing
                                // above -infinity
  float* logprobs;              // [num_rows], out: this and the rest only with num_top; NaN, 0 and
                                // -1 where a row doesn't want them
  std::int32_t* ranks;          // [num_rows], out
  std::int32_t* top_ids;        // [num_rows, max_top], out
  float* top_logprobs;          // [num_rows, max_top], out
  double* log_sums;  // [num_rows, 2], out: ln(sum(e^x)) of the logits as they are; after the edits
                     // and temperature (0 counts as 1)
  DType dtype;       // of logits: f32; on CUDA also f16 or bf16
  std::int64_t num_rows, vocab_size, logits_stride;  // stride in elements
  std::int64_t num_masks, num_words, num_biases, num_histories, max_top;
};

FULLBEAM_DECLARE_OP(sample, SampleParams)

}  // namespace fullbeam
