// One kernel for each kind of primitive that the emulator supplies; tests/test_emulator.py knows the right answers.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "planted.cuh"

namespace cg = cooperative_groups;

namespace {

constexpr unsigned kAll = 0xffffffff;

__device__ int global_thread() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void indices(Buffers b) {
  const int block = int(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  const int thread = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  int* out = b.out<int>() + 6 * (block * threads + thread);
  const unsigned found[] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
  for (int i = 0; i < 6; ++i) out[i] = int(found[i]);
}

// n rounds of reversing and adding one.
__global__ void reverse(Buffers b) {
  int* shared = shared_memory<int>();
  const int i = int(threadIdx.x), last = int(blockDim.x) - 1;
  int value = b.in<int>()[i];
  for (int round = 0; round < b.n; ++round) {
    shared[i] = value + 1;
    __syncthreads();
    value = shared[last - i];
    __syncthreads();
  }
  b.out<int>()[i] = value;
}

__global__ void barrier_votes(Buffers b) {
  const int i = int(threadIdx.x), value = b.in<int>()[i];
  for (int bit = 0; bit < 4; ++bit) b.out<int>()[4 * i + bit] = __syncthreads_or(value & 1 << bit);
}

template <class T>
__global__ void shuffles(Buffers b) {
  const int i = int(threadIdx.x);
  const T value = b.in<T>()[i];
  T* out = b.out<T>() + 4 * i;
  out[0] = __shfl_sync(kAll, value, 5 * i + 3);
  out[1] = __shfl_up_sync(kAll, value, 3);
  out[2] = __shfl_down_sync(kAll, value, 3);
  out[3] = __shfl_xor_sync(kAll, value, 5);
}

// Even and odd lanes vote apart from one another.
__global__ void votes(Buffers b) {
  const int i = int(threadIdx.x), value = b.in<int>()[i];
  unsigned* out = b.out<unsigned>() + 4 * i;
  unsigned mask = 0x55555555;
  if (i % 2) {
    mask = ~mask;
    out[0] = __ballot_sync(mask, value & 1);
  } else {
    out[0] = __ballot_sync(mask, value & 2);
  }
  out[1] = unsigned(__any_sync(mask, value & 4));
  out[2] = unsigned(__all_sync(mask, value & 8));
  out[3] = __match_any_sync(mask, value & 3);
}

template <class T>
__global__ void sums(Buffers b) {
  const int i = int(threadIdx.x);
  b.out<T>()[i] = __reduce_add_sync(i % 32 < 20 ? 0x000fffff : 0xfff00000, b.in<T>()[i]);
}

// Sums by a tree of warps, handed over through shared memory with no more than __syncwarp.
__global__ void warp_sums(Buffers b) {
  const int i = int(threadIdx.x), lane = i % 32;
  int* shared = shared_memory<int>() + (i - lane);
  shared[lane] = b.in<int>()[i];
  __syncwarp();
  for (int step = 16; step > 0; step /= 2) {
    if (lane < step) shared[lane] += shared[lane + step];
    __syncwarp();
  }
  b.out<int>()[i] = shared[0];
}

// out[0..3] hold what the atomics start from; out[4 + i] is the ticket that thread i drew.
template <class T>
__global__ void atomics(Buffers b) {
  const int i = global_thread();
  const T value = b.in<T>()[i];
  T* out = b.out<T>();
  atomicAdd(&out[0], value);
  atomicMin(&out[1], value);
  atomicMax(&out[2], value);
  out[4 + i] = atomicAdd(&out[3], T(1));
}

// Every thread waits for the one before it, whose sum it goes on with.
__global__ void handed_over(Buffers b) {
  int* out = b.out<int>();
  const int i = int(threadIdx.x);
  while (__ldcg(&out[blockDim.x]) != i) continue;
  out[i] = b.in<int>()[i] + (i > 0 ? out[i - 1] : 0);
  atomicAdd(&out[blockDim.x], 1);
}

__global__ void bits(Buffers b) {
  const int i = int(threadIdx.x);
  const unsigned x = b.in<unsigned>()[2 * i], y = b.in<unsigned>()[2 * i + 1];
  unsigned* out = b.out<unsigned>() + 5 * i;
  out[0] = unsigned(__popc(x));
  out[1] = unsigned(__ffs(int(x)));
  out[2] = unsigned(__clz(int(x)));
  out[3] = __brev(x);
  out[4] = min(x, y) ^ max(x, y);
}

__global__ void arithmetic(Buffers b) {
  const int i = int(threadIdx.x);
  const float x = b.in<float>()[2 * i], y = b.in<float>()[2 * i + 1];
  float* out = b.out<float>() + 5 * i;
  out[0] = __fdiv_rn(x, y);
  out[1] = exp2f(x);
  out[2] = fminf(x, y);
  out[3] = fmaxf(x, y);
  out[4] = __uint_as_float(__float_as_uint(y) ^ 1);
}

// Every half and bfloat16 to float.
__global__ void conversions(Buffers b) {
  const int i = global_thread(), n = int(gridDim.x * blockDim.x);
  b.out<float>()[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(i)));
  b.out<float>()[n + i] = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(i)));
}

// Every thread reads what its like in the next block of the cluster holds; all count in the shared memory of the first.
__global__ void clusters(Buffers b) {
  const cg::cluster_group cluster = cg::this_cluster();
  const int i = int(threadIdx.x), rank = int(cluster.block_rank()), blocks = int(cluster.num_blocks());
  const int thread = int(blockIdx.x + gridDim.x * blockIdx.y) * int(blockDim.x) + i;
  int* shared = shared_memory<int>();
  int* counter = shared + blockDim.x;
  shared[i] = b.in<int>()[thread];
  if (i == 0) *counter = 0;
  cluster.sync();
  const int next = cluster.map_shared_rank(shared, unsigned((rank + 1) % blocks))[i];
  atomicAdd(cluster.map_shared_rank(counter, 0), 1);
  cluster.sync();
  int* out = b.out<int>() + 3 * thread;
  out[0] = next;
  out[1] = rank;
  out[2] = *counter;
}

}  // namespace

const Kernels primitives{
    {"indices", indices},
    {"reverse", reverse},
    {"barrier_votes", barrier_votes},
    {"shuffles_int32", shuffles<int>},
    {"shuffles_uint32", shuffles<unsigned>},
    {"shuffles_int64", shuffles<long long>},
    {"shuffles_float32", shuffles<float>},
    {"shuffles_float64", shuffles<double>},
    {"votes", votes},
    {"sums_int32", sums<int>},
    {"sums_uint32", sums<unsigned>},
    {"warp_sums", warp_sums},
    {"atomics_int32", atomics<int>},
    {"atomics_uint32", atomics<unsigned>},
    {"atomics_uint64", atomics<unsigned long long>},
    {"handed_over", handed_over},
    {"bits", bits},
    {"arithmetic", arithmetic},
    {"conversions", conversions},
    {"clusters", clusters},
};
