// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>

#include "core/check.h"
#include "ops/gated_activation.h"

namespace fullbeam::ops {

inline Activation activation_of(const Check& check, const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name != "gelu_tanh") check.fail("activation", "silu, gelu or gelu_tanh", shown(name));
  return Activation::gelu_tanh;
}

}  // namespace fullbeam::ops
