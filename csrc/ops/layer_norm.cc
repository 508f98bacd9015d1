// SPDX-License-Identifier: Apache-2.0
#include "ops/layer_norm.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out,
                float eps) {
  Check check("layer_norm");
  check.activation("x", x, {"num_tokens", "size"});
  check.tensor("weight", weight, {"size"}, {DType::f32});
  check.tensor("bias", bias, {"size"}, {DType::f32});
  check.activation("out", out, {"num_tokens", "size"});
  check.writable("out", out, {"x"});
  check.require(eps >= 0, "eps", "at least 0", std::to_string(eps));
  LayerNormParams p{};
  p.x = x.data;
  p.dtype = x.dtype;
  p.weight = static_cast<const float*>(weight.data);
  p.bias = static_cast<const float*>(bias.data);
  p.out = out.data;
  p.eps = eps;
  p.num_tokens = check.size("num_tokens");
  p.size = check.size("size");
  p.x_stride = x.strides[0];
  p.out_stride = out.strides[0];
  run(p, x.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const LayerNormParams& params, Device device) {
  FULLBEAM_DISPATCH(layer_norm, device, params);
}
