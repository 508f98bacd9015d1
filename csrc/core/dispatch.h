// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "core/errors.h"
#include "core/op.h"
#include "core/program.h"
#include "core/tensor.h"
#ifdef FULLBEAM_WITH_CUDA
#include "cuda/device.h"
#endif

// An op whose CUDA twin is built says so here by FULLBEAM_DISPATCH; one whose twin is still to come
// uses FULLBEAM_DISPATCH_CPU.
#if defined(FULLBEAM_EMULATE)  // the tests' build: CUDA kernels run on the CPU, and no others
#define FULLBEAM_DISPATCH(op, device, params) launch(params, &cuda::op)
#define FULLBEAM_DISPATCH_CPU(op, device, params) \
  (static_cast<void>(params), require_cpu(#op, device))
#else
#ifdef FULLBEAM_WITH_CUDA
#define FULLBEAM_DISPATCH(op, device, params) \
  launch(params, device == Device::cuda ? &cuda::op : FULLBEAM_CPU(op))
#else
#define FULLBEAM_DISPATCH(op, device, params) FULLBEAM_DISPATCH_CPU(op, device, params)
#endif
#define FULLBEAM_DISPATCH_CPU(op, device, params) \
  (require_cpu(#op, device), launch(params, FULLBEAM_CPU(op)))
#endif

namespace fullbeam {

// The device that arrays in the host's memory belong to.
#if defined(FULLBEAM_EMULATE)
constexpr Device kHostDevice = Device::cuda;
#else
constexpr Device kHostDevice = Device::cpu;
#endif

// CUDA devices that this process can use, and where there is none, why.
#if defined(FULLBEAM_WITH_CUDA)
inline int num_cuda_devices() { return cuda::num_devices(); }
inline std::string why_no_cuda_device() { return cuda::why_no_device(); }
#else
inline int num_cuda_devices() { return 0; }
inline std::string why_no_cuda_device() { return "this build has no CUDA kernels"; }
#endif

inline void require_cpu(const char* op, Device device) {
  if (device != Device::cpu) {
    throw NotImplemented(std::string(op) +
                         ": this build serves tensors on the CPU only, got one on a CUDA device");
  }
}

}  // namespace fullbeam
