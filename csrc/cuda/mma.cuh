// SPDX-License-Identifier: Apache-2.0
// Tensor-core products of one warp on 16-bit floats, and the loads that bring their operands.
//
// Fragments, with g = lane / 4 and t = lane % 4; each register holds two neighbours of a row
// (of a column for B):
//   A [16, 16]: a[0] (g, 2t) a[1] (g + 8, 2t) a[2] (g, 2t + 8) a[3] (g + 8, 2t + 8)
//   B [16, 8]:  b[0] (2t, g) b[1] (2t + 8, g), rows first
//   D [16, 8]:  d[0..1] (g, 2t) d[2..3] (g + 8, 2t)
#pragma once
#include <cstdint>

#include "cuda/vec.cuh"

namespace fullbeam::cuda {

// Two floats as one register of T (Half or BFloat), the first in the low half.
template <class T>
__device__ inline unsigned pack(float low, float high);
template <>
__device__ inline unsigned pack<Half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}
template <>
__device__ inline unsigned pack<BFloat>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

__device__ inline unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Four 8x8 matrices from shared memory: lane i gives the address of row i % 8 of matrix i / 8, 16
// bytes each, a multiple of 16. Lane i gets of matrix j in to[j]: (i / 4, 2 * (i % 4)) and its
// right neighbour; transposed, (2 * (i % 4), i / 4) and its lower neighbour.
__device__ inline void load_matrices(const void* row, unsigned (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(const void* row, unsigned (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of two matrices; the addresses of lanes 16 to 31 are not used.
__device__ inline void load_matrices(const void* row, unsigned (&to)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(const void* row, unsigned (&to)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}

// d += a * b, accumulated in float32.
template <class T>
__device__ inline void multiply_add(const unsigned (&a)[4], const unsigned (&b)[2], float (&d)[4]);
template <>
__device__ inline void multiply_add<Half>(const unsigned (&a)[4], const unsigned (&b)[2],
                                          float (&d)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<BFloat>(const unsigned (&a)[4], const unsigned (&b)[2],
                                            float (&d)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace fullbeam::cuda
