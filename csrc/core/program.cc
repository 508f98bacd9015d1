// SPDX-License-Identifier: Apache-2.0
#include "core/program.h"

namespace fullbeam {

Program*& Program::recording() {
  thread_local Program* program = nullptr;
  return program;
}

}  // namespace fullbeam
