// The host's side of CUDA: what the device can do, and what a launch is refused for.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace corrmatch_emulator {
namespace {

constexpr int kSharedUnasked = 48 * 1024;
constexpr unsigned kThreads = 1024, kCluster = 8;

struct Error {
  cudaError_t code;
  const char *name, *text;
};
constexpr Error kErrors[]{
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize",
     "a kernel launch error has occurred due to cluster misconfiguration"},
};
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Device {
  int architecture;   // 10 * major + minor
  int shared_memory;  // of a block that asks for it
};
Device device() {
  static constexpr Device kKnown[]{{80, 163 * 1024}, {86, 99 * 1024}, {89, 99 * 1024}, {90, 227 * 1024}};
  const char* asked = std::getenv("CORRMATCH_EMULATOR_ARCH");
  const Device* found = std::ranges::find(kKnown, asked && *asked ? std::atoi(asked) : 90, &Device::architecture);
  if (found == std::end(kKnown)) throw std::invalid_argument("CORRMATCH_EMULATOR_ARCH is none of 80, 86, 89, 90");
  return *found;
}

std::map<const void*, int> shared_asked;  // by kernel
std::mutex shared_asked_mutex;

bool within(const dim3& size, const dim3& most) {
  return size.x - 1 < most.x && size.y - 1 < most.y && size.z - 1 < most.z;  // 0 - 1 is large
}

cudaError_t check(const void* kernel, const dim3& grid, const dim3& block, const dim3& cluster, size_t shared_bytes) {
  if (!within(grid, {0x7fffffff, 65535, 65535}) || !within(block, {kThreads, kThreads, 64}) || count(block) > kThreads)
    return cudaErrorInvalidConfiguration;
  const std::lock_guard lock(shared_asked_mutex);
  const int allowed = std::max(kSharedUnasked, std::min(shared_asked[kernel], device().shared_memory));
  if (shared_bytes > size_t(allowed)) return cudaErrorInvalidValue;
  if (count(cluster) == 0 || count(cluster) > (device().architecture >= 90 ? kCluster : 1) || grid.x % cluster.x ||
      grid.y % cluster.y || grid.z % cluster.z)
    return cudaErrorInvalidClusterSize;
  return cudaSuccess;
}

}  // namespace

namespace cuda {

const char* cudaGetErrorName(cudaError_t error) { return std::ranges::find(kErrors, error, &Error::code)->name; }
const char* cudaGetErrorString(cudaError_t error) { return std::ranges::find(kErrors, error, &Error::code)->text; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device known = device();
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? known.architecture / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? known.architecture % 10
           : attribute == cudaDevAttrMultiProcessorCount    ? 132
                                                            : known.shared_memory;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > device().shared_memory) return remember(cudaErrorInvalidValue);
  const std::lock_guard lock(shared_asked_mutex);
  shared_asked[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch_emulated(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  dim3 cluster;
  if (config.numAttrs > 0) {
    const auto& asked = config.attrs[0].val.clusterDim;
    cluster = {asked.x, asked.y, asked.z};
  }
  const cudaError_t error = check(kernel, config.gridDim, config.blockDim, cluster, config.dynamicSmemBytes);
  if (error == cudaSuccess) run(config.gridDim, config.blockDim, cluster, config.dynamicSmemBytes, body);
  return remember(error);
}

}  // namespace cuda
}  // namespace corrmatch_emulator
