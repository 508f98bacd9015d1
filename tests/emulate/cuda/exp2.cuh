// SPDX-License-Identifier: Apache-2.0
// The emulation's version of csrc/cuda/exp2.cuh.
#pragma once
#include <cuda_runtime.h>

namespace fullbeam::cuda {

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace fullbeam::cuda
