// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fullbeam {

// Where a CUDA op of this thread goes: set from the call's arrays before the op is launched.
struct Stream {
  void* handle = nullptr;  // cudaStream_t; null is the default stream
  int device_idx = 0;
};

inline Stream& current_stream() {
  thread_local Stream stream;
  return stream;
}

}  // namespace fullbeam
