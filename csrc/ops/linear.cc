// SPDX-License-Identifier: Apache-2.0
#include "ops/linear.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void linear(const Tensor& x, const PackedWeight& weight, const MaybeTensor& bias,
            const MaybeTensor& residual, const Tensor& out, bool largest_only) {
  Check check("linear");
  check.tensor("x", x, {"num_tokens", weight.cols()}, {DType::f32}, false);
  check.tensor("out", out, {"num_tokens", weight.rows()}, {DType::f32}, false);
  check.writable("out", out, {"residual"});
  LinearParams p{};
  if (bias) {
    check.tensor("bias", *bias, {weight.rows()}, {DType::f32});
    p.bias = static_cast<const float*>(bias->data);
  }
  if (residual) {
    check.tensor("residual", *residual, {"num_tokens", weight.rows()}, {DType::f32}, false);
    p.residual = static_cast<const float*>(residual->data);
    p.residual_stride = residual->strides[0];
  }
  check.require(!largest_only || !residual, "residual", "None where largest_only is True",
                "an array");
  p.largest_only = largest_only;
  p.x = static_cast<const float*>(x.data);
  p.segments = weight.segments().data();
  p.out = static_cast<float*>(out.data);
  p.num_tokens = check.size("num_tokens");
  p.cols = weight.cols();
  p.rows = weight.rows();
  p.num_segments = static_cast<std::int64_t>(weight.segments().size());
  p.num_panels = weight.num_panels();
  p.x_stride = x.strides[0];
  p.out_stride = out.strides[0];
  run(p, x.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const LinearParams& params, Device device) {
  FULLBEAM_DISPATCH_CPU(linear, device, params);
}
