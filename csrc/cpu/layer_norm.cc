// SPDX-License-Identifier: Apache-2.0
// Layer norm: out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.
// Mapping: a thread takes whole rows. Cost: reads x three times (twice from L1), weight and bias;
// writes out. Numerics: float32; the variance is that of x - mean, in a pass of its own that also
// finds what rounding left of the mean, so a large mean costs no accuracy; sums in kLanes partial
// sums, added by halves, in the same order for every row whatever the batch. Source: Ba, Kiros and
// Hinton 2016 (arXiv 1607.06450), eq. 4.
#include "ops/layer_norm.h"

#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

void norm_row(const LayerNormParams& p, const float* x, float* out) {
  const std::int64_t whole = p.size / kLanes * kLanes;
  const float size = static_cast<float>(p.size);
  F32 sums = set1(0.0f);
  for (std::int64_t i = 0; i < whole; i += kLanes) sums = add(load(x + i), sums);
  float sum = reduce_add(sums);
  for (std::int64_t i = whole; i < p.size; ++i) sum += x[i];
  const float mean = sum / size;
  F32 squares = set1(0.0f), rests = set1(0.0f);
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const F32 centred = sub(load(x + i), set1(mean));
    rests = add(centred, rests);
    squares = fma(centred, centred, squares);
  }
  float rest = reduce_add(rests), square = reduce_add(squares);
  for (std::int64_t i = whole; i < p.size; ++i) {
    rest += x[i] - mean;
    square += (x[i] - mean) * (x[i] - mean);
  }
  rest /= size;
  const float scale = 1.0f / __builtin_sqrtf(square / size - rest * rest + p.eps);
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const F32 normed = mul(sub(sub(load(x + i), set1(mean)), set1(rest)), set1(scale));
    store(out + i, add(mul(normed, load(p.weight + i)), load(p.bias + i)));
  }
  for (std::int64_t i = whole; i < p.size; ++i)
    out[i] = (x[i] - mean - rest) * scale * p.weight[i] + p.bias[i];
}

}  // namespace

void layer_norm(const LayerNormParams& p) {
  const auto* x = static_cast<const float*>(p.x);
  auto* out = static_cast<float*>(p.out);
  parallel_for(p.num_tokens, 1 + 16384 / (p.size + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token)
      norm_row(p, x + token * p.x_stride, out + token * p.out_stride);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
