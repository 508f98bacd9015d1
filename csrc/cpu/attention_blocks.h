// SPDX-License-Identifier: Apache-2.0
// How the rows of an attention op are cut into blocks, a thread's work at a time, and the memory of
// a block. What is cut never changes a row's result, only how often keys and values are read.
#pragma once
#include "core/parallel.h"
#include "cpu/attention_tile.h"
#include "ops/attention_prefill.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr int kTileKeys = 32;   // a bit each in a word
constexpr int kMaxRows = 128;   // query rows of a block
constexpr int kLeastRows = 32;  // and of one that is cut so that all threads have work
constexpr int kFewRows = 8;     // up to here the lanes are keys

// Query rows of one block: tokens of one unit (rows of q) x some heads of one KV head's group.
struct QueryRows {
  std::int64_t token_begin, num_tokens, head_begin, num_heads;
  std::int64_t count() const { return num_tokens * num_heads; }
  bool are_many() const { return count() > kFewRows; }
};

// Memory of one thread's block. Panels are kRegCols columns wide, [.., kRegCols] each.
struct AttentionBlock {
  float* q;                 // scaled; many: panels of [head_dim, rows]; else [kFewRows, head_dim]
  float* out;               // [kMaxRows, head_dim]
  float* k_tile;            // many: [kTileKeys, head_dim]; else of T, [head_dim, kTileKeys]
  float* v_tile;            // panels of [kTileKeys, head_dim]
  float* weights;           // many: [kTileKeys, kMaxRows]; else [kFewRows, kTileKeys]
  float* maxima;            // [kMaxRows]
  float* sums;              // [kMaxRows]
  std::uint32_t* row_seen;  // [kMaxRows]: seen, by rows
  std::int32_t* positions;  // [kMaxRows], of the tokens
  std::uint32_t* seen;      // [kMaxRows], of the tokens: bit i is key i of the tile

  static std::int64_t floats(std::int64_t head_dim) {
    const std::int64_t panels = (head_dim + kRegCols - 1) / kRegCols * kRegCols;
    return kMaxRows * 2 * head_dim + kTileKeys * (head_dim + panels) + kMaxRows * kTileKeys +
           5 * kMaxRows;
  }
  AttentionBlock(float* memory, std::int64_t head_dim) {
    const std::int64_t panels = (head_dim + kRegCols - 1) / kRegCols * kRegCols;
    q = memory;
    out = q + kMaxRows * head_dim;
    k_tile = out + kMaxRows * head_dim;
    v_tile = k_tile + kTileKeys * head_dim;
    weights = v_tile + kTileKeys * panels;
    maxima = weights + kMaxRows * kTileKeys;
    sums = maxima + kMaxRows;
    row_seen = reinterpret_cast<std::uint32_t*>(sums + kMaxRows);
    positions = reinterpret_cast<std::int32_t*>(row_seen + kMaxRows);
    seen = reinterpret_cast<std::uint32_t*>(positions + kMaxRows);
  }
};

// Sequences whose rows go through the keys that all of them share together: one sequence, or
// neighbours of one row each.
struct Unit {
  std::int64_t begin, end;          // sequences
  std::int64_t row_begin, row_end;  // their rows of q
  std::int64_t num_shared;          // keys, whole tiles; 0 for one sequence
};

// The work of one thread at a time: some of a unit's tokens, some heads.
struct Item {
  Unit unit;
  QueryRows rows;
};

// Calls fn(item, next, b) for blocks of the query rows of each sequence; `next` (null for none) is
// the item that is free next. Where items are few for the threads, blocks are smaller, down to
// kLeastRows, and then query heads are cut in parts. Threads take items as they become free, last
// tokens first, since those see most keys. Each thread has a block of its own in the caller's
// scratch memory. join(unit, s) says whether sequence s, the next one, joins the unit.
template <class Join, class Fn>
void for_each_block(const AttentionPrefillParams& p, const Join& join, const Fn& fn) {
  const std::int64_t group = p.num_q_heads / p.num_kv_heads;
  const auto row_of = [&](std::int64_t s) {
    return p.query_starts == nullptr ? s : std::int64_t{p.query_starts[s]};
  };
  const int threads = num_threads();
  const std::int64_t block_bytes = AttentionBlock::floats(p.head_dim) * 4;
  auto* memory = static_cast<char*>(
      scratch(threads * block_bytes + p.num_seqs * static_cast<std::int64_t>(sizeof(Unit))));
  Unit* units = reinterpret_cast<Unit*>(memory + threads * block_bytes);
  std::int64_t num_units = 0;
  for (std::int64_t s = 0; s < p.num_seqs; ++s) {
    if (num_units > 0 && join(&units[num_units - 1], s)) {
      units[num_units - 1].end = s + 1;
      units[num_units - 1].row_end = row_of(s + 1);
    } else {
      units[num_units++] = {s, s + 1, row_of(s), row_of(s + 1), 0};
    }
  }
  std::int64_t parts = (group + kMaxRows - 1) / kMaxRows, max_rows = kMaxRows;
  std::int64_t num_heads, num_tokens, num_items;
  const auto blocks_of = [&](const Unit& unit) {
    const std::int64_t count = unit.row_end - unit.row_begin;
    const std::int64_t blocks = (count + num_tokens - 1) / num_tokens;
    // What sequences share is most of their work: enough for all threads.
    const std::int64_t least = (threads + p.num_kv_heads - 1) / p.num_kv_heads;
    if (unit.num_shared == 0 || blocks >= least) return blocks;
    return least < count ? least : count;
  };
  for (;;) {
    num_heads = (group + parts - 1) / parts;
    num_tokens = max_rows > num_heads ? max_rows / num_heads : 1;
    num_items = 0;
    for (std::int64_t i = 0; i < num_units; ++i) num_items += blocks_of(units[i]);
    num_items *= p.num_kv_heads * parts;
    if (num_items < 4 * threads && max_rows > kLeastRows) {
      max_rows /= 2;
    } else if (num_items < threads && parts < group) {
      ++parts;
    } else {
      break;
    }
  }
  const auto item_of = [&](std::int64_t idx) {
    const std::int64_t head = idx % (p.num_kv_heads * parts);
    std::int64_t block = idx / (p.num_kv_heads * parts);
    const Unit* unit = units;
    for (; block >= blocks_of(*unit); ++unit) block -= blocks_of(*unit);
    const std::int64_t count = unit->row_end - unit->row_begin, blocks = blocks_of(*unit);
    const std::int64_t begin = count * block / blocks, end = count * (block + 1) / blocks;
    const std::int64_t head_begin = head / parts * group + head % parts * num_heads,
                       left = (head / parts + 1) * group - head_begin;
    return Item{
        *unit,
        {unit->row_begin + begin, end - begin, head_begin, left < num_heads ? left : num_heads}};
  };
  int next_block = 0;
  std::int64_t next = 0;
  parallel_for(threads, 1, [&](std::int64_t, std::int64_t) {
    const int idx = __atomic_fetch_add(&next_block, 1, __ATOMIC_RELAXED);
    const AttentionBlock b(reinterpret_cast<float*>(memory + idx * block_bytes), p.head_dim);
    for (;;) {
      const std::int64_t taken = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (taken >= num_items) return;
      const Item item = item_of(num_items - 1 - taken);
      if (item.rows.num_heads <= 0) continue;
      const std::int64_t then = __atomic_load_n(&next, __ATOMIC_RELAXED);
      const Item following = then < num_items ? item_of(num_items - 1 - then) : item;
      fn(item, then < num_items ? &following : nullptr, b);
    }
  });
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
