// SPDX-License-Identifier: Apache-2.0
// Causal attention of many query tokens per sequence; mapping and arithmetic are in attention.h.
#include "ops/attention_prefill.h"

#include "cpu/attention.h"

namespace fullbeam::cpu::FULLBEAM_ISA {

void attention_prefill(const AttentionPrefillParams& p) {
  const auto never = [](Unit*, std::int64_t) { return false; };
  for_each_block(p, never, [&](const Item& item, const Item*, const AttentionBlock& b) {
    const QueryRows& rows = item.rows;
    const std::int64_t s = item.unit.begin;
    const std::int64_t first_position = p.seq_lens[s] - (item.unit.row_end - rows.token_begin);
    for (std::int64_t token = 0; token < rows.num_tokens; ++token)
      b.positions[token] = static_cast<std::int32_t>(first_position + token);
    begin_rows(p, rows, b);
    dispatch_pages(p.kv_dtype, [&]<class T>() {
      add_keys<T>(p, p.page_table + s * p.max_pages, rows, 0, first_position + rows.num_tokens,
                  nullptr, b);
    });
    finish_rows(p, rows, b);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
