// SPDX-License-Identifier: Apache-2.0
// An op on this program's own memory: by views, which are checked, and by the op's struct.
#include <cstdio>
#include <exception>
#include <optional>

#include "fullbeam/ops/ops.h"
#include "fullbeam/ops/rms_norm.h"

using fullbeam::dense_view;
using fullbeam::DType;

int main() try {
  float x[] = {3, 4, 6, 8}, weight[] = {1, 2}, out[4];
  fullbeam::ops::rms_norm(dense_view(x, DType::f32, {2, 2}), dense_view(weight, DType::f32, {2}),
                          std::nullopt, dense_view(out, DType::f32, {2, 2}), 0, 0);
  std::printf("%.4f %.4f %.4f %.4f\n", out[0], out[1], out[2], out[3]);

  fullbeam::RmsNormParams params{};
  params.x = x;
  params.out = x;  // in place, the first row only
  params.weight = weight;
  params.num_tokens = params.num_heads = 1;
  params.size = 2;
  fullbeam::run(params, fullbeam::Device::cpu);
  std::printf("%.4f %.4f %.4f %.4f\n", x[0], x[1], x[2], x[3]);

  // Views that don't fit: the error names the op, the argument and what it must be.
  fullbeam::ops::rms_norm(dense_view(x, DType::f32, {1, 4}), dense_view(weight, DType::f32, {2}),
                          std::nullopt, dense_view(out, DType::f32, {1, 4}), 0, 0);
} catch (const std::exception& error) {
  std::printf("%s\n", error.what());
}
