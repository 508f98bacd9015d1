// SPDX-License-Identifier: Apache-2.0
// What the ops on rows of logits share: a thread's memory, block maxima, softmax weights, lists of
// tokens. Everything is in an anonymous namespace, see cpu/vec.h.
#pragma once
#include "core/parallel.h"
#include "cpu/vec.h"

namespace fullbeam::cpu::FULLBEAM_ISA {
namespace {

constexpr std::int64_t kBlock = 128;  // tokens that share a maximum and a partial sum
constexpr std::int64_t kBins = 2048;
constexpr std::int64_t kSample = 4096;  // what stands for a long list
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;

// Some tokens of a row, in order of id.
struct TokenList {
  const float* values;
  const std::int32_t* ids;  // null: all tokens, from 0 on
  std::int64_t size;
};

// The calling thread's memory for one row at a time.
struct RowMemory {
  float* edited_row;       // [vocab_size], the caller's with its edits
  float* finite_row;       // [vocab_size], for rows with +infinity
  float* block_max;        // [num_blocks], of the caller's row
  float* edited_max;       // [num_blocks], of the edited one
  double* block_sums;      // [num_blocks]
  float* values;           // [vocab_size], of a list
  std::int32_t* ids;       // [vocab_size], of a list
  double* weights;         // [vocab_size], of a list: e^((value - max) / temperature)
  std::int32_t* places;    // [vocab_size]
  float* edge_values;      // [vocab_size]
  double* edge_weights;    // [vocab_size]
  float* sample_values;    // [kSample]
  double* sample_weights;  // [kSample]
  double* mass;            // [kBins]
  std::int32_t* counts;    // [kBins]
};

inline std::int64_t num_blocks_of(std::int64_t size) { return (size + kBlock - 1) / kBlock; }

inline RowMemory row_memory(std::int64_t vocab_size) {
  const std::int64_t size = num_blocks_of(vocab_size) * kBlock, num_blocks = size / kBlock;
  auto* memory =
      static_cast<char*>(scratch(size * 40 + num_blocks * 16 + kSample * 12 + kBins * 12));
  const auto take = [&memory](std::int64_t bytes) {
    char* taken = memory;
    memory += bytes;
    return static_cast<void*>(taken);
  };
  RowMemory m;
  m.edited_row = static_cast<float*>(take(size * 4));
  m.finite_row = static_cast<float*>(take(size * 4));
  m.weights = static_cast<double*>(take(size * 8));
  m.edge_weights = static_cast<double*>(take(size * 8));
  m.block_sums = static_cast<double*>(take(num_blocks * 8));
  m.sample_weights = static_cast<double*>(take(kSample * 8));
  m.mass = static_cast<double*>(take(kBins * 8));
  m.values = static_cast<float*>(take(size * 4));
  m.ids = static_cast<std::int32_t*>(take(size * 4));
  m.places = static_cast<std::int32_t*>(take(size * 4));
  m.edge_values = static_cast<float*>(take(size * 4));
  m.sample_values = static_cast<float*>(take(kSample * 4));
  m.block_max = static_cast<float*>(take(num_blocks * 4));
  m.edited_max = static_cast<float*>(take(num_blocks * 4));
  m.counts = static_cast<std::int32_t*>(take(kBins * 4));
  return m;
}

// A whole block of the row: in place, or copied to `padded` and filled up with -infinity.
inline const float* block_at(const float* row, std::int64_t size, std::int64_t block,
                             float* padded) {
  const std::int64_t begin = block * kBlock;
  if (begin + kBlock <= size) return row + begin;
  for (std::int64_t i = 0; i < kBlock; ++i) {
    padded[i] = begin + i < size ? row[begin + i] : -kInfinity;
  }
  return padded;
}

// The maximum of the row and of its blocks; NaN if the row has one. `copy`, where not null, becomes
// a copy of the row (with room for whole blocks).
inline float scan_row(const float* row, std::int64_t size, float* block_max,
                      float* copy = nullptr) {
  constexpr int kChains =
      4;  // independent maxima and sums, or the latency of max and add would be the pace
  float padded[kBlock], best = -kInfinity;
  F32 sums[kChains];  // NaN after a NaN, or after infinities of both signs
  for (F32& sum : sums) sum = set1(0.0f);
  for (std::int64_t block = 0; block < num_blocks_of(size); ++block) {
    const float* x = block_at(row, size, block, padded);
    if (copy != nullptr) __builtin_memcpy(copy + block * kBlock, x, kBlock * sizeof(float));
    F32 largest[kChains];
    for (int c = 0; c < kChains; ++c) largest[c] = load(x + c * kLanes);
    for (std::int64_t i = 0; i < kBlock; i += kChains * kLanes) {
      for (int c = 0; c < kChains; ++c) {
        const F32 value = load(x + i + c * kLanes);
        largest[c] = max(largest[c], value);
        sums[c] = add(sums[c], value);
      }
    }
    const F32 of_pairs = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
    block_max[block] = reduce_max(of_pairs);
    best = block_max[block] > best ? block_max[block] : best;
  }
  const float sum = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  if (sum == sum) return best;
  for (std::int64_t i = 0; i < size; ++i) {
    if (row[i] != row[i]) return row[i];
  }
  return best;
}

// Makes +infinity 0 and all else -infinity: the same distribution, in finite numbers.
inline const float* finite_row(const float* row, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; ++i) out[i] = row[i] == kInfinity ? 0.0f : -kInfinity;
  return out;
}

// A row in numbers that are finite or -infinity.
struct ScannedRow {
  const float* values;  // [size]
  std::int64_t size;
  const float* block_max;  // [num_blocks]
  float top;               // NaN or -infinity where the row has no distribution, else finite
  bool had_infinity;       // shared all the mass equally; `values` says so in finite numbers

  bool has_distribution() const { return top > -kInfinity; }
};

// `finite` (may be `row`) is written where the row has +infinity; `copy` as in scan_row.
inline ScannedRow scan(const float* row, std::int64_t size, float* block_max, float* finite,
                       float* copy = nullptr) {
  const float top = scan_row(row, size, block_max, copy);
  if (top != kInfinity) return {row, size, block_max, top, false};
  finite_row(row, size, finite);
  return {finite, size, block_max, scan_row(finite, size, block_max), true};
}

// The softmax weight e^((x - top) / temperature); `rate` is log2(e) / temperature.
inline F32 weight_of(F32 x, float top, float rate) {
  return exp2(mul(sub(x, set1(top)), set1(rate)));
}

// The sum of the weights of a block: 16 partial sums whatever the register's width.
inline float block_weight(const float* x, float top, float rate) {
  constexpr int kRegisters = 16 / kLanes;
  F32 sums[kRegisters];
  for (F32& sum : sums) sum = set1(0.0f);
  for (std::int64_t i = 0; i < kBlock; i += 16) {
    for (int r = 0; r < kRegisters; ++r) {
      sums[r] = add(sums[r], weight_of(load(x + i + r * kLanes), top, rate));
    }
  }
  float lanes[16];
  for (int r = 0; r < kRegisters; ++r) store(lanes + r * kLanes, sums[r]);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The same of a row, block by block in float64. `block_sums` may be null.
inline double row_weight(const float* row, std::int64_t size, float top, float rate,
                         double* block_sums) {
  float padded[kBlock];
  double total = 0.0;
  for (std::int64_t block = 0; block < num_blocks_of(size); ++block) {
    const double sum =
        static_cast<double>(block_weight(block_at(row, size, block, padded), top, rate));
    if (block_sums != nullptr) block_sums[block] = sum;
    total += sum;
  }
  return total;
}

// Appends to `places`, which has room for whole registers, the places in [begin, end) with a value
// in [low, high], and returns their new number. `found`, where not null, becomes their values.
inline std::int64_t append_places(const float* values, std::int64_t begin, std::int64_t end,
                                  float low, float high, std::int32_t* places, std::int64_t count,
                                  float* found = nullptr) {
  std::int64_t i = begin;
#if defined(FULLBEAM_ISA_avx512)
  constexpr std::int32_t kSteps[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i steps = _mm512_loadu_si512(kSteps);
  for (; i + kLanes <= end; i += kLanes) {
    const F32 x = load(values + i);
    const __mmask16 is_in = _mm512_cmp_ps_mask(x, set1(low), _CMP_GE_OQ) &
                            _mm512_cmp_ps_mask(x, set1(high), _CMP_LE_OQ);
    const __m512i ids = _mm512_add_epi32(steps, _mm512_set1_epi32(static_cast<int>(i)));
    _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(is_in, ids));
    if (found != nullptr) store(found + count, _mm512_maskz_compress_ps(is_in, x));
    count += __builtin_popcount(is_in);
  }
#endif
  for (; i < end; ++i) {
    places[count] = static_cast<std::int32_t>(i);
    if (found != nullptr) found[count] = values[i];
    count += values[i] >= low && values[i] <= high ? 1 : 0;
  }
  return count;
}

inline double row_weight(const ScannedRow& row, float rate, double* block_sums) {
  return row_weight(row.values, row.size, row.top, rate, block_sums);
}

// Larger floats have smaller keys; both zeros have the same.
inline std::uint32_t descending_key(float value) {
  const std::uint32_t bits = float_to_bits(value + 0.0f);
  return (bits & 0x80000000u) != 0 ? bits : ~bits & 0x7fffffffu;
}

}  // namespace
}  // namespace fullbeam::cpu::FULLBEAM_ISA
