// The host's side of CUDA: what a launch is refused for, and why.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

namespace corrmatch_emulator {
namespace {

constexpr int kShared = 48 * 1024, kSharedPerMultiprocessor = 228 * 1024;
constexpr int kSharedReserved = 1024;  // of every block
constexpr unsigned kThreads = 1024, kThreadsPerMultiprocessor = 2048, kBlocksPerMultiprocessor = 32;
constexpr unsigned kCluster = 8, kClusterNonPortable = 16;

constexpr struct {
  cudaError_t error;
  const char *name, *text;
} kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize",
     "a kernel launch error has occurred due to cluster misconfiguration"},
};

struct Attributes {
  int shared = kShared;
  bool large_cluster = false;
};
std::map<const void*, Attributes> attributes;
std::mutex attributes_mutex;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

Attributes attributes_of(const void* kernel) {
  const std::lock_guard lock(attributes_mutex);
  return attributes[kernel];
}

int shared_opt_in() { return 1024 * (architecture() >= 90 ? 227 : architecture() == 80 ? 163 : 99); }

bool within(const dim3& size, const dim3& most) {
  return size.x - 1 < most.x && size.y - 1 < most.y && size.z - 1 < most.z;  // 0 - 1 is large
}

cudaError_t check(const cudaLaunchConfig_t& config, const Attributes& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim, cluster = cluster_size(config);
  if (!within(grid, {0x7fffffff, 65535, 65535}) || !within(block, {kThreads, kThreads, 64}) || count(block) > kThreads)
    return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > size_t(kernel.shared)) return cudaErrorInvalidValue;
  if (count(cluster) > 1 && architecture() < 90) return cudaErrorInvalidClusterSize;
  if (count(cluster) == 0 || count(cluster) > (kernel.large_cluster ? kClusterNonPortable : kCluster) ||
      grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z)
    return cudaErrorInvalidClusterSize;
  return cudaSuccess;
}

}  // namespace

namespace cuda {

const char* cudaGetErrorName(cudaError_t error) {
  for (const auto& known : kErrors)
    if (known.error == error) return known.name;
  return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  for (const auto& known : kErrors)
    if (known.error == error) return known.text;
  return "unrecognized error code";
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const std::map<cudaDeviceAttr, int> h100{
      {cudaDevAttrMaxThreadsPerBlock, kThreads},
      {cudaDevAttrMaxSharedMemoryPerBlock, kShared},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrComputeCapabilityMajor, architecture() / 10},
      {cudaDevAttrComputeCapabilityMinor, architecture() % 10},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedPerMultiprocessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_opt_in()},
  };
  if (device != 0) return remember(cudaErrorInvalidDevice);
  *value = h100.at(attribute);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

}  // namespace cuda

int architecture() {
  const char* given = std::getenv("CORRMATCH_EMULATOR_ARCH");
  return given != nullptr ? std::atoi(given) : 90;
}

dim3 cluster_size(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    cluster = {config.attrs[i].val.clusterDim.x, config.attrs[i].val.clusterDim.y, config.attrs[i].val.clusterDim.z};
  return cluster;
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const bool shared = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (value < 0 || value > (shared ? shared_opt_in() : 1)) return remember(cudaErrorInvalidValue);
  const std::lock_guard lock(attributes_mutex);
  if (shared)
    attributes[kernel].shared = std::max(value, kShared);
  else
    attributes[kernel].large_cluster = value;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body) {
  const cudaError_t error = check(config, attributes_of(kernel));
  if (error == cudaSuccess)
    run(kernel, config.gridDim, config.blockDim, cluster_size(config), config.dynamicSmemBytes, body);
  return remember(error);
}

int blocks_per_multiprocessor(size_t threads, size_t shared_bytes) {
  return int(std::min({size_t{kBlocksPerMultiprocessor}, kThreadsPerMultiprocessor / threads,
                       kSharedPerMultiprocessor / (shared_bytes + kSharedReserved)}));
}

}  // namespace corrmatch_emulator
