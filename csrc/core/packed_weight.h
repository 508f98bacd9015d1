// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core/api.h"
#include "core/weight.h"

namespace fullbeam {

// A part of a matrix as a GGUF file stores it: row-major blocks.
struct WeightPart {
  const std::uint8_t* data;
  std::int64_t num_bytes;
  std::string type;  // "F32", "Q4_K", ...
  std::int64_t rows, cols;
};

// A weight matrix [rows, cols] in the layout of core/weight.h; parts are stacked by rows and keep
// their own types, so that query, key and value projections, or gate and up, are one product.
// `largest_only`: for products of which mostly each token's largest value is wanted; 8-bit values
// lie in halves then.
class PackedWeight {
 public:
  FULLBEAM_API PackedWeight(const std::vector<WeightPart>& parts, bool largest_only);

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  std::int64_t num_panels() const { return num_panels_; }
  std::int64_t num_bytes() const { return num_bytes_; }
  std::int64_t low_bytes() const { return low_bytes_; }  // of them, lower halves that lie apart
  const std::vector<WeightSegment>& segments() const { return segments_; }

 private:
  friend class Packing;
  PackedWeight() = default;
  // All but the panels' contents.
  void lay_out(const std::vector<WeightPart>& parts, bool largest_only);

  std::shared_ptr<std::uint8_t> storage_;
  std::vector<WeightSegment> segments_;
  std::int64_t rows_ = 0, cols_ = 0, num_panels_ = 0, num_bytes_ = 0, low_bytes_ = 0;
};

// Packs many matrices in threads of its own while the caller goes on. A matrix may be used once
// `wait` has returned true; the bytes of its parts must stay where they are until then. The last
// `spare_bytes` are left until `wait` is called: memory that the caller needs meanwhile.
class Packing {
 public:
  FULLBEAM_API Packing(int num_threads, std::int64_t spare_bytes);
  FULLBEAM_API ~Packing();  // leaves what is not packed yet
  Packing(const Packing&) = delete;
  Packing& operator=(const Packing&) = delete;

  // `release`: the parts lie in a mapped file, whose pages are dropped once they are packed.
  FULLBEAM_API PackedWeight add(const std::vector<WeightPart>& parts, bool release,
                                bool largest_only);
  // Lends a hand for some time; whether all is done.
  FULLBEAM_API bool wait(double seconds);
  std::int64_t packed_bytes() const { return packed_bytes_.load(std::memory_order_relaxed); }

 private:
  struct Stretch {
    WeightPart part;
    WeightSegment segment;
    std::int64_t first, count;  // panels of the segment
    std::shared_ptr<std::uint8_t> storage;
    bool release;
    std::int64_t num_bytes() const { return count * (segment.panel_bytes + segment.low_bytes); }
  };
  void work();
  Stretch take();  // of those that wait
  void pack(const Stretch& stretch);

  std::mutex mutex_;  // of what follows
  std::condition_variable added_, done_;
  std::deque<Stretch> waiting_;
  std::int64_t waiting_bytes_ = 0, spare_bytes_;
  int num_busy_ = 0;
  bool is_closed_ = false;
  std::atomic<std::int64_t> packed_bytes_{0};
  std::vector<std::thread> threads_;
};

WeightType parse_weight_type(const char* op, const std::string& name);
FULLBEAM_API const char* name_of(WeightType type);
// Bytes of one row of `cols` columns in a GGUF file; -1 where cols is no multiple of the type's
// block.
std::int64_t row_bytes(WeightType type, std::int64_t cols);

}  // namespace fullbeam
