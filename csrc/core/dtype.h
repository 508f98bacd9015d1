// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace fullbeam {

enum class Device : std::int32_t { cpu, cuda };

enum class DType : std::int32_t { f32, f16, bf16, f64, i32, i64, u32, u64, u8 };

constexpr std::int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
    case DType::u64:
      return 8;
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::u8:
      return 1;
    default:
      return 4;
  }
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::f64:
      return "float64";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::u32:
      return "uint32";
    case DType::u64:
      return "uint64";
    case DType::u8:
      return "uint8";
  }
  return "?";
}

}  // namespace fullbeam
