// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/api.h"

namespace fullbeam {

// Where a CUDA op of this thread goes: set from the call's arrays before the op is launched.
struct Stream {
  void* handle = nullptr;  // cudaStream_t; null is the default stream
  int device_idx = 0;
};

FULLBEAM_API Stream& current_stream();

}  // namespace fullbeam
