// SPDX-License-Identifier: Apache-2.0
// Causal attention of many query tokens per sequence; mapping and arithmetic are in attention.h.
#include "ops/attention_prefill.h"

#include "cpu/attention.h"

namespace fullbeam::cpu::FULLBEAM_ISA {

void attention_prefill(const AttentionPrefillParams& p) {
  for_each_block(
      p, [&](std::int64_t s, std::int64_t end, const QueryRows& rows, const AttentionBlock& b) {
        const std::int64_t first_position = p.seq_lens[s] - (end - rows.token_begin);
        for (std::int64_t token = 0; token < rows.num_tokens; ++token)
          b.positions[token] = static_cast<std::int32_t>(first_position + token);
        begin_rows(p, rows, b);
        dispatch_pages(p.kv_dtype, [&]<class T>() {
          add_keys<T>(p, p.page_table + s * p.max_pages, rows, first_position + rows.num_tokens, b);
        });
        finish_rows(p, rows, b);
      });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
