// SPDX-License-Identifier: Apache-2.0
// Put before csrc/core/isa.cc with -DFULLBEAM_SIMULATE_AVX512=ON: the processor then says that it
// has AVX-512 (see immintrin.h beside this file). AVX2 is still asked for as ever.
#pragma once
namespace {
constexpr bool is_simulated(const char* feature) {
  return feature[0] == 'a' && feature[1] == 'v' && feature[2] == 'x' && feature[3] == '5';
}
}  // namespace
// Within its own expansion the name is the compiler's function.
#define __builtin_cpu_supports(feature) (is_simulated(feature) || __builtin_cpu_supports(feature))
