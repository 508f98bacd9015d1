// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding, in place.
// Mapping: a thread takes whole tokens; it computes a token's cosines and sines once, for all its
// heads. Cost: reads and writes the rotated part of x once; 2 ns of arithmetic per frequency and
// token. Numerics: angles, range reduction and polynomials in float64 without fma, so that every
// instruction set gives the same bits; error of a cosine below 1e-9 before it is rounded to
// float32. Source: Su et al. 2021 (arXiv 2104.09864), eq. 34.
#include "ops/rope.h"

#include <cstring>

#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

// pi/2 in three parts; the products of the first two with a quadrant number below 2^20 are exact.
constexpr double kHalfPi1 = 0x1.921fb544p+0, kHalfPi2 = 0x1.0b4611a6p-34,
                 kHalfPi3 = 0x1.3198a2e037073p-69;
constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number

void rotation(const float* inv_freq, std::int64_t num_freqs, double position, float scale,
              float* cosines, float* sines) {
#pragma omp simd
  for (std::int64_t i = 0; i < num_freqs; ++i) {
    const double angle = position * static_cast<double>(inv_freq[i]);
    const double shifted = angle * 0x1.45f306dc9c883p-1 + kRound;
    const double quadrant = shifted - kRound;
    std::int64_t bits;
    __builtin_memcpy(&bits, &shifted, 8);
    const double r = ((angle - quadrant * kHalfPi1) - quadrant * kHalfPi2) - quadrant * kHalfPi3;
    const double r2 = r * r;
    const double sine =
        r + r * r2 *
                (-1.0 / 6 +
                 r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880 - r2 / 39916800))));
    const double cosine =
        1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 - r2 / 3628800))));
    const bool is_odd = (bits & 1) != 0;
    const double c = is_odd ? sine : cosine, s = is_odd ? cosine : sine;
    cosines[i] = static_cast<float>(((bits + 1) & 2) != 0 ? -c : c) * scale;
    sines[i] = static_cast<float>((bits & 2) != 0 ? -s : s) * scale;
  }
}

void rotate_halves(float* x, std::int64_t n, const float* cosines, const float* sines) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float a = x[i], b = x[i + n];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + n] = a * sines[i] + b * cosines[i];
  }
}

void rotate_interleaved(float* x, std::int64_t n, const float* cosines, const float* sines) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosines[i] - b * sines[i];
    x[2 * i + 1] = a * sines[i] + b * cosines[i];
  }
}

}  // namespace

void rope(const RopeParams& p) {
  const std::int64_t n = p.num_freqs;
  const std::int64_t grain = 1 + 8192 / (p.num_heads * 2 * n + 16 * n + 1);
  parallel_for(p.num_tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    float* cosines = static_cast<float*>(scratch(2 * n * std::int64_t{sizeof(float)} + 64));
    float* sines = cosines + n;
    for (std::int64_t token = begin; token < end; ++token) {
      rotation(p.inv_freq, n, p.positions[token], p.scale, cosines, sines);
      for (std::int64_t head = 0; head < p.num_heads; ++head) {
        float* x = static_cast<float*>(p.x) + token * p.token_stride + head * p.head_stride;
        if (p.is_interleaved) {
          rotate_interleaved(x, n, cosines, sines);
        } else {
          rotate_halves(x, n, cosines, sines);
        }
      }
    }
  });
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
