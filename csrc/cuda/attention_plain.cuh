// SPDX-License-Identifier: Apache-2.0
// Attention of a few query rows by float32 multiply-adds: for float32 pages or queries, for head
// sizes above 256, and for arrays whose addresses don't allow 16-byte copies.
//
// Mapping: 128 threads, 8 rows, two per warp. 32 keys at a time are converted to float32 in shared
// memory; a lane has a key for the scores, then every 32nd column for the output, and reads the
// values of the keys that one of its rows sees. Cost: K and V of the visible keys once per 8 rows.
// Numerics: float32 throughout. What a row sees is added up in order of position.
#pragma once
#include "cuda/attention.cuh"

namespace fullbeam::cuda {
namespace {

constexpr int kPlainKeys = 32;
constexpr int kPlainRows = 2 * kWarps;

__device__ inline float load_any(const void* from, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::f16:
      return to_float(static_cast<const Half*>(from)[at]);
    case DType::bf16:
      return to_float(static_cast<const BFloat*>(from)[at]);
    default:
      return static_cast<const float*>(from)[at];
  }
}

__device__ inline void store_any(void* to, DType dtype, std::int64_t at, float value) {
  switch (dtype) {
    case DType::f16:
      static_cast<Half*>(to)[at] = from_float<Half>(value);
      break;
    case DType::bf16:
      static_cast<BFloat*>(to)[at] = from_float<BFloat>(value);
      break;
    default:
      static_cast<float*>(to)[at] = value;
  }
}

// Shared memory of PlainRows, in floats.
constexpr std::int64_t plain_shared(std::int64_t head_dim) {
  return kPlainRows * head_dim + kPlainKeys * (head_dim + 4);
}

// The rows of one warp, warp and warp + kWarps of the block; kCols columns per lane.
template <class T, int kCols>
class PlainRows {
 public:
  // `shared` [plain_shared(head_dim)] is nobody else's from here on.
  __device__ PlainRows(const AttentionPrefillParams& p, const QueryRows& rows, float* shared)
      : log2_scale_(log2_scale(p)), dim_(static_cast<int>(p.head_dim)), num_rows_(rows.num_rows) {
    query_ = shared;
    keys_ = shared + kPlainRows * dim_;
    __syncthreads();  // the rows before are done with `shared`
    for (int row = warp(); row < num_rows_; row += kWarps) {
      const std::int64_t from = rows.token(row) * p.q_stride + rows.head(row) * p.head_dim;
      for (int col = lane(); col < dim_; col += 32) {
        const float value = load_any(p.q, p.dtype, from + col);
        query_[row * dim_ + col] = p.scale < 0 ? -value : value;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maxima_[i] = -kInfinity;
      sums_[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < kCols; ++j) out_[i][j] = 0.0f;
    }
  }

  // Row of the block.
  __device__ static int row(int i) { return warp() + kWarps * i; }

  // Adds the keys [first, first + 32) of a sequence, of which [begin, end) may be read; seen(i)
  // tells which of them row(i) sees. All threads call it together.
  template <class Seen>
  __device__ void add(const AttentionPrefillParams& p, int seq, int kv_head, int first, int begin,
                      int end, const Seen& seen) {
    const KeyPlace place(p, seq, first + lane(), begin, end);
    const auto at = [&](int key, std::int64_t page_stride) -> std::int64_t {
      const int page = __shfl_sync(kWholeWarp, place.page, key);
      const int offset = __shfl_sync(kWholeWarp, place.offset, key);
      return page < 0 ? -1 : page * page_stride + (kv_head * p.page_size + offset) * dim_;
    };
    const int stride = dim_ + 4;  // 16-byte reads of 8 neighbours meet all banks
    __syncthreads();
    for (int key = warp(); key < kPlainKeys; key += kWarps) {
      const std::int64_t from = at(key, p.k_page_stride);
      for (int col = lane(); col < dim_; col += 32) {
        keys_[key * stride + col] =
            from < 0 ? 0.0f : to_float(static_cast<const T*>(p.k_pages)[from + col]);
      }
    }
    __syncthreads();

    unsigned any = 0, own[2];
    float weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[i] = row(i) < num_rows_ ? static_cast<unsigned>(seen(i)) : 0u;
      any |= own[i];
      weights[i] = own[i] == 0 ? 0.0f : weigh(p, i, own[i]);
    }
    for (; any != 0; any &= any - 1) {
      const int key = __ffs(static_cast<int>(any)) - 1;
      const std::int64_t from = at(key, p.v_page_stride);
      const float weight[2] = {__shfl_sync(kWholeWarp, weights[0], key),
                               __shfl_sync(kWholeWarp, weights[1], key)};
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        const int col = lane() + 32 * j;
        if (col >= dim_ || from < 0) continue;
        const float value = to_float(static_cast<const T*>(p.v_pages)[from + col]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if ((own[i] >> key & 1) != 0) out_[i][j] = fmaf(weight[i], value, out_[i][j]);
        }
      }
    }
  }

  // As MatrixRows::for_each_output, for single columns.
  template <class FnRow, class Fn>
  __device__ void for_each_output(int num_rows, int head_dim, const FnRow& fn_row,
                                  const Fn& fn) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row(i) >= num_rows) continue;
      fn_row(row(i), lane() == 0, maxima_[i], sums_[i]);
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        if (lane() + 32 * j < head_dim) fn(lane() + 32 * j, out_[i][j]);
      }
    }
  }

 private:
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  // This lane's key's weight; the row's maximum, sum and output follow.
  __device__ float weigh(const AttentionPrefillParams& p, int i, unsigned seen) {
    const float4* query = reinterpret_cast<const float4*>(query_ + row(i) * dim_);
    const float4* key = reinterpret_cast<const float4*>(keys_ + lane() * (dim_ + 4));
    float sums[4] = {};
    for (int col = 0; col < dim_ / 4; ++col) {
      const float4 a = query[col], b = key[col];
      sums[0] = fmaf(a.x, b.x, sums[0]);
      sums[1] = fmaf(a.y, b.y, sums[1]);
      sums[2] = fmaf(a.z, b.z, sums[2]);
      sums[3] = fmaf(a.w, b.w, sums[3]);
    }
    float scores[1] = {(sums[0] + sums[1]) + (sums[2] + sums[3])};
    if (p.softcap > 0) cap_scores(p, scores);
    const float score = (seen >> lane() & 1) != 0 ? scores[0] : -kInfinity;
    const float maximum = fmaxf(maxima_[i], warp_reduce(score, Max()) * log2_scale_);
    const float base = maximum == -kInfinity ? 0.0f : maximum;
    const float shrink = exp2_fast(maxima_[i] - base);
    const float weight = exp2_fast(fmaf(score, log2_scale_, -base));
    maxima_[i] = maximum;
    sums_[i] = fmaf(sums_[i], shrink, warp_reduce(weight, Sum()));
#pragma unroll
    for (int j = 0; j < kCols; ++j) out_[i][j] *= shrink;
    return weight;
  }

  float log2_scale_;
  int dim_, num_rows_;
  float *query_, *keys_;
  float out_[2][kCols], maxima_[2], sums_[2];
};

// Calls fn<T, kCols>() for the pages' type and the head size.
template <class Fn>
inline void dispatch_plain(const AttentionPrefillParams& p, const Fn& fn) {
  dispatch_float(p.kv_dtype, [&]<class T>() {
    if (p.head_dim <= 128) return fn.template operator()<T, 4>();
    return fn.template operator()<T, 16>();
  });
}

}  // namespace
}  // namespace fullbeam::cuda
