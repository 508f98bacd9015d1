// SPDX-License-Identifier: Apache-2.0
// GGUF blocks -> the panels of core/weight.h. The block formats are those of the GGUF specification
// (ggml's block_q4_0 ... block_q6_K): little-endian, f16 scales.
#include "core/packed_weight.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>

#include "core/parallel.h"

namespace fullbeam {
namespace {

struct Block {
  int cols;
  int bytes;
};

constexpr Block block_of(WeightType type) {
  switch (type) {
    case WeightType::f32:
      return {1, 4};
    case WeightType::f16:
    case WeightType::bf16:
      return {1, 2};
    case WeightType::q8_0:
      return {32, 34};
    case WeightType::q4_0:
      return {32, 18};
    case WeightType::q4_1:
      return {32, 20};
    case WeightType::q5_0:
      return {32, 22};
    case WeightType::q5_1:
      return {32, 24};
    case WeightType::q4_k:
      return {256, 144};
    case WeightType::q5_k:
      return {256, 176};
    case WeightType::q6_k:
      return {256, 210};
  }
  return {1, 1};
}

// What is packed at a time, so that threads share even one matrix, and what has been read can be
// let go of.
constexpr std::int64_t kStretchBytes = 1 << 20;

constexpr WeightType kTypes[] = {WeightType::f32,  WeightType::f16,  WeightType::bf16,
                                 WeightType::q8_0, WeightType::q4_0, WeightType::q4_1,
                                 WeightType::q5_0, WeightType::q5_1, WeightType::q4_k,
                                 WeightType::q5_k, WeightType::q6_k};

// One row's 32 columns of a tile: unsigned values and what scales them.
struct TileRow {
  std::uint8_t values[32];
  std::uint16_t d = 0, m = 0;      // f16 bits; of the super-block for k and k16
  std::uint8_t scale[2] = {0, 0};  // k: scale, minimum; k16: two scales (as i8)
};

std::uint16_t load_u16(const std::uint8_t* p) {
  std::uint16_t value;
  std::memcpy(&value, p, 2);
  return value;
}

void unpack_nibbles(const std::uint8_t* q, std::uint8_t* values) {
  for (int i = 0; i < 16; ++i) {
    values[i] = q[i] & 15;
    values[i + 16] = q[i] >> 4;
  }
}

void add_fifth_bits(const std::uint8_t* high, std::uint8_t* values) {
  for (int i = 0; i < 32; ++i)
    values[i] = static_cast<std::uint8_t>(values[i] | ((high[i / 8] >> (i % 8) & 1) << 4));
}

// The 6-bit scale and minimum of sub-block j (0..7) from the 12 packed bytes of a Q4_K or Q5_K
// block.
void unpack_k_scale(const std::uint8_t* s, int j, std::uint8_t* out) {
  if (j < 4) {
    out[0] = s[j] & 63;
    out[1] = s[j + 4] & 63;
  } else {
    out[0] = static_cast<std::uint8_t>((s[j + 4] & 15) | (s[j - 4] >> 6 << 4));
    out[1] = static_cast<std::uint8_t>((s[j + 4] >> 4) | (s[j] >> 6 << 4));
  }
}

TileRow read_tile(WeightType type, const std::uint8_t* row, std::int64_t tile) {
  TileRow t;
  const Block block = block_of(type);
  const std::uint8_t* b = row + (block.cols == 32 ? tile : tile / kTilesPerSuper) * block.bytes;
  const int j = static_cast<int>(tile % kTilesPerSuper);
  switch (type) {
    case WeightType::q8_0:
      t.d = load_u16(b);
      for (int i = 0; i < 32; ++i) t.values[i] = static_cast<std::uint8_t>(b[2 + i] ^ 0x80);
      break;
    case WeightType::q4_0:
      t.d = load_u16(b);
      unpack_nibbles(b + 2, t.values);
      break;
    case WeightType::q4_1:
      t.d = load_u16(b);
      t.m = load_u16(b + 2);
      unpack_nibbles(b + 4, t.values);
      break;
    case WeightType::q5_0:
      t.d = load_u16(b);
      unpack_nibbles(b + 6, t.values);
      add_fifth_bits(b + 2, t.values);
      break;
    case WeightType::q5_1:
      t.d = load_u16(b);
      t.m = load_u16(b + 2);
      unpack_nibbles(b + 8, t.values);
      add_fifth_bits(b + 4, t.values);
      break;
    case WeightType::q4_k:
    case WeightType::q5_k: {
      t.d = load_u16(b);
      t.m = load_u16(b + 2);
      unpack_k_scale(b + 4, j, t.scale);
      const std::uint8_t* q = b + (type == WeightType::q4_k ? 16 : 48) + j / 2 * 32;
      for (int i = 0; i < 32; ++i) t.values[i] = j % 2 ? q[i] >> 4 : q[i] & 15;
      if (type == WeightType::q5_k) {
        for (int i = 0; i < 32; ++i) {
          t.values[i] = static_cast<std::uint8_t>(t.values[i] | ((b[16 + i] >> j & 1) << 4));
        }
      }
      break;
    }
    case WeightType::q6_k: {
      t.d = load_u16(b + 208);
      const int half = j / 4,
                quarter = j % 4;  // 128 columns share 64 + 32 bytes; a quarter is 32 columns
      const std::uint8_t* low = b + half * 64 + quarter % 2 * 32;
      const std::uint8_t* high = b + 128 + half * 32;
      for (int i = 0; i < 32; ++i) {
        const int nibble = quarter < 2 ? low[i] & 15 : low[i] >> 4;
        t.values[i] = static_cast<std::uint8_t>(nibble | ((high[i] >> (2 * quarter) & 3) << 4));
      }
      t.scale[0] = b[192 + j * 2];
      t.scale[1] = b[192 + j * 2 + 1];
      break;
    }
    default:
      break;
  }
  return t;
}

void put_u16(std::uint8_t* p, int idx, std::uint16_t value) { std::memcpy(p + 2 * idx, &value, 2); }

// Four values of a step are one 32-bit word, in memory and here.
void write_values(const QuantLayout& layout, int lane, const std::uint8_t* values,
                  std::uint8_t* tile) {
  std::uint32_t steps[8];
  std::memcpy(steps, values, sizeof steps);
  const auto put = [&](int offset, std::uint32_t word) {
    std::memcpy(tile + offset + 4 * lane, &word, 4);
  };
  if (layout.bits == 8) {
    for (int s = 0; s < 8; ++s) put(64 * s, steps[s]);
    return;
  }
  constexpr std::uint32_t kLow = 0x0f0f0f0fu;
  for (int s = 0; s < 4; ++s) put(64 * s, (steps[s] & kLow) | (steps[s + 4] & kLow) << 4);
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

void pack_quantised_panel(const WeightPart& part, WeightType type, std::int64_t panel,
                          std::uint8_t* out) {
  const QuantLayout layout = layout_of(type);
  const std::int64_t bytes_per_row = row_bytes(type, part.cols), num_tiles = part.cols / kTileCols;
  std::uint8_t* super = nullptr;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    if (layout.super_bytes() > 0 && tile % kTilesPerSuper == 0) {
      super = out;
      out += layout.super_bytes();
    }
    std::uint8_t* scales = out + layout.value_bytes();
    for (int lane = 0; lane < kPanelRows; ++lane) {
      const std::int64_t row = panel * kPanelRows + lane;
      if (row >= part.rows) break;
      const TileRow t = read_tile(type, part.data + row * bytes_per_row, tile);
      write_values(layout, lane, t.values, out);
      switch (layout.scales) {
        case ScaleKind::dm:
          put_u16(scales + 32, lane, t.m);
          [[fallthrough]];
        case ScaleKind::d:
          put_u16(scales, lane, t.d);
          break;
        case ScaleKind::k:
          put_u16(super + 32, lane, t.m);
          [[fallthrough]];
        case ScaleKind::k16:
          put_u16(super, lane, t.d);
          scales[lane] = t.scale[0];
          scales[16 + lane] = t.scale[1];
          break;
      }
    }
    out += layout.tile_bytes();
  }
}

void pack_float_panel(const WeightPart& part, WeightType type, std::int64_t panel,
                      std::uint8_t* out) {
  const std::int64_t item = block_of(type).bytes, bytes_per_row = row_bytes(type, part.cols);
  for (std::int64_t lane = 0; lane < kPanelRows && panel * kPanelRows + lane < part.rows; ++lane) {
    const std::uint8_t* row = part.data + (panel * kPanelRows + lane) * bytes_per_row;
    for (std::int64_t col = 0; col < part.cols; ++col) {
      std::memcpy(out + (col * kPanelRows + lane) * item, row + col * item,
                  static_cast<std::size_t>(item));
    }
  }
}

void pack_panels(const WeightPart& part, const WeightSegment& segment, std::int64_t begin,
                 std::int64_t end) {
  const auto pack = is_quantised(segment.type) ? pack_quantised_panel : pack_float_panel;
  for (std::int64_t panel = begin; panel < end; ++panel)
    pack(part, segment.type, panel,
         const_cast<std::uint8_t*>(segment.data) + panel * segment.panel_bytes);
}

std::int64_t bytes_of_panel(WeightType type, std::int64_t cols) {
  if (!is_quantised(type)) return cols * kPanelRows * block_of(type).bytes;
  const QuantLayout layout = layout_of(type);
  const std::int64_t num_tiles = cols / kTileCols;
  return num_tiles * layout.tile_bytes() + num_tiles / kTilesPerSuper * layout.super_bytes();
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

const char* name_of(WeightType type) {
  constexpr const char* kNames[] = {"F32",  "F16",  "BF16", "Q8_0", "Q4_0", "Q4_1",
                                    "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"};
  return kNames[static_cast<int>(type)];
}

WeightType parse_weight_type(const char* op, const std::string& name) {
  std::string known;
  for (WeightType type : kTypes) {
    if (name == name_of(type)) return type;
    known += (known.empty() ? "" : ", ") + std::string(name_of(type));
  }
  throw std::invalid_argument(std::string(op) + ": type must be one of " + known + ", got " + name);
}

std::int64_t row_bytes(WeightType type, std::int64_t cols) {
  const Block block = block_of(type);
  return cols % block.cols == 0 ? cols / block.cols * block.bytes : -1;
}

PackedWeight::PackedWeight(const std::vector<WeightPart>& parts) {
  lay_out(parts);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    parallel_chunks(segments_[i].num_panels, 8, [&](std::int64_t begin, std::int64_t end) {
      pack_panels(parts[i], segments_[i], begin, end);
    });
  }
}

void PackedWeight::lay_out(const std::vector<WeightPart>& parts) {
  if (parts.empty())
    throw std::invalid_argument("pack_weight: parts must be at least one, got none");
  cols_ = parts.front().cols;
  std::vector<std::int64_t> offsets;
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
    segment.panel_bytes = bytes_of_panel(type, part.cols);
    offsets.push_back(num_bytes_);
    num_bytes_ += (segment.num_panels * segment.panel_bytes + 63) / 64 * 64;
    rows_ += part.rows;
    num_panels_ += segment.num_panels;
    segments_.push_back(segment);
  }
  // One register beyond the end may be loaded, never used.
  storage_ = weight_memory(static_cast<std::size_t>(num_bytes_) + 64);
  for (std::size_t i = 0; i < parts.size(); ++i) segments_[i].data = storage_.get() + offsets[i];
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

PackedWeight Packing::add(const std::vector<WeightPart>& parts, bool release) {
  PackedWeight weight;
  weight.lay_out(parts);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::size_t i = 0; i < parts.size(); ++i) {
      const WeightSegment& segment = weight.segments_[i];
      const std::int64_t most = std::max<std::int64_t>(8, kStretchBytes / segment.panel_bytes);
      for (std::int64_t first = 0; first < segment.num_panels; first += most) {
        const std::int64_t count = std::min(most, segment.num_panels - first);
        waiting_.push_back({parts[i], segment, first, count, weight.storage_, release});
        waiting_bytes_ += count * segment.panel_bytes;
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
  waiting_bytes_ -= stretch.count * stretch.segment.panel_bytes;
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
  packed_bytes_.fetch_add(count * segment.panel_bytes, std::memory_order_relaxed);
}

}  // namespace fullbeam
