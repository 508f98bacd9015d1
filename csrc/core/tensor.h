// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstdint>

#include "core/dtype.h"

namespace fullbeam {

enum class Device : std::int32_t { cpu, cuda };

// A view of somebody else's memory. Strides are in elements.
struct TensorView {
  static constexpr int kMaxDims = 4;
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int device_idx = 0;
  bool is_writable = true;
  int num_dims = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};
};

}  // namespace fullbeam
