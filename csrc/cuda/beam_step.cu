// SPDX-License-Identifier: Apache-2.0
// One step of beam search: the best tokens of each beam, then each group's choice among them.
// Mapping: two launches. The rows of beams as cuda/logits_row.cuh has it: a cluster per beam, or a
// block per tile and the last one for the rest. Then a block per request, group after group:
// candidates are sorted in shared memory, as many at a time as there is room for beside the best so
// far. Cost: the logits once per beam; of lists, 16 bytes per beam and token that a group may need.
// Numerics: log-softmax as in cuda/logprobs.cu; scores in float64. Where only rounding makes scores
// of one beam's tokens equal, the larger logit may win over the lower id. Source: Vijayakumar et
// al. 2016 (arXiv 1610.02424) for diverse groups; exact for the reason that cpu/beam_step.cc gives.
#include "cuda/logits_kernel.cuh"
#include "cuda/select.cuh"
#include "ops/beam_step.h"

namespace fullbeam::cuda {
namespace {

constexpr std::int64_t kMaxBeam = 2048;
constexpr std::int64_t kMaxKeys = 1 << 26;  // of the lists of one step, 512 MB

// What a group needs to know of a beam: lists of `width` places each in the pool, best first.
struct BeamTokens {
  double log_sum;
  unsigned live, terminated;  // where the lists begin
  int num_live, num_terminated;
};

struct BeamMemory {
  BeamTokens* beams;  // [num_beams]
  Key* pool;          // [capacity]
  std::int64_t capacity;
  unsigned *num_taken, *num_done;  // counters
};

__device__ std::int64_t clamped(std::int64_t value, std::int64_t low, std::int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// The last of `count` parts, in ascending starts, that begins at or before the item.
__device__ std::int64_t part_of(const std::int32_t* starts, std::int64_t count, std::int64_t item) {
  std::int64_t low = 0, high = count - 1;
  while (low < high) {
    const std::int64_t middle = (low + high + 1) / 2;
    if (starts[middle] <= item) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// How many tokens of a kind the group needs of each beam: those that earlier groups may penalise
// besides its own. Its request begins with group `first_group`.
__device__ std::int64_t width_of(const BeamStepParams& p, std::int64_t first_group,
                                 std::int64_t group, float strength) {
  std::int64_t width = clamped(p.beam_sizes[group], 1, p.max_beam);
  for (std::int64_t g = first_group; strength > 0.0f && g < group; ++g) {
    if (p.group_starts[g] != p.group_starts[g + 1]) {
      width += clamped(p.beam_sizes[g], 1, p.max_beam);
    }
  }
  return width < p.vocab_size ? width : p.vocab_size;
}

__device__ const std::uint32_t* mask_of(const std::uint32_t* masks, const std::int32_t* idx,
                                        std::int64_t beam, std::int64_t num_masks,
                                        std::int64_t num_words) {
  if (idx == nullptr || idx[beam] < 0 || idx[beam] >= num_masks) return nullptr;
  return masks + idx[beam] * num_words;
}

struct BeamRow {
  const BeamStepParams& p;
  const BeamMemory& memory;
  std::int64_t beam;
  const std::uint32_t *allowed, *terminators;

  struct Params {
    BeamStepParams p;
    BeamMemory memory;
  };

  __device__ BeamRow(const Params& params, std::int64_t row)
      : p(params.p),
        memory(params.memory),
        beam(row),
        allowed(mask_of(p.allowed, p.allowed_idx, beam, p.num_allowed, p.num_words)),
        terminators(
            mask_of(p.terminators, p.terminator_idx, beam, p.num_terminators, p.num_words)) {}

  __device__ void set(Row& row) const {
    const std::int64_t idx = p.beam_rows[beam];
    const bool is_there = idx >= 0 && idx < p.num_rows;
    row.logits = row_of(p.logits, p.dtype, (is_there ? idx : 0) * p.logits_stride);
    row.dtype = p.dtype;
    row.vocab_size = is_there ? static_cast<int>(p.vocab_size) : 0;
    row.edits.bias = entries_of(p.bias_starts, beam, p.num_biases);
    row.edits.bias_ids = p.bias_ids;
    row.edits.bias_values = p.bias_values;
  }

  __device__ Masks masks(bool is_live) const {
    return is_live ? Masks{allowed, nullptr, terminators} : Masks{allowed, terminators, nullptr};
  }

  // stats: maximum and sum of the row, maxima of its live and of its terminated tokens.
  __device__ void scan(RowShared& s) const {
    const Row& row = s.row;
    const bool has_edits = row.edits.is_any();
    scan_share(s, [&](int strip, float (&x)[4], bool is_edited) {
      if (has_edits && !is_edited) return;
      const int place = strip - row.stats_first, id = strip * kStrip + 4 * (threadIdx.x % 32);
      const bool is_first_lane = threadIdx.x % 32 == 0;
      const float largest = strip_max(x), sum = strip_sum(x, largest, Softmax::of(1.0f).rate);
      if (is_first_lane) {
        row.stats[0][place] = largest;
        row.stats[1][place] = sum;
      }
      for (int kind = 2; kind < (terminators == nullptr ? 3 : 4); ++kind) {
        const unsigned bits = masks(kind == 2).bits(id, row.vocab_size);
        float chosen[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) chosen[i] = (bits >> i & 1) != 0 ? x[i] : -INFINITY;
        const float of_kind = strip_max(chosen);
        if (is_first_lane) row.stats[kind][place] = of_kind;
      }
    });
  }

  __device__ __noinline__ void finish(RowShared& s) const {
    const Row& row = s.row;
    const std::int64_t group = part_of(p.group_starts, p.num_groups, beam);
    const std::int64_t request = part_of(p.request_starts, p.num_requests, group);
    const std::int64_t first_group = clamped(p.request_starts[request], 0, group);
    const auto width =
        static_cast<int>(width_of(p, first_group, group, p.diversity_strengths[request]));
    BeamTokens tokens{};
    View &all = s.views[0], &view = s.views[1];
    make_view(all, kRawView, row.stats[0], row.stats[1], 1.0f);
    if (all.has_distribution()) {
      tokens.log_sum = log_sum_of(all, mass_of_row(all, kRawMass));
      if (row.is_root() && threadIdx.x == 0) {
        s.count = atomicAdd(memory.num_taken, 2u * static_cast<unsigned>(width));
      }
      row.team.sync();
      tokens.live = row.root->count;
      tokens.terminated = tokens.live + static_cast<unsigned>(width);
      // Always, unless what group_starts and request_starts hold is broken.
      const bool has_room = std::int64_t{tokens.terminated} + width <= memory.capacity;
      const int num_kinds = !has_room ? 0 : terminators == nullptr ? 1 : 2;
      for (int kind = 0; kind < num_kinds; ++kind) {
        make_view(view, kind == 0 ? kDrawnView : kDrawnMass, row.stats[2 + kind], nullptr, 1.0f);
        if (!view.has_distribution() || view.is_infinite != all.is_infinite) continue;
        if (threadIdx.x == 0) view.masks = masks(kind == 0);
        __syncthreads();
        Key* list = memory.pool + (kind == 0 ? tokens.live : tokens.terminated);
        const int found =
            for_each_first(s, view, kLastFinite, width, [&](int i, Key key) { list[i] = key; });
        (kind == 0 ? tokens.num_live : tokens.num_terminated) = found;
      }
    }
    if (row.is_root() && threadIdx.x == 0) {
      memory.beams[beam] = tokens;
      // The last beam puts the pool's counter back.
      const auto last = static_cast<unsigned>(p.num_beams - 1);
      __threadfence();
      if (atomicInc(memory.num_done, last) == last) *memory.num_taken = 0;
    }
  }
};

// Of a group's candidates, the one in this place: beam by beam, best first.
struct Place {
  double score;
  int idx;  // -1: no candidate
};

// A group in its step, for one kind of candidates.
struct Group {
  const BeamStepParams& p;
  const BeamMemory& memory;
  std::int64_t idx, first_beam, num_beams;
  int size, width;
  double strength;
  const std::int32_t* chosen;  // [num_chosen], by earlier groups; -1 is no token
  std::int64_t num_chosen;

  __device__ std::int64_t beam_of(int place) const { return first_beam + place / width; }
  __device__ Key key_of_place(int place, bool is_live) const {
    const BeamTokens& beam = memory.beams[beam_of(place)];
    return memory
        .pool[(is_live ? beam.live : beam.terminated) + static_cast<unsigned>(place % width)];
  }
  __device__ double logprob_of_place(int place, bool is_live) const {
    return static_cast<double>(value_of(value_key(key_of_place(place, is_live)))) -
           memory.beams[beam_of(place)].log_sum;
  }
  __device__ Place candidate(int place, bool is_live) const {
    const BeamTokens& tokens = memory.beams[beam_of(place)];
    if (place % width >= (is_live ? tokens.num_live : tokens.num_terminated)) return {0.0, -1};
    const int id = id_of(key_of_place(place, is_live));
    int count = 0;
    for (std::int64_t i = 0; i < num_chosen; ++i) count += chosen[i] == id ? 1 : 0;
    return {p.sums[2 * beam_of(place)] + logprob_of_place(place, is_live) -
                strength * static_cast<double>(count),
            place};
  }
  // Whether candidate a comes before b, which may be of the other kind.
  __device__ bool is_before(Place a, bool a_is_live, Place b, bool b_is_live) const {
    if (a.idx < 0 || b.idx < 0) return a.idx >= 0;
    if (a.score != b.score) return a.score > b.score;
    const std::int64_t beam_a = beam_of(a.idx), beam_b = beam_of(b.idx);
    if (beam_a != beam_b) return beam_a < beam_b;
    return id_of(key_of_place(a.idx, a_is_live)) < id_of(key_of_place(b.idx, b_is_live));
  }
  __device__ void write(const BeamStepResults& out, int rank, Place place, bool is_live) const {
    const std::int64_t at = idx * p.max_beam + rank;
    const bool is_one = place.idx >= 0;
    const double nan = static_cast<double>(NAN);
    const double logprob = is_one ? logprob_of_place(place.idx, is_live) : nan;
    const std::int64_t beam = is_one ? beam_of(place.idx) : -1;
    out.parents[at] = static_cast<std::int32_t>(beam);
    out.token_ids[at] = is_one ? id_of(key_of_place(place.idx, is_live)) : -1;
    out.logprobs[at] = static_cast<float>(logprob);
    out.sums[2 * at] = is_one ? place.score : nan;
    out.sums[2 * at + 1] = is_one ? p.sums[2 * beam + 1] + logprob : nan;
  }
};

// Leaves the best of the group's candidates, at most its size, at the beginning of `places`, which
// has `room` for at least twice as many (a power of 2).
__device__ void find_best(const Group& group, bool is_live, Place* places, int room) {
  const int total = static_cast<int>(group.num_beams) * group.width;
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  for (int i = thread; i < group.size; i += step) places[i] = {0.0, -1};
  __syncthreads();
  int kept = 0;
  for (int done = 0; done < total;) {
    const int count = total - done < room - kept ? total - done : room - kept;
    int padded = 2;
    while (padded < kept + count) padded *= 2;
    for (int i = thread; i < padded - kept; i += step) {
      places[kept + i] = i < count ? group.candidate(done + i, is_live) : Place{0.0, -1};
    }
    __syncthreads();
    for (int run = 2; run <= padded; run *= 2) {
      for (int apart = run / 2; apart > 0; apart /= 2) {
        for (int i = thread; i < padded / 2; i += step) {
          const int a = 2 * i - (i & (apart - 1)), b = a + apart;
          const Place place_a = places[a], place_b = places[b];
          const bool is_wrong = (a & run) == 0
                                    ? group.is_before(place_b, is_live, place_a, is_live)
                                    : group.is_before(place_a, is_live, place_b, is_live);
          if (is_wrong) {
            places[a] = place_b;
            places[b] = place_a;
          }
        }
        __syncthreads();
      }
    }
    done += count;
    kept = kept + count < group.size ? kept + count : group.size;
  }
}

__device__ void step_group(const Group& group, Place* places, Place* live, int room) {
  const BeamStepParams& p = group.p;
  const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const auto max_beam = static_cast<int>(p.max_beam);
  const Place none{0.0, -1};
  find_best(group, true, places, room);
  for (int i = thread; i < max_beam; i += step) {
    live[i] = i < group.size ? places[i] : none;
    group.write(p.live, i, live[i], true);
  }
  __syncthreads();
  find_best(group, false, places, room);
  for (int i = thread; i < max_beam; i += step) {
    const Place terminated = i < group.size ? places[i] : none;
    int before = 0;  // live ones before it
    for (int high = group.size; terminated.idx >= 0 && before < high;) {
      const int middle = (before + high) / 2;
      if (group.is_before(live[middle], true, terminated, false)) {
        before = middle + 1;
      } else {
        high = middle;
      }
    }
    group.write(p.finished, i, before + i < group.size ? terminated : none, false);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(256, 2)
    group_kernel(const __grid_constant__ BeamStepParams p,
                 const __grid_constant__ BeamMemory memory, int room) {
  wait_for_launch_before();
  auto* places = reinterpret_cast<Place*>(dynamic_shared());  // [room], then [max_beam]
  const std::int64_t request = blockIdx.x;
  const std::int64_t first_group = clamped(p.request_starts[request], 0, p.num_groups);
  const std::int64_t end_group = clamped(p.request_starts[request + 1], 0, p.num_groups);
  const float strength = p.diversity_strengths[request];
  for (std::int64_t g = first_group; g < end_group; ++g) {
    const std::int64_t first_beam = clamped(p.group_starts[g], 0, p.num_beams);
    const std::int64_t end_beam = clamped(p.group_starts[g + 1], first_beam, p.num_beams);
    const Group group{p,
                      memory,
                      g,
                      first_beam,
                      end_beam - first_beam,
                      static_cast<int>(clamped(p.beam_sizes[g], 1, p.max_beam)),
                      static_cast<int>(width_of(p, first_group, g, strength)),
                      static_cast<double>(strength),
                      p.live.token_ids + first_group * p.max_beam,
                      strength > 0.0f ? (g - first_group) * p.max_beam : 0};
    step_group(group, places, places + room, room);
  }
}

}  // namespace

void beam_step(const BeamStepParams& p) {
  if (p.num_groups == 0 || p.num_requests == 0) return;
  if (p.max_beam > kMaxBeam) {
    throw NotImplemented("beam_step: beam_sizes must be at most " + std::to_string(kMaxBeam) +
                         " on CUDA, got " + std::to_string(p.max_beam));
  }
  // Two lists per beam, as wide as any group may need: all groups may be of one request.
  const std::int64_t all_sizes = p.num_groups * p.max_beam;
  const std::int64_t widest = all_sizes < p.vocab_size ? all_sizes : p.vocab_size;
  const std::int64_t most_keys = 2 * p.num_beams * widest;
  if (most_keys > kMaxKeys) {
    throw NotImplemented("beam_step: num_beams must be at most " +
                         std::to_string(kMaxKeys / (2 * widest)) + " on CUDA with " +
                         std::to_string(p.num_groups) + " groups of up to " +
                         std::to_string(p.max_beam) + " beams, got " + std::to_string(p.num_beams) +
                         ": call it for fewer requests at a time");
  }
  const RowLaunch plan =
      choose_rows<BeamRow, BeamRow::Params>("beam_step", p.num_beams, p.vocab_size);
  const std::int64_t beams_bytes = p.num_beams * std::int64_t{sizeof(BeamTokens)};
  auto* bytes = static_cast<char*>(workspace(plan.stats_bytes + beams_bytes + most_keys * 8));
  auto* row_counters = counters(p.num_beams + 2);
  const BeamMemory memory{reinterpret_cast<BeamTokens*>(bytes),
                          reinterpret_cast<Key*>(bytes + beams_bytes), most_keys,
                          row_counters + p.num_beams, row_counters + p.num_beams + 1};
  if (p.num_beams > 0) {
    const BeamRow::Params params{p, memory};
    launch_rows<BeamRow>(plan, params, bytes + beams_bytes + most_keys * 8, row_counters);
  }
  int room = 256;
  while (room < 2 * p.max_beam) room *= 2;
  const Shape shape{.grid = static_cast<unsigned>(p.num_requests),
                    .block = 256,
                    .shared_bytes = (room + p.max_beam) * std::int64_t{sizeof(Place)},
                    .overlaps = true};
  launch(&group_kernel, shape, p, memory, room);
}

}  // namespace fullbeam::cuda
