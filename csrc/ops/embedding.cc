// SPDX-License-Identifier: Apache-2.0
#include "ops/embedding.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void embedding(const Tensor& token_ids, const Table& table, const MaybeTensor& residual,
               const Tensor& out, float scale) {
  Check check("embedding");
  check.tensor("token_ids", token_ids, {"num_tokens"}, {DType::i32});
  EmbeddingParams p{};
  if (const auto* dense = std::get_if<Tensor>(&table)) {
    if (!dense->fault.empty())
      throw TypeError("embedding: table must be a PackedWeight, or " + dense->fault);
    check.tensor("table", *dense, {"vocab_size", "cols"}, {DType::f32, DType::f16, DType::bf16},
                 false);
    p.table = dense->data;
    p.table_dtype = dense->dtype;
    p.table_rows = dense->shape[0];
    p.table_stride = dense->strides[0];
    p.cols = dense->shape[1];
  } else {
    const PackedWeight* packed = std::get<const PackedWeight*>(table);
    check.require(packed != nullptr, "table", "a PackedWeight or an array", "None");
    check.require(token_ids.device == Device::cpu, "table", "an array on the device of token_ids",
                  "a PackedWeight, which is in the host's memory");
    p.segments = packed->segments().data();
    p.num_segments = static_cast<std::int64_t>(packed->segments().size());
    p.cols = packed->cols();
  }
  if (residual) {
    check.activation("residual", *residual, {"num_tokens", p.cols});
    p.residual = residual->data;
    p.residual_stride = residual->strides[0];
  }
  check.activation("out", out, {"num_tokens", p.cols});
  check.writable("out", out, {"residual"});
  p.token_ids = static_cast<const std::int32_t*>(token_ids.data);
  p.out = out.data;
  p.dtype = out.dtype;
  p.scale = scale;
  p.num_tokens = check.size("num_tokens");
  p.out_stride = out.strides[0];
  run(p, token_ids.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const EmbeddingParams& params, Device device) {
  FULLBEAM_DISPATCH(embedding, device, params);
}
