// SPDX-License-Identifier: Apache-2.0
#include "ops/attention_prefill.h"

#include "core/dispatch.h"
#include "ops/attention_checks.h"

namespace fullbeam::ops {

void attention_prefill(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                       const Tensor& page_table, const Tensor& seq_lens, const Tensor& query_starts,
                       const Tensor& out, float scale, std::int64_t window, float softcap) {
  Check check("attention_prefill");
  AttentionPrefillParams p{};
  check_attention(check, q, k_pages, v_pages, page_table, seq_lens, out, scale, window, softcap, p);
  check.tensor("query_starts", query_starts, {p.num_seqs + 1}, {DType::i32});
  p.query_starts = static_cast<const std::int32_t*>(query_starts.data);
  if (q.device == Device::cpu && Program::recording() == nullptr) {
    check_query_starts(check, p);
    for (std::int64_t s = 0; s < p.num_seqs; ++s)
      check_seq_len(check, p, s, p.query_starts[s + 1] - p.query_starts[s]);
  }
  run(p, q.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const AttentionPrefillParams& params, Device device) {
  FULLBEAM_DISPATCH(attention_prefill, device, params);
}
