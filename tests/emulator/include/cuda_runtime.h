// The CUDA names that csrc/cuda uses, for an ordinary C++ compiler. Signatures follow the CUDA C++ programming guide.
#pragma once

#define __CUDA_ARCH__ 900
#define __global__ __attribute__((visibility("default")))  // so that messages can name it
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))

#include "../arithmetic.hpp"
#include "../host.hpp"
#include "../memory.hpp"
#include "../warp.hpp"

using namespace corrmatch_emulator::cuda;
