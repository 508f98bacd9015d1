// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdexcept>
#include <string>

#include "core/api.h"

namespace fullbeam {

// What the ops throw besides std::invalid_argument: an array of the wrong dtype, and what this
// build doesn't do.
struct FULLBEAM_API TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct FULLBEAM_API NotImplemented : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What an error says of a text that was given: the beginning of a long one.
inline std::string shown(const std::string& text) {
  if (text.size() <= 100) return text;
  std::size_t end = 97;
  while ((text[end] & 0xC0) == 0x80) --end;  // within a character of UTF-8
  return text.substr(0, end) + "...";
}

}  // namespace fullbeam
