// SPDX-License-Identifier: Apache-2.0
// Activation: out = activation(x).
// Mapping: a thread takes whole rows. Cost: reads and writes size numbers; one exponential and one
// division each. Numerics: those of activations.h. Source: as there.
#include "ops/activation.h"

#include "core/parallel.h"
#include "cpu/activations.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

template <F32 (*kActivation)(F32)>
void row(const float* x, float* out, std::int64_t size) {
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) store(out + i, kActivation(load(x + i)));
  if (whole == size) return;
  const auto rest_bytes = static_cast<std::size_t>(size - whole) * sizeof(float);
  float tail[kLanes] = {};
  std::memcpy(tail, x + whole, rest_bytes);
  store(tail, kActivation(load(tail)));
  std::memcpy(out + whole, tail, rest_bytes);
}

}  // namespace

void activation(const ActivationParams& p) {
  const auto run = p.activation == Activation::silu   ? &row<silu>
                   : p.activation == Activation::gelu ? &row<gelu>
                                                      : &row<gelu_tanh>;
  const auto* x = static_cast<const float*>(p.x);
  auto* out = static_cast<float*>(p.out);
  parallel_for(p.num_tokens, 1 + 8192 / (p.size + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token)
      run(x + token * p.x_stride, out + token * p.out_stride, p.size);
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
