// The CUDA names that csrc/cuda uses, for an ordinary C++ compiler; a kernel that needs another one adds it. Signatures
// follow the CUDA C++ programming guide, but for `where`; shuffles are of whole warps.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "../emulator.hpp"

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define CORRMATCH_WHERE corrmatch_emulator::Where where = corrmatch_emulator::Where::current()

namespace corrmatch_emulator::cuda {

// ---- Bits and arithmetic ----

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

inline float __fdiv_rn(float x, float y) { return x / y; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

using std::max;
using std::min;

// ---- Barriers and warps ----

inline void __syncthreads(CORRMATCH_WHERE) { meet(Scope::block, "__syncthreads", ~0u, 0, where); }
inline void __syncwarp(unsigned mask = ~0u, CORRMATCH_WHERE) { meet(Scope::warp, "__syncwarp", mask, 0, where); }

// What lane `source` brought; the caller's own where there is no such lane.
template <class T>
  requires(std::is_arithmetic_v<T> && sizeof(T) >= 4)
T shuffle(const char* name, unsigned mask, T value, unsigned source, const Where& where) {
  if (source >= 32) source = lane();
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane that its mask does not name", where);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  std::memcpy(&value, &meet(Scope::warp, name, mask, bits, where).value[source], sizeof(T));
  return value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, CORRMATCH_WHERE) {
  return shuffle("__shfl_sync", mask, value, unsigned(source) % 32, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, CORRMATCH_WHERE) {
  return shuffle("__shfl_up_sync", mask, value, lane() - by, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, CORRMATCH_WHERE) {
  return shuffle("__shfl_down_sync", mask, value, lane() + by, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, CORRMATCH_WHERE) {
  return shuffle("__shfl_xor_sync", mask, value, lane() ^ unsigned(by), where);
}

// The lanes of the mask that bring this value.
inline unsigned lanes_with(uint64_t value, const Lanes& lanes) {
  unsigned found = 0;
  for (int i = 0; i < 32; ++i) found |= unsigned(lanes.value[i] == value) << i;
  return found & lanes.mask;
}
inline int __syncthreads_or(int predicate, CORRMATCH_WHERE) {
  return lanes_with(true, meet(Scope::block, "__syncthreads_or", ~0u, predicate != 0, where)) != 0;
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CORRMATCH_WHERE) {
  return lanes_with(true, meet(Scope::warp, "__ballot_sync", mask, predicate != 0, where));
}
inline int __any_sync(unsigned mask, int predicate, CORRMATCH_WHERE) {
  return lanes_with(true, meet(Scope::warp, "__any_sync", mask, predicate != 0, where)) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CORRMATCH_WHERE) {
  return lanes_with(false, meet(Scope::warp, "__all_sync", mask, predicate != 0, where)) == 0;
}
template <std::integral T>
unsigned __match_any_sync(unsigned mask, T value, CORRMATCH_WHERE) {
  return lanes_with(uint64_t(value), meet(Scope::warp, "__match_any_sync", mask, uint64_t(value), where));
}
template <std::integral T>
  requires(sizeof(T) == 4)
T __reduce_add_sync(unsigned mask, T value, CORRMATCH_WHERE) {
  unsigned sum = 0;  // wraps
  for (const uint64_t part : meet(Scope::warp, "__reduce_add_sync", mask, uint64_t(value), where).value)
    sum += unsigned(part);
  return T(sum);
}

// ---- Memory ----

template <class T>
T __ldcg(const T* address, CORRMATCH_WHERE) {
  maybe_yield(where);  // a loop may wait by it
  return *address;
}

template <class T, class Operation>
  requires(std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>)
T atomic(T* address, const Where& where, const Operation& operation) {
  maybe_yield(where);
  const T before = *address;
  *address = operation(before);
  return before;
}
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value, CORRMATCH_WHERE) {
  using Wrapping = std::make_unsigned_t<T>;
  return atomic(address, where, [&](T old) { return T(Wrapping(old) + Wrapping(value)); });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value, CORRMATCH_WHERE) {
  return atomic(address, where, [&](T old) { return min(old, value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value, CORRMATCH_WHERE) {
  return atomic(address, where, [&](T old) { return max(old, value); });
}

// ---- The host's side: an H100 with nothing else to do ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidClusterSize = 912,
};
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();  // and forgets it

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  attributes->ptxVersion = attributes->binaryVersion = 10 * major + minor;
  return cudaSuccess;
}
// The body calls the kernel.
cudaError_t launch_emulated(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  const std::tuple<Parameters...> arguments(std::forward<Arguments>(given)...);
  return launch_emulated(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, arguments); });
}

}  // namespace corrmatch_emulator::cuda

using namespace corrmatch_emulator::cuda;
