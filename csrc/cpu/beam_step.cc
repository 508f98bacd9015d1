// SPDX-License-Identifier: Apache-2.0
// One step of beam search: the best tokens of each beam, then each group's choice among them.
// Mapping: a thread takes whole beams, then whole requests, as it becomes free.
// Cost: two passes over a beam's row (maxima, then one exponential per token), as a draw of sample
// at temperature 1; a biased row is copied first. Of the blocks, those with the largest maxima are
// read again, and others that may hold a better token than what these left. Numerics: log-softmax
// as in logprobs.cc; scores in float64. Where only rounding makes scores of one beam's tokens
// equal, the larger logit may win over the lower id. Source: Vijayakumar et al. 2016 (arXiv
// 1610.02424) for diverse groups. Exact, as a beam hands its group the best M live and the best M
// terminated tokens, M = beam_size + the number of tokens that earlier groups may penalise: no
// other token has fewer than beam_size of its kind before it.
#include "ops/beam_step.h"

#include "cpu/edits.h"
#include "cpu/logits.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// The best of what is offered, in order.
template <class T>
struct Best {
  T* items;  // [capacity]
  std::int64_t size, capacity;

  bool is_full() const { return size == capacity; }
  const T& last() const { return items[size - 1]; }
  void offer(const T& item) {
    if (is_full() && !(item < last())) return;
    std::int64_t place = is_full() ? size - 1 : size++;
    for (; place > 0 && item < items[place - 1]; --place) items[place] = items[place - 1];
    items[place] = item;
  }
};

// A token's logit and id in one number; better tokens (larger logit, then lower id) have smaller
// keys.
using Key = std::uint64_t;

inline Key key_of(float value, std::int64_t id) {
  return Key{descending_key(value)} << 32 | static_cast<std::uint32_t>(id);
}
inline std::int32_t id_of(Key key) { return static_cast<std::int32_t>(key & 0xffffffffu); }
inline float value_of(Key key) {
  const auto bits = static_cast<std::uint32_t>(key >> 32);
  return bits_to_float((bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu);
}

// What a group needs to know of a beam.
struct BeamTokens {
  double log_sum;
  Best<Key> live, terminated;
};

// A group's candidate; better ones are less.
struct Candidate {
  double score, logprob_sum, logprob;
  std::int32_t beam, token_id;
};
inline bool operator<(const Candidate& a, const Candidate& b) {
  if (a.score != b.score) return a.score > b.score;
  return a.beam != b.beam ? a.beam < b.beam : a.token_id < b.token_id;
}

// Token masks [num_words]; null where a beam has none.
struct BeamMasks {
  const std::uint32_t *allowed, *terminators;
};

inline bool is_in(const std::uint32_t* mask, std::int64_t id) {
  return (mask[id / 32] >> (id % 32) & 1u) != 0;
}

// The least key that a token of the block may have.
inline Key block_key(const ScannedRow& row, std::int64_t block) {
  return key_of(row.block_max[block], block * kBlock);
}

// Whether the tokens from this key on can be left out: they are at -infinity, or behind enough live
// ones.
inline bool is_behind(const BeamTokens& tokens, Key key) {
  constexpr Key kNothing = Key{0xff800000u} << 32;
  return key >= kNothing || (tokens.live.is_full() && key >= tokens.live.last());
}

// Calls fn(place) for the places in [begin, end) whose value the list may still take.
template <class Fn>
inline void for_each_wanted(const Best<Key>& best, const float* values, std::int64_t begin,
                            std::int64_t end, Fn&& fn) {
  std::int32_t places[kBlock + 16];
  for (; begin < end; begin += kBlock) {
    const std::int64_t stop = begin + kBlock < end ? begin + kBlock : end;
    const float bound = best.is_full() ? value_of(best.last()) : -kInfinity;
    const std::int64_t count = append_places(values, begin, stop, bound, kInfinity, places, 0);
    for (std::int64_t i = 0; i < count; ++i) fn(places[i]);
  }
}

void offer_block(const ScannedRow& row, const BeamMasks& masks, std::int64_t block,
                 BeamTokens& tokens) {
  const std::int64_t begin = block * kBlock;
  const std::int64_t end = begin + kBlock < row.size ? begin + kBlock : row.size;
  std::uint32_t allowed = 0, live = 0;  // whether any token of the block is
  for (std::int64_t word = begin / 32; word < (end + 31) / 32; ++word) {
    const std::uint32_t bits = masks.allowed == nullptr ? ~0u : masks.allowed[word];
    allowed |= bits;
    live |= masks.terminators == nullptr ? bits : bits & ~masks.terminators[word];
  }
  if (allowed == 0) return;
  const Best<Key>& best = live != 0 ? tokens.live : tokens.terminated;
  for_each_wanted(best, row.values, begin, end, [&](std::int64_t id) {
    const Key key = key_of(row.values[id], id);
    if (is_behind(tokens, key)) return;
    if (masks.allowed != nullptr && !is_in(masks.allowed, id)) return;
    const bool is_last = masks.terminators != nullptr && is_in(masks.terminators, id);
    (is_last ? tokens.terminated : tokens.live).offer(key);
  });
}

// The blocks with the largest maxima first: where most tokens are allowed and live, no other is
// left to read.
void find_tokens(const ScannedRow& row, const BeamMasks& masks, Best<Key> blocks,
                 BeamTokens& tokens) {
  const std::int64_t num_blocks = num_blocks_of(row.size);
  for_each_wanted(blocks, row.block_max, 0, num_blocks,
                  [&](std::int64_t block) { blocks.offer(block_key(row, block)); });
  for (std::int64_t i = 0; i < blocks.size; ++i) {
    if (is_behind(tokens, blocks.items[i])) return;
    offer_block(row, masks, id_of(blocks.items[i]) / kBlock, tokens);
  }
  for_each_wanted(tokens.live, row.block_max, 0, num_blocks, [&](std::int64_t block) {
    const Key key = block_key(row, block);
    if (key > blocks.last() && !is_behind(tokens, key)) offer_block(row, masks, block, tokens);
  });
}

// A thread's memory for one row at a time.
struct BeamMemory {
  float* block_max;  // [num_blocks]
  float* row;        // [vocab_size], for rows with a bias or +infinity
  Key* blocks;       // [max_width]
};

const std::uint32_t* mask_of(const std::uint32_t* masks, const std::int32_t* idx, std::int64_t beam,
                             std::int64_t num_words) {
  return idx == nullptr || idx[beam] < 0 ? nullptr : masks + idx[beam] * num_words;
}

void read_beam(const BeamStepParams& p, std::int64_t beam, const BeamMemory& m,
               BeamTokens& tokens) {
  const float* values = static_cast<const float*>(p.logits) + p.beam_rows[beam] * p.logits_stride;
  if (p.bias_starts != nullptr && p.bias_starts[beam] < p.bias_starts[beam + 1]) {
    __builtin_memcpy(m.row, values, static_cast<std::size_t>(p.vocab_size) * sizeof(float));
    add_bias(m.row, p.vocab_size, p.bias_ids, p.bias_values,
             {p.bias_starts[beam], p.bias_starts[beam + 1]});
    values = m.row;
  }
  const ScannedRow row = scan(values, p.vocab_size, m.block_max, m.row);
  if (!row.has_distribution()) return;
  tokens.log_sum = static_cast<double>(row.top) + __builtin_log(row_weight(row, kLog2E, nullptr));
  const BeamMasks masks{mask_of(p.allowed, p.allowed_idx, beam, p.num_words),
                        mask_of(p.terminators, p.terminator_idx, beam, p.num_words)};
  find_tokens(row, masks, {m.blocks, 0, tokens.live.capacity}, tokens);
}

void write(const BeamStepResults& out, std::int64_t place, const Candidate* candidate) {
  const bool is_one = candidate != nullptr;
  const double nan = __builtin_nan("");
  out.parents[place] = is_one ? candidate->beam : -1;
  out.token_ids[place] = is_one ? candidate->token_id : -1;
  out.logprobs[place] = static_cast<float>(is_one ? candidate->logprob : nan);
  out.sums[2 * place] = is_one ? candidate->score : nan;
  out.sums[2 * place + 1] = is_one ? candidate->logprob_sum : nan;
}

// `memory` has room for twice the group's beam size.
void step_group(const BeamStepParams& p, std::int64_t group, std::int64_t first_group,
                double strength, const BeamTokens* beams, Candidate* memory) {
  const std::int64_t size = p.beam_sizes[group];
  // The choices of the earlier groups; no token is -1, which fills the rest.
  const std::int32_t* chosen = p.live.token_ids + first_group * p.max_beam;
  const std::int64_t num_chosen = strength > 0.0 ? (group - first_group) * p.max_beam : 0;
  Best<Candidate> live{memory, 0, size}, terminated{memory + size, 0, size};
  const auto offer = [&](std::int32_t beam, const Best<Key>& tokens, Best<Candidate>& candidates) {
    for (std::int64_t i = 0; i < tokens.size; ++i) {
      const std::int32_t id = id_of(tokens.items[i]);
      const double logprob = static_cast<double>(value_of(tokens.items[i])) - beams[beam].log_sum;
      std::int32_t count = 0;
      for (std::int64_t c = 0; c < num_chosen; ++c) count += chosen[c] == id ? 1 : 0;
      candidates.offer({p.sums[2 * beam] + logprob - strength * static_cast<double>(count),
                        p.sums[2 * beam + 1] + logprob, logprob, beam, id});
    }
  };
  for (std::int32_t beam = p.group_starts[group]; beam < p.group_starts[group + 1]; ++beam) {
    offer(beam, beams[beam].live, live);
    offer(beam, beams[beam].terminated, terminated);
  }
  std::int64_t num_finished = 0, num_before = 0;  // live ones before a terminated one
  for (std::int64_t i = 0; i < terminated.size; ++i) {
    while (num_before < live.size && live.items[num_before] < terminated.items[i]) ++num_before;
    if (num_before + i >= size) break;
    write(p.finished, group * p.max_beam + num_finished++, &terminated.items[i]);
  }
  for (std::int64_t i = 0; i < p.max_beam; ++i) {
    write(p.live, group * p.max_beam + i, i < live.size ? &live.items[i] : nullptr);
    if (i >= num_finished) write(p.finished, group * p.max_beam + i, nullptr);
  }
}

// Calls fn(group, width) for every group that has beams: how many tokens of a kind it needs of
// each.
template <class Fn>
void for_each_width(const BeamStepParams& p, Fn&& fn) {
  for (std::int64_t request = 0; request < p.num_requests; ++request) {
    std::int64_t num_penalised = 0;
    for (std::int64_t g = p.request_starts[request]; g < p.request_starts[request + 1]; ++g) {
      if (p.group_starts[g] == p.group_starts[g + 1]) continue;
      const std::int64_t width = p.beam_sizes[g] + num_penalised;
      fn(g, width < p.vocab_size ? width : p.vocab_size);
      if (p.diversity_strengths[request] > 0.0f) num_penalised += p.beam_sizes[g];
    }
  }
}

}  // namespace

void beam_step(const BeamStepParams& p) {
  const std::int64_t num_blocks = num_blocks_of(p.vocab_size);
  const std::int64_t threads = num_threads() < p.num_beams ? num_threads() : p.num_beams;
  std::int64_t num_keys = 0, max_width = 0;
  for_each_width(p, [&](std::int64_t group, std::int64_t width) {
    num_keys += 2 * width * (p.group_starts[group + 1] - p.group_starts[group]);
    max_width = width > max_width ? width : max_width;
  });
  const std::int64_t num_candidates = 2 * p.max_beam * p.num_requests;
  auto* memory = static_cast<char*>(scratch(
      p.num_beams * std::int64_t{sizeof(BeamTokens)} + (num_keys + threads * max_width) * 8 +
      num_candidates * std::int64_t{sizeof(Candidate)} + threads * num_blocks * (kBlock + 1) * 4));
  const auto take = [&memory](std::int64_t bytes) {
    char* taken = memory;
    memory += bytes;
    return static_cast<void*>(taken);
  };
  auto* rows = static_cast<float*>(take(threads * num_blocks * kBlock * 4));
  auto* beams = static_cast<BeamTokens*>(take(p.num_beams * std::int64_t{sizeof(BeamTokens)}));
  auto* candidates =
      static_cast<Candidate*>(take(num_candidates * std::int64_t{sizeof(Candidate)}));
  auto* keys = static_cast<Key*>(take(num_keys * 8));
  auto* blocks = static_cast<Key*>(take(threads * max_width * 8));
  auto* block_max = static_cast<float*>(take(threads * num_blocks * 4));
  for_each_width(p, [&](std::int64_t group, std::int64_t width) {
    for (std::int64_t b = p.group_starts[group]; b < p.group_starts[group + 1]; ++b) {
      beams[b] = {0.0, {keys, 0, width}, {keys + width, 0, width}};
      keys += 2 * width;
    }
  });
  std::int64_t next_slot = 0, next_beam = 0;
  parallel_for(threads, 1, [&](std::int64_t, std::int64_t) {
    const std::int64_t slot = __atomic_fetch_add(&next_slot, 1, __ATOMIC_RELAXED);
    const BeamMemory m{block_max + slot * num_blocks, rows + slot * num_blocks * kBlock,
                       blocks + slot * max_width};
    for (;;) {
      const std::int64_t beam = __atomic_fetch_add(&next_beam, 1, __ATOMIC_RELAXED);
      if (beam >= p.num_beams) return;
      read_beam(p, beam, m, beams[beam]);
    }
  });
  parallel_chunks(p.num_requests, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t request = begin; request < end; ++request) {
      const std::int64_t first_group = p.request_starts[request];
      for (std::int64_t g = first_group; g < p.request_starts[request + 1]; ++g) {
        step_group(p, g, first_group, static_cast<double>(p.diversity_strengths[request]), beams,
                   candidates + 2 * p.max_beam * request);
      }
    }
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
