// SPDX-License-Identifier: Apache-2.0
// Gated activation: out = activation(gate) * up.
// Mapping: a thread takes whole rows. Cost: reads 2 * size numbers, writes size; one exponential
// and one division each. Numerics: those of activations.h. Source: Shazeer 2020 (arXiv 2002.05202).
#include "ops/gated_activation.h"

#include "core/parallel.h"
#include "cpu/activations.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

template <F32 (*kActivation)(F32)>
void row(const float* gate, const float* up, float* out, std::int64_t size) {
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    store(out + i, mul(kActivation(load(gate + i)), load(up + i)));
  }
  if (whole == size) return;
  float tail[kLanes] = {};
  std::memcpy(tail, gate + whole, static_cast<std::size_t>(size - whole) * sizeof(float));
  store(tail, kActivation(load(tail)));
  for (std::int64_t i = whole; i < size; ++i) out[i] = tail[i - whole] * up[i];
}

}  // namespace

void gated_activation(const GatedActivationParams& p) {
  const auto run = p.activation == Activation::silu   ? &row<silu>
                   : p.activation == Activation::gelu ? &row<gelu>
                                                      : &row<gelu_tanh>;
  parallel_for(p.num_tokens, 1 + 8192 / (p.size + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      const float* x = static_cast<const float*>(p.x) + token * p.x_stride;
      run(x, x + p.size, static_cast<float*>(p.out) + token * p.out_stride, p.size);
    }
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
