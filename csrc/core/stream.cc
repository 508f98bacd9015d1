// SPDX-License-Identifier: Apache-2.0
#include "core/stream.h"

namespace fullbeam {

Stream& current_stream() {
  thread_local Stream stream;
  return stream;
}

}  // namespace fullbeam
