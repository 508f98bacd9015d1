// SPDX-License-Identifier: Apache-2.0
#include "ops/kv_write.h"

#include "core/check.h"
#include "core/dispatch.h"
#include "ops/ops.h"

namespace fullbeam::ops {

void kv_write(const TensorView& k, const TensorView& v, const TensorView& k_pages,
              const TensorView& v_pages, const TensorView& slots) {
  Check check("kv_write");
  check.activation("k", k, {"num_tokens", "num_kv_heads", "head_dim"});
  check.activation("v", v, {"num_tokens", "num_kv_heads", "head_dim"});
  check.pages("k_pages", k_pages, {DType::f32, DType::f16, DType::bf16});
  check.pages("v_pages", v_pages, {k_pages.dtype});
  check.writable("k_pages", k_pages);
  check.writable("v_pages", v_pages);
  check.tensor("slots", slots, {"num_tokens"}, {DType::i64});
  KvWriteParams p{};
  p.k = k.data;
  p.v = v.data;
  p.k_pages = k_pages.data;
  p.k_page_stride = k_pages.strides[0];
  p.v_page_stride = v_pages.strides[0];
  p.v_pages = v_pages.data;
  p.slots = static_cast<const std::int64_t*>(slots.data);
  p.source_dtype = k.dtype;
  p.dtype = k_pages.dtype;
  p.num_tokens = check.size("num_tokens");
  p.num_kv_heads = check.size("num_kv_heads");
  p.head_dim = check.size("head_dim");
  p.num_pages = check.size("num_pages");
  p.page_size = check.size("page_size");
  p.k_token_stride = k.strides[0];
  p.k_head_stride = k.strides[1];
  p.v_token_stride = v.strides[0];
  p.v_head_stride = v.strides[1];
  // What a recorded program will find in the slots isn't known yet.
  const std::int64_t num_slots = p.num_pages * p.page_size;
  if (slots.device == Device::cpu && Program::recording() == nullptr) {
    for (std::int64_t token = 0; token < p.num_tokens; ++token) {
      check.require(p.slots[token] < num_slots, "slots",
                    "below num_pages*page_size=" + std::to_string(num_slots),
                    std::to_string(p.slots[token]));
    }
  }
  run(p, k.device);
}

}  // namespace fullbeam::ops

void fullbeam::run(const KvWriteParams& params, Device device) {
  FULLBEAM_DISPATCH(kv_write, device, params);
}
