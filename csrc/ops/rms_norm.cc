// SPDX-License-Identifier: Apache-2.0
#include "ops/rms_norm.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void rms_norm(const TensorView& x, const TensorView& weight,
              const std::optional<TensorView>& residual, const TensorView& out, float eps,
              float weight_offset) {
  Check check("rms_norm");
  const TensorView x3 = as_heads(x), out3 = as_heads(out);
  check.activation("x", x3, {"num_tokens", "num_heads", "size"});
  check.tensor("weight", weight, {"size"}, {DType::f32});
  check.activation("out", out3, {"num_tokens", "num_heads", "size"});
  check.writable("out", out, {"x", "residual"});
  check.require(eps >= 0, "eps", "at least 0", std::to_string(eps));
  RmsNormParams p{};
  if (residual) {
    const TensorView residual3 = as_heads(*residual);
    check.activation("residual", residual3, {"num_tokens", "num_heads", "size"});
    p.residual = residual->data;
    p.residual_stride = residual3.strides[0];
    p.residual_head_stride = residual3.strides[1];
  }
  p.x = x.data;
  p.weight = static_cast<const float*>(weight.data);
  p.out = out.data;
  p.dtype = x.dtype;
  p.eps = eps;
  p.weight_offset = weight_offset;
  p.num_tokens = check.size("num_tokens");
  p.num_heads = check.size("num_heads");
  p.size = check.size("size");
  p.x_stride = x3.strides[0];
  p.x_head_stride = x3.strides[1];
  p.out_stride = out3.strides[0];
  p.out_head_stride = out3.strides[1];
  run(p, x.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const RmsNormParams& params, Device device) {
  FULLBEAM_DISPATCH(rms_norm, device, params);
}
