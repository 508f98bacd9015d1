// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// Causal attention of query tokens over a paged KV cache. Sequence i owns query rows
// [query_starts[i], query_starts[i + 1]), which stand at the last positions of its seq_lens[i] keys
// (their own K and V are already written). score = softcap * tanh(scale * q.k / softcap) where
// softcap > 0, else scale * q.k; a query at position p sees keys max(0, p - window + 1) .. p, all
// up to p where window is 0.
struct AttentionPrefillParams {
  const void* q;                   // [num_tokens, num_q_heads, head_dim], dtype
  const void* k_pages;             // [num_pages, num_kv_heads, page_size, head_dim], kv_dtype
  const void* v_pages;             // likewise
  const std::int32_t* page_table;  // [num_seqs, max_pages]; entries beyond seq_lens are never read
  const std::int32_t* seq_lens;    // [num_seqs]
  const std::int32_t*
      query_starts;  // [num_seqs + 1]; nullptr: row i is the only query of sequence i
  void* out;         // [num_tokens, num_q_heads, head_dim], dtype
  float scale, softcap;
  DType dtype, kv_dtype;
  std::int64_t num_tokens, num_seqs, num_pages, max_pages, page_size, num_q_heads, num_kv_heads,
      head_dim, window;
  std::int64_t q_stride, out_stride;          // per token, in elements
  std::int64_t k_page_stride, v_page_stride;  // per page, in elements
};

FULLBEAM_DECLARE_OP(attention_prefill, AttentionPrefillParams)

}  // namespace fullbeam
