// SPDX-License-Identifier: Apache-2.0
#include "ops/dequantise.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void dequantise(const Tensor& data, const std::string& type, const Tensor& out) {
  Check check("dequantise");
  DequantiseParams p{};
  p.type = parse_weight_type("dequantise", type);
  check.tensor("out", out, {"rows", "cols"}, {DType::f32, DType::f16, DType::bf16}, false);
  check.writable("out", out);
  p.rows = check.size("rows");
  p.cols = check.size("cols");
  p.row_bytes = row_bytes(p.type, p.cols);
  check.require(p.row_bytes >= 0, "out", "a multiple of the block of " + type + " wide",
                std::to_string(p.cols) + " columns");
  check.tensor("data", data, {p.rows * p.row_bytes}, {DType::u8});
  p.data = static_cast<const std::uint8_t*>(data.data);
  p.out = out.data;
  p.dtype = out.dtype;
  p.out_stride = out.strides[0];
  run(p, data.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const DequantiseParams& params, Device device) {
  FULLBEAM_DISPATCH(dequantise, device, params);
}
