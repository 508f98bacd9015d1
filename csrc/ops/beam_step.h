// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// What a step makes of each group, best first; -1 and NaN beyond a group's last one.
struct BeamStepResults {
  std::int32_t* parents;    // [num_groups, max_beam], the beam that is continued
  std::int32_t* token_ids;  // [num_groups, max_beam]
  float* logprobs;          // [num_groups, max_beam], of the token
  double* sums;             // [num_groups, max_beam, 2]: search score, log-probability
};

// One step of (diverse) beam search. A beam is a live hypothesis with a search score s and a
// log-probability l; beams lie in groups by rank, groups in requests. A beam's candidates are the
// tokens that its mask allows, with lp = log-softmax of its row after bias, over the whole
// vocabulary; tokens at -infinity are none, and a row with a NaN or nothing above -infinity has
// none. A candidate has s' = s + lp - strength * count and l' = l + lp, count being the number of
// live results of the request's earlier groups with that token. The candidates of a group stand in
// order of s' (larger first, then lower beam, then lower token id). In that order, the first
// beam_size whose token is no terminator of their beam become live; a terminated one becomes
// finished if it is among the first beam_size of all.
struct BeamStepParams {
  const void* logits;                  // [num_rows, vocab_size], dtype; row stride logits_stride
  const std::int32_t* beam_rows;       // [num_beams], the row of each beam; beams may share one
  const double* sums;                  // [num_beams, 2]: s and l, finite
  const std::int32_t* group_starts;    // [num_groups + 1], ascending from 0 to num_beams
  const std::int32_t* request_starts;  // [num_requests + 1], ascending from 0 to num_groups
  const std::int32_t* beam_sizes;      // [num_groups] in 1..max_beam
  const float* diversity_strengths;    // [num_requests], finite, at least 0
  const std::uint32_t* allowed;      // [num_allowed, num_words], bit i of word w is token 32 w + i
  const std::int32_t* allowed_idx;   // [num_beams], -1 allows all; nullptr: all are -1
  const std::uint32_t* terminators;  // [num_terminators, num_words]
  const std::int32_t* terminator_idx;  // [num_beams], -1 terminates none; nullptr: all are -1
  const std::int32_t* bias_starts;     // [num_beams + 1], or nullptr for no bias
  const std::int32_t* bias_ids;        // [num_biases] below vocab_size
  const float* bias_values;            // [num_biases], added to logits; -infinity bans
  BeamStepResults live, finished;      // out
  DType dtype;                         // of logits: f32; on CUDA also f16 or bf16
  std::int64_t num_rows, num_beams, num_groups, num_requests, max_beam;
  std::int64_t num_allowed, num_terminators, num_biases;
  std::int64_t vocab_size, num_words, logits_stride;  // stride in elements
};

FULLBEAM_DECLARE_OP(beam_step, BeamStepParams)

}  // namespace fullbeam
