// SPDX-License-Identifier: Apache-2.0
// Causal attention of many query tokens per sequence; the arithmetic is in attention.h.
// Mapping: a work item is (sequence, block of tokens, KV head); threads take items as they become
// free, last tokens first, since those see most keys. Each thread has a block of its own in the
// caller's scratch memory.
#include "ops/attention_prefill.h"

#include "core/parallel.h"
#include "cpu/attention.h"

namespace fullbeam::cpu::FULLBEAM_ISA {

void attention_prefill(const AttentionPrefillParams& p) {
  const std::int64_t group = p.num_q_heads / p.num_kv_heads;
  // A group too large for one block is cut; its parts are further items.
  const std::int64_t heads_per_block = group < kMaxRows ? group : kMaxRows;
  const std::int64_t parts = (group + heads_per_block - 1) / heads_per_block;
  const std::int64_t tokens_per_block = kMaxRows / heads_per_block;
  std::int64_t num_blocks = 0;
  for (std::int64_t s = 0; s < p.num_seqs; ++s) {
    num_blocks +=
        (p.query_starts[s + 1] - p.query_starts[s] + tokens_per_block - 1) / tokens_per_block;
  }
  const std::int64_t block_floats = AttentionBlock::floats(p.head_dim);
  const int threads = num_threads();
  auto* memory = static_cast<float*>(scratch(threads * block_floats * 4));
  int next_block = 0;
  const std::int64_t num_items = num_blocks * p.num_kv_heads * parts;
  std::int64_t next = 0;
  auto work = [&](AttentionBlock b) {
    for (;;) {
      const std::int64_t item = num_items - 1 - __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (item < 0) return;
      const std::int64_t head = item % (p.num_kv_heads * parts);
      std::int64_t block = item / (p.num_kv_heads * parts), s = 0;
      for (;; ++s) {
        const std::int64_t blocks =
            (p.query_starts[s + 1] - p.query_starts[s] + tokens_per_block - 1) / tokens_per_block;
        if (block < blocks) break;
        block -= blocks;
      }
      const std::int64_t first = p.query_starts[s] + block * tokens_per_block,
                         end = p.query_starts[s + 1];
      const std::int64_t last = first + tokens_per_block < end ? first + tokens_per_block : end;
      const std::int64_t head_begin = head / parts * group + head % parts * heads_per_block;
      const std::int64_t group_end = (head / parts + 1) * group;
      const std::int64_t head_end =
          head_begin + heads_per_block < group_end ? head_begin + heads_per_block : group_end;
      attend_any(p, p.page_table + s * p.max_pages, first, last, head_begin, head_end,
                 p.seq_lens[s] - (end - first), b);
    }
  };
  parallel_for(threads, 1, [&](std::int64_t, std::int64_t) {
    const int idx = __atomic_fetch_add(&next_block, 1, __ATOMIC_RELAXED);
    work(AttentionBlock(memory + idx * block_floats, p.head_dim));
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
