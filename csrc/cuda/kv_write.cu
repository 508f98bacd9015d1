// SPDX-License-Identifier: Apache-2.0
// Stores new keys and values in their slots of the paged cache.
// Mapping: a token is a row of blocks, a thread takes 8 neighbours of one head's key or value, or
// one element where an address is not a multiple of 16. Where two tokens have the same slot, which
// one stays is not defined. Cost: reads k and v, writes the same number of elements: memory-bound.
// Numerics: round to nearest even; float16 saturates at +-65504 (infinity included), NaN stays NaN.
// Source: pages as on the CPU.
#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/vec.cuh"
#include "ops/kv_write.h"

namespace fullbeam::cuda {
namespace {

template <class T>
__device__ inline float saturated(float x) {
  if constexpr (std::is_same_v<T, Half>)
    return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
  return x;
}

template <class From, class To, int kItems>
__global__ void __launch_bounds__(256) write_token(const __grid_constant__ KvWriteParams p) {
  const std::int64_t token = blockIdx.x, per_kind = p.num_kv_heads * p.head_dim;
  std::int64_t first = first_item<kItems>();
  if (first >= 2 * per_kind) return;
  const std::int64_t slot = p.slots[token];
  if (slot < 0 || slot >= p.num_pages * p.page_size) return;
  const bool is_value = first >= per_kind;
  first -= is_value ? per_kind : 0;
  const std::int64_t head = first / p.head_dim, dim = first % p.head_dim;
  const From* from =
      is_value ? static_cast<const From*>(p.v) + token * p.v_token_stride + head * p.v_head_stride
               : static_cast<const From*>(p.k) + token * p.k_token_stride + head * p.k_head_stride;
  const std::int64_t page = slot / p.page_size, offset = slot % p.page_size;
  To* to = is_value ? static_cast<To*>(p.v_pages) + page * p.v_page_stride
                    : static_cast<To*>(p.k_pages) + page * p.k_page_stride;
  float items[kItems];
  load_floats(from + dim, items);
#pragma unroll
  for (int i = 0; i < kItems; ++i) items[i] = saturated<To>(items[i]);
  store_floats(items, to + (head * p.page_size + offset) * p.head_dim + dim);
}

}  // namespace

void kv_write(const KvWriteParams& p) {
  const std::int64_t num_items = 2 * p.num_kv_heads * p.head_dim;
  if (p.num_tokens == 0 || num_items == 0) return;
  dispatch_float(p.source_dtype, [&]<class From>() {
    dispatch_float(p.dtype, [&]<class To>() {
      constexpr int kItems = 8;
      const std::int64_t from = sizeof(From), to = sizeof(To);
      const bool is_aligned =
          p.head_dim % kItems == 0 &&
          is_aligned16({address_of(p.k), address_of(p.v), address_of(p.k_pages),
                        address_of(p.v_pages), p.k_token_stride * from, p.k_head_stride * from,
                        p.v_token_stride * from, p.v_head_stride * from, p.k_page_stride * to,
                        p.v_page_stride * to});
      launch(is_aligned ? &write_token<From, To, kItems> : &write_token<From, To, 1>,
             shape_by_threads(p.num_tokens, is_aligned ? num_items / kItems : num_items), p);
    });
  });
}

}  // namespace fullbeam::cuda
