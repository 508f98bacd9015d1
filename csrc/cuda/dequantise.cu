// SPDX-License-Identifier: Apache-2.0
// A matrix from its bytes in a GGUF file.
// Mapping: a thread takes 8 columns of a row. Cost: reads the file's bytes once, byte by byte (the
// blocks are not aligned; neighbours share cache lines), writes out 16 bytes at a time: for use at
// load. Numerics: d * scale first, products and sum in float32, then rounded to nearest even, as on
// the CPU. Source: core/weight_blocks.h.
#include "core/weight_blocks.h"
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/dequantise.h"

namespace fullbeam::cuda {
namespace {

constexpr int kItems = 8;

__device__ inline float half_of(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Element i of a row of a float type.
__device__ inline float float_at(WeightType type, const std::uint8_t* row, std::int64_t i) {
  if (type == WeightType::f16) return half_of(u16_at(row + 2 * i));
  const bool is_wide = type == WeightType::f32;
  const unsigned high = u16_at(row + (is_wide ? 4 * i + 2 : 2 * i));
  return __uint_as_float(high << 16 | (is_wide ? u16_at(row + 4 * i) : 0u));
}

template <class Out>
__global__ void __launch_bounds__(256)
    write_rows(const __grid_constant__ DequantiseParams p, bool is_aligned) {
  const std::int64_t row = blockIdx.x, first = first_item<kItems>();
  if (first >= p.cols) return;
  const std::uint8_t* from = p.data + row * p.row_bytes;
  const auto count = static_cast<int>(p.cols - first < kItems ? p.cols - first : kItems);
  float items[kItems] = {};
  if (is_quantised(p.type)) {
    const int zero_point = layout_of(p.type).zero_point;
    const auto run = read_run<kItems>(p.type, from, first);
    const float factor = half_of(run.d) * static_cast<float>(run.scale);
    const float offset = half_of(run.m) * static_cast<float>(run.minimum);
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      items[i] = factor * static_cast<float>(run.values[i] - zero_point) + offset;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i < count) items[i] = float_at(p.type, from, first + i);
    }
  }
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride + first;
  if (is_aligned) {
    store_floats(items, out);
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i < count) out[i] = from_float<Out>(items[i]);
    }
  }
}

}  // namespace

void dequantise(const DequantiseParams& p) {
  if (p.rows == 0 || p.cols == 0) return;
  dispatch_float(p.dtype, [&]<class Out>() {
    const std::int64_t bytes = sizeof(Out);
    const bool is_aligned =
        p.cols % kItems == 0 && is_aligned16({address_of(p.out), p.out_stride * bytes});
    launch(&write_rows<Out>, shape_by_threads(p.rows, (p.cols + kItems - 1) / kItems), p,
           is_aligned);
  });
}

}  // namespace fullbeam::cuda
