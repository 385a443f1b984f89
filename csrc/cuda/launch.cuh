// Launches, shared memory, and the limits of the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "ops.hpp"

namespace corrmatch::cuda {

inline constexpr int kWarp = 32;
inline constexpr int64_t kMostBlocks = 65535;  // along y; there may be 2^31 - 1 along x

inline constexpr int64_t kSharedUnasked = 48 * 1024;  // bytes of shared memory of a kernel without an attribute

// The dynamic shared memory of the block.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef CORRMATCH_EMULATOR
  return static_cast<T*>(corrmatch_emulator::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char corrmatch_shared[];
  return reinterpret_cast<T*>(corrmatch_shared);
#endif
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which has been reported
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The largest shared memory of a block.
inline int64_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

struct Shape {
  int64_t blocks_x, blocks_y;
  int threads;
  int64_t shared = 0;
  int cluster = 1;  // blocks along x that share their shared memory
};

// Launches `kernel`. Errors contain its name.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Shape& shape, uintptr_t stream,
            Arguments... arguments) {
  if (shape.blocks_x > INT32_MAX) throw std::invalid_argument(std::string(name) + ": more blocks than a grid may have");
  if (shape.shared > kSharedUnasked)  // the maximum, because other threads may launch the same kernel for other sizes
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_limit())), name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks_x), unsigned(std::min(shape.blocks_y, kMostBlocks)), 1);
  config.blockDim = dim3(unsigned(shape.threads), 1, 1);
  config.dynamicSmemBytes = size_t(shape.shared);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

// n / divisor for 0 <= n < 2^31, by a multiplication.
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(uint32_t(divisor)) {
    while ((uint64_t(1) << shift_) < divisor_) ++shift_;
    magic_ = uint32_t((((uint64_t(1) << shift_) - divisor_) << 32) / divisor_ + 1);
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (uint32_t((uint64_t(n) * magic_) >> 32) + n) >> shift_;
  }
  __device__ __forceinline__ uint32_t value() const { return divisor_; }

 private:
  uint32_t divisor_, magic_, shift_ = 0;
};

}  // namespace corrmatch::cuda
