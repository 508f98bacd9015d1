// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "core/api.h"

namespace fullbeam {

enum class Isa { portable, avx2, avx512 };

// The instruction set in use: the best one that processor and operating system have, or what
// FULLBEAM_CPU_ISA names. Throws std::invalid_argument when that names one that is unknown or
// absent.
FULLBEAM_API Isa isa();
FULLBEAM_API void set_isa(const char* name);
FULLBEAM_API const char* name_of(Isa isa);
FULLBEAM_API bool has_isa(Isa isa);

}  // namespace fullbeam
