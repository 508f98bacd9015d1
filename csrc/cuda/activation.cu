// SPDX-License-Identifier: Apache-2.0
// Activation: out = activation(x), by the kernel of activations.cuh. Source: as cpu/activations.h.
#include "cuda/activations.cuh"
#include "ops/activation.h"

namespace fullbeam::cuda {

void activation(const ActivationParams& p) { launch_activation<false>(p); }

}  // namespace fullbeam::cuda
