// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdexcept>
#include <string>

#include "core/op.h"
#include "core/program.h"
#include "core/tensor.h"

// An op whose CUDA twin is built says so here by FULLBEAM_DISPATCH; one whose twin is still to come
// uses FULLBEAM_DISPATCH_CPU.
#ifdef FULLBEAM_WITH_CUDA
#define FULLBEAM_DISPATCH(op, device, params) \
  launch(params, device == Device::cuda ? &cuda::op : FULLBEAM_CPU(op))
#else
#define FULLBEAM_DISPATCH(op, device, params) FULLBEAM_DISPATCH_CPU(op, device, params)
#endif
#define FULLBEAM_DISPATCH_CPU(op, device, params) \
  (require_cpu(#op, device), launch(params, FULLBEAM_CPU(op)))

namespace fullbeam {

struct NotImplemented : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require_cpu(const char* op, Device device) {
  if (device != Device::cpu) {
    throw NotImplemented(std::string(op) +
                         ": this build serves tensors on the CPU only, got one on a CUDA device");
  }
}

}  // namespace fullbeam
