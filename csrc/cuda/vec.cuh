// SPDX-License-Identifier: Apache-2.0
// Element types and 16-byte accesses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "core/dtype.h"

namespace fullbeam::cuda {

using Half = __half;
using BFloat = __nv_bfloat16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Half x) { return __half2float(x); }
__device__ inline float to_float(BFloat x) { return __bfloat162float(x); }

// To nearest, ties to even.
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Half from_float<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline BFloat from_float<BFloat>(float x) {
  return __float2bfloat16_rn(x);
}

// kItems elements that are read and written at once; its address must be a multiple of its size.
template <class T, int kItems>
struct alignas(sizeof(T) * kItems) Vec {
  T items[kItems];
};

// kItems floats of memory of type T, by accesses of at most 16 bytes.
template <int kItems, class T>
__device__ inline void load_floats(const T* from, float (&to)[kItems]) {
  constexpr int kEach = kItems * sizeof(T) > 16 ? 16 / sizeof(T) : kItems;
  static_assert(kItems % kEach == 0);
#pragma unroll
  for (int i = 0; i < kItems; i += kEach) {
    const auto vec = *reinterpret_cast<const Vec<T, kEach>*>(from + i);
#pragma unroll
    for (int j = 0; j < kEach; ++j) to[i + j] = to_float(vec.items[j]);
  }
}

template <int kItems, class T>
__device__ inline void store_floats(const float (&from)[kItems], T* to) {
  constexpr int kEach = kItems * sizeof(T) > 16 ? 16 / sizeof(T) : kItems;
  static_assert(kItems % kEach == 0);
#pragma unroll
  for (int i = 0; i < kItems; i += kEach) {
    Vec<T, kEach> vec;
#pragma unroll
    for (int j = 0; j < kEach; ++j) vec.items[j] = from_float<T>(from[i + j]);
    *reinterpret_cast<Vec<T, kEach>*>(to + i) = vec;
  }
}

// Whether every address is a multiple of 16 bytes; strides in bytes may be given as addresses.
inline bool is_aligned16(std::initializer_list<std::int64_t> addresses) {
  for (std::int64_t address : addresses) {
    if (address % 16 != 0) return false;
  }
  return true;
}
inline std::int64_t address_of(const void* memory) {
  return static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(memory));
}

// Calls fn.operator()<T>() for the element type.
template <class Fn>
inline void dispatch_float(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f16:
      return fn.template operator()<Half>();
    case DType::bf16:
      return fn.template operator()<BFloat>();
    default:
      return fn.template operator()<float>();
  }
}

}  // namespace fullbeam::cuda
