// SPDX-License-Identifier: Apache-2.0
#include "ops/beam_step.h"

#include <limits>

#include "core/dispatch.h"
#include "ops/array_checks.h"

namespace fullbeam::ops {
namespace {

constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr double kMaxDouble = std::numeric_limits<double>::max();

BeamStepResults check_results(Check& check, const char* argument, const Tensor& parents,
                              const Tensor& token_ids, const Tensor& logprobs, const Tensor& sums) {
  check.tensor(argument, parents, {"num_groups", "max_beam"}, {DType::i32});
  check.tensor(argument, token_ids, {"num_groups", "max_beam"}, {DType::i32});
  check.tensor(argument, logprobs, {"num_groups", "max_beam"}, {DType::f32});
  check.tensor(argument, sums, {"num_groups", "max_beam", 2}, {DType::f64});
  for (const Tensor* out : {&parents, &token_ids, &logprobs, &sums}) {
    check.writable(argument, *out);
  }
  return {static_cast<std::int32_t*>(parents.data), static_cast<std::int32_t*>(token_ids.data),
          static_cast<float*>(logprobs.data), static_cast<double*>(sums.data)};
}

// What the arrays hold, where this call reads it now (a recorded program reads it later, and trusts
// its maker).
void check_data(const Check& check, const BeamStepParams& p) {
  check_ints(check, "beam_rows", p.beam_rows, p.num_beams, 0, p.num_rows - 1);
  check_floats(check, "sums", p.sums, 2 * p.num_beams, -kMaxDouble, kMaxDouble, "finite");
  check_starts(check, "group_starts", p.group_starts, p.num_groups, "num_beams", p.num_beams);
  check_starts(check, "request_starts", p.request_starts, p.num_requests, "num_groups",
               p.num_groups);
  check_ints(check, "beam_sizes", p.beam_sizes, p.num_groups, 1, p.max_beam);
  check_floats(check, "diversity_strengths", p.diversity_strengths, p.num_requests, 0.0f, kMaxFloat,
               "finite and at least 0");
  check_ints(check, "allowed_idx", p.allowed_idx, p.num_beams, -1, p.num_allowed - 1);
  check_ints(check, "terminator_idx", p.terminator_idx, p.num_beams, -1, p.num_terminators - 1);
  check_starts(check, "bias_starts", p.bias_starts, p.num_beams, "num_biases", p.num_biases);
  check_ints(check, "bias_ids", p.bias_ids, p.num_biases, 0, p.vocab_size - 1);
  check_floats(check, "bias_values", p.bias_values, p.num_biases,
               -std::numeric_limits<float>::infinity(), kMaxFloat, "finite or -infinity");
}

}  // namespace

void beam_step(const Tensor& logits, const Tensor& beam_rows, const Tensor& sums,
               const Tensor& group_starts, const Tensor& request_starts, const Tensor& beam_sizes,
               const Tensor& diversity_strengths, const MaybeTensor& allowed,
               const MaybeTensor& allowed_idx, const MaybeTensor& terminators,
               const MaybeTensor& terminator_idx, const MaybeTensor& bias_starts,
               const MaybeTensor& bias_ids, const MaybeTensor& bias_values,
               const Tensor& out_parents, const Tensor& out_token_ids, const Tensor& out_logprobs,
               const Tensor& out_sums, const Tensor& out_finished_parents,
               const Tensor& out_finished_token_ids, const Tensor& out_finished_logprobs,
               const Tensor& out_finished_sums) {
  Check check("beam_step");
  BeamStepParams p{};
  check.activation("logits", logits, {"num_rows", "vocab_size"});
  check.tensor("beam_rows", beam_rows, {"num_beams"}, {DType::i32});
  check.tensor("sums", sums, {"num_beams", 2}, {DType::f64});
  check.tensor("beam_sizes", beam_sizes, {"num_groups"}, {DType::i32});
  check.tensor("diversity_strengths", diversity_strengths, {"num_requests"}, {DType::f32});
  p.num_rows = check.size("num_rows");
  p.num_beams = check.size("num_beams");
  p.num_groups = check.size("num_groups");
  p.num_requests = check.size("num_requests");
  p.vocab_size = check.size("vocab_size");
  p.num_words = (p.vocab_size + 31) / 32;
  p.logits_stride = logits.strides[0];
  check.tensor("group_starts", group_starts, {p.num_groups + 1}, {DType::i32});
  check.tensor("request_starts", request_starts, {p.num_requests + 1}, {DType::i32});
  p.allowed = data_with<std::uint32_t>(check, "allowed", allowed, {"num_allowed", p.num_words},
                                       DType::u32, "allowed_idx", allowed_idx);
  p.allowed_idx = data_with<std::int32_t>(check, "allowed_idx", allowed_idx, {"num_beams"},
                                          DType::i32, "allowed", allowed);
  p.terminators =
      data_with<std::uint32_t>(check, "terminators", terminators, {"num_terminators", p.num_words},
                               DType::u32, "terminator_idx", terminator_idx);
  p.terminator_idx = data_with<std::int32_t>(check, "terminator_idx", terminator_idx, {"num_beams"},
                                             DType::i32, "terminators", terminators);
  p.bias_starts = data_with<std::int32_t>(check, "bias_starts", bias_starts, {p.num_beams + 1},
                                          DType::i32, "bias_ids", bias_ids);
  p.bias_ids = data_with<std::int32_t>(check, "bias_ids", bias_ids, {"num_biases"}, DType::i32,
                                       "bias_starts", bias_starts);
  p.bias_values = data_with<float>(check, "bias_values", bias_values, {"num_biases"}, DType::f32,
                                   "bias_starts", bias_starts);
  p.num_allowed = check.size("num_allowed");
  p.num_terminators = check.size("num_terminators");
  p.num_biases = check.size("num_biases");
  p.live = check_results(check, "out", out_parents, out_token_ids, out_logprobs, out_sums);
  p.finished = check_results(check, "out_finished", out_finished_parents, out_finished_token_ids,
                             out_finished_logprobs, out_finished_sums);
  p.max_beam = check.size("max_beam");
  p.logits = logits.data;
  p.dtype = logits.dtype;
  p.beam_rows = static_cast<const std::int32_t*>(beam_rows.data);
  p.sums = static_cast<const double*>(sums.data);
  p.group_starts = static_cast<const std::int32_t*>(group_starts.data);
  p.request_starts = static_cast<const std::int32_t*>(request_starts.data);
  p.beam_sizes = static_cast<const std::int32_t*>(beam_sizes.data);
  p.diversity_strengths = static_cast<const float*>(diversity_strengths.data);
  if (logits.device == Device::cpu && Program::recording() == nullptr) check_data(check, p);
  run(p, logits.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const BeamStepParams& params, Device device) {
  FULLBEAM_DISPATCH(beam_step, device, params);
}
