// What the host calls: errors, attributes, launches. The device is an H100 with nothing else to do.
#pragma once

#include <tuple>

#include "memory.hpp"

namespace corrmatch_emulator {
namespace cuda {

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidClusterSize = 912,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it
cudaError_t cudaPeekAtLastError();

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDevice(int* device);

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

}  // namespace cuda

int architecture();  // 90 for compute capability 9.0
cuda::cudaError_t set_attribute(const void* kernel, cuda::cudaFuncAttribute attribute, int value);
cuda::cudaError_t launch(const cuda::cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
int blocks_per_multiprocessor(size_t threads, size_t shared_bytes);
cuda::dim3 cluster_size(const cuda::cudaLaunchConfig_t& config);

namespace cuda {

struct cudaFuncAttributes {
  int ptxVersion;
};
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  attributes->ptxVersion = architecture();
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  const std::tuple<Parameters...> arguments(std::forward<Arguments>(given)...);
  return launch(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, arguments); });
}

template <class T>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, T*, int threads, size_t shared_bytes) {
  *blocks = blocks_per_multiprocessor(size_t(threads), shared_bytes);
  return cudaSuccess;
}

template <class T>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, T*, const cudaLaunchConfig_t* config) {
  const int blocks = 132 * blocks_per_multiprocessor(count(config->blockDim), config->dynamicSmemBytes);
  *clusters = blocks / int(count(cluster_size(*config)));
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace corrmatch_emulator
