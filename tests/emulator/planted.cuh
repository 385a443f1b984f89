// What the kernels of primitives.cu and faults.cu share: one signature, so that Python launches any of them by name.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <string>

struct Buffers {
  const void* given;
  void* taken;
  int n;

  template <class T>
  __device__ const T* in() const {
    return static_cast<const T*>(given);
  }
  template <class T>
  __device__ T* out() const {
    return static_cast<T*>(taken);
  }
};
using Kernels = std::map<std::string, void (*)(Buffers)>;

extern const Kernels primitives, faults;

template <class T>
__device__ T* shared_memory() {
#if CORRMATCH_EMULATOR
  return static_cast<T*>(corrmatch_emulator::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}
