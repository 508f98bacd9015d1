// SPDX-License-Identifier: Apache-2.0
// The activations on vectors, for gated_activation.cc and activation.cc.
// Numerics: float32. silu is g / (1 + e^-g); gelu_tanh is g / (1 + e^-2z), which is its tanh form
// without the cancellation; gelu uses erfc, so that small results keep their relative accuracy
// (3e-7 times the argument's square). Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415). The
// erfc polynomial is our fit.
#pragma once
#include "cpu/vec.h"

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

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
