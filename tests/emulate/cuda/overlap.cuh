// SPDX-License-Identifier: Apache-2.0
// The emulation's version of csrc/cuda/overlap.cuh; launches never overlap, but whoever may must
// wait.
#pragma once
#include "cuda_runtime.h"

namespace fullbeam::cuda {

inline void wait_for_launch_before() { emulate::fiber->has_waited = true; }

}  // namespace fullbeam::cuda
