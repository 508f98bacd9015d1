// SPDX-License-Identifier: Apache-2.0
// Soft cap of logits: out = cap * tanh(x / cap).
// Mapping: threads share the rows by stretches of columns. Cost: reads and writes size numbers a
// row; one exponential and two divisions each. Numerics: float32; the error is absolute, 1e-7 of
// the cap. NaN stays NaN. Source: Gemma 2 (arXiv 2408.00118), section 2.
#include "ops/softcap.h"

#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr std::int64_t kStretch = 4096;  // columns; a multiple of kLanes

// The last term is 0, or NaN where x is.
F32 capped(F32 x, float cap) {
  const F32 share = div(x, set1(cap));
  return fma(set1(cap), tanh(share), mul(set1(0.0f), min(set1(1.0f), max(set1(-1.0f), share))));
}

void cap_stretch(const SoftcapParams& p, const float* x, float* out, std::int64_t size) {
  const std::int64_t whole = size / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) store(out + i, capped(load(x + i), p.cap));
  if (whole == size) return;
  const auto rest_bytes = static_cast<std::size_t>(size - whole) * sizeof(float);
  float tail[kLanes] = {};
  std::memcpy(tail, x + whole, rest_bytes);
  store(tail, capped(load(tail), p.cap));
  std::memcpy(out + whole, tail, rest_bytes);
}

}  // namespace

void softcap(const SoftcapParams& p) {
  const auto* x = static_cast<const float*>(p.x);
  auto* out = static_cast<float*>(p.out);
  const std::int64_t stretches = (p.size + kStretch - 1) / kStretch;
  parallel_for(p.num_rows * stretches, 2, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = i / stretches, first = i % stretches * kStretch;
      const std::int64_t size = p.size - first < kStretch ? p.size - first : kStretch;
      cap_stretch(p, x + row * p.x_stride + first, out + row * p.out_stride + first, size);
    }
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
