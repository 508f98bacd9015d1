// SPDX-License-Identifier: Apache-2.0
// What the processor's integer units can do at best, so that a benchmark can say how far a kernel
// is from it. Assembly, because compilers copy accumulators in such loops (GCC 12 halves the rate).
#include "core/ceiling.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "core/isa.h"
#include "core/parallel.h"

namespace fullbeam {
namespace {

constexpr std::int64_t kIterations = 1 << 19;
constexpr int kRounds = 5;

#if defined(__x86_64__)

// 12 chains hide the latency of a product. Registers hold whatever they held: integers have no
// slow values.
void vnni_loop(std::int64_t count) {
  asm volatile(
      "1:\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm0\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm1\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm2\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm3\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm4\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm5\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm6\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm7\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm8\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm9\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm10\n\t"
      "vpdpbusd %%zmm14, %%zmm15, %%zmm11\n\t"
      "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(count)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11");
}
constexpr std::int64_t kVnniOps = 12 * 64 * 2;

// Products of bytes to 16 bits, pairs of those to 32, and the sum: 3 instructions for 32 products.
void avx2_loop(std::int64_t count) {
  asm volatile(
      "1:\n\t"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm6\n\t"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm7\n\t"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm8\n\t"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm9\n\t"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm10\n\t"
      "vpmaddubsw %%ymm14, %%ymm15, %%ymm11\n\t"
      "vpmaddwd %%ymm13, %%ymm6, %%ymm6\n\t"
      "vpmaddwd %%ymm13, %%ymm7, %%ymm7\n\t"
      "vpmaddwd %%ymm13, %%ymm8, %%ymm8\n\t"
      "vpmaddwd %%ymm13, %%ymm9, %%ymm9\n\t"
      "vpmaddwd %%ymm13, %%ymm10, %%ymm10\n\t"
      "vpmaddwd %%ymm13, %%ymm11, %%ymm11\n\t"
      "vpaddd %%ymm6, %%ymm0, %%ymm0\n\t"
      "vpaddd %%ymm7, %%ymm1, %%ymm1\n\t"
      "vpaddd %%ymm8, %%ymm2, %%ymm2\n\t"
      "vpaddd %%ymm9, %%ymm3, %%ymm3\n\t"
      "vpaddd %%ymm10, %%ymm4, %%ymm4\n\t"
      "vpaddd %%ymm11, %%ymm5, %%ymm5\n\t"
      "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(count)
      :
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
        "xmm10", "xmm11");
}
constexpr std::int64_t kAvx2Ops = 6 * 32 * 2;

#endif

}  // namespace

double int8_ops_per_second() {
#if defined(__x86_64__)
  // Asked anew: in the tests' simulation isa() may name instructions that are not there.
  const bool has_vnni = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
  void (*loop)(std::int64_t) = nullptr;
  std::int64_t ops = 0;
  if (isa() == Isa::avx512 && has_vnni) {
    loop = vnni_loop, ops = kVnniOps;
  } else if (isa() != Isa::portable && __builtin_cpu_supports("avx2")) {
    loop = avx2_loop, ops = kAvx2Ops;
  } else {
    return 0;
  }
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    run_team([](void* raw, int, int) { (*static_cast<void (**)(std::int64_t)>(raw))(kIterations); },
             &loop);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(ops * kIterations) * num_threads() / elapsed.count());
  }
  return best;
#else
  return 0;
#endif
}

}  // namespace fullbeam
