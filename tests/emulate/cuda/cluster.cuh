// SPDX-License-Identifier: Apache-2.0
// The emulation's version of csrc/cuda/cluster.cuh.
#pragma once
#include "cuda_runtime.h"

namespace fullbeam::cuda {

inline unsigned cluster_rank() { return emulate::fiber->block->cluster_rank; }
inline unsigned cluster_size() { return emulate::cluster_size; }
template <class T>
inline T* map_shared(T* shared, unsigned rank) {
  return static_cast<T*>(emulate::in_block_of_rank(shared, rank));
}
inline void cluster_arrive() { emulate::cluster_arrive(); }
inline void cluster_wait() { emulate::cluster_wait(); }
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

}  // namespace fullbeam::cuda
