// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/dtype.h"

namespace fullbeam {

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
  std::string fault;  // what is wrong with an argument that has no such view, for its op to say
};

// A dense array in the host's memory.
inline TensorView dense_view(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  for (const std::int64_t size : shape) view.shape.at(view.num_dims++) = size;
  std::int64_t stride = 1;
  for (int i = view.num_dims - 1; i >= 0; --i) {
    view.strides[i] = stride;
    stride *= view.shape[i];
  }
  return view;
}

}  // namespace fullbeam
