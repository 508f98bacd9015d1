// SPDX-License-Identifier: Apache-2.0
// The emulation's version of csrc/cuda/shared.cuh.
#pragma once
#include "cuda_runtime.h"

namespace fullbeam::cuda {

inline char* dynamic_shared() { return emulate::fiber->block->shared; }

}  // namespace fullbeam::cuda
