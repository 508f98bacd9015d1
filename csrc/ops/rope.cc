// SPDX-License-Identifier: Apache-2.0
#include "ops/rope.h"

#include <cmath>

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void rope(const TensorView& x, const TensorView& positions, const TensorView& inv_freq,
          bool interleaved, float scale) {
  Check check("rope");
  const TensorView x3 = as_heads(x);
  check.activation("x", x3, {"num_tokens", "num_heads", "head_dim"});
  check.writable("x", x);
  check.tensor("positions", positions, {"num_tokens"}, {DType::i32});
  check.tensor("inv_freq", inv_freq, {"num_freqs"}, {DType::f32});
  const std::int64_t num_freqs = check.size("num_freqs"), head_dim = check.size("head_dim");
  check.require(2 * num_freqs <= head_dim, "inv_freq",
                "at most head_dim/2=" + std::to_string(head_dim / 2) + " numbers",
                std::to_string(num_freqs));
  check.require(std::isfinite(scale), "scale", "finite", std::to_string(scale));
  RopeParams p{};
  p.x = x.data;
  p.dtype = x.dtype;
  p.positions = static_cast<const std::int32_t*>(positions.data);
  p.inv_freq = static_cast<const float*>(inv_freq.data);
  p.scale = scale;
  p.is_interleaved = interleaved;
  p.num_tokens = check.size("num_tokens");
  p.num_heads = check.size("num_heads");
  p.num_freqs = num_freqs;
  p.head_dim = head_dim;
  p.token_stride = x3.strides[0];
  p.head_stride = x3.strides[1];
  run(p, x.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const RopeParams& params, Device device) {
  FULLBEAM_DISPATCH(rope, device, params);
}
