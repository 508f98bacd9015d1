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
  check.tensor("q", q, {"num_tokens", "num_q_heads", "head_dim"}, {DType::f32}, false);
  check.tensor("k_pages", k_pages, {"num_pages", "num_kv_heads", "page_size", "head_dim"},
               {DType::f32, DType::f16, DType::bf16});
  check.tensor("v_pages", v_pages, {"num_pages", "num_kv_heads", "page_size", "head_dim"},
               {k_pages.dtype});
  check.tensor("page_table", page_table, {"num_seqs", "max_pages"}, {DType::i32});
  check.tensor("seq_lens", seq_lens, {"num_seqs"}, {DType::i32});
  check.tensor("out", out, {"num_tokens", "num_q_heads", "head_dim"}, {DType::f32}, false);
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
  p.q = static_cast<const float*>(q.data);
  p.k_pages = k_pages.data;
  p.v_pages = v_pages.data;
  p.page_table = static_cast<const std::int32_t*>(page_table.data);
  p.seq_lens = static_cast<const std::int32_t*>(seq_lens.data);
  p.out = static_cast<float*>(out.data);
  p.scale = scale;
  p.softcap = softcap;
  p.window = window;
  p.kv_dtype = k_pages.dtype;
  p.q_stride = q.strides[0];
  p.out_stride = out.strides[0];
}

}  // namespace fullbeam::ops
