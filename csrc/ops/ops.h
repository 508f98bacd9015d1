// SPDX-License-Identifier: Apache-2.0
// The ops as C++ functions on tensor views: check, fill the op's struct, launch. What
// csrc/python/module.cc binds.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "core/packed_weight.h"
#include "core/tensor.h"

namespace fullbeam::ops {

using Tensor = TensorView;
using MaybeTensor = std::optional<TensorView>;

// [num_tokens, size] seen as [num_tokens, 1, size]; three dimensions as they are.
inline Tensor as_heads(const Tensor& view) {
  if (view.num_dims != 2) return view;
  Tensor heads = view;
  heads.num_dims = 3;
  heads.shape = {view.shape[0], 1, view.shape[1], 0};
  heads.strides = {view.strides[0], view.shape[1], view.strides[1], 0};
  return heads;
}

void embedding(const Tensor& token_ids, const PackedWeight& table, const Tensor& out, float scale);
void rms_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& residual, const Tensor& out,
              float eps, float weight_offset);
void linear(const Tensor& x, const PackedWeight& weight, const MaybeTensor& bias,
            const MaybeTensor& residual, const Tensor& out);
void rope(const Tensor& x, const Tensor& positions, const Tensor& inv_freq, bool interleaved,
          float scale);
void kv_write(const Tensor& k, const Tensor& v, const Tensor& k_pages, const Tensor& v_pages,
              const Tensor& slots);
void attention_prefill(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                       const Tensor& page_table, const Tensor& seq_lens, const Tensor& query_starts,
                       const Tensor& out, float scale, std::int64_t window, float softcap);
void attention_decode(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                      const Tensor& page_table, const Tensor& seq_lens, const Tensor& out,
                      float scale, std::int64_t window, float softcap);
void gated_activation(const Tensor& x, const Tensor& out, const std::string& activation);
void logprobs(const Tensor& logits, const Tensor& token_ids, const Tensor& out_logprobs,
              const Tensor& out_ranks, const Tensor& out_top_ids, const Tensor& out_top_logprobs);
void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const Tensor& seeds, const Tensor& counters,
            const Tensor& out_token_ids);

}  // namespace fullbeam::ops
