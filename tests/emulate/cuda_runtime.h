// SPDX-License-Identifier: Apache-2.0
// Takes the place of CUDA's own header where csrc/cuda is compiled for the CPU (see fibers.h): the
// part of the language and of the runtime that our kernels use. What is missing here doesn't
// compile; add it.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __CUDA_ARCH_LIST__ 800, 900
constexpr int warpSize = 32;

// --- Vector types
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// --- Barriers
inline void __syncthreads() { emulate::block_barrier(false, "__syncthreads"); }
inline int __syncthreads_count(int value) {
  return emulate::block_barrier(value != 0, "__syncthreads_count");
}
inline int __syncthreads_or(int value) {
  return emulate::block_barrier(value != 0, "__syncthreads_or") > 0;
}
inline int __syncthreads_and(int value) {
  return emulate::block_barrier(value == 0, "__syncthreads_and") == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  int nothing = 0;
  emulate::collective(mask, "__syncwarp", nothing, [](int**) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
inline void __trap() { emulate::fail("__trap"); }

// --- Warp operations
namespace emulate {

template <class T>
struct Exchanged {
  T value, result;
  int source;  // lane, or -1 for its own value
};

template <class T>
inline T exchange(unsigned mask, const char* name, T value, int source) {
  Exchanged<T> mine{value, value, source};
  collective(mask, name, mine, [&](Exchanged<T>** lanes) {
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr || lanes[i]->source < 0) continue;
      if (lanes[lanes[i]->source] == nullptr) {
        fail(std::string(name) + ": lane " + std::to_string(i) + " reads lane " +
             std::to_string(lanes[i]->source) + ", which the mask leaves out");
      }
      lanes[i]->result = lanes[lanes[i]->source]->value;
    }
  });
  return mine.result;
}

inline int shuffle_width(const char* name, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(std::string(name) + ": width must be a power of 2 up to 32");
  }
  return width;
}

// combine(all values of the mask's lanes, in order of lanes) for all of them.
template <class T, class Combine>
inline T reduce(unsigned mask, const char* name, T value, Combine&& combine) {
  collective(mask, name, value, [&](T** lanes) {
    T result{};
    bool is_first = true;
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr) continue;
      result = is_first ? *lanes[i] : combine(result, *lanes[i]);
      is_first = false;
    }
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr) *lanes[i] = result;
    }
  });
  return value;
}

}  // namespace emulate

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  emulate::shuffle_width("__shfl_sync", width);
  const int base = emulate::fiber->lane & ~(width - 1);
  return emulate::exchange(mask, "__shfl_sync", value, base + (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  emulate::shuffle_width("__shfl_xor_sync", width);
  const int lane = emulate::fiber->lane, source = lane ^ bits;
  const bool is_inside = source < 32 && source / width <= lane / width;
  return emulate::exchange(mask, "__shfl_xor_sync", value, is_inside ? source : -1);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  emulate::shuffle_width("__shfl_up_sync", width);
  const int lane = emulate::fiber->lane, source = lane - static_cast<int>(delta);
  const bool is_inside = source >= (lane & ~(width - 1));
  return emulate::exchange(mask, "__shfl_up_sync", value, is_inside ? source : -1);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  emulate::shuffle_width("__shfl_down_sync", width);
  const int lane = emulate::fiber->lane, source = lane + static_cast<int>(delta);
  const bool is_inside = source < (lane & ~(width - 1)) + width;
  return emulate::exchange(mask, "__shfl_down_sync", value, is_inside ? source : -1);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate != 0 ? 1u << emulate::fiber->lane : 0u;
  return emulate::reduce(mask, "__ballot_sync", bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulate::reduce(mask, "__any_sync", predicate != 0 ? 1 : 0,
                         [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate) {
  return emulate::reduce(mask, "__all_sync", predicate != 0 ? 1 : 0,
                         [](int a, int b) { return a & b; });
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  struct Lane {
    T value;
    unsigned same;
  } mine{value, 0};
  emulate::collective(mask, "__match_any_sync", mine, [](Lane** lanes) {
    for (int i = 0; i < 32; ++i) {
      for (int j = 0; j < 32; ++j) {
        if (lanes[i] == nullptr || lanes[j] == nullptr) continue;
        if (std::memcmp(&lanes[i]->value, &lanes[j]->value, sizeof(T)) == 0)
          lanes[i]->same |= 1u << j;
      }
    }
  });
  return mine.same;
}
// For int and unsigned, as in CUDA.
template <class T>
inline T __reduce_add_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
  return static_cast<T>(emulate::reduce(mask, "__reduce_add_sync", static_cast<unsigned>(value),
                                        [](unsigned a, unsigned b) { return a + b; }));
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
  return emulate::reduce(mask, "__reduce_max_sync", value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value) {
  static_assert(sizeof(T) == 4 && std::is_integral_v<T>);
  return emulate::reduce(mask, "__reduce_min_sync", value, [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emulate::reduce(mask, "__reduce_or_sync", value,
                         [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emulate::reduce(mask, "__reduce_and_sync", value,
                         [](unsigned a, unsigned b) { return a & b; });
}

// --- Atomics: fibers change over at waiting points only, so plain operations will do.
namespace emulate {
template <class T, class Change>
inline T read_and_change(T* address, Change&& change) {
  const T before = *address;
  *address = static_cast<T>(change(before));
  return before;
}
}  // namespace emulate
template <class T>
inline T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulate::read_and_change(address, [&](T before) { return before + value; });
}
template <class T>
inline T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulate::read_and_change(address, [&](T before) { return std::max(before, value); });
}
template <class T>
inline T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulate::read_and_change(address, [&](T before) { return std::min(before, value); });
}
template <class T>
inline T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulate::read_and_change(address, [&](T before) { return before | value; });
}
template <class T>
inline T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emulate::read_and_change(address, [&](T before) { return before & value; });
}
template <class T>
inline T atomicXor(T* address, std::type_identity_t<T> value) {
  return emulate::read_and_change(address, [&](T before) { return before ^ value; });
}
template <class T>
inline T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulate::read_and_change(address, [&](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulate::read_and_change(address,
                                  [&](T before) { return before == expected ? value : before; });
}
// Wraps to 0 once it has reached `last`.
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return emulate::read_and_change(address,
                                  [&](unsigned before) { return before >= last ? 0 : before + 1; });
}

// --- Arithmetic
template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
template <class T>
inline void __stcg(T* p, std::type_identity_t<T> value) {
  *p = value;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t both = static_cast<std::uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 15;
    unsigned byte = static_cast<unsigned>(both >> (8 * (pick & 7))) & 255;
    if ((pick & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<std::uint64_t>(high) << 32 | low) << (shift & 31)) >>
                               32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
using std::max;
using std::min;

// --- Runtime
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900
};
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    default:
      return "an error that the emulation has no words for";
  }
}
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
inline cudaError_t cudaGetDevice(int* idx) {
  *idx = emulate::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int idx) {
  if (idx < 0) return cudaErrorInvalidValue;
  emulate::current_device = idx;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulate::device.num_sms;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulate::device.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulate::device.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulate::device.shared_bytes;
      break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= emulate::device.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
template <class Kernel>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel*, int,
                                                                 std::size_t) {
  *count = 2;
  return cudaSuccess;
}
// Clusters of the config's size that run at once.
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*,
                                                  const cudaLaunchConfig_t* config) {
  *count = 0;
  if (emulate::device.major != 9) return cudaErrorNotSupported;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    *count =
        static_cast<int>(config->attrs[i].val.clusterDim.x) <= emulate::device.max_cluster ? 1 : 0;
  }
  return cudaSuccess;
}
// Streams, of which emulate::captured_stream may be recorded for a graph: then what waits is
// forbidden to threads that don't ask for it, and work on that stream is not done.
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed = 2 };
constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  emulate::is_capture_relaxed = current == cudaStreamCaptureModeRelaxed;
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(std::intptr_t{-1});
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return emulate::may_wait(stream) ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

// Device memory is the host's; new memory is NaN.
template <class T>
inline cudaError_t cudaMalloc(T** memory, std::size_t num_bytes) {
  if (!emulate::may_wait(nullptr)) return cudaErrorStreamCaptureUnsupported;
  *memory = static_cast<T*>(std::aligned_alloc(256, (num_bytes + 255) / 256 * 256));
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(static_cast<void*>(*memory), 0xFF, num_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int byte, std::size_t num_bytes,
                                   cudaStream_t stream) {
  if (!emulate::is_captured(stream)) std::memset(memory, byte, num_bytes);
  return cudaSuccess;
}

template <class... Params, class... Args>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                                      Args&&... args) {
  emulate::Grid grid{config->gridDim, config->blockDim, config->dynamicSmemBytes, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      grid.overlaps = true;
      continue;
    }
    const dim3 cluster = config->attrs[i].val.clusterDim;
    // Later devices would run the code for capability 80, whose clusters have one block.
    if (emulate::device.major != 9) return cudaErrorNotSupported;
    if (cluster.y != 1 || cluster.z != 1 ||
        static_cast<int>(cluster.x) > emulate::device.max_cluster || grid.grid.x % cluster.x != 0) {
      return cudaErrorInvalidConfiguration;
    }
    grid.cluster = cluster.x;
  }
  const dim3 g = grid.grid, b = grid.block;
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 || g.z > 65535 || b.x * b.y * b.z == 0 ||
      b.x * b.y * b.z > 1024 ||
      grid.shared_bytes > static_cast<std::size_t>(emulate::device.shared_bytes)) {
    return cudaErrorInvalidConfiguration;
  }
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  emulate::run_grid(grid, [&] { std::apply(kernel, params); });
  return cudaSuccess;
}
