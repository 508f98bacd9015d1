// SPDX-License-Identifier: Apache-2.0
#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/errors.h"

namespace fullbeam {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512};

Isa parse(const std::string& name) {
  for (Isa isa : kAll) {
    if (name == name_of(isa)) {
      if (has_isa(isa)) return isa;
      throw std::invalid_argument(
          "FULLBEAM_CPU_ISA: the instruction set must be one that this processor has, got " + name);
    }
  }
  throw std::invalid_argument(
      "FULLBEAM_CPU_ISA: the instruction set must be portable, avx2 or avx512, got " + shown(name));
}

Isa choose() {
  const char* forced = std::getenv("FULLBEAM_CPU_ISA");
  if (forced != nullptr && *forced != '\0') return parse(forced);
  if (has_isa(Isa::avx512)) return Isa::avx512;
  return has_isa(Isa::avx2) ? Isa::avx2 : Isa::portable;
}

std::atomic<int> current{-1};

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    default:
      return "portable";
  }
}

bool has_isa(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::avx512:
      return has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case Isa::avx2:
      return has_avx2;
    default:
      return true;
  }
#else
  return isa == Isa::portable;
#endif
}

Isa isa() {
  int value = current.load(std::memory_order_relaxed);
  if (value < 0) {
    value = static_cast<int>(choose());
    current.store(value, std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

void set_isa(const char* name) {
  current.store(static_cast<int>(parse(name)), std::memory_order_relaxed);
}

}  // namespace fullbeam
