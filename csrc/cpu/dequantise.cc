// SPDX-License-Identifier: Apache-2.0
// A matrix from its bytes in a GGUF file.
// Mapping: a thread takes whole rows, 16 columns at a time. Cost: reads the file's bytes once,
// writes out; bound by the unpacking, for use at load. Numerics: d * scale first, products and sum
// in float32, then rounded to nearest even: the same values as the packed layout's. Source:
// core/weight_blocks.h.
#include "ops/dequantise.h"

#include "core/parallel.h"
#include "core/weight_blocks.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr int kRun = 16;  // columns

float half_of(std::uint16_t bits) {
  Half value;
  std::memcpy(&value, &bits, 2);
  return to_float(value);
}

template <class In, class Out>
void float_row(const std::uint8_t* row, Out* out, std::int64_t cols) {
  for (std::int64_t i = 0; i < cols; ++i) {
    In value;
    std::memcpy(&value, row + i * std::int64_t{sizeof(In)}, sizeof(In));
    out[i] = from_float<Out>(to_float(value));
  }
}

template <class Out>
void write_row(const DequantiseParams& p, const std::uint8_t* row, Out* out) {
  switch (p.type) {
    case WeightType::f32:
      return float_row<float>(row, out, p.cols);
    case WeightType::f16:
      return float_row<Half>(row, out, p.cols);
    case WeightType::bf16:
      return float_row<BFloat>(row, out, p.cols);
    default:
      break;
  }
  const int zero_point = layout_of(p.type).zero_point;
  for (std::int64_t col = 0; col < p.cols; col += kRun) {
    const auto run = read_run<kRun>(p.type, row, col);
    const float factor = half_of(run.d) * static_cast<float>(run.scale);
    const float offset = half_of(run.m) * static_cast<float>(run.minimum);
    for (int i = 0; i < kRun; ++i)
      out[col + i] =
          from_float<Out>(factor * static_cast<float>(run.values[i] - zero_point) + offset);
  }
}

template <class Out>
void write_rows(const DequantiseParams& p) {
  parallel_for(p.rows, 1 + 4096 / (p.cols + 1), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row)
      write_row(p, p.data + row * p.row_bytes, static_cast<Out*>(p.out) + row * p.out_stride);
  });
}

}  // namespace

void dequantise(const DequantiseParams& p) {
  switch (p.dtype) {
    case DType::f16:
      return write_rows<Half>(p);
    case DType::bf16:
      return write_rows<BFloat>(p);
    default:
      return write_rows<float>(p);
  }
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
