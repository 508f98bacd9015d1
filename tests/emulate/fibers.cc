// SPDX-License-Identifier: Apache-2.0
#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <stdexcept>

#include "core/stream.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulate {

Fiber* fiber = nullptr;
std::size_t shared_size = 0;
unsigned cluster_size = 1;
Device device;
int current_device = 0;
const void* captured_stream = nullptr;
bool is_capturing = false, is_capture_relaxed = false;

namespace {

constexpr std::size_t kStackBytes = 256 << 10, kGuardPage = 4096, kSharedGuard = 4096;
constexpr unsigned char kGuardByte = 0xA5;

std::mutex launch_mutex;
std::uint64_t seed = 1, random_state = 1;
std::vector<Fiber*> runnable;
std::vector<char*> stacks;
Fiber launcher;  // the caller of run_grid
const std::function<void()>* body = nullptr;
std::exception_ptr failure;
bool is_overlapping = false;
int num_live = 0;                                // of all blocks of the cluster
int num_cluster_arrived = 0, cluster_phase = 0;  // of the cluster's barrier
std::vector<Fiber*> cluster_waiting;

char* new_stack() {
  void* memory = mmap(nullptr, kStackBytes + kGuardPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardPage, PROT_NONE);  // an overflow stops at once
  return static_cast<char*>(memory) + kGuardPage;
}

// The address sanitizer is told of every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kHasSanitizer = true;
const void* launcher_stack = nullptr;
std::size_t launcher_bytes = 0;
bool comes_from_launcher = false;  // the fiber that starts now

void start_switch(Fiber& from, const Fiber& to) {
  comes_from_launcher = &from == &launcher;
  const bool is_launcher = &to == &launcher;
  __sanitizer_start_switch_fiber(from.is_finished ? nullptr : &from.fake_stack,
                                 is_launcher ? launcher_stack : to.stack,
                                 is_launcher ? launcher_bytes : kStackBytes);
}
void finish_switch(void* fake_stack) {
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
  if (!comes_from_launcher) return;
  launcher_stack = stack;
  launcher_bytes = bytes;
}
// A stack that a fiber left for good keeps what its frames had forbidden.
void allow(void* memory, std::size_t num_bytes) { ASAN_UNPOISON_MEMORY_REGION(memory, num_bytes); }
void forbid(void* memory, std::size_t num_bytes) { ASAN_POISON_MEMORY_REGION(memory, num_bytes); }
#else
constexpr bool kHasSanitizer = false;
void start_switch(Fiber&, const Fiber&) {}
void finish_switch(void*) {}
void allow(void*, std::size_t) {}
void forbid(void*, std::size_t) {}
#endif

std::uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}
std::size_t random_below(std::size_t count) {
  return static_cast<std::size_t>((next_random() >> 32) * count >> 32);
}

#if defined(__x86_64__)
// Keeps the registers that a called function must keep, and the stack pointer.
extern "C" void fullbeam_emulate_switch(void** save, void* load);
asm(R"(
.text
.local fullbeam_emulate_switch
.type fullbeam_emulate_switch,@function
fullbeam_emulate_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fullbeam_emulate_switch,.-fullbeam_emulate_switch
)");

void prepare(Fiber& f, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(f.stack + kStackBytes) - 2;  // 16-byte aligned
  *--top = nullptr;                                                 // where entry would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.stack_pointer = top;
}
void change_over(Fiber& from, Fiber& to) {
  fullbeam_emulate_switch(&from.stack_pointer, to.stack_pointer);
}
#else
void prepare(Fiber& f, void (*entry)()) {
  if (f.stack_pointer == nullptr) f.stack_pointer = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(f.stack_pointer);
  getcontext(context);
  context->uc_stack.ss_sp = f.stack;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
void change_over(Fiber& from, Fiber& to) {
  static ucontext_t launcher_context;
  launcher.stack_pointer = &launcher_context;
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer),
              static_cast<ucontext_t*>(to.stack_pointer));
}
#endif

void switch_to(Fiber& to) {
  Fiber& from = *fiber;
  fiber = &to;
  if (&to != &launcher) {
    threadIdx = to.thread_idx;
    blockIdx = to.block->block_idx;
  }
  start_switch(from, to);
  change_over(from, to);
  finish_switch(from.fake_stack);
}

Fiber* take_random() {
  const std::size_t idx = random_below(runnable.size());
  Fiber* chosen = runnable[idx];
  runnable[idx] = runnable.back();
  runnable.pop_back();
  return chosen;
}

// Goes on with another fiber; returns when this one has been made runnable again.
void wait_at(const char* name) {
  fiber->waits_at = name;
  switch_to(runnable.empty() ? launcher : *take_random());
  fiber->waits_at = nullptr;
}

void wake(std::vector<Fiber*>& waiting) {
  runnable.insert(runnable.end(), waiting.begin(), waiting.end());
  waiting.clear();
}

void release_barrier(Barrier& barrier) {
  barrier.result = barrier.sum;
  barrier.num_arrived = barrier.sum = 0;
  wake(barrier.waiting);
}

void release_cluster() {
  num_cluster_arrived = 0;
  ++cluster_phase;
  wake(cluster_waiting);
}

void leave() {
  Block& block = *fiber->block;
  fiber->is_finished = true;
  --num_live;
  if (--block.num_live > 0 && block.barrier.num_arrived == block.num_live) {
    release_barrier(block.barrier);
  }
  // Nobody may read it any more, of the cluster neither.
  if (block.num_live == 0) std::memset(block.shared, 0xFF, shared_size);
  if (num_live > 0 && num_cluster_arrived == num_live) release_cluster();
}

void fiber_main() {
  finish_switch(nullptr);
  try {
    (*body)();
    if (is_overlapping && !fiber->has_waited) {
      fail("a thread returned without waiting for the launch that its own may overlap");
    }
    if (!fiber->copies.empty()) fail("a thread returned with asynchronous copies under way");
    leave();
  } catch (...) {
    failure = std::current_exception();
    fiber->is_finished = true;
  }
  switch_to(failure || runnable.empty() ? launcher : *take_random());
  __builtin_unreachable();
}

std::string at(const Fiber& f) {
  const uint3 b = f.block->block_idx, t = f.thread_idx;
  const auto text = [](uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
  };
  return "block " + text(b) + " thread " + text(t);
}

void run_cluster(std::vector<Block>& blocks, std::vector<Fiber>& fibers) {
  num_live = static_cast<int>(fibers.size());
  num_cluster_arrived = 0;
  cluster_waiting.clear();
  runnable.clear();
  failure = nullptr;
  for (Block& block : blocks) {
    std::memset(block.shared, 0xFF, shared_size);
    if (!kHasSanitizer) std::memset(block.shared + shared_size, kGuardByte, kSharedGuard);
    forbid(block.shared + shared_size, kSharedGuard);
    for (Warp& warp : block.warps) warp.arrived = 0;
    block.barrier.num_arrived = block.barrier.sum = 0;
    block.barrier.waiting.clear();
    block.num_live = static_cast<int>(fibers.size() / blocks.size());
  }
  for (Fiber& f : fibers) {
    allow(f.stack, kStackBytes);
    f.is_finished = false;
    f.waits_at = nullptr;
    f.has_waited = f.has_arrived_at_cluster = false;
    f.num_copy_groups = f.num_done_groups = 0;
    f.copies.clear();
    prepare(f, &fiber_main);
    runnable.push_back(&f);
  }
  fiber = &launcher;
  launcher.is_finished = false;
  switch_to(*take_random());
  if (failure) std::rethrow_exception(failure);
  for (const Fiber& f : fibers) {
    if (f.is_finished) continue;
    fail("threads wait for ones that never come: " + at(f) + " waits at " + f.waits_at + ", with " +
         std::to_string(num_live - 1) + " more threads waiting");
  }
  for (const Block& block : blocks) {
    for (std::size_t i = 0; !kHasSanitizer && i < kSharedGuard; ++i) {
      if (static_cast<unsigned char>(block.shared[shared_size + i]) != kGuardByte) {
        fail("a thread wrote " + std::to_string(i) + " bytes past the " +
             std::to_string(shared_size) + " bytes of shared memory");
      }
    }
  }
}

}  // namespace

void fail(const std::string& what) {
  throw std::runtime_error("emulated CUDA: " + what + " (--emulate-seed " + std::to_string(seed) +
                           ")");
}

int block_barrier(bool value, const char* name) {
  Block& block = *fiber->block;
  Barrier& barrier = block.barrier;
  barrier.sum += value ? 1 : 0;
  if (++barrier.num_arrived == block.num_live) {
    release_barrier(barrier);
    return barrier.result;
  }
  barrier.waiting.push_back(fiber);
  wait_at(name);
  return barrier.result;
}

void cluster_arrive() {
  if (fiber->has_arrived_at_cluster) fail("cluster_arrive twice without cluster_wait between");
  fiber->has_arrived_at_cluster = true;
  fiber->cluster_phase = cluster_phase;
  if (++num_cluster_arrived == num_live) release_cluster();
}

void cluster_wait() {
  if (!fiber->has_arrived_at_cluster) fail("cluster_wait without cluster_arrive");
  fiber->has_arrived_at_cluster = false;
  if (cluster_phase != fiber->cluster_phase) return;
  cluster_waiting.push_back(fiber);
  wait_at("cluster_wait");
}

void* in_block_of_rank(void* shared, unsigned rank) {
  const std::ptrdiff_t offset = static_cast<char*>(shared) - fiber->block->shared;
  if (rank >= cluster_size) fail("map_shared: no block of rank " + std::to_string(rank));
  if (offset < 0 || static_cast<std::size_t>(offset) > shared_size) {
    fail("map_shared: not an address of this block's shared memory");
  }
  return (fiber->block - fiber->block->cluster_rank + rank)->shared + offset;
}

bool arrive_in_warp(unsigned mask, const char* name, void* lane_data) {
  Warp& warp = fiber->block->warps[static_cast<std::size_t>(fiber->warp)];
  const auto lane = static_cast<unsigned>(fiber->lane);
  if ((mask >> lane & 1) == 0) fail(std::string(name) + ": the mask leaves out the calling lane");
  warp.lane_data[lane] = lane_data;
  warp.masks[lane] = mask;
  warp.names[lane] = name;
  warp.fibers[lane] = fiber;
  warp.arrived |= 1u << lane;
  if ((warp.arrived & mask) != mask) {
    wait_at(name);
    return false;
  }
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (warp.masks[i] != mask || std::strcmp(warp.names[i], name) != 0) {
      fail("lanes of a warp meet in different operations: " + std::string(name) + " and " +
           warp.names[i] + ", or with different masks, at " + at(*fiber));
    }
  }
  return true;
}

void release_warp(unsigned mask) {
  Warp& warp = fiber->block->warps[static_cast<std::size_t>(fiber->warp)];
  warp.arrived &= ~mask;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) != 0 && i != fiber->lane) runnable.push_back(warp.fibers[i]);
  }
}

void run_grid(const Grid& grid, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  blockDim = grid.block;
  gridDim = grid.grid;
  shared_size = grid.shared_bytes;
  cluster_size = grid.cluster;
  is_overlapping = grid.overlaps;
  body = &kernel;
  const std::size_t num_threads = std::size_t{1} * grid.block.x * grid.block.y * grid.block.z;
  while (stacks.size() < num_threads * cluster_size) stacks.push_back(new_stack());

  std::vector<Block> blocks(cluster_size);
  std::vector<Fiber> fibers(num_threads * cluster_size);
  std::vector<char> shared((shared_size + kSharedGuard + 1024) * cluster_size + 1024);
  for (std::size_t rank = 0; rank < cluster_size; ++rank) {
    Block& block = blocks[rank];
    block.cluster_rank = static_cast<unsigned>(rank);
    block.warps.resize((num_threads + 31) / 32);
    auto address = reinterpret_cast<std::uintptr_t>(shared.data()) +
                   rank * (shared_size + kSharedGuard + 1024);
    block.shared = reinterpret_cast<char*>((address + 1023) / 1024 * 1024);
    for (std::size_t i = 0; i < num_threads; ++i) {
      Fiber& f = fibers[rank * num_threads + i];
      const auto idx = static_cast<unsigned>(i);
      f.thread_idx = {idx % grid.block.x, idx / grid.block.x % grid.block.y,
                      idx / grid.block.x / grid.block.y};
      f.block = &block;
      f.warp = static_cast<int>(i / 32);
      f.lane = static_cast<int>(i % 32);
      f.stack = stacks[rank * num_threads + i];
    }
  }

  const std::size_t num_clusters =
      std::size_t{1} * grid.grid.x * grid.grid.y * grid.grid.z / cluster_size;
  std::vector<std::size_t> order(num_clusters);
  for (std::size_t i = 0; i < num_clusters; ++i) order[i] = i;
  for (std::size_t i = num_clusters; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  for (const std::size_t cluster : order) {
    for (std::size_t rank = 0; rank < cluster_size; ++rank) {
      const auto idx = static_cast<unsigned>(cluster * cluster_size + rank);
      blocks[rank].block_idx = {idx % grid.grid.x, idx / grid.grid.x % grid.grid.y,
                                idx / grid.grid.x / grid.grid.y};
    }
    run_cluster(blocks, fibers);
  }
}

}  // namespace emulate

// For the tests, by ctypes.
extern "C" __attribute__((visibility("default"))) void emulate_set_seed(std::uint64_t seed,
                                                                        std::uint64_t test) {
  emulate::seed = seed;
  emulate::random_state = (seed * 0x9E3779B97F4A7C15u ^ test * 0xD1B54A32D192ED03u) | 1;
}
// With a number of its own where it holds less than other Hopper devices: the library keeps what a
// device has told of its clusters.
extern "C" __attribute__((visibility("default"))) void emulate_set_device(int major, int minor,
                                                                          int num_sms,
                                                                          int shared_bytes,
                                                                          int max_cluster) {
  emulate::device = {major, minor, num_sms, shared_bytes, max_cluster};
  fullbeam::current_stream().device_idx = max_cluster < 8 ? 1 : 0;
}
