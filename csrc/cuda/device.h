// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>

#include "core/api.h"

namespace fullbeam::cuda {

struct DeviceInfo {
  int capability;  // 10 * major + minor
  int num_sms;
  std::int64_t max_shared_bytes;  // of one block
};

// Of the current stream's device.
DeviceInfo device_info();

// Grow-only memory of the current stream, for intermediate results of one op: the next op on the
// stream reuses it. What it holds is undefined. Outgrown memory stays, since a captured graph may
// use it.
void* workspace(std::int64_t num_bytes);

// Counters of the current stream, zero at the start; a kernel leaves them zero, whatever happened.
unsigned* counters(std::int64_t count);

// Devices that can be used, and why there are none: "" or the driver's words.
FULLBEAM_API int num_devices();
FULLBEAM_API std::string why_no_device();

// Throws std::runtime_error with the call, its place and CUDA's words.
void check_call(int error, const char* call, const char* file, int line);

}  // namespace fullbeam::cuda

#define FULLBEAM_CUDA_CALL(call) \
  ::fullbeam::cuda::check_call(static_cast<int>(call), #call, __FILE__, __LINE__)
