// SPDX-License-Identifier: Apache-2.0
#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <pthread.h>

namespace fullbeam {
namespace {

// About 60 us between two checks of the clock-free spin: longer than the gap between two ops of a
// step.
constexpr int kSpins = 4000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

void spin_until_zero(const std::atomic<int>& count) {
  for (int spins = 0; count.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

// One team for the process. A region is a generation: workers see the counter move, run, and count
// themselves off.
class Team {
 public:
  void run(void (*body)(void*, int, int), void* context, int count) {
    std::lock_guard<std::mutex> one_region(region_);
    while (static_cast<int>(workers_.size()) < count - 1) {
      const int idx = static_cast<int>(workers_.size()) + 1;
      workers_.emplace_back([this, idx, seen = generation_.load()] { work(idx, seen); });
    }
    body_ = body;
    context_ = context;
    count_ = count;
    remaining_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    body(context, 0, count);
    spin_until_zero(remaining_);
  }

 private:
  void work(int idx, std::uint64_t seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen;
           ++spins)
        pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
      }
      ++seen;
      if (idx < count_) body_(context_, idx, count_);
      remaining_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex region_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<std::uint64_t> generation_{0};
  std::atomic<int> sleepers_{0}, remaining_{0};
  void (*body_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
  int count_ = 1;
};

// Never destroyed (workers outlive static destructors) and replaced in a forked child, which has
// none of the workers.
Team* team_instance = nullptr;
std::once_flag team_once;

Team& team() {
  std::call_once(team_once, [] {
    team_instance = new Team();
    pthread_atfork(nullptr, nullptr, [] { team_instance = new Team(); });
  });
  return *team_instance;
}

thread_local int threads_wanted = 0;

int count_physical_cores() {
  std::set<std::pair<std::string, std::string>> cores;
  const int logical = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  for (int cpu = 0; cpu < logical; ++cpu) {
    const std::string folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    std::ifstream package(folder + "physical_package_id"), core(folder + "core_id");
    std::string package_id, core_id;
    if (!(package >> package_id) || !(core >> core_id)) return logical;
    cores.emplace(package_id, core_id);
  }
  return std::min(logical, std::max(1, static_cast<int>(cores.size())));
}

}  // namespace

int num_physical_cores() {
  static const int count = count_physical_cores();
  return count;
}

int num_threads() { return threads_wanted > 0 ? threads_wanted : num_physical_cores(); }

void set_num_threads(int count) {
  if (count < 1 || count > 1024) {
    throw std::invalid_argument("threads: the count must be in 1..1024, got " +
                                std::to_string(count));
  }
  threads_wanted = count;
}

void Barrier::wait() {
  left_.fetch_sub(1, std::memory_order_acq_rel);
  spin_until_zero(left_);
}

void* scratch(std::int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    std::int64_t bytes = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const std::int64_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, static_cast<std::size_t>(rounded));
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

void run_team(void (*body)(void*, int, int), void* context) {
  const int count = num_threads();
  if (count == 1) {
    body(context, 0, 1);
  } else {
    team().run(body, context, count);
  }
}

}  // namespace fullbeam
