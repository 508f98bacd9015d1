// SPDX-License-Identifier: Apache-2.0
// Attention of one query token per sequence, or of the live beams of a search; mapping and
// arithmetic are in attention.h, the same as prefill's. A tile of slots is a word of `visible`.
// Cost: the beams of a search, and sequences whose page tables begin alike, read what they share
// once for every kMaxRows of their query rows. A tile's values meet runs of tokens that see the
// same slots, and those slots only: what a slot holds that a row doesn't see, NaN included, never
// reaches the row.
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

// Whether sequence s has a row of its own and no slots.
bool is_plain(const AttentionDecodeParams& p, std::int64_t s) {
  if (p.query_starts == nullptr) return true;
  return p.query_starts[s + 1] - p.query_starts[s] == 1 &&
         (p.num_words == 0 || p.num_slots[s] == 0);
}

// Takes sequence s into the unit if the pages at the front of all their page tables are the same
// and hold half of the longest one's keys: their rows read those together.
bool join_unit(const AttentionDecodeParams& p, Unit* unit, std::int64_t s) {
  if (!is_plain(p, unit->begin) || !is_plain(p, s)) return false;
  std::int64_t shared = unit->num_shared > 0 ? unit->num_shared : p.seq_lens[unit->begin];
  if (p.seq_lens[s] < shared) shared = p.seq_lens[s];
  const std::int32_t* pages = p.page_table + s * p.max_pages;
  const std::int32_t* others = p.page_table + unit->begin * p.max_pages;
  std::int64_t same = 0;
  while (same * p.page_size < shared && pages[same] == others[same]) ++same;
  if (same * p.page_size < shared) shared = same * p.page_size;
  shared = shared / kTileKeys * kTileKeys;
  if (shared == 0) return false;
  for (std::int64_t i = unit->begin; i <= s; ++i) {
    if (p.seq_lens[i] > 2 * shared) return false;
  }
  unit->num_shared = shared;
  return true;
}

// The first tile of keys [begin, seq_lens) that the row of sequence s sees, if it sees one.
template <class T>
const TileRows<T>* find_first(const AttentionDecodeParams& p, std::int64_t s, std::int64_t kv_head,
                              std::int64_t begin, TileRows<T>* tile) {
  const std::int64_t seen = first_key(p, p.seq_lens[s] - 1), first = seen < begin ? begin : seen;
  const std::int64_t left = p.seq_lens[s] - first;
  if (left <= 0) return nullptr;
  find_tile(p, p.page_table + s * p.max_pages, kv_head, first, left < kTileKeys ? left : kTileKeys,
            tile);
  return tile;
}

template <class T>
void decode_item(const AttentionDecodeParams& p, const Item& item, const Item* next,
                 const AttentionBlock& b) {
  const QueryRows& rows = item.rows;
  const std::int64_t s = item.unit.begin, kv_head = kv_head_of(p, rows);
  const std::int32_t* page_table = p.page_table + s * p.max_pages;
  TileRows<T> tile;
  const auto tile_of_next = [&] {
    return next == nullptr ? nullptr
                           : find_first(p, next->unit.begin, kv_head_of(p, next->rows), 0, &tile);
  };
  if (item.unit.num_shared == 0) {
    const bool has_slots = p.num_words > 0 && p.num_slots[s] > 0;
    for (std::int64_t token = 0; token < rows.num_tokens; ++token)
      b.positions[token] = has_slots ? p.positions[rows.token_begin + token] : p.seq_lens[s] - 1;
    begin_rows(p, rows, b);
    add_keys(p, page_table, rows, 0, p.seq_lens[s], tile_of_next(), b);
    if (has_slots) add_slots<T>(p, s, rows, b);
    finish_rows(p, rows, b);
    return;
  }
  const std::int64_t first = s + rows.token_begin - item.unit.row_begin;
  for (std::int64_t token = 0; token < rows.num_tokens; ++token)
    b.positions[token] = p.seq_lens[first + token] - 1;
  begin_rows(p, rows, b);
  add_keys(p, page_table, rows, 0, item.unit.num_shared,
           find_first(p, first, kv_head, item.unit.num_shared, &tile), b);
  for (std::int64_t token = 0; token < rows.num_tokens; ++token) {  // each one's other keys
    const QueryRows own{rows.token_begin + token, 1, rows.head_begin, rows.num_heads};
    AttentionBlock own_block = b;
    own_block.out += token * rows.num_heads * p.head_dim;
    own_block.maxima += token * rows.num_heads;
    own_block.sums += token * rows.num_heads;
    own_block.positions += token;
    load_queries(p, own, own_block);
    const std::int64_t seq = first + token;
    add_keys(p, p.page_table + seq * p.max_pages, own, item.unit.num_shared, p.seq_lens[seq],
             token + 1 < rows.num_tokens
                 ? find_first(p, seq + 1, kv_head, item.unit.num_shared, &tile)
                 : tile_of_next(),
             own_block);
  }
  finish_rows(p, rows, b);
}

}  // namespace

void attention_decode(const AttentionDecodeParams& p) {
  const auto join = [&](Unit* unit, std::int64_t s) { return join_unit(p, unit, s); };
  for_each_block(p, join, [&](const Item& item, const Item* next, const AttentionBlock& b) {
    dispatch_pages(p.kv_dtype, [&]<class T>() { decode_item<T>(p, item, next, b); });
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
