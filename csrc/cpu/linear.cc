// SPDX-License-Identifier: Apache-2.0
// Matrix product out = x * weight^T [+ bias] [+ residual] with the packed weights of core/weight.h.
// Mapping: threads quantise the activations together; then each has a contiguous share of the
// panels of 16 rows, a stretch of memory, and helps with the others' when it has done its own. Up
// to kMaxTokens tokens meet a panel together, their sums in registers; more do so in turns or,
// where that is faster, tile by tile. linear_largest.h goes another way where few tokens want no
// more than their largest values. Cost: at few tokens the packed bytes of the weight,
// once; at many, 512 multiply-adds per tile and token. Numerics: exact int32 inside a tile (half a
// tile for Q6_K); float32 over tiles, in column order. A row of the result depends on its own token
// alone: the order of its float operations is the same for every number of tokens. Source: the
// interleaving of rows is the idea of ik_llama.cpp's repacked types; the layout and the code are
// our own.
#include "ops/linear.h"

#include <optional>

#include "core/parallel.h"
#include "cpu/linear_largest.h"
#include "cpu/linear_panel.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr std::int64_t kChunkBytes = 512 << 10;  // of weights, in L2 beside a turn's activations

// Panels [begin_panel, end_panel) against all tokens, turn by turn.
void some_panels(const LinearParams& p, const Activations& a, std::int64_t begin_panel,
                 std::int64_t end_panel) {
  F32 acc[kMaxTurn][kParts];
  for (std::int64_t begin = 0; begin < p.num_tokens; begin += a.turn_tokens) {
    const std::int64_t count = a.turn_count(begin);
    std::int64_t s = 0;
    for (std::int64_t i = begin_panel; i < end_panel; ++i) {
      while (i >= p.segments[s].panel_begin + p.segments[s].num_panels) ++s;
      const WeightSegment& segment = p.segments[s];
      const Panel panel = panel_at(segment, i - segment.panel_begin);
      one_panel(p, segment, i - segment.panel_begin, a, begin, count,
                begin == 0 ? panel.ahead() : panel, acc);
      write_panel(p, segment, i - segment.panel_begin, begin, count, acc);
    }
  }
}

}  // namespace

void linear(const LinearParams& p) {
  const int num_threads = p.num_panels > 1 ? fullbeam::num_threads() : 1;
  bool any_quantised = false;
  for (std::int64_t s = 0; s < p.num_segments; ++s)
    any_quantised |= is_quantised(p.segments[s].type);
  const std::int64_t num_tiles = any_quantised ? p.cols / kTileCols : 0;
  const std::int64_t bytes = Activations::bytes(num_tiles, p.num_tokens);
  auto* memory = static_cast<std::uint8_t*>(scratch(bytes + Largest::bytes(p)));
  const Activations a(memory, num_tiles, p.num_tokens);
  std::optional<Largest> largest;
  if (Largest::serves(p)) largest.emplace(memory + bytes, p, a, num_threads);
  // Chunks small enough that the threads end together, and to stay in L2 while token after token
  // meets them; up to 16 panels, whose results are neighbours in memory.
  const std::int64_t fair = p.num_panels / (8 * num_threads);
  const std::int64_t fitting =
      kChunkBytes / (p.segments[0].panel_bytes + p.segments[0].low_bytes + 1);
  const std::int64_t most = fair < fitting ? fair : fitting;
  Chunks chunks(p.num_panels, most < 1 ? 1 : most < 16 ? most : 16, num_threads);
  Barrier quantised(num_threads);
  const auto share = [&](int thread_idx, int) {
    if (any_quantised) {
      quantise_share(p, a, thread_idx, num_threads);
      quantised.wait();
    }
    if (largest) return largest->run(thread_idx);
    chunks.run(thread_idx,
               [&](std::int64_t begin, std::int64_t end) { some_panels(p, a, begin, end); });
  };
  if (num_threads == 1) {
    share(0, 1);
  } else {
    run_team(share);
  }
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
