// SPDX-License-Identifier: Apache-2.0
// The edits of a row of logits before a draw. What the arrays hold may be anything, in a recorded
// program: entries outside them and tokens outside the vocabulary are skipped. Everything is in an
// anonymous namespace, see cpu/vec.h.
#pragma once
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// A row's entries in compressed sparse rows.
struct Entries {
  std::int64_t begin, end;
  bool is_empty() const { return begin >= end; }
};

inline Entries entries_of(const std::int32_t* starts, std::int64_t row, std::int64_t count) {
  if (starts == nullptr) return {0, 0};
  return {starts[row] > 0 ? starts[row] : 0, starts[row + 1] < count ? starts[row + 1] : count};
}

// Makes the tokens outside the mask -infinity.
inline void allow(float* row, std::int64_t size, const std::uint32_t* mask) {
  for (std::int64_t begin = 0; begin < size; begin += 32) {
    const std::uint32_t word = mask[begin / 32];
    if (word == 0xffffffffu) continue;
    const std::int64_t count = size - begin < 32 ? size - begin : 32;
    for (std::int64_t i = 0; i < count; ++i) {
      row[begin + i] = (word >> i & 1u) != 0 ? row[begin + i] : -__builtin_inff();
    }
  }
}

inline void add_bias(float* row, std::int64_t size, const std::int32_t* ids, const float* values,
                     Entries entries) {
  for (std::int64_t i = entries.begin; i < entries.end; ++i) {
    if (ids[i] < 0 || ids[i] >= size) continue;
    float& logit = row[ids[i]];
    logit = values[i] == -__builtin_inff() ? values[i] : logit + values[i];
  }
}

struct Penalties {
  float repetition, frequency, presence;
  bool are_neutral() const { return repetition == 1.0f && frequency == 0.0f && presence == 0.0f; }
};

inline void penalize(float& logit, float count, Penalties penalties) {
  logit = logit > 0.0f ? logit / penalties.repetition : logit * penalties.repetition;
  if (count > 0.0f) logit -= count * penalties.frequency + penalties.presence;
}

// `last`: a token that counts once more, or -1.
inline void penalize(float* row, std::int64_t size, const std::int32_t* ids,
                     const std::int32_t* counts, Entries entries, std::int32_t last,
                     Penalties penalties) {
  bool is_listed = last < 0 || last >= size;
  for (std::int64_t i = entries.begin; i < entries.end; ++i) {
    if (ids[i] < 0 || ids[i] >= size) continue;
    const bool is_last = ids[i] == last;
    is_listed |= is_last;
    penalize(row[ids[i]], static_cast<float>(counts[i]) + (is_last ? 1.0f : 0.0f), penalties);
  }
  if (!is_listed) penalize(row[last], 1.0f, penalties);
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
