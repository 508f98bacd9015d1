// SPDX-License-Identifier: Apache-2.0
// The kernel of every op on rows of logits, and its launch.
#pragma once
#include <new>
#include <string>

#include "core/dispatch.h"
#include "cuda/logits_passes.cuh"

namespace fullbeam::cuda {

// One kernel for every op on rows: `Op` is built from the params and the row's number, in shared
// memory, and has set(Row&) for the row's address, size and edits, scan(RowShared&) for the first
// pass and finish(RowShared&) for all the rest.
template <class Op>
constexpr std::int64_t bytes_before_tiles() {
  return (std::int64_t{sizeof(RowShared)} + std::int64_t{sizeof(Op)} + 127) / 128 * 128;
}

template <class Op, class Params>
__global__ void __launch_bounds__(kMaxRowThreads, 2)
    row_kernel(const __grid_constant__ Params p, const __grid_constant__ RowTuning tuning,
               float* const stats, unsigned* const counters) {
  const std::int64_t idx = blockIdx.x / tuning.num_parts;
  const auto part = static_cast<int>(blockIdx.x % tuning.num_parts);
  RowShared& s = row_shared();
  Op& op = *reinterpret_cast<Op*>(&s + 1);
  if (threadIdx.x == 0) {
    new (&op) Op(p, idx);
    Row& row = s.row;
    row = {};
    op.set(row);
    row.num_strips = (row.vocab_size + kStrip - 1) / kStrip;
    row.begin = part * tuning.part_strips;
    row.end = row.begin + tuning.part_strips;
    row.begin = row.begin < row.num_strips ? row.begin : row.num_strips;
    row.end = row.end < row.num_strips ? row.end : row.num_strips;
    row.resident = reinterpret_cast<float*>(reinterpret_cast<char*>(&s) + bytes_before_tiles<Op>());
    row.tile_strips = tuning.tile_strips;
    if (tuning.is_cluster) {
      row.team = {cluster_rank(), cluster_size()};
      row.is_resident = true;
      row.root = row.team.at(&s, 0);
      row.stats_first = row.begin;
      row.tile = row.resident + tuning.part_strips * kStrip;
      for (int i = 0; i < 4; ++i) {
        row.stats[i] = row.tile + row.tile_strips * kStrip + i * tuning.part_strips;
      }
    } else {
      row.team = {0, 1};
      row.root = &s;
      row.tile = row.resident;
      for (int i = 0; i < 4; ++i) row.stats[i] = stats + (idx * 4 + i) * row.num_strips;
    }
  }
  __syncthreads();
  op.scan(s);
  if (!tuning.is_cluster) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      // Wraps to 0 at the last block, for the next launch.
      s.is_last = tuning.num_parts == 1 ||
                  atomicInc(counters + idx, tuning.num_parts - 1) == tuning.num_parts - 1;
      s.row.begin = 0;
      s.row.end = s.row.num_strips;
    }
    __syncthreads();
    if (s.is_last == 0) return;
    __threadfence();
  }
  op.finish(s);
  s.row.team.sync();  // others may still read this block's memory, and what `op` refers to
}

// Of one launch.
struct RowLaunch {
  RowTuning tuning;
  Shape shape;
  std::int64_t stats_bytes;  // of stats in global memory
};

template <class Op>
inline RowLaunch plan_rows(std::int64_t num_rows, std::int64_t vocab_size, bool is_cluster) {
  const RowTuning tuning = tune_rows(vocab_size, is_cluster);
  const std::int64_t num_strips = (vocab_size + kStrip - 1) / kStrip;
  const std::int64_t own = is_cluster ? tuning.part_strips * (kStrip + 4) : 0;
  return {tuning,
          {.grid = static_cast<unsigned>(num_rows * tuning.num_parts),
           .block = static_cast<unsigned>(tuning.threads),
           .shared_bytes = bytes_before_tiles<Op>() + (own + tuning.tile_strips * kStrip) * 4,
           .cluster = is_cluster ? tuning.num_parts : 1},
          is_cluster ? 0 : num_rows * 4 * num_strips * 4};
}

// Chooses the way: clusters, wherever the device can hold one.
template <class Op, class Params>
inline RowLaunch choose_rows(const char* op, std::int64_t num_rows, std::int64_t vocab_size) {
  if (vocab_size > kMaxVocab) {
    throw NotImplemented(std::string(op) + ": vocab_size must be at most " +
                         std::to_string(kMaxVocab) + " on CUDA, got " + std::to_string(vocab_size));
  }
  const DeviceInfo device = device_info();
  if (device.is_hopper && vocab_size > std::int64_t{kCluster} * kStrip) {
    const RowLaunch plan = plan_rows<Op>(num_rows, vocab_size, true);
    if (plan.shape.shared_bytes <= device.max_shared_bytes &&
        fits_cluster(&row_kernel<Op, Params>, plan.shape)) {
      return plan;
    }
  }
  return plan_rows<Op>(num_rows, vocab_size, false);
}

// Runs the op on rows; `stats` has plan.stats_bytes, and each row a counter.
template <class Op, class Params>
inline void launch_rows(const RowLaunch& plan, const Params& p, void* stats,
                        unsigned* row_counters) {
  launch(&row_kernel<Op, Params>, plan.shape, p, plan.tuning, static_cast<float*>(stats),
         row_counters);
}

}  // namespace fullbeam::cuda
