// SPDX-License-Identifier: Apache-2.0
// Python arrays <-> TensorView: numpy arrays directly, anything else by the DLPack protocol.
// Nothing is copied.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "core/tensor.h"

namespace fullbeam {

// Fills `view`, and `owner` with what keeps the memory alive. Throws TypeError for what is no
// array.
void view_of(pybind11::handle array, TensorView& view, pybind11::object& owner);

}  // namespace fullbeam

namespace pybind11::detail {

template <>
struct type_caster<fullbeam::TensorView> {
  PYBIND11_TYPE_CASTER(fullbeam::TensorView, const_name("object"));
  bool load(handle source, bool) {
    if (source.is_none()) return false;
    fullbeam::view_of(source, value, owner_);
    return true;
  }

 private:
  object owner_;
};

}  // namespace pybind11::detail
