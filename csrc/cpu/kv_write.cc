// SPDX-License-Identifier: Apache-2.0
// Stores new keys and values in their slots of the paged cache.
// Mapping: a thread takes whole tokens; where two have the same slot, which one stays is not
// defined. Cost: reads k and v, writes the same number of elements in the pages' dtype. Numerics:
// round to nearest even; float16 saturates at +-65504 (infinity included), NaN stays NaN. Source:
// pages of [num_kv_heads, page_size, head_dim], so that one head's keys of a page are one run of
// memory.
#include "ops/kv_write.h"

#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

void convert(const float* from, float* to, std::int64_t count) {
  std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}

void convert(const float* from, BFloat* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from_float<BFloat>(from[i]);
}

// The constant comes first: where the other operand is NaN, min and max give that one.
void convert(const float* from, Half* to, std::int64_t count) {
  const std::int64_t whole = count / kLanes * kLanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    store(to + i, max(set1(-65504.0f), min(set1(65504.0f), load(from + i))));
  }
  for (std::int64_t i = whole; i < count; ++i) {
    const float x = from[i];
    to[i] = from_float<Half>(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
  }
}

template <class T>
void write(const KvWriteParams& p) {
  const std::int64_t num_slots = p.num_pages * p.page_size;
  const std::int64_t grain = 1 + 16384 / (p.num_kv_heads * p.head_dim + 1);
  parallel_for(p.num_tokens, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      const std::int64_t slot = p.slots[token];
      if (slot < 0 || slot >= num_slots) continue;
      const std::int64_t page = slot / p.page_size, offset = slot % p.page_size;
      for (std::int64_t head = 0; head < p.num_kv_heads; ++head) {
        const std::int64_t in_page = (head * p.page_size + offset) * p.head_dim;
        convert(static_cast<const float*>(p.k) + token * p.k_token_stride + head * p.k_head_stride,
                static_cast<T*>(p.k_pages) + page * p.k_page_stride + in_page, p.head_dim);
        convert(static_cast<const float*>(p.v) + token * p.v_token_stride + head * p.v_head_stride,
                static_cast<T*>(p.v_pages) + page * p.v_page_stride + in_page, p.head_dim);
      }
    }
  });
}

}  // namespace

void kv_write(const KvWriteParams& p) {
  switch (p.dtype) {
    case DType::f16:
      return write<Half>(p);
    case DType::bf16:
      return write<BFloat>(p);
    default:
      return write<float>(p);
  }
}

}  // namespace fullbeam::cpu::FULLBEAM_ISA
