// SPDX-License-Identifier: Apache-2.0
// The matrix product where only each token's largest value matters: see Largest.
#pragma once
#include "core/parallel.h"
#include "cpu/linear_panel.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// Where only each token's largest value matters, and 8-bit values lie in halves: upper bounds from
// the upper halves first, then the true values of what they don't rule out. Exact: bounds hold for
// what float32 makes of the sums (`bound_offset`), and true values are the bits of the whole
// product. Cost: at one token 0.53 of the bytes, and of the panels that the bounds leave open the
// rest: 1 to 6 % for heads of Qwen2.5-Coder 0.5B and Gemma 3 270M. Source: our own; bounds that
// spare most of an exact search for the largest inner product are old (Ram and Gray, KDD 2012).
class Largest {
 public:
  static bool serves(const LinearParams& p) {
    bool in_halves = p.largest_only && p.num_tokens > 0 && p.num_tokens <= kMostTokens;
    for (std::int64_t s = 0; s < p.num_segments; ++s) in_halves &= p.segments[s].low != nullptr;
    return in_halves;
  }
  static std::int64_t bytes(const LinearParams& p) {
    return serves(p) ? p.num_tokens * (num_stretches(p) + 1) * std::int64_t{sizeof(float)} : 0;
  }

  Largest(void* memory, const LinearParams& params, const Activations& activations, int num_threads)
      : p(params),
        a(activations),
        num_threads_(num_threads),
        num_stretches_(num_stretches(params)),
        peaks_(static_cast<float*>(memory)),
        floors_(peaks_ + params.num_tokens * num_stretches_),
        to_bound_(num_stretches_, 1, num_threads),
        to_settle_(num_stretches_, kStretch, num_threads),
        prepared_(num_threads),
        bounded_(num_threads),
        has_floors_(num_threads) {}

  // A thread's share, once the activations are quantised.
  void run(int thread_idx) {
    if (thread_idx == 0) prepare();
    prepared_.wait();
    to_bound_.run(thread_idx, [&](std::int64_t stretch, std::int64_t) { bound(stretch); });
    bounded_.wait();
    for (std::int64_t t = thread_idx; t < p.num_tokens; t += num_threads_) set_floor(t);
    has_floors_.wait();
    to_settle_.run(thread_idx, [&](std::int64_t begin, std::int64_t end) { settle(begin, end); });
  }

 private:
  static constexpr std::int64_t kStretch = 16;  // panels
  // Of more tokens products take as long as the memory, and more panels stay open.
  static constexpr std::int64_t kMostTokens = kMaxTokens < 4 ? kMaxTokens : 4;

  static std::int64_t num_stretches(const LinearParams& p) {
    return (p.num_panels + kStretch - 1) / kStretch;
  }

  // What the bounds take beside the activations.
  void prepare() {
    std::int32_t* offsets = a.offsets + kBoundOffset * a.num_places();
    for (std::int64_t i = 0; i < a.num_places(); ++i)
      offsets[i] = bound_offset(a.values + i * kTileCols, a.num_tiles);
  }

  // Bounds of the panels of a stretch, to `out`, and the largest ones.
  void bound(std::int64_t stretch) {
    F32 acc[kMostTokens][kParts];
    F32 largest[kMostTokens];
    for (std::int64_t t = 0; t < p.num_tokens; ++t) largest[t] = set1(-__builtin_inff());
    for (std::int64_t panel = stretch * kStretch; panel < end_of(stretch); ++panel) {
      const WeightSegment& segment = segment_of(panel);
      const std::int64_t idx = panel - segment.panel_begin;
      const Panel weights = panel_at(segment, idx);
      quantised_panel<4, ScaleKind::d, Form::bounds>(weights, a, 0, p.num_tokens, weights.ahead(),
                                                     acc);
      write_panel(p, segment, idx, 0, p.num_tokens, acc);
      for (std::int64_t t = 0; t < p.num_tokens; ++t)
        largest[t] = max(largest_of(panel, t), largest[t]);
    }
    for (std::int64_t t = 0; t < p.num_tokens; ++t) peak(t, stretch) = reduce_max(largest[t]);
  }

  // What a token's largest value is not below: the largest of the panel with the largest bound.
  void set_floor(std::int64_t token) {
    std::int64_t stretch = 0;
    for (std::int64_t i = 1; i < num_stretches_; ++i) {
      if (peak(token, i) > peak(token, stretch)) stretch = i;
    }
    std::int64_t panel = stretch * kStretch;
    while (panel + 1 < end_of(stretch) &&
           reduce_max(largest_of(panel, token)) < peak(token, stretch))
      ++panel;
    settle(panel, token, 1, panel);
    const float value = reduce_max(largest_of(panel, token));
    // What subnormal numbers lose to rounding no margin covers.
    const bool is_normal = value < -1e-30f || (value > 1e-30f && value < __builtin_inff());
    floors_[token] = is_normal ? value : -__builtin_inff();
  }

  // True values of panels that may have a largest one, of stretches [begin, end).
  void settle(std::int64_t begin, std::int64_t end) {
    for (std::int64_t panel = next_open(begin * kStretch, end); panel < end_of(end - 1);) {
      const std::int64_t next = next_open(panel + 1, end);
      settle(panel, 0, p.num_tokens, next < end_of(end - 1) ? next : panel);
      panel = next;
    }
  }

  std::int64_t end_of(std::int64_t stretch) const {
    const std::int64_t end = (stretch + 1) * kStretch;
    return end < p.num_panels ? end : p.num_panels;
  }
  float& peak(std::int64_t token, std::int64_t stretch) {
    return peaks_[token * num_stretches_ + stretch];
  }
  const WeightSegment& segment_of(std::int64_t panel) const {
    std::int64_t s = 0;
    while (panel >= p.segments[s].panel_begin + p.segments[s].num_panels) ++s;
    return p.segments[s];
  }
  // The largest value that `out` holds of a panel, lanes apart.
  F32 largest_of(std::int64_t panel, std::int64_t token) const {
    const WeightSegment& segment = segment_of(panel);
    const std::int64_t row = (panel - segment.panel_begin) * kPanelRows;
    const float* out = p.out + token * p.out_stride + segment.row_begin + row;
    float values[kPanelRows];
    if (segment.num_rows - row < kPanelRows) {
      for (std::int64_t i = 0; i < kPanelRows; ++i)
        values[i] = i < segment.num_rows - row ? out[i] : -__builtin_inff();
      out = values;
    }
    F32 largest = load(out);
    for (int i = 1; i < kParts; ++i) largest = max(load(out + i * kLanes), largest);
    return largest;
  }
  // Whether a panel's bounds leave open that it has the token's largest value.
  bool is_open(std::int64_t panel, std::int64_t token) {
    return peak(token, panel / kStretch) >= floors_[token] &&
           reduce_max(largest_of(panel, token)) >= floors_[token];
  }
  // The first open panel from `panel` to the end of the stretches before `end`, or that end.
  std::int64_t next_open(std::int64_t panel, std::int64_t end) {
    for (; panel < end_of(end - 1); ++panel) {
      for (std::int64_t t = 0; t < p.num_tokens; ++t) {
        if (is_open(panel, t)) return panel;
      }
    }
    return panel;
  }
  // True values of a panel for tokens [begin, begin + count); `next` is prefetched meanwhile.
  void settle(std::int64_t panel, std::int64_t begin, std::int64_t count, std::int64_t next) {
    const WeightSegment &segment = segment_of(panel), &following = segment_of(next);
    const std::int64_t idx = panel - segment.panel_begin;
    F32 acc[kMostTokens][kParts] = {};
    one_panel(p, segment, idx, a, begin, count, panel_at(following, next - following.panel_begin),
              acc);
    write_panel(p, segment, idx, begin, count, acc);
  }

  const LinearParams& p;
  const Activations& a;
  const int num_threads_;
  const std::int64_t num_stretches_;
  float* const peaks_;   // [num_tokens, num_stretches], largest bounds
  float* const floors_;  // [num_tokens]
  Chunks to_bound_, to_settle_;
  Barrier prepared_, bounded_, has_floors_;
};

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
