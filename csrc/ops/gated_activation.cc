// SPDX-License-Identifier: Apache-2.0
#include "ops/gated_activation.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/activation_name.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void gated_activation(const TensorView& x, const TensorView& out, const std::string& activation) {
  Check check("gated_activation");
  check.activation("x", x, {"num_tokens", "2 * size"});
  check.require(x.shape[1] % 2 == 0, "x", "of an even number of columns",
                std::to_string(x.shape[1]));
  check.activation("out", out, {"num_tokens", x.shape[1] / 2});
  check.writable("out", out, {"x"});
  GatedActivationParams p{};
  p.activation = activation_of(check, activation);
  p.x = x.data;
  p.dtype = x.dtype;
  p.out = out.data;
  p.num_tokens = check.size("num_tokens");
  p.size = x.shape[1] / 2;
  p.x_stride = x.strides[0];
  p.out_stride = out.strides[0];
  run(p, x.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const GatedActivationParams& params, Device device) {
  FULLBEAM_DISPATCH(gated_activation, device, params);
}
