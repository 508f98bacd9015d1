// SPDX-License-Identifier: Apache-2.0
#include "ops/attention_decode.h"

#include "core/dispatch.h"
#include "ops/attention_checks.h"

namespace fullbeam::ops {

void attention_decode(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                      const Tensor& page_table, const Tensor& seq_lens, const Tensor& out,
                      float scale, std::int64_t window, float softcap) {
  Check check("attention_decode");
  AttentionDecodeParams p{};
  check_attention(check, q, k_pages, v_pages, page_table, seq_lens, out, scale, window, softcap, p);
  check.require(p.num_tokens == p.num_seqs, "q",
                "one row per sequence, num_seqs=" + std::to_string(p.num_seqs),
                std::to_string(p.num_tokens));
  if (q.device == Device::cpu && Program::recording() == nullptr) check_attention_data(check, p);
  FULLBEAM_DISPATCH_CPU(attention_decode, q.device, p);
}

}  // namespace fullbeam::ops
