// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/op.h"

namespace fullbeam {

// out = cap * tanh(x / cap). `out` may be `x`.
struct SoftcapParams {
  const float* x;  // [num_rows, size]
  float* out;      // [num_rows, size]
  float cap;
  std::int64_t num_rows, size;
  std::int64_t x_stride, out_stride;  // per row, in elements
};

FULLBEAM_DECLARE_OP(softcap, SoftcapParams)

}  // namespace fullbeam
