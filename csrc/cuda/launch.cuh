// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
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

// Launches a kernel on the current stream and throws where CUDA refuses it. Every kernel goes
// through here.
template <class... Params, class... Args>
inline void launch(void (*kernel)(Params...), const Shape& shape, Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(current_stream().handle);
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  const OnDevice on_device;
  if (shape.overlaps && device_info().is_hopper) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.shared_bytes > (48 << 10)) {
    FULLBEAM_CUDA_CALL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shape.shared_bytes)));
  }
  FULLBEAM_CUDA_CALL(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...));
}

}  // namespace fullbeam::cuda
