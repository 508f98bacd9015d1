// SPDX-License-Identifier: Apache-2.0
// Root-mean-square norm: out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) [+ residual].
// Mapping: a thread takes whole rows. Cost: reads x twice (the second time from L1), weight,
// residual; writes out. Numerics: float32 sums in kLanes partial sums, added by halves; the same
// order for every row whatever the batch. Source: Zhang and Sennrich 2019 (arXiv 1910.07467), eq.
// 4; the offset is Gemma's "1 + weight".
#include "ops/rms_norm.h"

#include <cmath>

#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

void norm_row(const RmsNormParams& p, const float* x, const float* residual, float* out) {
  const std::int64_t whole = p.size / kLanes * kLanes;
  F32 sums = set1(0.0f);
  for (std::int64_t i = 0; i < whole; i += kLanes) sums = fma(load(x + i), load(x + i), sums);
  float sum = reduce_add(sums);
  for (std::int64_t i = whole; i < p.size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(p.size) + p.eps);
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const F32 weight = add(load(p.weight + i), set1(p.weight_offset));
    const F32 normed = mul(mul(load(x + i), set1(scale)), weight);
    store(out + i, residual == nullptr ? normed : add(normed, load(residual + i)));
  }
  for (std::int64_t i = whole; i < p.size; ++i) {
    const float normed = x[i] * scale * (p.weight[i] + p.weight_offset);
    out[i] = residual == nullptr ? normed : normed + residual[i];
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  const auto* x = static_cast<const float*>(p.x);
  const auto* residual = static_cast<const float*>(p.residual);
  auto* out = static_cast<float*>(p.out);
  const std::int64_t num_rows = p.num_tokens * p.num_heads;
  const std::int64_t grain = 1 + 16384 / (p.size + 1);
  parallel_for(num_rows, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t token = row / p.num_heads, head = row % p.num_heads;
      norm_row(p, x + token * p.x_stride + head * p.x_head_stride,
               residual == nullptr
                   ? nullptr
                   : residual + token * p.residual_stride + head * p.residual_head_stride,
               out + token * p.out_stride + head * p.out_head_stride);
    }
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
