// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <array>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/errors.h"
#include "core/sharing.h"
#include "core/tensor.h"

namespace fullbeam {

// A size of a tensor in a check: a name that is bound by the first tensor that has it and compared
// in the rest, or a fixed number.
struct Size {
  const char* name = nullptr;
  std::int64_t value = -1;
  Size(const char* bound_name) : name(bound_name) {}  // NOLINT: meant to convert
  Size(std::int64_t fixed) : value(fixed) {}          // NOLINT
};

// Checks the tensors of one op's call, at the only place where they are checked. They must stay
// where they are until the last one is checked.
class Check {
 public:
  explicit Check(const char* op) : op_(op) { seen_.reserve(8); }

  [[noreturn]] void fail(const std::string& argument, const std::string& requirement,
                         const std::string& got) const {
    throw std::invalid_argument(std::string(op_) + ": " + argument + " must be " + requirement +
                                ", got " + got);
  }
  void require(bool ok, const char* argument, const std::string& requirement,
               const std::string& got) const {
    if (!ok) fail(argument, requirement, got);
  }

  // The shape, the dtype (one of), unit stride in the last dimension, and with `contiguous` all the
  // other strides too.
  void tensor(const char* argument, const TensorView& view, std::initializer_list<Size> sizes,
              std::initializer_list<DType> dtypes, bool contiguous = true) {
    if (!view.fault.empty()) throw TypeError(std::string(op_) + ": " + argument + " " + view.fault);
    bool known = false;
    for (DType dtype : dtypes) known = known || dtype == view.dtype;
    if (!known) {
      std::string wanted;
      for (DType dtype : dtypes)
        wanted += (wanted.empty() ? "" : " or ") + std::string(name_of(dtype));
      throw TypeError(std::string(op_) + ": " + argument + " must be " + wanted + ", got " +
                      name_of(view.dtype));
    }
    bool ok = view.num_dims == static_cast<int>(sizes.size());
    std::string wanted;
    int axis = 0;
    for (const Size& size : sizes) {
      std::int64_t expected = size.value;
      std::string label = std::to_string(size.value);
      if (size.name != nullptr) {
        label = size.name;
        const std::int64_t* bound = find(size.name);
        if (bound == nullptr && ok) bound_.emplace_back(size.name, view.shape[axis]);
        expected = bound == nullptr ? -1 : *bound;
        if (bound != nullptr) label += "=" + std::to_string(*bound);
      }
      if (ok && expected >= 0 && view.shape[axis] != expected) ok = false;
      wanted += (axis == 0 ? "" : ", ") + label;
      ++axis;
    }
    if (!ok) fail(argument, "[" + wanted + "]", shape_text(view));
    if (!is_dense(view, contiguous)) {
      fail(argument, contiguous ? "C-contiguous" : "contiguous in its last dimension",
           "strides that are not");
    }
    if (first_argument_ == nullptr) {
      first_argument_ = argument;
      device_ = view.device;
      device_idx_ = view.device_idx;
    } else if (view.device != device_ || view.device_idx != device_idx_) {
      fail(argument, "on the device of " + std::string(first_argument_),
           device_text(view.device, view.device_idx) + " and " + device_text(device_, device_idx_));
    }
    for (const Seen& other : seen_) {
      if (other.is_out) apart(other, argument, view);
    }
    seen_.push_back({argument, &view});
  }
  // Activations: float32 on the CPU; on CUDA float16 and bfloat16 too, one dtype for all of a call.
  void activation(const char* argument, const TensorView& view, std::initializer_list<Size> sizes) {
    if (has_activation_) {
      tensor(argument, view, sizes, {activation_dtype_}, false);
    } else if (view.device == Device::cpu) {
      tensor(argument, view, sizes, {DType::f32}, false);
    } else {
      tensor(argument, view, sizes, {DType::f32, DType::f16, DType::bf16}, false);
    }
    has_activation_ = true;
    activation_dtype_ = view.dtype;
  }
  // The pages of a KV cache [num_pages, num_kv_heads, page_size, head_dim]: each page dense, any
  // distance between them.
  void pages(const char* argument, const TensorView& view, std::initializer_list<DType> dtypes) {
    tensor(argument, view, {"num_pages", "num_kv_heads", "page_size", "head_dim"}, dtypes, false);
    const std::int64_t size = view.shape[2] * view.shape[3];
    const bool is_dense =
        view.shape[0] == 0 || ((view.shape[2] < 2 || view.strides[2] == view.shape[3]) &&
                               (view.shape[1] < 2 || view.strides[1] == size));
    if (!is_dense) fail(argument, "contiguous within a page", "strides that are not");
  }
  // That an array which was checked may be written, and shares no memory with the call's others. It
  // may lie on those of `may_be`, element for element.
  void writable(const char* argument, const TensorView& view,
                std::array<const char*, 2> may_be = {}) {
    if (!view.is_writable) fail(argument, "writable", "a read-only array");
    std::size_t idx = seen_.size() - 1;
    while (seen_[idx].view->data != view.data || std::strcmp(seen_[idx].argument, argument) != 0)
      --idx;
    Seen& out = seen_[idx];
    out.is_out = true;
    out.may_be = may_be;
    for (const Seen& other : seen_) {
      if (&other != &out) apart(out, other.argument, *other.view);
    }
  }

  std::int64_t size(const char* name) const {
    const std::int64_t* bound = find(name);
    return bound == nullptr ? 0 : *bound;
  }

  static std::string shape_text(const TensorView& view) {
    std::string text = "[";
    for (int i = 0; i < view.num_dims; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
    return text + "]";
  }

 private:
  struct Seen {
    const char* argument;
    const TensorView* view;
    bool is_out = false;
    std::array<const char*, 2> may_be{};
  };

  void apart(const Seen& out, const char* argument, const TensorView& view) const {
    if (!share_memory(*out.view, view)) return;
    bool may_be = false;
    for (const char* name : out.may_be) {
      may_be = may_be || (name != nullptr && std::strcmp(name, argument) == 0);
    }
    if (may_be && lies_on(*out.view, view)) return;
    fail(out.argument,
         (may_be ? "element for element on " : "apart from ") + std::string(argument) +
             (may_be ? ", or apart from it in memory" : " in memory"),
         "memory that they share");
  }
  static bool is_dense(const TensorView& view, bool contiguous) {
    for (int i = 0; i < view.num_dims; ++i) {
      if (view.shape[i] == 0) return true;  // nothing is there, whatever the strides say
    }
    std::int64_t expected = 1;
    for (int i = view.num_dims - 1; i >= 0; --i) {
      const bool matters = view.shape[i] > 1 && (contiguous || i == view.num_dims - 1);
      if (matters && view.strides[i] != expected) return false;
      expected *= view.shape[i];
    }
    return true;
  }
  static std::string device_text(Device device, int idx) {
    return device == Device::cpu ? "cpu" : "cuda:" + std::to_string(idx);
  }
  const std::int64_t* find(const char* name) const {
    for (const auto& [key, value] : bound_) {
      if (key == name) return &value;
    }
    return nullptr;
  }

  const char* op_;
  std::vector<std::pair<std::string, std::int64_t>> bound_;
  std::vector<Seen> seen_;
  const char* first_argument_ = nullptr;
  Device device_ = Device::cpu;
  int device_idx_ = 0;
  bool has_activation_ = false;
  DType activation_dtype_ = DType::f32;
};

}  // namespace fullbeam
