// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "ops/attention_prefill.h"

namespace fullbeam {

// The same with one query per sequence, at its last position, where num_words is 0: row i of q
// belongs to sequence i. Else query_starts says whose the rows are, and a sequence whose num_slots
// is above 0 is a search: each of its rows stands at a position of its own, behind its seq_lens
// keys, sees them all and, of the keys slot_starts + j (0 <= j < num_slots) in its page table,
// those whose bit is set in `visible` (the tokens generated on the way to that row). The window
// holds for keys and slots alike. Slots lie in any order; a row sums them in theirs. A row that
// sees nothing is NaN.
struct AttentionDecodeParams : AttentionPrefillParams {
  const std::int32_t* slot_starts;     // [num_seqs], multiples of page_size, at least seq_lens
  const std::int32_t* num_slots;       // [num_seqs]; 0: one query, at the last position
  const std::uint32_t* visible;        // [num_tokens, num_words]: bit j of word w is slot 32 w + j
  const std::int32_t* slot_positions;  // [num_seqs, 32 * num_words], position of each slot's token
  const std::int32_t* positions;       // [num_tokens]
  std::int64_t num_words;
};

FULLBEAM_DECLARE_OP(attention_decode, AttentionDecodeParams)

}  // namespace fullbeam
