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
  const int threads = int(cg::this_thread_block().num_threads());
  int* out = b.out<int>() + 8 * (block * threads + thread);
  const unsigned found[] = {blockIdx.x,  blockIdx.y,  blockIdx.z, threadIdx.x,
                            threadIdx.y, threadIdx.z, blockDim.y, cg::this_thread_block().thread_rank()};
  for (int i = 0; i < 8; ++i) out[i] = int(found[i]);
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
    cg::this_thread_block().sync();
  }
  b.out<int>()[i] = value;
}

__global__ void barrier_votes(Buffers b) {
  const int i = int(threadIdx.x), value = b.in<int>()[i];
  int* out = b.out<int>() + 4 * i;
  out[0] = __syncthreads_count(value & 1);
  out[1] = __syncthreads_or(value & 2);
  out[2] = __syncthreads_and(value & 4);
  out[3] = __syncthreads_or(0);
}

template <class T>
__global__ void shuffles(Buffers b) {
  const int i = int(threadIdx.x);
  const T value = b.in<T>()[i];
  T* out = b.out<T>() + 20 * i;
  for (int width = 2; width <= 32; width *= 2) {
    *out++ = __shfl_sync(kAll, value, 5 * i + 3, width);
    *out++ = __shfl_up_sync(kAll, value, 3, width);
    *out++ = __shfl_down_sync(kAll, value, 3, width);
    *out++ = __shfl_xor_sync(kAll, value, 5, width);
  }
}

// Even and odd lanes vote apart from one another.
__global__ void votes(Buffers b) {
  const int i = int(threadIdx.x), value = b.in<int>()[i];
  unsigned* out = b.out<unsigned>() + 8 * i;
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
  int all = 7;
  out[4] = __match_all_sync(kAll, static_cast<unsigned long long>(value), &all);
  out[5] = unsigned(all);
  out[6] = __match_all_sync(kAll, blockDim.x, &all);
  out[7] = unsigned(all) | (__activemask() >> (i % 32) & 1) << 1;
}

template <class T>
__global__ void folds(Buffers b) {
  const int i = int(threadIdx.x);
  const T value = b.in<T>()[i];
  const unsigned mask = i % 32 < 20 ? 0x000fffff : 0xfff00000;
  T* out = b.out<T>() + 6 * i;
  out[0] = __reduce_add_sync(mask, value);
  out[1] = __reduce_min_sync(mask, value);
  out[2] = __reduce_max_sync(mask, value);
  out[3] = T(__reduce_and_sync(mask, unsigned(value)));
  out[4] = T(__reduce_or_sync(mask, unsigned(value)));
  out[5] = T(__reduce_xor_sync(mask, unsigned(value)));
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

// out[0..8] hold what the atomics start from; out[9 + i] is the ticket that thread i drew.
template <class T>
__global__ void atomics(Buffers b) {
  const int i = global_thread();
  const T value = b.in<T>()[i];
  T* out = b.out<T>();
  atomicAdd(&out[0], value);
  atomicSub(&out[1], value);
  atomicMin(&out[2], value);
  atomicMax_block(&out[3], value);
  atomicAnd(&out[4], value);
  atomicOr(&out[5], value);
  atomicXor(&out[6], value);
  for (T seen = out[7], before; (before = atomicCAS(&out[7], seen, T(unsigned(seen) + unsigned(value)))) != seen;)
    seen = before;
  out[9 + i] = atomicAdd(&out[8], T(1));
}

// Every value moves one ticket on; the last one stays in out[0].
__global__ void wide_atomics(Buffers b) {
  using Wide = unsigned long long;
  const int i = global_thread();
  const Wide value = b.in<Wide>()[i];
  Wide* out = b.out<Wide>();
  out[8 + i] = atomicExch(&out[0], value);
  atomicAdd(&out[1], value);
  atomicMin(&out[2], value);
  atomicMax(&out[3], value);
  atomicAnd(&out[4], value);
  atomicOr(&out[5], value);
  atomicXor(&out[6], value);
  for (Wide seen = out[7], before; (before = atomicCAS(&out[7], seen, seen + value)) != seen;) seen = before;
}

__global__ void float_sum(Buffers b) { atomicAdd(b.out<float>(), b.in<float>()[global_thread()]); }

// A lock held by one thread at a time guards a plain counter.
__global__ void spin_lock(Buffers b) {
  int* lock = b.out<int>();
  volatile int* counter = lock + 1;
  while (atomicCAS(lock, 0, 1) != 0) __nanosleep(20);
  __threadfence();
  const int before = *counter;
  __threadfence();
  *counter = before + 1;
  __threadfence();
  atomicExch(lock, 0);
}

// The block that finishes last sums what all have written.
__global__ void last_block(Buffers b) {
  int* out = b.out<int>();
  out[2 + global_thread()] = b.in<int>()[global_thread()];
  __threadfence();
  const int done = __syncthreads_count(1);
  int ticket = 0;
  if (threadIdx.x == 0) ticket = atomicAdd(&out[0], 1);
  if (!__syncthreads_or(ticket == int(gridDim.x) - 1)) return;
  int sum = 0;
  for (int i = int(threadIdx.x); i < b.n; i += done) sum += __ldcg(&out[2 + i]);
  atomicAdd(&out[1], sum);
}

__global__ void bits(Buffers b) {
  const int i = int(threadIdx.x);
  const unsigned x = b.in<unsigned>()[2 * i], y = b.in<unsigned>()[2 * i + 1];
  const unsigned long long wide = static_cast<unsigned long long>(y) << 32 | x;
  unsigned* out = b.out<unsigned>() + 11 * i;
  out[0] = unsigned(__popc(x));
  out[1] = unsigned(__popcll(wide));
  out[2] = unsigned(__ffs(int(x)));
  out[3] = unsigned(__ffsll(static_cast<long long>(wide)));
  out[4] = unsigned(__clz(int(x)));
  out[5] = unsigned(__clzll(static_cast<long long>(wide)));
  out[6] = __brev(x);
  out[7] = __funnelshift_l(x, y, unsigned(i));
  out[8] = __funnelshift_r(x, y, unsigned(i));
  out[9] = __byte_perm(x, y, 0x7c0a ^ unsigned(i));
  out[10] = min(x, y) ^ max(x, y);
}

__global__ void arithmetic(Buffers b) {
  const int i = int(threadIdx.x);
  const float x = __ldg(&b.in<float>()[2 * i]), y = b.in<float>()[2 * i + 1];
  float* out = b.out<float>() + 14 * i;
  out[0] = __fadd_rn(x, y);
  out[1] = __fmul_rn(x, y);
  out[2] = __fdiv_rn(x, y);
  out[3] = __fmaf_rn(x, y, 1.0f);
  out[4] = __fdividef(x, y);
  out[5] = exp2f(x);
  out[6] = float(exp2(double(x)));
  out[7] = __expf(x);
  out[8] = rsqrtf(y * y);
  out[9] = fminf(x, y);
  out[10] = fmaxf(x, y);
  out[11] = __int_as_float(__float_as_int(x) ^ 1);
  out[12] = __uint_as_float(__float_as_uint(y) ^ 1);
  __stcg(&out[13], min(x, 0.25f) + max(y, 0.5f));
}

// Every half and bfloat16 to float, and floats to both.
__global__ void conversions(Buffers b) {
  const int i = global_thread(), n = int(gridDim.x * blockDim.x);
  float* out = b.out<float>();
  out[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(i)));
  out[n + i] = __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(i)));
  out[2 * n + i] = __half2float(__float2half(b.in<float>()[i]));
  out[3 * n + i] = __bfloat162float(__float2bfloat16(b.in<float>()[i]));
}

__global__ void vectors(Buffers b) {
  const int i = int(threadIdx.x);
  const int4 x = b.in<int4>()[i];
  const uint2 y = make_uint2(unsigned(x.x), unsigned(x.y));
  const float2 z = make_float2(float(x.z), float(x.w));
  b.out<float4>()[i] = make_float4(z.y, z.x, float(y.y), float(y.x));
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
  const int next = cluster.map_shared_rank(shared, (rank + 1) % blocks)[i];
  atomicAdd(cluster.map_shared_rank(counter, 0), 1);
  cluster.sync();
  int* out = b.out<int>() + 4 * thread;
  out[0] = next;
  out[1] = rank;
  out[2] = int(cluster.thread_rank());
  out[3] = *counter;
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
    {"folds_int32", folds<int>},
    {"folds_uint32", folds<unsigned>},
    {"warp_sums", warp_sums},
    {"atomics_int32", atomics<int>},
    {"atomics_uint32", atomics<unsigned>},
    {"wide_atomics", wide_atomics},
    {"float_sum", float_sum},
    {"spin_lock", spin_lock},
    {"last_block", last_block},
    {"bits", bits},
    {"arithmetic", arithmetic},
    {"conversions", conversions},
    {"vectors", vectors},
    {"clusters", clusters},
};
