// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace fullbeam {

enum class Isa { portable, avx2, avx512 };

// The instruction set in use: the best one that processor and operating system have, or what
// FULLBEAM_CPU_ISA names. Throws std::invalid_argument when that names one that is unknown or
// absent.
Isa isa();
void set_isa(const char* name);
const char* name_of(Isa isa);
bool has_isa(Isa isa);

}  // namespace fullbeam
