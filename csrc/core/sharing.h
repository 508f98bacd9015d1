// SPDX-License-Identifier: Apache-2.0
// Whether two arrays share memory: exactly, and at once for those that are apart as a whole.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/tensor.h"

namespace fullbeam {

// The bytes from an array's first to its last; none of an empty one.
struct Span {
  std::uintptr_t begin = 0, end = 0;
};

// Of the dimensions from `first_dim` on.
inline Span span_of(const TensorView& view, int first_dim = 0) {
  const auto item = static_cast<std::uintptr_t>(size_of(view.dtype));
  const auto begin = reinterpret_cast<std::uintptr_t>(view.data);
  Span span{begin, begin + item};
  for (int i = first_dim; i < view.num_dims; ++i) {
    if (view.shape[i] == 0) return {};
    const std::uintptr_t reach =
        static_cast<std::uintptr_t>(view.shape[i] - 1) * view.strides[i] * item;
    (view.strides[i] < 0 ? span.begin : span.end) += reach;
  }
  return span;
}

// Where an array's runs of consecutive bytes begin, ascending; each is `run_bytes` long.
inline std::vector<std::uintptr_t> runs_of(const TensorView& view, std::uintptr_t& run_bytes) {
  const auto item = static_cast<std::uintptr_t>(size_of(view.dtype));
  int num_dims = view.num_dims;
  for (run_bytes = item; num_dims > 0; --num_dims) {
    const int i = num_dims - 1;
    if (view.shape[i] > 1 && view.strides[i] * item != run_bytes) break;
    run_bytes *= view.shape[i];
  }
  std::vector<std::uintptr_t> runs{reinterpret_cast<std::uintptr_t>(view.data)};
  for (int i = 0; i < num_dims; ++i) {
    const std::size_t count = view.strides[i] == 0 ? 0 : runs.size();
    for (std::int64_t k = 1; k < view.shape[i]; ++k) {
      for (std::size_t j = 0; j < count; ++j) runs.push_back(runs[j] + k * view.strides[i] * item);
    }
  }
  std::sort(runs.begin(), runs.end());
  return runs;
}

inline bool share_memory(const TensorView& a, const TensorView& b) {
  const Span all_a = span_of(a), all_b = span_of(b);
  if (all_a.begin >= all_b.end || all_b.begin >= all_a.end) return false;
  // Columns of the same rows, such as queries and keys of one product: apart in a row, apart in
  // all.
  const std::int64_t stride = a.strides[0] * size_of(a.dtype);
  if (a.num_dims > 0 && b.num_dims > 0 && stride > 0 && stride == b.strides[0] * size_of(b.dtype)) {
    const Span row_a = span_of(a, 1), row_b = span_of(b, 1);
    const auto row_bytes = static_cast<std::uintptr_t>(stride);
    const std::uintptr_t ahead = row_b.begin % row_bytes + row_bytes - row_a.begin % row_bytes;
    const std::uintptr_t gap = ahead % row_bytes;
    if (row_a.end - row_a.begin <= gap && gap + (row_b.end - row_b.begin) <= row_bytes)
      return false;
  }
  std::uintptr_t bytes_a = 0, bytes_b = 0;
  const std::vector<std::uintptr_t> runs_a = runs_of(a, bytes_a), runs_b = runs_of(b, bytes_b);
  return std::any_of(runs_b.begin(), runs_b.end(), [&](std::uintptr_t begin) {
    const auto next = std::upper_bound(runs_a.begin(), runs_a.end(), begin - bytes_a);
    return next != runs_a.end() && *next < begin + bytes_b;
  });
}

// Whether each element of `a` is the element of `b` at the same indices.
inline bool lies_on(const TensorView& a, const TensorView& b) {
  bool lies = a.data == b.data && a.dtype == b.dtype && a.num_dims == b.num_dims;
  for (int i = 0; lies && i < a.num_dims; ++i) {
    lies = a.shape[i] <= b.shape[i] && (a.shape[i] == 1 || a.strides[i] == b.strides[i]);
  }
  return lies;
}

}  // namespace fullbeam
