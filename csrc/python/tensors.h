// SPDX-License-Identifier: Apache-2.0
// Python arrays <-> TensorView: numpy arrays directly, anything else by the DLPack protocol.
// Nothing is copied.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/tensor.h"

namespace fullbeam {

// Fills `view`, and `owner` with what keeps the memory alive; of what is no array the view's fault.
void view_of(pybind11::handle array, TensorView& view, pybind11::object& owner);

// Makes torch's current stream of the device that the call's arrays are on, or the default stream
// for other arrays, this thread's current stream; false where no array is on a CUDA device.
bool set_current_stream();

// Guards an op's call, its arguments loaded: chooses the stream, then releases the interpreter.
class OpCall {
  bool is_on_stream_ = set_current_stream();
  pybind11::gil_scoped_release release_;
};

}  // namespace fullbeam

namespace pybind11::detail {

template <>
struct type_caster<fullbeam::TensorView> {
  PYBIND11_TYPE_CASTER(fullbeam::TensorView, const_name("object"));
  bool load(handle source, bool) {
    fullbeam::view_of(source, value, owner_);
    return true;
  }

 private:
  object owner_;
};

}  // namespace pybind11::detail
