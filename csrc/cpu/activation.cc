// SPDX-License-Identifier: Apache-2.0
// Activation: out = activation(x). Mapping, cost, numerics and source: activations.h.
#include "ops/activation.h"

#include "cpu/activations.h"

namespace fullbeam::cpu::FULLBEAM_ISA {

void activation(const ActivationParams& p) { activate<false>(p); }

}  // namespace fullbeam::cpu::FULLBEAM_ISA
