// SPDX-License-Identifier: Apache-2.0
#include "ops/sample.h"

#include <cmath>
#include <cstdio>
#include <limits>

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {
namespace {

constexpr float kMaxFloat = std::numeric_limits<float>::max();

void check_range(const Check& check, const char* argument, const float* values, std::int64_t count,
                 float high, const char* requirement) {
  for (std::int64_t row = 0; row < count; ++row) {
    if (values[row] >= 0.0f && values[row] <= high) continue;
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(values[row]));
    check.fail(argument, requirement, text);
  }
}

}  // namespace

void sample(const TensorView& logits, const TensorView& temperature, const TensorView& top_k,
            const TensorView& top_p, const TensorView& min_p, const TensorView& seeds,
            const TensorView& counters, const TensorView& out_token_ids) {
  Check check("sample");
  check.tensor("logits", logits, {"num_rows", "vocab_size"}, {DType::f32}, false);
  check.tensor("temperature", temperature, {"num_rows"}, {DType::f32});
  check.tensor("top_k", top_k, {"num_rows"}, {DType::i32});
  check.tensor("top_p", top_p, {"num_rows"}, {DType::f32});
  check.tensor("min_p", min_p, {"num_rows"}, {DType::f32});
  check.tensor("seeds", seeds, {"num_rows"}, {DType::u64});
  check.tensor("counters", counters, {"num_rows", 3}, {DType::u32});
  check.tensor("out", out_token_ids, {"num_rows"}, {DType::i32});
  check.writable("out", out_token_ids);
  SampleParams p{};
  p.logits = static_cast<const float*>(logits.data);
  p.temperature = static_cast<const float*>(temperature.data);
  p.top_k = static_cast<const std::int32_t*>(top_k.data);
  p.top_p = static_cast<const float*>(top_p.data);
  p.min_p = static_cast<const float*>(min_p.data);
  p.seeds = static_cast<const std::uint64_t*>(seeds.data);
  p.counters = static_cast<const std::uint32_t*>(counters.data);
  p.token_ids = static_cast<std::int32_t*>(out_token_ids.data);
  p.num_rows = check.size("num_rows");
  p.vocab_size = check.size("vocab_size");
  p.logits_stride = logits.strides[0];
  // What a recorded program will find in the arrays isn't known yet; the backends are safe with any
  // value.
  if (logits.device == Device::cpu && Program::recording() == nullptr) {
    check_range(check, "temperature", p.temperature, p.num_rows, kMaxFloat,
                "finite and at least 0");
    check_range(check, "top_p", p.top_p, p.num_rows, 1.0f, "in [0, 1]");
    check_range(check, "min_p", p.min_p, p.num_rows, 1.0f, "in [0, 1]");
  }
  FULLBEAM_DISPATCH_CPU(sample, logits.device, p);
}

}  // namespace fullbeam::ops
