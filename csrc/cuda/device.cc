// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
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

// What the current thread asks of CUDA meanwhile is done at once, though a graph be captured.
class Uncaptured {
 public:
  Uncaptured() { FULLBEAM_CUDA_CALL(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Uncaptured() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Zeros, there before this returns; on a stream aside, since the current one may be captured.
void clear(void* data, std::int64_t num_bytes) {
  cudaStream_t aside;
  FULLBEAM_CUDA_CALL(cudaStreamCreateWithFlags(&aside, cudaStreamNonBlocking));
  FULLBEAM_CUDA_CALL(cudaMemsetAsync(data, 0, static_cast<std::size_t>(num_bytes), aside));
  FULLBEAM_CUDA_CALL(cudaStreamSynchronize(aside));
  FULLBEAM_CUDA_CALL(cudaStreamDestroy(aside));
}

// Device memory that no captured graph can lose: grown to at least twice the size, never freed.
void* grown(Memory& memory, std::int64_t num_bytes, bool is_cleared) {
  if (num_bytes > memory.num_bytes) {
    const OnDevice on_device;
    const Uncaptured uncaptured;
    const std::int64_t wanted = std::max({num_bytes, 2 * memory.num_bytes, std::int64_t{1} << 20});
    void* data = nullptr;
    FULLBEAM_CUDA_CALL(cudaMalloc(&data, static_cast<std::size_t>(wanted)));
    if (is_cleared) clear(data, wanted);
    memory = {data, wanted};
  }
  return memory.data;
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
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
  constexpr bool kHasHopperCode =
      std::find(std::begin(kArchs), std::end(kArchs), 900) != std::end(kArchs);
  const int idx = current_stream().device_idx;
  return {ask(cudaDevAttrMultiProcessorCount, idx),
          ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, idx),
          kHasHopperCode && ask(cudaDevAttrComputeCapabilityMajor, idx) == 9};
}

OnDevice::OnDevice() : idx_(current_stream().device_idx) {
  FULLBEAM_CUDA_CALL(cudaGetDevice(&before_));
  if (before_ != idx_) FULLBEAM_CUDA_CALL(cudaSetDevice(idx_));
}
OnDevice::~OnDevice() {
  if (before_ != idx_) cudaSetDevice(before_);
}

void* workspace(std::int64_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  return grown(memory_of(current_stream()).workspace, num_bytes, false);
}

unsigned* counters(std::int64_t count) {
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<unsigned*>(
      grown(memory_of(current_stream()).counters, count * std::int64_t{sizeof(unsigned)}, true));
}

int num_devices() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {  // which it also says where there is none
    int driver = 0, needed = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&needed);
    const auto version = [](int number) {  // 13010 is 13.1
      return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
    };
    if (driver == 0) return "no NVIDIA driver is installed";
    return "the NVIDIA driver is for CUDA " + version(driver) + ", but this build needs " +
           version(needed);
  }
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
