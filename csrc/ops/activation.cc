// SPDX-License-Identifier: Apache-2.0
#include "ops/activation.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/activation_name.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void activation(const Tensor& x, const Tensor& out, const std::string& activation) {
  Check check("activation");
  check.activation("x", x, {"num_tokens", "size"});
  check.activation("out", out, {"num_tokens", "size"});
  check.writable("out", out, {"x"});
  ActivationParams p{};
  p.activation = activation_of(check, activation);
  p.x = x.data;
  p.dtype = x.dtype;
  p.out = out.data;
  p.num_tokens = check.size("num_tokens");
  p.size = check.size("size");
  p.x_stride = x.strides[0];
  p.out_stride = out.strides[0];
  run(p, x.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const ActivationParams& params, Device device) {
  FULLBEAM_DISPATCH(activation, device, params);
}
