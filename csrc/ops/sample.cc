// SPDX-License-Identifier: Apache-2.0
#include "ops/sample.h"

#include <limits>

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/array_checks.h"
#include "ops/ops.h"

namespace fullbeam::ops {
namespace {

constexpr float kMaxFloat = std::numeric_limits<float>::max();

// A number for each row, which needs a history.
template <class T>
const T* with_history(Check& check, const char* argument, const MaybeTensor& tensor, DType dtype,
                      const MaybeTensor& history_starts) {
  if (!tensor) return nullptr;
  check.require(history_starts.has_value(), "history_starts", std::string("given with ") + argument,
                "none");
  check.tensor(argument, *tensor, {"num_rows"}, {dtype});
  return static_cast<const T*>(tensor->data);
}

template <class T>
T* out_of(Check& check, const char* argument, const MaybeTensor& tensor,
          std::initializer_list<Size> sizes, DType dtype, const MaybeTensor& num_top) {
  T* data = const_cast<T*>(data_with<T>(check, argument, tensor, sizes, dtype, "num_top", num_top));
  if (tensor) check.writable(argument, *tensor);
  return data;
}

// What the arrays hold, where this call reads it now. What a recorded program will find there isn't
// known yet; the backends are safe with any value.
void check_data(const Check& check, const SampleParams& p) {
  check_floats(check, "temperature", p.temperature, p.num_rows, 0.0f, kMaxFloat,
               "finite and at least 0");
  check_floats(check, "top_p", p.top_p, p.num_rows, 0.0f, 1.0f, "in [0, 1]");
  check_floats(check, "min_p", p.min_p, p.num_rows, 0.0f, 1.0f, "in [0, 1]");
  check_ints(check, "allowed_idx", p.allowed_idx, p.num_rows, -1, p.num_masks - 1);
  check_starts(check, "bias_starts", p.bias_starts, p.num_rows, "num_biases", p.num_biases);
  check_ints(check, "bias_ids", p.bias_ids, p.num_biases, 0, p.vocab_size - 1);
  check_floats(check, "bias_values", p.bias_values, p.num_biases,
               -std::numeric_limits<float>::infinity(), kMaxFloat, "finite or -infinity");
  check_starts(check, "history_starts", p.history_starts, p.num_rows, "num_histories",
               p.num_histories);
  check_ints(check, "history_ids", p.history_ids, p.num_histories, 0, p.vocab_size - 1);
  check_ints(check, "history_counts", p.history_counts, p.num_histories, 0,
             std::numeric_limits<std::int32_t>::max());
  check_ints(check, "history_last", p.history_last, p.num_rows, -1, p.vocab_size - 1);
  check_floats(check, "repetition_penalty", p.repetition_penalty, p.num_rows,
               std::numeric_limits<float>::denorm_min(), kMaxFloat, "finite and above 0");
  check_floats(check, "frequency_penalty", p.frequency_penalty, p.num_rows, -kMaxFloat, kMaxFloat,
               "finite");
  check_floats(check, "presence_penalty", p.presence_penalty, p.num_rows, -kMaxFloat, kMaxFloat,
               "finite");
  check_ints(check, "num_top", p.num_top, p.num_rows, -1, p.max_top);
}

}  // namespace

void sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const Tensor& seeds, const Tensor& counters,
            const MaybeTensor& allowed, const MaybeTensor& allowed_idx,
            const MaybeTensor& bias_starts, const MaybeTensor& bias_ids,
            const MaybeTensor& bias_values, const MaybeTensor& history_starts,
            const MaybeTensor& history_ids, const MaybeTensor& history_counts,
            const MaybeTensor& history_last, const MaybeTensor& repetition_penalty,
            const MaybeTensor& frequency_penalty, const MaybeTensor& presence_penalty,
            const MaybeTensor& num_top, const Tensor& out_token_ids,
            const MaybeTensor& out_logprobs, const MaybeTensor& out_ranks,
            const MaybeTensor& out_top_ids, const MaybeTensor& out_top_logprobs,
            const MaybeTensor& out_log_sums) {
  Check check("sample");
  SampleParams p{};
  check.activation("logits", logits, {"num_rows", "vocab_size"});
  check.tensor("temperature", temperature, {"num_rows"}, {DType::f32});
  check.tensor("top_k", top_k, {"num_rows"}, {DType::i32});
  check.tensor("top_p", top_p, {"num_rows"}, {DType::f32});
  check.tensor("min_p", min_p, {"num_rows"}, {DType::f32});
  check.tensor("seeds", seeds, {"num_rows"}, {DType::u64});
  check.tensor("counters", counters, {"num_rows", 3}, {DType::u32});
  check.tensor("out", out_token_ids, {"num_rows"}, {DType::i32});
  check.writable("out", out_token_ids);
  p.logits = logits.data;
  p.dtype = logits.dtype;
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
  p.num_words = (p.vocab_size + 31) / 32;

  p.allowed = data_with<std::uint32_t>(check, "allowed", allowed, {"num_masks", p.num_words},
                                       DType::u32, "allowed_idx", allowed_idx);
  p.allowed_idx = data_with<std::int32_t>(check, "allowed_idx", allowed_idx, {"num_rows"},
                                          DType::i32, "allowed", allowed);
  p.bias_starts = data_with<std::int32_t>(check, "bias_starts", bias_starts, {p.num_rows + 1},
                                          DType::i32, "bias_ids", bias_ids);
  p.bias_ids = data_with<std::int32_t>(check, "bias_ids", bias_ids, {"num_biases"}, DType::i32,
                                       "bias_starts", bias_starts);
  p.bias_values = data_with<float>(check, "bias_values", bias_values, {"num_biases"}, DType::f32,
                                   "bias_starts", bias_starts);
  p.history_starts =
      data_with<std::int32_t>(check, "history_starts", history_starts, {p.num_rows + 1}, DType::i32,
                              "history_ids", history_ids);
  p.history_ids = data_with<std::int32_t>(check, "history_ids", history_ids, {"num_histories"},
                                          DType::i32, "history_starts", history_starts);
  p.history_counts =
      data_with<std::int32_t>(check, "history_counts", history_counts, {"num_histories"},
                              DType::i32, "history_starts", history_starts);
  p.history_last =
      with_history<std::int32_t>(check, "history_last", history_last, DType::i32, history_starts);
  p.repetition_penalty = with_history<float>(check, "repetition_penalty", repetition_penalty,
                                             DType::f32, history_starts);
  p.frequency_penalty = with_history<float>(check, "frequency_penalty", frequency_penalty,
                                            DType::f32, history_starts);
  p.presence_penalty =
      with_history<float>(check, "presence_penalty", presence_penalty, DType::f32, history_starts);
  p.num_masks = check.size("num_masks");
  p.num_biases = check.size("num_biases");
  p.num_histories = check.size("num_histories");

  if (num_top) {
    check.tensor("num_top", *num_top, {"num_rows"}, {DType::i32});
    p.num_top = static_cast<const std::int32_t*>(num_top->data);
  }
  p.logprobs =
      out_of<float>(check, "out.logprobs", out_logprobs, {"num_rows"}, DType::f32, num_top);
  p.ranks = out_of<std::int32_t>(check, "out.ranks", out_ranks, {"num_rows"}, DType::i32, num_top);
  p.top_ids = out_of<std::int32_t>(check, "out.top_ids", out_top_ids, {"num_rows", "max_top"},
                                   DType::i32, num_top);
  p.top_logprobs = out_of<float>(check, "out.top_logprobs", out_top_logprobs,
                                 {"num_rows", "max_top"}, DType::f32, num_top);
  p.log_sums =
      out_of<double>(check, "out.log_sums", out_log_sums, {"num_rows", 2}, DType::f64, num_top);
  p.max_top = check.size("max_top");
  check.require(p.max_top <= p.vocab_size, "num_top",
                "at most vocab_size=" + std::to_string(p.vocab_size), std::to_string(p.max_top));
  if (logits.device == Device::cpu && Program::recording() == nullptr) check_data(check, p);
  run(p, logits.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const SampleParams& params, Device device) {
  FULLBEAM_DISPATCH(sample, device, params);
}
