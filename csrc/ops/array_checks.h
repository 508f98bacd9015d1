// SPDX-License-Identifier: Apache-2.0
// Checks of what arrays hold, and of arrays that are given together.
#pragma once
#include <cmath>
#include <cstdio>
#include <string>

#include "core/check.h"
#include "ops/ops.h"

namespace fullbeam::ops {

// The data of a tensor that is given if and only if `first` is.
template <class T>
inline const T* data_with(Check& check, const char* argument, const MaybeTensor& tensor,
                          std::initializer_list<Size> sizes, DType dtype,
                          const char* first_argument, const MaybeTensor& first) {
  check.require(tensor.has_value() == first.has_value(), first ? argument : first_argument,
                std::string("given with ") + (first ? first_argument : argument), "none");
  if (!tensor) return nullptr;
  check.tensor(argument, *tensor, sizes, {dtype});
  return static_cast<const T*>(tensor->data);
}

inline void check_ints(const Check& check, const char* argument, const std::int32_t* values,
                       std::int64_t count, std::int64_t low, std::int64_t high) {
  for (std::int64_t i = 0; values != nullptr && i < count; ++i) {
    if (values[i] >= low && values[i] <= high) continue;  // makes no text for what is right
    check.fail(argument, "in " + std::to_string(low) + ".." + std::to_string(high),
               std::to_string(values[i]));
  }
}

template <class T>
inline void check_floats(const Check& check, const char* argument, const T* values,
                         std::int64_t count, T low, T high, const char* requirement) {
  for (std::int64_t i = 0; values != nullptr && i < count; ++i) {
    if (values[i] >= low && values[i] <= high) continue;
    char text[32];
    std::snprintf(text, sizeof text, "%g", static_cast<double>(values[i]));
    check.fail(argument, requirement, text);
  }
}

// Where each of `count` rows starts in an array of `end` entries.
inline void check_starts(const Check& check, const char* argument, const std::int32_t* starts,
                         std::int64_t count, const char* end_name, std::int64_t end) {
  if (starts == nullptr) return;
  const std::string requirement =
      std::string("ascending from 0 to ") + end_name + "=" + std::to_string(end);
  check.require(starts[0] == 0, argument, requirement, std::to_string(starts[0]) + " at its start");
  for (std::int64_t i = 0; i < count; ++i) {
    if (starts[i + 1] >= starts[i]) continue;
    check.fail(argument, requirement,
               std::to_string(starts[i + 1]) + " after " + std::to_string(starts[i]));
  }
  check.require(starts[count] == end, argument, requirement,
                std::to_string(starts[count]) + " at its end");
}

}  // namespace fullbeam::ops
