// SPDX-License-Identifier: Apache-2.0
// Gated activation: out = activation(gate) * up, by the kernel of activations.cuh. Source: Shazeer
// 2020 (arXiv 2002.05202).
#include "cuda/activations.cuh"
#include "ops/gated_activation.h"

namespace fullbeam::cuda {

void gated_activation(const GatedActivationParams& p) { launch_activation<true>(p); }

}  // namespace fullbeam::cuda
