// SPDX-License-Identifier: Apache-2.0
// Attention of one query token per sequence, or of the live beams of a search; mapping and
// arithmetic are in attention.h, the same as prefill's. A tile of slots is a word of `visible`.
// Cost: the beams of a search read its prompt once for every kMaxRows of their query rows. A tile's
// values meet runs of tokens that see the same slots, and those slots only: what a slot holds that
// a row doesn't see, NaN included, never reaches the row.
#include "ops/attention_decode.h"

#include "cpu/attention.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// Slots of the tile that one token sees.
std::uint32_t seen_slots(const AttentionDecodeParams& p, std::int64_t s, std::int64_t token,
                         std::int64_t word, std::int64_t count) {
  std::uint32_t seen = p.visible[token * p.num_words + word] & key_bits(0, count);
  if (p.window > 0) {
    const std::int32_t* positions = p.slot_positions + (s * p.num_words + word) * kTileKeys;
    for (std::int64_t j = 0; j < count; ++j) {
      if (positions[j] <= p.positions[token] - p.window) seen &= ~(1u << j);
    }
  }
  return seen;
}

template <class T>
void add_slots(const AttentionDecodeParams& p, std::int64_t s, const QueryRows& rows,
               const AttentionBlock& b) {
  const std::int32_t* page_table = p.page_table + s * p.max_pages;
  TileRows<T> tile;
  for (std::int64_t first = 0; first < p.num_slots[s]; first += kTileKeys) {
    const std::int64_t left = p.num_slots[s] - first;
    const std::int64_t count = left < kTileKeys ? left : kTileKeys;
    std::uint32_t any = 0;
    for (std::int64_t token = 0; token < rows.num_tokens; ++token) {
      b.seen[token] = seen_slots(p, s, rows.token_begin + token, first / kTileKeys, count);
      any |= b.seen[token];
    }
    if (any == 0) continue;
    find_tile(p, page_table, kv_head_of(p, rows), p.slot_starts[s] + first, count, &tile);
    weigh_tile(p, tile, tile, rows, count, b);
    for (std::int64_t token = 0, next; token < rows.num_tokens; token = next) {
      const std::uint32_t seen = b.seen[token];
      for (next = token + 1; next < rows.num_tokens && b.seen[next] == seen;) ++next;
      const std::int64_t row = token * rows.num_heads;
      for (std::int64_t slot = 0, end; slot < count; slot = end) {
        const bool is_seen = (seen >> slot & 1u) != 0;
        for (end = slot + 1; end < count && ((seen >> end & 1u) != 0) == is_seen;) ++end;
        if (!is_seen) continue;
        add_values(p, tile, tile, rows, row, (next - token) * rows.num_heads, slot, end - slot, b);
      }
    }
  }
}

}  // namespace

void attention_decode(const AttentionDecodeParams& p) {
  for_each_block(p, [&](std::int64_t s, std::int64_t, const QueryRows& rows,
                        const AttentionBlock& b) {
    const bool has_slots = p.num_words > 0 && p.num_slots[s] > 0;
    for (std::int64_t token = 0; token < rows.num_tokens; ++token)
      b.positions[token] = has_slots ? p.positions[rows.token_begin + token] : p.seq_lens[s] - 1;
    begin_rows(p, rows, b);
    dispatch_pages(p.kv_dtype, [&]<class T>() {
      add_keys<T>(p, p.page_table + s * p.max_pages, rows, p.seq_lens[s], b);
      if (has_slots) add_slots<T>(p, s, rows, b);
    });
    finish_rows(p, rows, b);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
