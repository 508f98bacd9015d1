// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// Stores the keys and values of new tokens in their slots, slot = page * page_size + offset. A
// negative slot skips its token. A slot past the last page is refused at the door; where a recorded
// program meets one, its token is skipped.
struct KvWriteParams {
  const void* k;              // [num_tokens, num_kv_heads, head_dim], source_dtype
  const void* v;              // [num_tokens, num_kv_heads, head_dim], source_dtype
  void* k_pages;              // [num_pages, num_kv_heads, page_size, head_dim], dtype, out
  void* v_pages;              // [num_pages, num_kv_heads, page_size, head_dim], dtype, out
  const std::int64_t* slots;  // [num_tokens]
  DType source_dtype;         // f32; on CUDA also f16 or bf16
  DType dtype;                // f32, f16 (numbers past its range become +-65504) or bf16
  std::int64_t num_tokens, num_kv_heads, head_dim, num_pages, page_size;
  // In elements.
  std::int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  std::int64_t k_page_stride, v_page_stride;
};

FULLBEAM_DECLARE_OP(kv_write, KvWriteParams)

}  // namespace fullbeam
