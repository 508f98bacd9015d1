// SPDX-License-Identifier: Apache-2.0
#include "ops/softcap.h"

#include <cmath>

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void softcap(const Tensor& x, const Tensor& out, float cap) {
  Check check("softcap");
  check.activation("x", x, {"num_rows", "size"});
  check.activation("out", out, {"num_rows", "size"});
  check.writable("out", out, {"x"});
  check.require(cap > 0 && std::isfinite(cap), "cap", "finite and above 0", std::to_string(cap));
  SoftcapParams p{};
  p.x = x.data;
  p.dtype = x.dtype;
  p.out = out.data;
  p.cap = cap;
  p.num_rows = check.size("num_rows");
  p.size = check.size("size");
  p.x_stride = x.strides[0];
  p.out_stride = out.strides[0];
  run(p, x.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const SoftcapParams& params, Device device) {
  FULLBEAM_DISPATCH(softcap, device, params);
}
