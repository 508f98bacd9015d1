// SPDX-License-Identifier: Apache-2.0
// Gated activation: out = activation(gate) * up. Mapping, cost and numerics: activations.h. Source:
// Shazeer 2020 (arXiv 2002.05202).
#include "ops/gated_activation.h"

#include "cpu/activations.h"

namespace fullbeam::cpu::FULLBEAM_ISA {

void gated_activation(const GatedActivationParams& p) { activate<true>(p); }

}  // namespace fullbeam::cpu::FULLBEAM_ISA
