// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>

#include "core/check.h"
#include "ops/attention_prefill.h"
#include "ops/ops.h"

namespace fullbeam::ops {

// What both attention ops check and fill in alike.
inline void check_attention(Check& check, const Tensor& q, const Tensor& k_pages,
                            const Tensor& v_pages, const Tensor& page_table, const Tensor& seq_lens,
                            const Tensor& out, float scale, std::int64_t window, float softcap,
                            AttentionPrefillParams& p) {
  check.activation("q", q, {"num_tokens", "num_q_heads", "head_dim"});
  check.pages("k_pages", k_pages, {DType::f32, DType::f16, DType::bf16});
  check.pages("v_pages", v_pages, {k_pages.dtype});
  check.tensor("page_table", page_table, {"num_seqs", "max_pages"}, {DType::i32});
  check.tensor("seq_lens", seq_lens, {"num_seqs"}, {DType::i32});
  check.activation("out", out, {"num_tokens", "num_q_heads", "head_dim"});
  check.writable("out", out);
  p.num_tokens = check.size("num_tokens");
  p.num_seqs = check.size("num_seqs");
  p.num_pages = check.size("num_pages");
  p.max_pages = check.size("max_pages");
  p.page_size = check.size("page_size");
  p.num_q_heads = check.size("num_q_heads");
  p.num_kv_heads = check.size("num_kv_heads");
  p.head_dim = check.size("head_dim");
  check.require(p.num_kv_heads > 0 && p.num_q_heads % p.num_kv_heads == 0, "num_q_heads",
                "a multiple of num_kv_heads=" + std::to_string(p.num_kv_heads),
                std::to_string(p.num_q_heads));
  check.require(p.head_dim > 0 && p.head_dim <= 512 && p.head_dim % 16 == 0, "head_dim",
                "a multiple of 16 up to 512", std::to_string(p.head_dim));
  for (const Tensor* heads : {&q, &out}) {
    check.require(p.num_tokens == 0 || p.num_q_heads < 2 || heads->strides[1] == p.head_dim,
                  heads == &q ? "q" : "out", "contiguous over its heads",
                  "a stride of " + std::to_string(heads->strides[1]));
  }
  check.require(std::isfinite(scale), "scale", "finite", std::to_string(scale));
  check.require(window >= 0, "window", "at least 0", std::to_string(window));
  check.require(softcap >= 0 && std::isfinite(softcap), "softcap", "finite and at least 0",
                std::to_string(softcap));
  p.q = q.data;
  p.k_pages = k_pages.data;
  p.k_page_stride = k_pages.strides[0];
  p.v_page_stride = v_pages.strides[0];
  p.v_pages = v_pages.data;
  p.page_table = static_cast<const std::int32_t*>(page_table.data);
  p.seq_lens = static_cast<const std::int32_t*>(seq_lens.data);
  p.out = out.data;
  p.scale = scale;
  p.softcap = softcap;
  p.window = window;
  p.dtype = q.dtype;
  p.kv_dtype = k_pages.dtype;
  p.q_stride = q.strides[0];
  p.out_stride = out.strides[0];
}

// The checks below are of what the arrays hold, where this call reads it now (a recorded program
// reads it later, and trusts its maker).

inline void check_query_starts(const Check& check, const AttentionPrefillParams& p) {
  if (p.query_starts == nullptr) return;
  std::int32_t last = 0;
  for (std::int64_t s = 0; s <= p.num_seqs; ++s) {
    const std::int32_t start = p.query_starts[s];
    check.require((s > 0 || start == 0) && start >= last && start <= p.num_tokens, "query_starts",
                  "ascending from 0 to num_tokens=" + std::to_string(p.num_tokens),
                  std::to_string(start) + " after " + std::to_string(last));
    last = start;
  }
  check.require(last == p.num_tokens, "query_starts",
                "num_tokens=" + std::to_string(p.num_tokens) + " at its end", std::to_string(last));
}

// The pages of keys [begin, end) of sequence s.
inline void check_pages(const Check& check, const AttentionPrefillParams& p, std::int64_t s,
                        std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin / p.page_size; i * p.page_size < end; ++i) {
    const std::int32_t page = p.page_table[s * p.max_pages + i];
    check.require(page >= 0 && page < p.num_pages, "page_table",
                  "in 0.." + std::to_string(p.num_pages - 1) + " for the pages in use",
                  std::to_string(page));
  }
}

// The length of sequence s, whose keys hold those of its queries where `least` says how many.
inline void check_seq_len(const Check& check, const AttentionPrefillParams& p, std::int64_t s,
                          std::int64_t least) {
  const std::int64_t len = p.seq_lens[s], room = p.max_pages * p.page_size;
  check.require(len >= least && len <= room, "seq_lens",
                "at least the queries of its sequence and at most max_pages * page_size=" +
                    std::to_string(room),
                std::to_string(len));
  check_pages(check, p, s, 0, len);
}

}  // namespace fullbeam::ops
