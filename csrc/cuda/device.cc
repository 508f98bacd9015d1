// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "core/stream.h"

namespace fullbeam::cuda {
namespace {

struct Memory {
  void* data = nullptr;
  std::int64_t num_bytes = 0;
};

struct StreamMemory {
  Memory workspace, counters;
};

// Device memory that no captured graph can lose: grown to at least twice the size, never freed.
void grow(Memory& memory, std::int64_t num_bytes) {
  if (num_bytes <= memory.num_bytes) return;
  const std::int64_t wanted = std::max({num_bytes, 2 * memory.num_bytes, std::int64_t{1} << 20});
  FULLBEAM_CUDA_CALL(cudaMalloc(&memory.data, static_cast<std::size_t>(wanted)));
  memory.num_bytes = wanted;
}

std::mutex mutex;

StreamMemory& memory_of(const Stream& stream) {
  static auto* memories = new std::map<std::pair<int, void*>, StreamMemory>();
  return (*memories)[{stream.device_idx, stream.handle}];
}

int ask(cudaDeviceAttr attribute, int device_idx) {
  int value = 0;
  FULLBEAM_CUDA_CALL(cudaDeviceGetAttribute(&value, attribute, device_idx));
  return value;
}

}  // namespace

DeviceInfo device_info() {
  const int idx = current_stream().device_idx;
  return {10 * ask(cudaDevAttrComputeCapabilityMajor, idx) +
              ask(cudaDevAttrComputeCapabilityMinor, idx),
          ask(cudaDevAttrMultiProcessorCount, idx),
          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, idx)};
}

void* workspace(std::int64_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  Memory& memory = memory_of(current_stream()).workspace;
  grow(memory, num_bytes);
  return memory.data;
}

unsigned* counters(std::int64_t count) {
  const Stream& stream = current_stream();
  const std::lock_guard<std::mutex> lock(mutex);
  Memory& memory = memory_of(stream).counters;
  const void* before = memory.data;
  grow(memory, count * std::int64_t{sizeof(unsigned)});
  if (memory.data != before) {
    FULLBEAM_CUDA_CALL(cudaMemsetAsync(memory.data, 0, static_cast<std::size_t>(memory.num_bytes),
                                       static_cast<cudaStream_t>(stream.handle)));
  }
  return static_cast<unsigned*>(memory.data);
}

int num_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count == 0 ? "the driver reports no device" : "";
}

void check_call(int error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that the next call doesn't report it again
  throw std::runtime_error(std::string("CUDA: ") + call + " failed at " + file + ":" +
                           std::to_string(line) + ": " +
                           cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace fullbeam::cuda
