// SPDX-License-Identifier: Apache-2.0
// Draws one token per row after its edits, temperature, min_p, top_k and top_p, and says how likely
// it was before them.
// Mapping: as cuda/logits_row.cuh has it: a cluster per row, or a block per tile and the last one
// for the rest. One launch. Cost: the logits once from memory; of a row with edits, the strips that
// log-probabilities ask for again, from L2. On the portable way the strips with candidates are read
// again, from L2, and all strips where more than kListSize tokens are candidates. Numerics: as
// cuda/logprobs.cu; weights in float32, their sums in whole numbers, so that a cumulative sum
// always reaches its target and the index needs no clamp; thresholds in float64. Source: inverse
// transform sampling; Holtzman et al. 2019 (arXiv 1904.09751) for top_p, Nguyen et al. 2024 (arXiv
// 2407.01082) for min_p, Keskar et al. 2019 (arXiv 1909.05858) for the repetition penalty.
#include "core/philox.h"
#include "cuda/logits_kernel.cuh"
#include "cuda/logprobs.cuh"
#include "ops/sample.h"

namespace fullbeam::cuda {
namespace {

// The smallest float at or above max + temperature * ln(min_p).
__device__ float min_p_bound(float top, float temperature, float min_p) {
  const double bound =
      static_cast<double>(top) + static_cast<double>(temperature) * log(static_cast<double>(min_p));
  const float rounded = static_cast<float>(bound);
  return static_cast<double>(rounded) < bound ? nextafterf(rounded, INFINITY) : rounded;
}

// What a row asks for.
struct Truncation {
  float temperature, min_p;
  double top_p;
  int top_k;  // at most vocab_size

  __device__ bool takes_the_best() const {
    return !(temperature > 0.0f) || top_k == 1 || top_p <= 0.0;
  }
  __device__ bool has_nucleus() const { return top_p < 1.0; }
  __device__ bool has_bound(int size) const { return top_k < size || min_p > 0.0f; }
  // Whether the draw asks for the mass of the whole row.
  __device__ bool needs_mass(int size) const { return !takes_the_best() && !has_bound(size); }
};

struct SampleRow {
  const SampleParams& p;
  std::int64_t idx;
  Truncation truncation;
  float temperature, rate;  // of the draw's softmax
  bool wants_logprobs, wants_mass;

  __device__ SampleRow(const SampleParams& params, std::int64_t row) : p(params), idx(row) {
    const int k = p.top_k[idx], size = static_cast<int>(p.vocab_size);
    truncation = {p.temperature[idx], p.min_p[idx], static_cast<double>(p.top_p[idx]),
                  k > 0 && k < size ? k : size};
    temperature = truncation.temperature > 0.0f ? truncation.temperature : 1.0f;
    rate = Softmax::of(temperature).rate;
    wants_logprobs = p.num_top != nullptr && p.num_top[idx] >= 0;
    wants_mass = wants_logprobs || truncation.needs_mass(size);
  }

  __device__ void set(Row& row) const {
    row.logits = row_of(p.logits, p.dtype, idx * p.logits_stride);
    row.dtype = p.dtype;
    row.vocab_size = static_cast<int>(p.vocab_size);
    const std::int32_t mask = p.allowed_idx == nullptr ? -1 : p.allowed_idx[idx];
    const Penalties penalties{p.repetition_penalty == nullptr ? 1.0f : p.repetition_penalty[idx],
                              p.frequency_penalty == nullptr ? 0.0f : p.frequency_penalty[idx],
                              p.presence_penalty == nullptr ? 0.0f : p.presence_penalty[idx]};
    const bool is_neutral = penalties.are_neutral();
    const int last = is_neutral || p.history_last == nullptr ? -1 : p.history_last[idx];
    row.edits = {mask >= 0 && mask < p.num_masks ? p.allowed + mask * p.num_words : nullptr,
                 entries_of(p.bias_starts, idx, p.num_biases),
                 p.bias_ids,
                 p.bias_values,
                 entries_of(is_neutral ? nullptr : p.history_starts, idx, p.num_histories),
                 p.history_ids,
                 p.history_counts,
                 last < row.vocab_size ? last : -1,
                 penalties};
  }

  // stats: maxima and sums of the row as it is, then of the one that is drawn from, which are the
  // same places where there is no difference.
  __device__ bool has_own_sum(const Row& row) const {
    return row.edits.is_any() || rate != Softmax::of(1.0f).rate;
  }
  __device__ void scan(RowShared& s) const {
    const Row& row = s.row;
    const bool has_edits = row.edits.is_any(), has_own_sum = this->has_own_sum(row);
    const bool wants_raw_sum = wants_logprobs || (wants_mass && !has_own_sum);
    scan_share(s, [&](int strip, float (&x)[4], bool is_edited) {
      const int place = strip - row.stats_first;
      const bool is_first_lane = threadIdx.x % 32 == 0;
      const float largest = strip_max(x);
      if (is_first_lane) row.stats[is_edited ? 2 : 0][place] = largest;
      for (int i = 1; i < 4; i += 2) {
        const bool is_wanted = i == 1 ? !is_edited && wants_raw_sum
                                      : is_edited == has_edits && has_own_sum && wants_mass;
        if (!is_wanted) continue;
        const float sum = strip_sum(x, largest, i == 1 ? Softmax::of(1.0f).rate : rate);
        if (is_first_lane) row.stats[i][place] = sum;
      }
    });
  }

  // The key of the best token.
  __device__ Key best_of(RowShared& s, const View& view) const {
    RowShared* const root = s.row.root;
    if (s.row.is_root() && threadIdx.x == 0) s.best = kLastKey;
    s.row.team.sync();
    visit(s, view, view.best, [&](int, int id, float (&x)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Key key = key_of(x[i], id + i);
        if (value_key(key) == view.best) atomicMin(&root->best, key);
      }
    });
    s.row.team.sync();
    return root->best;
  }

  // The key of the last token that min_p, top_k and top_p leave.
  __device__ Key last_kept(RowShared& s, const View& view) const {
    const auto nucleus_of = [&](unsigned long long total) {
      const auto wanted =
          static_cast<unsigned long long>(ceil(truncation.top_p * static_cast<double>(total)));
      return Amount{kNever, wanted > 0 ? wanted : 1};
    };
    Key limit = kLastFinite;
    if (truncation.min_p > 0.0f) {
      const float bound = min_p_bound(view.softmax.top, truncation.temperature, truncation.min_p);
      const float lowest = bound < view.softmax.top ? bound : view.softmax.top;
      const Key last = Key{descending_key(lowest)} << 32 | 0xffffffffu;
      limit = last < limit ? last : limit;
    }
    if (!truncation.has_bound(s.row.vocab_size)) {
      return find_edge(view, 0, limit, nucleus_of(mass_of_row(view, kNucleusMass))).key;
    }
    if (truncation.top_k == s.row.vocab_size && !truncation.has_nucleus()) return limit;
    const Edge edge =
        find_edge(view, 0, limit, {static_cast<unsigned long long>(truncation.top_k), kNever});
    if (!truncation.has_nucleus()) return edge.key;
    const Amount wanted = nucleus_of(edge.through.mass);
    if (!edge.is_listed) return find_edge(view, 0, edge.key, wanted).key;
    __syncthreads();  // others may still read the last search
    if (threadIdx.x == 0) s.search = {0, 0, {0, 0}, wanted};
    __syncthreads();
    find_in_list(s, view, kNucleus, static_cast<int>(edge.through.count));
    const Found& found = s.row.root->found[kNucleus];
    return found.is_reached ? s.row.root->list[found.idx] : edge.key;
  }

  // Makes the sums those of the tokens up to `last` alone.
  __device__ void keep(RowShared& s, const View& view, Key last) const {
    visit(s, view, value_key(last), [&](int strip, int id, float (&x)[4]) {
      const float largest = view.max_of(strip);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum += key_of(x[i], id + i) <= last ? weight_of(x[i], largest, view.softmax.rate) : 0.0f;
      }
      sum = warp_reduce(sum, Sum());
      if (threadIdx.x % 32 == 0) view.sum[strip - view.first] = sum;
    });
  }

  // The token at `target` of the `mass` of a strip's tokens up to `last`, to the root's token_id.
  __device__ void pick_in_strip(RowShared& s, const View& view, int strip, Key last,
                                unsigned long long target, unsigned long long mass) const {
    visit(s, view, strip, strip + 1, ~0u, [&](int, int id, float (&x)[4]) {
      const float largest = view.max_of(strip);
      unsigned long long masses[4], sum = 0;  // relative to the strip's best
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = weight_of(x[i], largest, view.softmax.rate);
        masses[i] = key_of(x[i], id + i) <= last
                        ? static_cast<unsigned long long>(static_cast<double>(weight) * kUnit)
                        : 0;
        sum += masses[i];
      }
      unsigned long long reached = sum;
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        const unsigned long long other = __shfl_up_sync(kWholeWarp, reached, delta);
        reached += lane >= delta ? other : 0;
      }
      const unsigned long long total = __shfl_sync(kWholeWarp, reached, 31);
      auto wanted = static_cast<unsigned long long>(
          static_cast<double>(target) / static_cast<double>(mass) * static_cast<double>(total));
      wanted = wanted < total ? wanted : total - 1;
      reached -= sum;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (reached <= wanted && wanted < reached + masses[i]) s.row.root->token_id = id + i;
        reached += masses[i];
      }
    });
  }

  // The first token by id whose cumulative mass exceeds its share `uniform` of the whole.
  __device__ int draw(RowShared& s, const View& view, Key last, double uniform) const {
    const Row& row = s.row;
    const Team team = row.team;
    const auto mass_of = [&](int i) {
      const int strip = row.begin + i;
      const bool is_kept = descending_key(view.max_of(strip)) <= value_key(last);
      return is_kept ? view.mass_of_strip(strip) : 0;
    };
    const int num_strips = row.end - row.begin;
    unsigned long long own = 0;
    for (int i = static_cast<int>(threadIdx.x); i < num_strips; i += static_cast<int>(blockDim.x)) {
      own += mass_of(i);
    }
    own = block_reduce(own, s.reduce, Sum());
    if (threadIdx.x == 0) {
      s.parts[kDrawMass] = own;
      s.token_id = -1;
    }
    team.sync();
    unsigned long long before = 0, total = 0;
    for (unsigned rank = 0; rank < team.size; ++rank) {
      const unsigned long long part = *team.at(&s.parts[kDrawMass], rank);
      if (rank < team.rank) before += part;
      total += part;
    }
    auto target = static_cast<unsigned long long>(uniform * static_cast<double>(total));
    target = target < total ? target : total - 1;
    if (before <= target && target < before + own) {
      Found& found = s.found[kInRow];
      find_first(s, num_strips, {0, 0}, {kNever, target - before + 1}, found,
                 [&](int i) { return Amount{0, mass_of(i)}; });
      pick_in_strip(s, view, row.begin + found.idx, last, target - before - found.before.mass,
                    found.through.mass - found.before.mass);
    }
    team.sync();
    return row.root->token_id;
  }

  __device__ int draw_token(RowShared& s, const View& view) const {
    // Histories that name a token twice may be edited otherwise each time: then no token is sure.
    if (truncation.takes_the_best()) {
      const Key best = best_of(s, view);
      return best != kLastKey ? id_of(best) : -1;
    }
    Key last = kLastFinite;
    if (truncation.has_bound(s.row.vocab_size) || truncation.has_nucleus()) {
      last = last_kept(s, view);
      keep(s, view, last);
    }
    const std::uint32_t* counter = p.counters + idx * 3;
    return draw(s, view, last,
                philox_uniform(p.seeds[idx], {{counter[0], counter[1], counter[2], 0}}));
  }

  __device__ __noinline__ void finish(RowShared& s) const {
    const Row& row = s.row;
    const double nan = static_cast<double>(NAN), infinity = static_cast<double>(INFINITY);
    View &raw = s.views[0], &view = s.views[1];
    make_view(raw, kRawView, row.stats[0], row.stats[1], 1.0f);
    double log_sum = nan, drawn_log_sum = nan;
    const bool is_reported = wants_logprobs && raw.has_distribution();
    if (is_reported) log_sum = log_sum_of(raw, mass_of_row(raw, kRawMass));
    int token_id = -1;
    if (raw.has_distribution()) {
      float* sum = row.stats[has_own_sum(row) ? 3 : 1];
      if (threadIdx.x == 0) raw.is_raw = row.edits.is_any();
      make_view(view, kDrawnView, row.stats[row.edits.is_any() ? 2 : 0], sum, temperature);
      if (view.has_distribution()) {
        if (is_reported) {
          const double mass = static_cast<double>(mass_of_row(view, kDrawnMass)) / kUnit;
          const double top = static_cast<double>(view.softmax.top);
          drawn_log_sum =
              view.is_infinite ? infinity : top / static_cast<double>(temperature) + log(mass);
        }
        token_id = draw_token(s, view);
      }
    }
    const bool writes_one = row.is_root() && threadIdx.x == 0;
    if (writes_one) p.token_ids[idx] = token_id;
    if (p.num_top == nullptr) return;
    if (writes_one) {
      p.log_sums[2 * idx] = is_reported && raw.is_infinite ? infinity : log_sum;
      p.log_sums[2 * idx + 1] = drawn_log_sum;
    }
    const LogprobsOut out{p.logprobs + idx, p.ranks + idx, p.top_ids + idx * p.max_top,
                          p.top_logprobs + idx * p.max_top, p.max_top};
    if (is_reported) {
      const std::int64_t num_top = p.num_top[idx] < p.max_top ? p.num_top[idx] : p.max_top;
      write_logprobs(s, raw, log_sum, token_id, num_top, out);
    } else if (row.is_root()) {
      clear_logprobs(out, 0);
    }
  }
};

}  // namespace

void sample(const SampleParams& p) {
  if (p.num_rows == 0) return;
  const RowLaunch plan = choose_rows<SampleRow, SampleParams>("sample", p.num_rows, p.vocab_size);
  launch_rows<SampleRow>(plan, p, workspace(plan.stats_bytes), counters(p.num_rows));
}

}  // namespace fullbeam::cuda
