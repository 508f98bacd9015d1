// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "core/api.h"
#include "core/stream.h"

namespace fullbeam {

// Asks a program to end early; any thread may.
class Stop {
 public:
  void set() { is_set_.store(true, std::memory_order_relaxed); }
  bool is_set() const { return is_set_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> is_set_{false};
};

// A recorded sequence of ops: their checked parameter structs, by value. Running it again costs no
// Python and no checks; the memory that the structs point to must still be there, and what it holds
// may have changed in between (lengths, page tables, token ids): a CUDA graph's contract, on the
// CPU.
class Program {
 public:
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  // Whether all of it ran: it ends after the op in which it is stopped.
  bool run(const Stop* stop = nullptr) const {
    for (const auto& call : calls_) {
      if (stop != nullptr && stop->is_set()) return false;
      call();
    }
    return true;
  }
  std::size_t size() const { return calls_.size(); }

  // The program that this thread is recording, or null.
  FULLBEAM_API static Program*& recording();

 private:
  std::vector<std::function<void()>> calls_;
};

// Every op ends here: runs the backend's function, or records it.
template <class Params>
inline void launch(const Params& params, void (*backend)(const Params&)) {
  if (Program* program = Program::recording()) {
    program->add([params, backend, stream = current_stream()] {
      current_stream() = stream;
      backend(params);
    });
  } else {
    backend(params);
  }
}

}  // namespace fullbeam
