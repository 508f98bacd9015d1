// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

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
class PackedWeight {
 public:
  // Called after every few megabytes with the part's index and the packed bytes of the stretch.
  using OnStretch = std::function<void(std::size_t part, std::int64_t num_bytes)>;
  explicit PackedWeight(const std::vector<WeightPart>& parts, const OnStretch& on_stretch = {});

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  std::int64_t num_panels() const { return num_panels_; }
  std::int64_t num_bytes() const { return num_bytes_; }
  const std::vector<WeightSegment>& segments() const { return segments_; }

 private:
  std::shared_ptr<std::uint8_t> storage_;
  std::vector<WeightSegment> segments_;
  std::int64_t rows_ = 0, cols_ = 0, num_panels_ = 0, num_bytes_ = 0;
};

WeightType parse_weight_type(const std::string& name);
const char* name_of(WeightType type);
// Bytes of one row of `cols` columns in a GGUF file; -1 where cols is no multiple of the type's
// block.
std::int64_t row_bytes(WeightType type, std::int64_t cols);

}  // namespace fullbeam
