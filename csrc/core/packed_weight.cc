// SPDX-License-Identifier: Apache-2.0
// GGUF blocks (core/weight_blocks.h) -> the panels of core/weight.h.
#include "core/packed_weight.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

#include "core/errors.h"
#include "core/parallel.h"
#include "core/weight_blocks.h"

namespace fullbeam {
namespace {

// What is packed at a time, so that threads share even one matrix, and what has been read can be
// let go of.
constexpr std::int64_t kStretchBytes = 1 << 20;

// In the order of WeightType.
constexpr const char* kNames[] = {"F32",  "F16",  "BF16", "Q8_0", "Q4_0", "Q4_1",
                                  "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"};

void put_u16(std::uint8_t* p, int idx, std::uint16_t value) { std::memcpy(p + 2 * idx, &value, 2); }

typedef std::uint32_t Steps __attribute__((vector_size(16)));

// Four values of a step are one 32-bit word, in memory and here.
void write_values(const QuantLayout& layout, int lane, const std::uint8_t* left,
                  const std::uint8_t* right, std::uint8_t* tile, std::uint8_t* low) {
  std::uint32_t steps[8];
  std::memcpy(steps, left, 16);
  std::memcpy(steps + 4, right, 16);
  const auto put = [&](int offset, std::uint32_t word) {
    std::memcpy(tile + offset + 4 * lane, &word, 4);
  };
  if (layout.bits == 8 && !layout.in_halves) {
    for (int s = 0; s < 8; ++s) put(64 * s, steps[s]);
    return;
  }
  Steps first, second;
  std::memcpy(&first, left, 16);
  std::memcpy(&second, right, 16);
  constexpr std::uint32_t kLow = 0x0f0f0f0fu;
  const Steps lower = (first & kLow) | (second & kLow) << 4;
  const Steps upper = (first >> 4 & kLow) | (second & ~kLow);
  for (int s = 0; s < 4; ++s) {
    put(64 * s, layout.in_halves ? upper[s] : lower[s]);
    const std::uint32_t word = lower[s];
    if (layout.in_halves) std::memcpy(low + 64 * s + 4 * lane, &word, 4);
  }
  if (layout.bits == 5) {
    std::uint32_t high = 0;
    for (int s = 0; s < 8; ++s) high |= (steps[s] >> 4 & 0x01010101u) << s;
    put(256, high);
  }
  if (layout.bits == 6) {
    for (int h = 0; h < 2; ++h) {
      std::uint32_t high = 0;
      for (int j = 0; j < 4; ++j) high |= (steps[4 * h + j] >> 4 & 0x03030303u) << (2 * j);
      put(256 + 64 * h, high);
    }
  }
}

template <WeightType kType, bool kInHalves = false>
void pack_blocks(const WeightPart& part, std::int64_t panel, std::uint8_t* out, std::uint8_t* low) {
  constexpr QuantLayout kLayout = layout_of(kType, kInHalves);
  const std::int64_t bytes_per_row = row_bytes(kType, part.cols), num_tiles = part.cols / kTileCols;
  std::uint8_t* super = nullptr;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    if (kLayout.super_bytes() > 0 && tile % kTilesPerSuper == 0) {
      super = out;
      out += kLayout.super_bytes();
    }
    std::uint8_t* scales = out + kLayout.value_bytes();
    for (int lane = 0; lane < kPanelRows; ++lane) {
      const std::int64_t row = panel * kPanelRows + lane;
      if (row >= part.rows) break;
      const std::uint8_t* from = part.data + row * bytes_per_row;
      const auto left = read_run<16>(kType, from, tile * kTileCols);
      const auto right = read_run<16>(kType, from, tile * kTileCols + 16);
      write_values(kLayout, lane, left.values, right.values, out, low);
      switch (kLayout.scales) {
        case ScaleKind::dm:
          put_u16(scales + 32, lane, left.m);
          [[fallthrough]];
        case ScaleKind::d:
          put_u16(scales, lane, left.d);
          break;
        case ScaleKind::k:
          put_u16(super + 32, lane, left.m);
          [[fallthrough]];
        case ScaleKind::k16: {
          const bool has_minimum = kLayout.scales == ScaleKind::k;
          put_u16(super, lane, left.d);
          scales[lane] = static_cast<std::uint8_t>(left.scale);
          scales[16 + lane] = static_cast<std::uint8_t>(has_minimum ? -left.minimum : right.scale);
          break;
        }
      }
    }
    out += kLayout.tile_bytes();
    low += kLayout.low_bytes();
  }
}

template <std::int64_t kItem>
void pack_floats(const WeightPart& part, std::int64_t panel, std::uint8_t* out, std::uint8_t*) {
  const std::int64_t bytes_per_row = part.cols * kItem;
  for (std::int64_t lane = 0; lane < kPanelRows && panel * kPanelRows + lane < part.rows; ++lane) {
    const std::uint8_t* row = part.data + (panel * kPanelRows + lane) * bytes_per_row;
    for (std::int64_t col = 0; col < part.cols; ++col) {
      std::memcpy(out + (col * kPanelRows + lane) * kItem, row + col * kItem, kItem);
    }
  }
}

// In the order of WeightType. A function for each: with the type known, a block's values are taken
// apart as vectors, 2x over one for all (Q4_K, Zen 4 of 2 cores, 2026-11-21).
constexpr decltype(&pack_floats<4>) kPackPanel[] = {
    pack_floats<4>,
    pack_floats<2>,
    pack_floats<2>,
    pack_blocks<WeightType::q8_0>,
    pack_blocks<WeightType::q4_0>,
    pack_blocks<WeightType::q4_1>,
    pack_blocks<WeightType::q5_0>,
    pack_blocks<WeightType::q5_1>,
    pack_blocks<WeightType::q4_k>,
    pack_blocks<WeightType::q5_k>,
    pack_blocks<WeightType::q6_k>,
};

void pack_panels(const WeightPart& part, const WeightSegment& segment, std::int64_t begin,
                 std::int64_t end) {
  const auto pack = segment.low != nullptr ? pack_blocks<WeightType::q8_0, true>
                                           : kPackPanel[static_cast<int>(segment.type)];
  for (std::int64_t panel = begin; panel < end; ++panel)
    pack(part, panel, const_cast<std::uint8_t*>(segment.data) + panel * segment.panel_bytes,
         const_cast<std::uint8_t*>(segment.low) + panel * segment.low_bytes);
}

// Memory for weights, zeros, 64-byte aligned. Small matrices share regions, so that huge pages
// serve them, too; a region goes with the last of its matrices.
struct Region {
  explicit Region(std::size_t bytes) : mapped(bytes + kHugePage) {
    void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    start = static_cast<std::uint8_t*>(memory);
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    next = start + ((kHugePage - address % kHugePage) % kHugePage);
    madvise(next, bytes, MADV_HUGEPAGE);
    end = next + bytes;
  }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  ~Region() { munmap(start, mapped); }

  static constexpr std::size_t kHugePage = std::size_t{2} << 20;
  std::size_t mapped;
  std::uint8_t *start, *next, *end;
};

std::shared_ptr<std::uint8_t> weight_memory(std::size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Region> last;
  constexpr std::size_t kShared = std::size_t{256} << 20;
  bytes = (bytes + 63) / 64 * 64;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Region> region = last.lock();
  if (region == nullptr || static_cast<std::size_t>(region->end - region->next) < bytes) {
    const std::size_t whole =
        (bytes + Region::kHugePage - 1) / Region::kHugePage * Region::kHugePage;
    region = std::make_shared<Region>(std::max(whole, kShared));
    if (whole < kShared) last = region;
  }
  std::uint8_t* memory = region->next;
  region->next += bytes;
  return {region, memory};
}

}  // namespace

const char* name_of(WeightType type) { return kNames[static_cast<int>(type)]; }

WeightType parse_weight_type(const char* op, const std::string& name) {
  std::string known;
  for (std::size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return static_cast<WeightType>(i);
    known += (known.empty() ? "" : ", ") + std::string(kNames[i]);
  }
  throw std::invalid_argument(std::string(op) + ": type must be one of " + known + ", got " +
                              shown(name));
}

std::int64_t row_bytes(WeightType type, std::int64_t cols) {
  const Block block = block_of(type);
  return cols % block.cols == 0 ? cols / block.cols * block.bytes : -1;
}

PackedWeight::PackedWeight(const std::vector<WeightPart>& parts, bool largest_only) {
  lay_out(parts, largest_only);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    parallel_chunks(segments_[i].num_panels, 8, [&](std::int64_t begin, std::int64_t end) {
      pack_panels(parts[i], segments_[i], begin, end);
    });
  }
}

void PackedWeight::lay_out(const std::vector<WeightPart>& parts, bool largest_only) {
  if (parts.empty())
    throw std::invalid_argument("pack_weight: parts must be at least one, got none");
  cols_ = parts.front().cols;
  std::vector<std::int64_t> offsets, low_offsets;
  for (const WeightPart& part : parts) {
    const WeightType type = parse_weight_type("pack_weight", part.type);
    const std::string what = std::string("pack_weight: a part [") + std::to_string(part.rows) +
                             ", " + std::to_string(part.cols) + "] of " + part.type;
    if (part.rows < 1 || part.cols < 1)
      throw std::invalid_argument(what + " must have at least one row and column");
    if (part.cols != cols_) {
      throw std::invalid_argument(what + " must have as many columns as the first, got " +
                                  std::to_string(part.cols) + " and " + std::to_string(cols_));
    }
    const std::int64_t bytes = row_bytes(type, part.cols);
    if (bytes < 0) {
      throw std::invalid_argument(what + " must have a multiple of " +
                                  std::to_string(block_of(type).cols) + " columns");
    }
    if (part.num_bytes / bytes != part.rows || part.num_bytes % bytes != 0) {
      throw std::invalid_argument(what + " must have " + std::to_string(bytes) +
                                  " bytes per row, got " + std::to_string(part.num_bytes) +
                                  " bytes in all");
    }
    WeightSegment segment{};
    segment.type = type;
    segment.row_begin = rows_;
    segment.num_rows = part.rows;
    segment.panel_begin = num_panels_;
    segment.num_panels = (part.rows + kPanelRows - 1) / kPanelRows;
    const bool in_halves = largest_only && type == WeightType::q8_0;
    if (is_quantised(type)) {
      const QuantLayout layout = layout_of(type, in_halves);
      const std::int64_t num_tiles = cols_ / kTileCols;
      segment.panel_bytes =
          num_tiles * layout.tile_bytes() + num_tiles / kTilesPerSuper * layout.super_bytes();
      segment.low_bytes = num_tiles * layout.low_bytes();
    } else {
      segment.panel_bytes = cols_ * kPanelRows * block_of(type).bytes;
    }
    offsets.push_back(num_bytes_);
    num_bytes_ += (segment.num_panels * segment.panel_bytes + 63) / 64 * 64;
    low_offsets.push_back(num_bytes_);
    num_bytes_ += segment.num_panels * segment.low_bytes;
    low_bytes_ += segment.num_panels * segment.low_bytes;
    rows_ += part.rows;
    num_panels_ += segment.num_panels;
    segments_.push_back(segment);
  }
  // One register beyond the end may be loaded, never used.
  storage_ = weight_memory(static_cast<std::size_t>(num_bytes_) + 64);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    segments_[i].data = storage_.get() + offsets[i];
    if (segments_[i].low_bytes > 0) segments_[i].low = storage_.get() + low_offsets[i];
  }
}

Packing::Packing(int num_threads, std::int64_t spare_bytes) : spare_bytes_(spare_bytes) {
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
}

Packing::~Packing() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closed_ = true;
    waiting_.clear();
  }
  added_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

PackedWeight Packing::add(const std::vector<WeightPart>& parts, bool release, bool largest_only) {
  PackedWeight weight;
  weight.lay_out(parts, largest_only);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const WeightSegment& segment = weight.segments_[i];
      const std::int64_t panel_bytes = segment.panel_bytes + segment.low_bytes;
      const std::int64_t most = std::max<std::int64_t>(8, kStretchBytes / panel_bytes);
      for (std::int64_t first = 0; first < segment.num_panels; first += most) {
        const std::int64_t count = std::min(most, segment.num_panels - first);
        waiting_.push_back({parts[i], segment, first, count, weight.storage_, release});
        waiting_bytes_ += count * panel_bytes;
      }
    }
  }
  added_.notify_all();
  return weight;
}

bool Packing::wait(double seconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::unique_lock<std::mutex> lock(mutex_);
  spare_bytes_ = 0;
  added_.notify_all();
  while (!waiting_.empty() && std::chrono::steady_clock::now() < until) {
    const Stretch stretch = take();
    lock.unlock();
    pack(stretch);
    lock.lock();
  }
  return done_.wait_until(lock, until, [&] { return waiting_.empty() && num_busy_ == 0; });
}

void Packing::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    added_.wait(lock, [&] { return is_closed_ || waiting_bytes_ > spare_bytes_; });
    if (is_closed_) return;
    const Stretch stretch = take();
    ++num_busy_;
    lock.unlock();
    pack(stretch);
    lock.lock();
    --num_busy_;
    if (waiting_.empty() && num_busy_ == 0) done_.notify_all();
  }
}

Packing::Stretch Packing::take() {
  Stretch stretch = std::move(waiting_.front());
  waiting_.pop_front();
  waiting_bytes_ -= stretch.num_bytes();
  return stretch;
}

void Packing::pack(const Stretch& stretch) {
  const auto& [part, segment, first, count, storage, release] = stretch;
  pack_panels(part, segment, first, first + count);
  if (release) {
    const std::int64_t bytes_per_row = part.num_bytes / part.rows;
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto address = [&](std::int64_t panel) {
      const std::int64_t row = std::min(panel * kPanelRows, part.rows);
      return reinterpret_cast<std::uintptr_t>(part.data + row * bytes_per_row) / page * page;
    };
    const std::uintptr_t begin = address(first), end = address(first + count);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
  }
  packed_bytes_.fetch_add(stretch.num_bytes(), std::memory_order_relaxed);
}

}  // namespace fullbeam
