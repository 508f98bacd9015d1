// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/api.h"

namespace fullbeam {

// The most int8 multiplications and additions per second of num_threads() threads, with the
// instructions that the chosen instruction set's matrix products are made of and all operands in
// registers; 0 where it has none. Takes some 20 ms.
FULLBEAM_API double int8_ops_per_second();

}  // namespace fullbeam
