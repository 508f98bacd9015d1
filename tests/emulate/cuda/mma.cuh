// SPDX-License-Identifier: Apache-2.0
// The emulation's version of csrc/cuda/mma.cuh, whose comments say what each function does.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda/vec.cuh"

namespace fullbeam::cuda {

template <class T>
inline unsigned pack(float low, float high) {
  const T both[2] = {from_float<T>(low), from_float<T>(high)};
  unsigned bits;
  std::memcpy(&bits, both, 4);
  return bits;
}

namespace emulated {

template <int kMatrices>
struct MatrixLane {
  const void* row;
  unsigned to[kMatrices];
};

template <int kMatrices>
inline void load_matrices(const char* name, const void* row, bool is_transposed,
                          unsigned (&to)[kMatrices]) {
  MatrixLane<kMatrices> mine{row, {}};
  emulate::collective(0xffffffffu, name, mine, [&](MatrixLane<kMatrices>** lanes) {
    for (int j = 0; j < kMatrices; ++j) {
      std::uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) {
        const void* from = lanes[8 * j + r]->row;
        if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
          emulate::fail(std::string(name) + ": the address of a row is no multiple of 16");
        }
        std::memcpy(matrix[r], from, 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int a = lane / 4, b = 2 * (lane % 4);
        const std::uint16_t low = is_transposed ? matrix[b][a] : matrix[a][b];
        const std::uint16_t high = is_transposed ? matrix[b + 1][a] : matrix[a][b + 1];
        lanes[lane]->to[j] = static_cast<unsigned>(high) << 16 | low;
      }
    }
  });
  for (int j = 0; j < kMatrices; ++j) to[j] = mine.to[j];
}

template <class T>
inline float half_of(unsigned reg, int idx) {
  const auto bits = static_cast<std::uint16_t>(reg >> (16 * idx));
  T value;
  std::memcpy(&value, &bits, 2);
  return to_float(value);
}

}  // namespace emulated

template <int kMatrices>
inline void load_matrices(const void* row, unsigned (&to)[kMatrices]) {
  emulated::load_matrices("load_matrices", row, false, to);
}
template <int kMatrices>
inline void load_matrices_transposed(const void* row, unsigned (&to)[kMatrices]) {
  emulated::load_matrices("load_matrices_transposed", row, true, to);
}

template <class T>
inline void multiply_add(const unsigned (&a)[4], const unsigned (&b)[2], float (&d)[4]) {
  struct Lane {
    const unsigned *a, *b;
    float* d;
  } mine{a, b, d};
  emulate::collective(0xffffffffu, "multiply_add", mine, [](Lane** lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        for (int h = 0; h < 2; ++h)
          left[g + i % 2 * 8][2 * t + i / 2 * 8 + h] = emulated::half_of<T>(lanes[lane]->a[i], h);
      }
      for (int i = 0; i < 2; ++i) {
        for (int h = 0; h < 2; ++h)
          right[2 * t + i * 8 + h][g] = emulated::half_of<T>(lanes[lane]->b[i], h);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, col = 2 * t + i % 2;
        float sum = lanes[lane]->d[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
        lanes[lane]->d[i] = sum;
      }
    }
  });
}

}  // namespace fullbeam::cuda
