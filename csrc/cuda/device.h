// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>

#include "core/api.h"

namespace fullbeam::cuda {

struct DeviceInfo {
  int num_sms;
  std::int64_t max_shared_bytes;  // of one block
  // Has code of its own for capability 90 (clusters, launches that overlap). Later devices don't:
  // they run what was compiled for all.
  bool is_hopper;
};

// Of the current stream's device.
DeviceInfo device_info();

// Makes the current stream's device this thread's own, as launches and allocations want it, and
// puts the one before back at its end.
class OnDevice {
 public:
  OnDevice();
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int idx_, before_ = 0;
};

// Grow-only memory of the current stream, for intermediate results of one op: the next op on the
// stream reuses it. What it holds is undefined. Outgrown memory stays, since a captured graph may
// use it; graphs captured on one stream share it, and must not run at the same time. It may grow
// while a graph is captured: that is done at once, and no part of the graph.
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
