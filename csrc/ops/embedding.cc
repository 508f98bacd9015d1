// SPDX-License-Identifier: Apache-2.0
#include "ops/embedding.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void embedding(const Tensor& token_ids, const PackedWeight& table, const MaybeTensor& residual,
               const Tensor& out, float scale) {
  Check check("embedding");
  check.tensor("token_ids", token_ids, {"num_tokens"}, {DType::i32});
  check.tensor("out", out, {"num_tokens", table.cols()}, {DType::f32}, false);
  check.writable("out", out);
  EmbeddingParams p{};
  if (residual) {
    check.tensor("residual", *residual, {"num_tokens", table.cols()}, {DType::f32}, false);
    p.residual = static_cast<const float*>(residual->data);
    p.residual_stride = residual->strides[0];
  }
  p.token_ids = static_cast<const std::int32_t*>(token_ids.data);
  p.segments = table.segments().data();
  p.out = static_cast<float*>(out.data);
  p.scale = scale;
  p.num_tokens = check.size("num_tokens");
  p.cols = table.cols();
  p.num_segments = static_cast<std::int64_t>(table.segments().size());
  p.out_stride = out.strides[0];
  FULLBEAM_DISPATCH_CPU(embedding, token_ids.device, p);
}

}  // namespace fullbeam::ops
