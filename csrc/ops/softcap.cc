// SPDX-License-Identifier: Apache-2.0
#include "ops/softcap.h"

#include <cmath>

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void softcap(const Tensor& x, const Tensor& out, float cap) {
  Check check("softcap");
  check.tensor("x", x, {"num_rows", "size"}, {DType::f32}, false);
  check.tensor("out", out, {"num_rows", "size"}, {DType::f32}, false);
  check.writable("out", out);
  check.require(cap > 0 && std::isfinite(cap), "cap", "finite and above 0", std::to_string(cap));
  SoftcapParams p{};
  p.x = static_cast<const float*>(x.data);
  p.out = static_cast<float*>(out.data);
  p.cap = cap;
  p.num_rows = check.size("num_rows");
  p.size = check.size("size");
  p.x_stride = x.strides[0];
  p.out_stride = out.strides[0];
  FULLBEAM_DISPATCH_CPU(softcap, x.device, p);
}

}  // namespace fullbeam::ops
