// SPDX-License-Identifier: Apache-2.0
// The activations on vectors, and the rows of gated_activation.cc and activation.cc.
// Mapping: a thread takes whole rows. Cost: reads a row (gate | up, or x) and writes size numbers;
// one exponential and one division each. Numerics: float32. silu is g / (1 + e^-g); gelu_tanh is g
// / (1 + e^-2z), which is its tanh form without the cancellation; gelu uses erfc, so that small
// results keep their relative accuracy (3e-7 times the argument's square). Source: Hendrycks and
// Gimpel 2016 (arXiv 1606.08415). The erfc polynomial is our fit.
#pragma once
#include "core/parallel.h"
#include "cpu/vec.h"
#include "ops/gated_activation.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

inline F32 silu(F32 g) { return div(g, add(set1(1.0f), exp(sub(set1(0.0f), g)))); }

inline F32 gelu_tanh(F32 g) {
  const F32 cubic = fma(mul(mul(g, g), g), set1(0.044715f), g);
  return div(g, add(set1(1.0f), exp(mul(set1(-1.5957691216057308f), cubic))));
}

// erfc(z) = t * exp(polynomial(t) - z^2), t = 1 / (1 + z / 2), for z >= 0: a degree-9 Chebyshev fit
// for z up to 11.
inline F32 erfc(F32 z) {
  constexpr float kFit[10] = {-1.26547384f, 0.99916881f,  0.38196391f, 0.05724635f,  -0.06602827f,
                              0.04750860f,  -0.85187942f, 1.27436161f, -0.73105931f, 0.15419173f};
  const F32 t = div(set1(1.0f), fma(z, set1(0.5f), set1(1.0f)));
  F32 sum = set1(kFit[9]);
  for (int i = 8; i >= 0; --i) sum = fma(sum, t, set1(kFit[i]));
  return mul(t, exp(sub(sum, mul(z, z))));
}

inline F32 gelu(F32 g) {
  const F32 half_tail = mul(set1(0.5f), erfc(mul(max(g, sub(set1(0.0f), g)), set1(0.70710678f))));
  const F32 is_positive = zero_below(set1(1.0f), g, set1(0.0f));
  // 1 - tail where g >= 0, else tail
  const F32 share = fma(sub(set1(1.0f), add(is_positive, is_positive)), half_tail, is_positive);
  return mul(g, share);
}

// out = activation(x), times x[size..] where it is gated.
template <F32 (*kActivation)(F32), bool kIsGated>
void activate_row(const float* x, float* out, std::int64_t size) {
  const float* up = x + size;
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const F32 activated = kActivation(load(x + i));
    store(out + i, kIsGated ? mul(activated, load(up + i)) : activated);
  }
  float tail[kLanes] = {};
  for (std::int64_t j = i; j < size; ++j) tail[j - i] = x[j];
  store(tail, kActivation(load(tail)));
  for (; i < size; ++i) out[i] = kIsGated ? tail[i % kLanes] * up[i] : tail[i % kLanes];
}

template <bool kIsGated, class Params>
void activate(const Params& p) {
  const auto run = p.activation == Activation::silu   ? &activate_row<silu, kIsGated>
                   : p.activation == Activation::gelu ? &activate_row<gelu, kIsGated>
                                                      : &activate_row<gelu_tanh, kIsGated>;
  const auto* x = static_cast<const float*>(p.x);
  auto* out = static_cast<float*>(p.out);
  parallel_for(p.num_tokens, 1 + 8192 / (p.size + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token)
      run(x + token * p.x_stride, out + token * p.out_stride, p.size);
  });
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
