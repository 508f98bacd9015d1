// SPDX-License-Identifier: Apache-2.0
// Attention of one query token per sequence, or of the live beams of a search, over paged keys.
//
// Mapping: a fixed grid of blocks takes equal runs of units of work, numbered over (sequence, KV
// head, block of query rows, chunk of keys); each block counts them for itself from the lengths, so
// that nothing is planned on the host and one captured graph serves every mix of lengths. The ring
// of tiles runs on from one unit into the next. A chunk is a multiple of 256 keys at positions that
// depend on the sequence's length alone, then of slots; its maximum, sum and output go to the
// workspace, and the block that is last to come adds a row's chunks up in their order: a row is the
// same bits whoever shares its batch. Rows of 16-bit floats that match their pages meet the keys on
// tensor cores (attention_matrix.cuh), up to 64 rows a block; all else takes float32 multiply-adds.
// Cost: K and V of a sequence once for every 64 query rows of a KV head: bound by memory. Partial
// results add 8 * rows * head_dim bytes to the 1024 * head_dim of a chunk's keys and values.
// Numerics: those of attention_matrix.cuh. A slot that a row doesn't see never reaches it, be it
// NaN. Source: stream-K (Osama et al. 2023, arXiv 2301.03598) for equal runs of work, here of whole
// chunks for the sake of equal bits; split keys as in Flash-Decoding (Dao et al. 2023).
#include <algorithm>

#include "cuda/attention_matrix.cuh"
#include "cuda/attention_plain.cuh"
#include "cuda/device.h"
#include "ops/attention_decode.h"

namespace fullbeam::cuda {
namespace {

constexpr int kChunkKeys = 256;
constexpr int kMaxChunks = 64;  // of a sequence's keys, when they are more than kChunkKeys each
constexpr int kWordSlots = 32;
constexpr int kMatrixRows = 16 * kWarps;

// What one call leaves between its blocks; chunks are numbered from 0 for each row, and a row is
// token * num_q_heads + head.
struct Partials {
  float* out;             // [rows, max_chunks, head_dim], not yet divided by the sums
  float2* state;          // [rows, max_chunks]: maximum (in base 2), sum
  unsigned* num_arrived;  // [rows], at the first row of each block of rows: finished chunks
  int max_chunks;
};

// How the work on one sequence is cut.
struct Sequence {
  int first_token, num_tokens, seq_len, slot_start, num_slots;
  int first_key;   // earlier ones are out of every row's window
  int chunk_keys;  // keys and slots of a chunk
  int first_chunk, num_key_chunks, num_chunks, num_blocks, num_units;

  __device__ Sequence() {}
  __device__ __forceinline__ Sequence(const AttentionDecodeParams& p, int seq, int block_rows) {
    const int room = static_cast<int>(min(p.max_pages * p.page_size, std::int64_t{0x7fffffff}));
    const int all_tokens = static_cast<int>(p.num_tokens), window = window_of(p);
    seq_len = min(max(__ldg(p.seq_lens + seq), 0), room);
    first_token = seq;
    num_tokens = 1;
    slot_start = num_slots = 0;
    int earliest = seq_len - 1;  // position of a row
    if (p.query_starts != nullptr) {
      first_token = min(max(__ldg(p.query_starts + seq), 0), all_tokens);
      num_tokens = min(__ldg(p.query_starts + seq + 1), all_tokens) - first_token;
      num_slots = min(__ldg(p.num_slots + seq), static_cast<int>(kWordSlots * p.num_words));
      num_slots = max(num_slots, 0);
      if (num_slots > 0) {
        slot_start = min(max(__ldg(p.slot_starts + seq), 0), room);
        num_slots = min(num_slots, room - slot_start);
        earliest = 0x7fffffff;
        for (int i = 0; window > 0 && i < num_tokens; ++i)
          earliest = min(earliest, max(__ldg(p.positions + first_token + i), seq_len));
      }
    }
    first_key = window > 0 ? min(max(earliest - window + 1, 0), seq_len) : 0;
    // Of what one row can see, so that it doesn't depend on the others.
    const int span = window > 0 ? min(window, seq_len) : seq_len;
    chunk_keys =
        max((span + kMaxChunks * kChunkKeys - 1) / (kMaxChunks * kChunkKeys), 1) * kChunkKeys;
    first_chunk = first_key / chunk_keys;
    num_key_chunks =
        first_key < seq_len ? (seq_len + chunk_keys - 1) / chunk_keys - first_chunk : 0;
    num_chunks = max(num_key_chunks + (num_slots + chunk_keys - 1) / chunk_keys, 1);
    const int num_rows = max(num_tokens, 0) * group_of(p);
    num_blocks = (num_rows + block_rows - 1) / block_rows;
    num_units = static_cast<int>(p.num_kv_heads) * num_blocks * num_chunks;
  }
};

// Goes over a block's units, and in each over its tiles.
template <int kTileKeys, int kBlockRows>
struct Walk {
  int num_left;   // units, this one included
  int seq, unit;  // number of the unit within its sequence
  Sequence s;
  int kv_head, row_block, chunk;
  bool is_slots;
  int first, begin, end;  // the tile's first key; those of the unit that may be read

  // This block's run of units. `shared` has 2 + 32 places.
  __device__ Walk(const AttentionDecodeParams& p, int* shared) {
    const int num_seqs = static_cast<int>(p.num_seqs);
    int sum = 0;
    for (int i = threadIdx.x; i < num_seqs; i += kThreads)
      sum += Sequence(p, i, kBlockRows).num_units;
    const std::int64_t total = block_reduce(sum, shared, Sum());
    const auto share = [&](std::int64_t block) {
      return static_cast<int>(total * block / gridDim.x);
    };
    const int first_unit = share(blockIdx.x);
    num_left = share(blockIdx.x + 1) - first_unit;
    seq = unit = first = begin = end = 0;
    if (num_left == 0) return;
    // The sequence of the first one.
    for (int begin_seq = 0, before = 0;; begin_seq += kThreads) {
      const int own = begin_seq + threadIdx.x;
      const int count = own < num_seqs ? Sequence(p, own, kBlockRows).num_units : 0;
      int up_to = count;  // sum of the threads' counts up to this one's
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kWholeWarp, up_to, step);
        if (threadIdx.x % 32 >= step) up_to += other;
      }
      if (threadIdx.x % 32 == 31) shared[threadIdx.x / 32] = up_to;
      __syncthreads();
      for (int warp = 0; warp < static_cast<int>(threadIdx.x / 32); ++warp) up_to += shared[warp];
      const int position = first_unit - before;
      const bool is_here = up_to - count <= position && position < up_to;
      if (is_here) {
        shared[32] = own;
        shared[33] = position - (up_to - count);
      }
      if (threadIdx.x == kThreads - 1) shared[kWarps] = up_to;
      if (__syncthreads_or(is_here)) break;
      before += shared[kWarps];
      __syncthreads();
    }
    seq = shared[32];
    unit = shared[33];
    s = Sequence(p, seq, kBlockRows);
    start();
  }

  __device__ bool has_tile() const { return num_left > 0 && first < end; }

  // To the next tile of any unit.
  __device__ void advance(const AttentionDecodeParams& p) {
    first += kTileKeys;
    while (num_left > 0 && first >= end) next_unit(p);
  }

  __device__ void next_unit(const AttentionDecodeParams& p) {
    if (--num_left == 0) return;
    if (++unit == s.num_units) {
      unit = 0;
      do s = Sequence(p, ++seq, kBlockRows);
      while (s.num_units == 0);
    }
    start();
  }

  __device__ QueryRows rows(const AttentionDecodeParams& p) const {
    const int group = group_of(p);
    const int first_row = row_block * kBlockRows;
    return {s.first_token, first_row, min(s.num_tokens * group - first_row, kBlockRows), kv_head,
            group};
  }

  __device__ int position(const AttentionDecodeParams& p, int token) const {
    return s.num_slots > 0 ? __ldg(p.positions + token) : s.seq_len - 1;
  }

 private:
  __device__ void start() {
    chunk = unit % s.num_chunks;
    row_block = unit / s.num_chunks % s.num_blocks;
    kv_head = unit / s.num_chunks / s.num_blocks;
    is_slots = chunk >= s.num_key_chunks;
    if (is_slots) {
      first = begin = s.slot_start + (chunk - s.num_key_chunks) * s.chunk_keys;
      end = min(first + s.chunk_keys, s.slot_start + s.num_slots);
    } else {
      const int at = (s.first_chunk + chunk) * s.chunk_keys;
      begin = max(at, s.first_key);
      first = begin / kTileKeys * kTileKeys;
      end = min(at + s.chunk_keys, s.seq_len);
    }
  }
};

// Slots of the walk's tile that each token of the block's rows sees, as words
// [tokens, kTileKeys / 32]; there after the next barrier.
template <int kTileKeys, class OwnWalk>
__device__ inline void find_seen_slots(const AttentionDecodeParams& p, const OwnWalk& walk,
                                       const QueryRows& rows, std::uint32_t* seen) {
  constexpr int kWords = kTileKeys / kWordSlots;
  const int first_token = rows.token(0), window = window_of(p);
  const int first_word = (walk.first - walk.s.slot_start) / kWordSlots;
  const int num_words = (rows.token(rows.num_rows - 1) - first_token + 1) * kWords;
  for (int i = threadIdx.x / 32; i < num_words; i += kWarps) {
    const int token = first_token + i / kWords, word = first_word + i % kWords;
    const int slot = word * kWordSlots + threadIdx.x % 32;
    bool is_seen = slot < walk.s.num_slots &&
                   (__ldg(p.visible + token * p.num_words + word) >> threadIdx.x % 32 & 1) != 0;
    if (is_seen && window > 0) {
      is_seen = __ldg(p.slot_positions + walk.seq * kWordSlots * p.num_words + slot) >
                __ldg(p.positions + token) - window;
    }
    const unsigned word_seen = __ballot_sync(kWholeWarp, is_seen);
    if (threadIdx.x % 32 == 0) seen[i] = word_seen;
  }
}

template <int kTileKeys>
__device__ inline SeenKeys seen_slots(const std::uint32_t* seen, int token) {
  if constexpr (kTileKeys == 32) return seen[token];
  return static_cast<SeenKeys>(seen[2 * token + 1]) << 32 | seen[2 * token];
}

__device__ inline void put(float* to, float value) { *to = value; }
__device__ inline void put(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}

// Counts a finished chunk of a block's rows; whether it was the last. `shared` has one place.
__device__ inline bool arrive(unsigned* num_arrived, int num_chunks, int* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool is_last = atomicAdd(num_arrived, 1u) + 1 == static_cast<unsigned>(num_chunks);
    if (is_last) *num_arrived = 0;  // as the next launch expects it
    *shared = is_last ? 1 : 0;
  }
  __syncthreads();
  const bool is_last = *shared != 0;
  if (is_last) __threadfence();
  return is_last;
}

// Adds up the chunks of a block's rows.
__device__ inline void add_up(const AttentionDecodeParams& p, const Partials& partials,
                              const QueryRows& block, int num_chunks) {
  const int quarters = static_cast<int>(p.head_dim / 4);
  for (int i = threadIdx.x; i < block.num_rows * quarters; i += kThreads) {
    const int row = i / quarters, col = i % quarters * 4;
    const int token = block.token(row), head = block.head(row);
    const std::int64_t first = (token * p.num_q_heads + head) * partials.max_chunks;
    const float2* state = partials.state + first;
    const float* from = partials.out + first * p.head_dim + col;
    float maximum = -kInfinity;
    for (int chunk = 0; chunk < num_chunks; ++chunk)
      maximum = fmaxf(maximum, __ldcg(state + chunk).x);
    const float base = maximum == -kInfinity ? 0.0f : maximum;
    float sum = 0.0f, out[4] = {};
#pragma unroll 8
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const float2 own = __ldcg(state + chunk);
      const float4 part = __ldcg(reinterpret_cast<const float4*>(from + chunk * p.head_dim));
      const float weight = exp2_fast(own.x - base);
      sum = fmaf(own.y, weight, sum);
      out[0] = fmaf(part.x, weight, out[0]);
      out[1] = fmaf(part.y, weight, out[1]);
      out[2] = fmaf(part.z, weight, out[2]);
      out[3] = fmaf(part.w, weight, out[3]);
    }
    const std::int64_t to = token * p.out_stride + head * p.head_dim + col;
#pragma unroll
    for (int j = 0; j < 4; ++j) store_any(p.out, p.dtype, to + j, out[j] / sum);
  }
}

// The end of a unit: writes the rows, or their partial results and, if they are the last, what all
// add up to. store(at, values...) writes to p.out.
template <class Rows, class OwnWalk, class Store>
__device__ inline void finish_unit(const AttentionDecodeParams& p, const Partials& partials,
                                   const OwnWalk& walk, const QueryRows& block, const Rows& rows,
                                   int* shared, const Store& store) {
  const auto row_of = [&](int row) { return block.token(row) * p.num_q_heads + block.head(row); };
  const int dim = static_cast<int>(p.head_dim);
  if (walk.s.num_chunks == 1) {
    float inverse = 0.0f;
    std::int64_t at = 0;
    rows.for_each_output(
        block.num_rows, dim,
        [&](int row, bool, float, float sum) {
          inverse = 1.0f / sum;
          at = block.token(row) * p.out_stride + block.head(row) * p.head_dim;
        },
        [&](int col, auto... values) { store(at + col, (values * inverse)...); });
    return;
  }
  float* out = nullptr;
  rows.for_each_output(
      block.num_rows, dim,
      [&](int row, bool is_first, float maximum, float sum) {
        const std::int64_t at = row_of(row) * partials.max_chunks + walk.chunk;
        out = partials.out + at * p.head_dim;
        if (is_first) partials.state[at] = make_float2(maximum, sum);
      },
      [&](int col, auto... values) { put(out + col, values...); });
  if (arrive(partials.num_arrived + row_of(0), walk.s.num_chunks, shared))
    add_up(p, partials, block, walk.s.num_chunks);
}

// Shared memory: the counts of Walk, the seen slots, then the rows' own, from byte kRows on; of
// decode_matrix scores, queries (where not in registers) and the ring of tiles.
constexpr int kSeen = 256;  // words [kMatrixRows, 2]
constexpr int kRows = kSeen + 8 * kMatrixRows;
template <int kDim>
constexpr int kQuery = kDim > 128 ? kRows + 16 * kScoreStride<kDim> * 4 : -1;
template <int kDim>
constexpr int kRing = kDim > 128 ? kQuery<kDim> + kMatrixRows * TileShape<kDim>::kStride * 2
                                 : kRows + 16 * kScoreStride<kDim> * 4;

template <class T, int kDim, bool kSplitRows, class Tiles, class OwnWalk>
__device__ inline void run_unit(const AttentionDecodeParams& p, const Partials& partials,
                                Tiles& ring, OwnWalk& walk, char* shared) {
  constexpr int kTileKeys = TileShape<kDim>::kKeys;
  using Rows = MatrixRows<T, kDim, 1, kSplitRows, kQuery<kDim>>;
  auto* seen = reinterpret_cast<std::uint32_t*>(shared + kSeen);
  auto* exchange = reinterpret_cast<float*>(shared + kRows);
  const QueryRows block = walk.rows(p);
  if constexpr (kQuery<kDim> >= 0) __syncthreads();  // the rows before are done with theirs
  Rows rows(p, block);
  int tokens[2], positions[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = block.token(min(Rows::row(0, half), block.num_rows - 1));
    tokens[half] = token - block.token(0);
    positions[half] = walk.position(p, token);
  }

  for (; walk.first < walk.end; walk.first += kTileKeys) {
    T* tile = ring.next(p);
    if (!walk.is_slots) {
      rows.add(p, tile, exchange, [&](int, int half) {
        return seen_keys<kTileKeys>(p, positions[half], walk.first, walk.end);
      });
      continue;
    }
    find_seen_slots<kTileKeys>(p, walk, block, seen);
    const auto seen_by = [&](int, int half) { return seen_slots<kTileKeys>(seen, tokens[half]); };
    if (__syncthreads_or(Rows::has_no_number(tile))) {
      rows.add_no_numbers(tile, seen_by);
      __syncthreads();
      Rows::clear_no_numbers(tile);
      __syncthreads();
    }
    rows.add(p, tile, exchange, seen_by);
  }
  finish_unit(p, partials, walk, block, rows, reinterpret_cast<int*>(shared),
              [&](std::int64_t at, float a, float b) {
                *reinterpret_cast<unsigned*>(static_cast<T*>(p.out) + at) = pack<T>(a, b);
              });
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    decode_matrix(const __grid_constant__ AttentionDecodeParams p,
                  const __grid_constant__ Partials partials, int num_stages) {
  using OwnWalk = Walk<TileShape<kDim>::kKeys, kMatrixRows>;
  char* shared = dynamic_shared();
  OwnWalk walk(p, reinterpret_cast<int*>(shared));
  OwnWalk ahead = walk;
  if (!ahead.has_tile()) ahead.advance(p);
  Ring<T, kDim, kRing<kDim>, OwnWalk> ring(p, ahead, num_stages);
  for (; walk.num_left > 0; walk.next_unit(p)) {
    if (walk.rows(p).num_rows <= 16) {
      run_unit<T, kDim, false>(p, partials, ring, walk, shared);
    } else {
      run_unit<T, kDim, true>(p, partials, ring, walk, shared);
    }
  }
  async_copy_wait<0>();
}

template <class T, int kCols>
__global__ void __launch_bounds__(kThreads)
    decode_plain(const __grid_constant__ AttentionDecodeParams p,
                 const __grid_constant__ Partials partials) {
  using OwnWalk = Walk<kPlainKeys, kPlainRows>;
  char* shared = dynamic_shared();
  auto* seen = reinterpret_cast<std::uint32_t*>(shared + kSeen);
  OwnWalk walk(p, reinterpret_cast<int*>(shared));
  for (; walk.num_left > 0; walk.next_unit(p)) {
    const QueryRows block = walk.rows(p);
    PlainRows<T, kCols> rows(p, block, reinterpret_cast<float*>(shared + kRows));
    const auto token_of = [&](int i) { return block.token(min(rows.row(i), block.num_rows - 1)); };
    for (; walk.first < walk.end; walk.first += kPlainKeys) {
      if (walk.is_slots) {
        __syncthreads();  // the tile before is done with `seen`
        find_seen_slots<kPlainKeys>(p, walk, block, seen);
      }
      rows.add(p, walk.seq, walk.kv_head, walk.first, walk.begin, walk.end, [&](int i) {
        if (walk.is_slots) return seen_slots<kPlainKeys>(seen, token_of(i) - block.token(0));
        return seen_keys<kPlainKeys>(p, walk.position(p, token_of(i)), walk.first, walk.end);
      });
    }
    finish_unit(p, partials, walk, block, rows, reinterpret_cast<int*>(shared),
                [&](std::int64_t at, float value) { store_any(p.out, p.dtype, at, value); });
  }
}

// A grid that fills the device, of no more blocks than there can be units.
template <class Kernel, class... More>
void launch_decode(Kernel kernel, const AttentionDecodeParams& p, int block_rows,
                   std::int64_t shared_bytes, int blocks_per_sm, const More&... more) {
  const std::int64_t rows = p.num_tokens * p.num_q_heads, group = p.num_q_heads / p.num_kv_heads;
  const std::int64_t room = p.max_pages * p.page_size;
  const std::int64_t slots = p.query_starts == nullptr ? 0 : kWordSlots * p.num_words;
  const auto chunks = [](std::int64_t keys) { return (keys + kChunkKeys - 1) / kChunkKeys; };
  // One more than kMaxChunks, since a window needn't begin with a chunk.
  const std::int64_t max_chunks = std::max<std::int64_t>(
      std::min<std::int64_t>(chunks(room), kMaxChunks + 1) + chunks(slots), 1);
  Partials partials{};
  partials.max_chunks = static_cast<int>(max_chunks);
  if (max_chunks > 1) {
    const std::int64_t count = rows * max_chunks;
    partials.out = static_cast<float*>(workspace(count * (p.head_dim + 2) * 4));
    partials.state = reinterpret_cast<float2*>(partials.out + count * p.head_dim);
    partials.num_arrived = counters(rows);
  }
  const std::int64_t max_units =
      p.num_kv_heads * (p.num_tokens * group / block_rows + p.num_seqs) * max_chunks;
  const std::int64_t fill = std::int64_t{device_info().num_sms} * blocks_per_sm;
  launch(kernel,
         Shape{.grid = static_cast<unsigned>(std::min(max_units, fill)),
               .block = kThreads,
               .shared_bytes = shared_bytes},
         p, partials, more...);
}

// Whether the device's shared memory allows it (99 KB don't for 256 columns).
template <class T>
bool decode_on_matrices(const AttentionDecodeParams& p) {
  return dispatch_dim<false>(p.head_dim, [&]<int kDim>() {
    // As many stages as let two blocks share a multiprocessor, or as fit at all.
    constexpr std::int64_t kFixed = kRing<kDim>, kStage = TileShape<kDim>::kBytes;
    const std::int64_t most = device_info().max_shared_bytes;
    if (kFixed + 2 * kStage > most) return false;
    const std::int64_t stages = std::clamp<std::int64_t>((most / 2 - 1024 - kFixed) / kStage, 2, 4);
    launch_decode(&decode_matrix<T, kDim>, p, kMatrixRows, kFixed + stages * kStage, 2,
                  static_cast<int>(stages));
    return true;
  });
}

}  // namespace

void attention_decode(const AttentionDecodeParams& p) {
  if (p.num_tokens == 0 || p.num_seqs == 0) return;
  if (fits_matrices(p) &&
      (p.dtype == DType::f16 ? decode_on_matrices<Half>(p) : decode_on_matrices<BFloat>(p))) {
    return;
  }
  dispatch_plain(p, [&]<class T, int kCols>() {
    launch_decode(&decode_plain<T, kCols>, p, kPlainRows, kRows + plain_shared(p.head_dim) * 4, 4);
  });
}

}  // namespace fullbeam::cuda
