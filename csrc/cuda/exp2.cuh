// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

namespace fullbeam::cuda {

// 2^x within 2 ulp, by the special-function unit alone: 0 where it would be subnormal.
__device__ inline float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace fullbeam::cuda
