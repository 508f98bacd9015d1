// SPDX-License-Identifier: Apache-2.0
// Rotary position embedding, in place.
// Mapping: a block takes a token, a thread a frequency of every blockDim.y-th head, so that a
// cosine and a sine serve several heads. Cost: reads and writes the rotated part of x once; about
// 25 float64 operations per frequency, token and thread along y. Numerics: angles, range reduction
// and polynomials in float64 without fma, as on the CPU and with its bits; all else in float32.
// Source: Su et al. 2021 (arXiv 2104.09864), eq. 34.
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "ops/rope.h"

namespace fullbeam::cuda {
namespace {

// As in cpu/rope.cc, which says what the constants are.
constexpr double kHalfPi1 = 0x1.921fb544p+0, kHalfPi2 = 0x1.0b4611a6p-34,
                 kHalfPi3 = 0x1.3198a2e037073p-69;
constexpr double kRound = 6755399441055744.0;

__device__ inline void rotation(double position, float inv_freq, float scale, float& cosine_out,
                                float& sine_out) {
  const double angle = position * static_cast<double>(inv_freq);
  const double shifted = angle * 0x1.45f306dc9c883p-1 + kRound;
  const double quadrant = shifted - kRound;
  const long long bits = __double_as_longlong(shifted);
  const double r = ((angle - quadrant * kHalfPi1) - quadrant * kHalfPi2) - quadrant * kHalfPi3;
  const double r2 = r * r;
  const double sine =
      r +
      r * r2 *
          (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880 - r2 / 39916800))));
  const double cosine =
      1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 - r2 / 3628800))));
  const bool is_odd = (bits & 1) != 0;
  const double c = is_odd ? sine : cosine, s = is_odd ? cosine : sine;
  cosine_out = static_cast<float>(((bits + 1) & 2) != 0 ? -c : c) * scale;
  sine_out = static_cast<float>((bits & 2) != 0 ? -s : s) * scale;
}

template <class T>
__global__ void __launch_bounds__(512) rotate_token(const __grid_constant__ RopeParams p) {
  const std::int64_t token = blockIdx.x, n = p.num_freqs;
  for (std::int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    float cosine, sine;
    rotation(p.positions[token], p.inv_freq[i], p.scale, cosine, sine);
    const std::int64_t first = p.is_interleaved ? 2 * i : i;
    const std::int64_t second = p.is_interleaved ? 2 * i + 1 : i + n;
    for (std::int64_t head = threadIdx.y; head < p.num_heads; head += blockDim.y) {
      T* x = static_cast<T*>(p.x) + token * p.token_stride + head * p.head_stride;
      const float a = to_float(x[first]), b = to_float(x[second]);
      x[first] = from_float<T>(a * cosine - b * sine);
      x[second] = from_float<T>(a * sine + b * cosine);
    }
  }
}

}  // namespace

void rope(const RopeParams& p) {
  if (p.num_tokens == 0 || p.num_heads == 0 || p.num_freqs == 0) return;
  const auto along_x =
      static_cast<unsigned>(p.num_freqs >= 128 ? 128 : (p.num_freqs + 31) / 32 * 32);
  const auto along_y = static_cast<unsigned>(p.num_heads >= 4 ? 4 : p.num_heads);
  const Shape shape{.grid = static_cast<unsigned>(p.num_tokens), .block = dim3(along_x, along_y)};
  dispatch_float(p.dtype, [&]<class T>() { launch(&rotate_token<T>, shape, p); });
}

}  // namespace fullbeam::cuda
