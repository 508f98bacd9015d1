// SPDX-License-Identifier: Apache-2.0
// Blocks of one cluster, which run together and reach each other's shared memory. Code for devices
// before capability 90 sees clusters of one block.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fullbeam::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// The same place in the shared memory of the block of that rank.
template <class T>
__device__ inline T* map_shared(T* shared, unsigned rank) {
  std::uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;"
      : "=l"(mapped)
      : "l"(reinterpret_cast<std::uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}
// A barrier over all threads of the cluster in two halves: what a thread wrote before it arrives,
// the others see after they have waited.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

#else

__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
template <class T>
__device__ inline T* map_shared(T* shared, unsigned) {
  return shared;
}
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() { __syncthreads(); }

#endif

// No block may return while others still read its shared memory: sync before the end.
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace fullbeam::cuda
