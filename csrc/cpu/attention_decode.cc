// SPDX-License-Identifier: Apache-2.0
// Attention of one query token per sequence; the arithmetic is in attention.h, the same as
// prefill's. Mapping: a work item is (sequence, KV head), its query heads cut in parts where there
// are fewer items than threads.
#include "ops/attention_decode.h"

#include "core/parallel.h"
#include "cpu/attention.h"

namespace fullbeam::cpu::FULLBEAM_ISA {

void attention_decode(const AttentionDecodeParams& p) {
  const std::int64_t group = p.num_q_heads / p.num_kv_heads;
  const int threads = num_threads();
  std::int64_t parts = (group + kMaxRows - 1) / kMaxRows;
  while (parts < group && p.num_seqs * p.num_kv_heads * parts < threads) ++parts;
  const std::int64_t heads_per_part = (group + parts - 1) / parts;
  const std::int64_t block_floats = AttentionBlock::floats(p.head_dim);
  auto* memory = static_cast<float*>(scratch(threads * block_floats * 4));
  int next_block = 0;
  std::int64_t next = 0;
  const std::int64_t num_items = p.num_seqs * p.num_kv_heads * parts;
  parallel_for(threads, 1, [&](std::int64_t, std::int64_t) {
    const int idx = __atomic_fetch_add(&next_block, 1, __ATOMIC_RELAXED);
    const AttentionBlock b(memory + idx * block_floats, p.head_dim);
    for (;;) {
      const std::int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item >= num_items) return;
      const std::int64_t s = item / (p.num_kv_heads * parts),
                         kv_head = item / parts % p.num_kv_heads;
      const std::int64_t head_begin = kv_head * group + item % parts * heads_per_part;
      const std::int64_t group_end = (kv_head + 1) * group;
      const std::int64_t head_end =
          head_begin + heads_per_part < group_end ? head_begin + heads_per_part : group_end;
      if (head_begin >= head_end) continue;
      attend_any(p, p.page_table + s * p.max_pages, s, s + 1, head_begin, head_end,
                 p.seq_lens[s] - 1, b);
    }
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
