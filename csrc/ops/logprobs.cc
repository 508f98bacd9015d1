// SPDX-License-Identifier: Apache-2.0
#include "ops/logprobs.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void logprobs(const TensorView& logits, const TensorView& token_ids, const TensorView& out_logprobs,
              const TensorView& out_ranks, const TensorView& out_top_ids,
              const TensorView& out_top_logprobs) {
  Check check("logprobs");
  check.activation("logits", logits, {"num_rows", "vocab_size"});
  check.tensor("token_ids", token_ids, {"num_rows"}, {DType::i32});
  check.tensor("out_logprobs", out_logprobs, {"num_rows"}, {DType::f32});
  check.tensor("out_ranks", out_ranks, {"num_rows"}, {DType::i32});
  check.tensor("out_top_ids", out_top_ids, {"num_rows", "num_top"}, {DType::i32});
  check.tensor("out_top_logprobs", out_top_logprobs, {"num_rows", "num_top"}, {DType::f32});
  check.writable("out_logprobs", out_logprobs);
  check.writable("out_ranks", out_ranks);
  check.writable("out_top_ids", out_top_ids);
  check.writable("out_top_logprobs", out_top_logprobs);
  LogprobsParams p{};
  p.logits = logits.data;
  p.dtype = logits.dtype;
  p.token_ids = static_cast<const std::int32_t*>(token_ids.data);
  p.logprobs = static_cast<float*>(out_logprobs.data);
  p.ranks = static_cast<std::int32_t*>(out_ranks.data);
  p.top_ids = static_cast<std::int32_t*>(out_top_ids.data);
  p.top_logprobs = static_cast<float*>(out_top_logprobs.data);
  p.num_rows = check.size("num_rows");
  p.vocab_size = check.size("vocab_size");
  p.num_top = check.size("num_top");
  p.logits_stride = logits.strides[0];
  check.require(p.num_top <= p.vocab_size, "num_top",
                "at most vocab_size=" + std::to_string(p.vocab_size), std::to_string(p.num_top));
  // What a recorded program will find in token_ids isn't known yet.
  if (logits.device == Device::cpu && Program::recording() == nullptr) {
    for (std::int64_t row = 0; row < p.num_rows; ++row) {
      check.require(p.token_ids[row] >= -1 && p.token_ids[row] < p.vocab_size, "token_ids",
                    "-1 or below vocab_size=" + std::to_string(p.vocab_size),
                    std::to_string(p.token_ids[row]));
    }
  }
  run(p, logits.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const LogprobsParams& params, Device device) {
  FULLBEAM_DISPATCH(logprobs, device, params);
}
