// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"
#include "core/weight.h"

namespace fullbeam {

// A matrix from its bytes in a GGUF file.
struct DequantiseParams {
  const std::uint8_t* data;  // [rows, row_bytes]
  void* out;                 // [rows, cols], dtype
  WeightType type;
  DType dtype;  // f32, f16 or bf16
  std::int64_t rows, cols, row_bytes, out_stride;
};

FULLBEAM_DECLARE_OP(dequantise, DequantiseParams)

}  // namespace fullbeam
