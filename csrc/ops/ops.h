// SPDX-License-Identifier: Apache-2.0
// The ops as C++ functions on tensor views: check, fill the op's struct, launch. What
// the Python module binds.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "core/api.h"
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

// A packed weight, or a dense matrix.
using Table = std::variant<const PackedWeight*, TensorView>;

FULLBEAM_API void dequantise(const Tensor& data, const std::string& type, const Tensor& out);
FULLBEAM_API void embedding(const Tensor& token_ids, const Table& table,
                            const MaybeTensor& residual, const Tensor& out, float scale);
FULLBEAM_API void rms_norm(const Tensor& x, const Tensor& weight, const MaybeTensor& residual,
                           const Tensor& out, float eps, float weight_offset);
FULLBEAM_API void layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                             const Tensor& out, float eps);
FULLBEAM_API void linear(const Tensor& x, const PackedWeight& weight, const MaybeTensor& bias,
                         const MaybeTensor& residual, const Tensor& out, bool largest_only);
FULLBEAM_API void rope(const Tensor& x, const Tensor& positions, const Tensor& inv_freq,
                       bool interleaved, float scale);
FULLBEAM_API void kv_write(const Tensor& k, const Tensor& v, const Tensor& k_pages,
                           const Tensor& v_pages, const Tensor& slots);
FULLBEAM_API void attention_prefill(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                    const Tensor& page_table, const Tensor& seq_lens,
                                    const Tensor& query_starts, const Tensor& out, float scale,
                                    std::int64_t window, float softcap);
FULLBEAM_API void attention_decode(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                                   const Tensor& page_table, const Tensor& seq_lens,
                                   const MaybeTensor& query_starts, const MaybeTensor& slot_starts,
                                   const MaybeTensor& num_slots, const MaybeTensor& visible,
                                   const MaybeTensor& slot_positions, const MaybeTensor& positions,
                                   const Tensor& out, float scale, std::int64_t window,
                                   float softcap);
FULLBEAM_API void gated_activation(const Tensor& x, const Tensor& out,
                                   const std::string& activation);
FULLBEAM_API void activation(const Tensor& x, const Tensor& out, const std::string& activation);
FULLBEAM_API void softcap(const Tensor& x, const Tensor& out, float cap);
FULLBEAM_API void logprobs(const Tensor& logits, const Tensor& token_ids,
                           const Tensor& out_logprobs, const Tensor& out_ranks,
                           const Tensor& out_top_ids, const Tensor& out_top_logprobs);
FULLBEAM_API void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
                         const Tensor& top_p, const Tensor& min_p, const Tensor& seeds,
                         const Tensor& counters, const MaybeTensor& allowed,
                         const MaybeTensor& allowed_idx, const MaybeTensor& bias_starts,
                         const MaybeTensor& bias_ids, const MaybeTensor& bias_values,
                         const MaybeTensor& history_starts, const MaybeTensor& history_ids,
                         const MaybeTensor& history_counts, const MaybeTensor& history_last,
                         const MaybeTensor& repetition_penalty,
                         const MaybeTensor& frequency_penalty, const MaybeTensor& presence_penalty,
                         const MaybeTensor& num_top, const Tensor& out_token_ids,
                         const MaybeTensor& out_logprobs, const MaybeTensor& out_ranks,
                         const MaybeTensor& out_top_ids, const MaybeTensor& out_top_logprobs,
                         const MaybeTensor& out_log_sums);
FULLBEAM_API void beam_step(const Tensor& logits, const Tensor& beam_rows, const Tensor& sums,
                            const Tensor& group_starts, const Tensor& request_starts,
                            const Tensor& beam_sizes, const Tensor& diversity_strengths,
                            const MaybeTensor& allowed, const MaybeTensor& allowed_idx,
                            const MaybeTensor& terminators, const MaybeTensor& terminator_idx,
                            const MaybeTensor& bias_starts, const MaybeTensor& bias_ids,
                            const MaybeTensor& bias_values, const Tensor& out_parents,
                            const Tensor& out_token_ids, const Tensor& out_logprobs,
                            const Tensor& out_sums, const Tensor& out_finished_parents,
                            const Tensor& out_finished_token_ids,
                            const Tensor& out_finished_logprobs, const Tensor& out_finished_sums);

}  // namespace fullbeam::ops
