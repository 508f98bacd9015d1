// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "core/stream.h"
#include "cuda/device.h"
#include "cuda/overlap.cuh"
#include "cuda/shared.cuh"

namespace fullbeam::cuda {

struct Shape {
  dim3 grid, block;
  std::int64_t shared_bytes = 0;
  unsigned cluster = 1;  // blocks along x that run together; above 1 on Hopper alone
  // On Hopper its blocks may start while the last ones of the launch before end: the kernel calls
  // wait_for_launch_before() first of all.
  bool overlaps = false;
};

// A launch on the current stream, as CUDA is told of it; the stream's device is this thread's own
// as long as it lives.
struct LaunchConfig : cudaLaunchConfig_t {
  LaunchConfig(const void* kernel, const Shape& shape) : cudaLaunchConfig_t{} {
    gridDim = shape.grid;
    blockDim = shape.block;
    dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
    stream = static_cast<cudaStream_t>(current_stream().handle);
    attrs = attributes;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = shape.cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    const DeviceInfo device = device_info();
    if (shape.overlaps && device.is_hopper) {
      cudaLaunchAttribute& attribute = attributes[numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    // All there is, whatever this launch takes: other threads may launch the kernel with more.
    if (shape.shared_bytes > (48 << 10)) {
      FULLBEAM_CUDA_CALL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(device.max_shared_bytes)));
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  OnDevice on_device;
  cudaLaunchAttribute attributes[2]{};
};

// Launches a kernel on the current stream and throws where CUDA refuses it. Every kernel goes
// through here.
template <class... Params, class... Args>
inline void launch(void (*kernel)(Params...), const Shape& shape, Args&&... args) {
  const LaunchConfig config(reinterpret_cast<const void*>(kernel), shape);
  FULLBEAM_CUDA_CALL(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

// Whether the device can run a cluster of such blocks: a slice of a GPU may have too few
// multiprocessors side by side. CUDA is asked once for each device, kernel and shared memory.
template <class... Params>
inline bool fits_cluster(void (*kernel)(Params...), Shape shape) {
  static std::mutex mutex;
  static auto* answers = new std::map<std::tuple<int, const void*, std::int64_t>, bool>();
  const auto* function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [answer, is_new] =
      answers->try_emplace({current_stream().device_idx, function, shape.shared_bytes}, false);
  if (is_new) {
    shape.grid = shape.cluster;
    const LaunchConfig config(function, shape);
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, function, &config) != cudaSuccess) {
      cudaGetLastError();  // clears it: the answer is no
    }
    answer->second = count > 0;
  }
  return answer->second;
}

}  // namespace fullbeam::cuda
