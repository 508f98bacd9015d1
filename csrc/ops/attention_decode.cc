// SPDX-License-Identifier: Apache-2.0
#include "ops/attention_decode.h"

#include "core/dispatch.h"
#include "ops/attention_checks.h"

namespace fullbeam::ops {
namespace {

constexpr std::int64_t kWordSlots = 32;

// A search: what it sees besides its seq_lens keys.
void check_slots(const Check& check, const AttentionDecodeParams& p, std::int64_t s) {
  const std::int64_t begin = p.slot_starts[s], num_slots = p.num_slots[s];
  const std::int64_t room = p.max_pages * p.page_size;
  check.require(num_slots <= kWordSlots * p.num_words, "num_slots",
                "in 0..32 * num_words=" + std::to_string(kWordSlots * p.num_words),
                std::to_string(num_slots));
  check.require(
      begin >= p.seq_lens[s] && begin % p.page_size == 0 && begin + num_slots <= room,
      "slot_starts",
      "a multiple of page_size=" + std::to_string(p.page_size) +
          ", at least the sequence's seq_lens=" + std::to_string(p.seq_lens[s]) +
          " and at most max_pages * page_size - num_slots=" + std::to_string(room - num_slots),
      std::to_string(begin));
  check_pages(check, p, s, begin, begin + num_slots);
  for (std::int64_t row = p.query_starts[s]; row < p.query_starts[s + 1]; ++row) {
    check.require(p.positions[row] >= p.seq_lens[s], "positions",
                  "at least the sequence's seq_lens=" + std::to_string(p.seq_lens[s]),
                  std::to_string(p.positions[row]));
  }
}

void check_data(const Check& check, const AttentionDecodeParams& p) {
  check_query_starts(check, p);
  for (std::int64_t s = 0; s < p.num_seqs; ++s) {
    const std::int64_t num_rows =
        p.query_starts == nullptr ? 1 : p.query_starts[s + 1] - p.query_starts[s];
    const std::int64_t num_slots = p.query_starts == nullptr ? 0 : p.num_slots[s];
    check.require(num_slots >= 0, "num_slots", "at least 0", std::to_string(num_slots));
    check.require(num_slots > 0 || num_rows <= 1, "query_starts",
                  "at most one row apart for a sequence without slots", std::to_string(num_rows));
    check_seq_len(check, p, s, num_slots > 0 ? 0 : num_rows);
    if (num_slots > 0) check_slots(check, p, s);
  }
}

}  // namespace

void attention_decode(const Tensor& q, const Tensor& k_pages, const Tensor& v_pages,
                      const Tensor& page_table, const Tensor& seq_lens,
                      const MaybeTensor& query_starts, const MaybeTensor& slot_starts,
                      const MaybeTensor& num_slots, const MaybeTensor& visible,
                      const MaybeTensor& slot_positions, const MaybeTensor& positions,
                      const Tensor& out, float scale, std::int64_t window, float softcap) {
  Check check("attention_decode");
  AttentionDecodeParams p{};
  check_attention(check, q, k_pages, v_pages, page_table, seq_lens, out, scale, window, softcap, p);
  if (query_starts) {
    check.require(slot_starts && num_slots && visible && slot_positions && positions,
                  "query_starts",
                  "given with slot_starts, num_slots, visible, slot_positions and positions",
                  "it without one of them");
    check.tensor("query_starts", *query_starts, {p.num_seqs + 1}, {DType::i32});
    check.tensor("slot_starts", *slot_starts, {"num_seqs"}, {DType::i32});
    check.tensor("num_slots", *num_slots, {"num_seqs"}, {DType::i32});
    check.tensor("visible", *visible, {"num_tokens", "num_words"}, {DType::u32});
    p.num_words = check.size("num_words");
    check.tensor("slot_positions", *slot_positions, {"num_seqs", kWordSlots * p.num_words},
                 {DType::i32});
    check.tensor("positions", *positions, {"num_tokens"}, {DType::i32});
    p.query_starts = static_cast<const std::int32_t*>(query_starts->data);
    p.slot_starts = static_cast<const std::int32_t*>(slot_starts->data);
    p.num_slots = static_cast<const std::int32_t*>(num_slots->data);
    p.visible = static_cast<const std::uint32_t*>(visible->data);
    p.slot_positions = static_cast<const std::int32_t*>(slot_positions->data);
    p.positions = static_cast<const std::int32_t*>(positions->data);
  } else {
    check.require(!slot_starts && !num_slots && !visible && !slot_positions && !positions,
                  "query_starts", "given where slots are", "None");
    check.require(p.num_tokens == p.num_seqs, "q",
                  "one row per sequence, num_seqs=" + std::to_string(p.num_seqs),
                  std::to_string(p.num_tokens));
  }
  if (q.device == Device::cpu && Program::recording() == nullptr) check_data(check, p);
  run(p, q.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const AttentionDecodeParams& params, Device device) {
  FULLBEAM_DISPATCH(attention_decode, device, params);
}
