// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdexcept>

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

}  // namespace fullbeam
