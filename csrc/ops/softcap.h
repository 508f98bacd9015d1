// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// out = cap * tanh(x / cap). `out` may be `x`.
struct SoftcapParams {
  const void* x;  // [num_rows, size], dtype
  void* out;      // [num_rows, size], dtype
  DType dtype;    // f32; on CUDA also f16 or bf16
  float cap;
  std::int64_t num_rows, size;
  std::int64_t x_stride, out_stride;  // per row, in elements
};

FULLBEAM_DECLARE_OP(softcap, SoftcapParams)

}  // namespace fullbeam
