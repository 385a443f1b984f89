// Kernels with one fault each, as they are made: tests/test_emulator_faults.py sees the emulator show every one.
#include <cooperative_groups.h>

#include "planted.cuh"

namespace cg = cooperative_groups;

// Not in an unnamed namespace: a message can then name the kernel.
namespace planted {

constexpr unsigned kAll = 0xffffffff;

// No barrier between the write and the neighbour's read.
__global__ void race(Buffers b) {
  int* shared = shared_memory<int>();
  const int i = int(threadIdx.x);
  shared[i] = b.in<int>()[i];
  b.out<int>()[i] = shared[(i + 1) % int(blockDim.x)];
}

// A barrier after the write, but none before the next round writes again.
__global__ void race_of_rounds(Buffers b) {
  int* shared = shared_memory<int>();
  const int i = int(threadIdx.x);
  int value = b.in<int>()[i];
  for (int round = 0; round < 3; ++round) {
    shared[i] = value;
    __syncthreads();
    value = shared[(i + 1) % int(blockDim.x)];
  }
  b.out<int>()[i] = value;
}

// Lanes of a warp do not run in lockstep.
__global__ void race_of_a_warp(Buffers b) {
  int* shared = shared_memory<int>();
  const int i = int(threadIdx.x);
  shared[i] = b.in<int>()[i];
  __syncwarp();
  for (int step = 16; step > 0; step /= 2)
    if (i < step) shared[i] += shared[i + step];
  __syncwarp();
  b.out<int>()[i] = shared[0];
}

// Blocks look first and mark afterwards: two of them can see the place free.
__global__ void race_of_blocks(Buffers b) {
  if (threadIdx.x != 0) return;
  int* out = b.out<int>();
  if (atomicAdd(&out[0], 0) == 0) {
    atomicMax(&out[0], 1);
    atomicAdd(&out[1], 1);
  }
}

// What no thread has written is read.
__global__ void unwritten(Buffers b) {
  const int i = int(threadIdx.x);
  float* shared = shared_memory<float>();
  if (i > 0) shared[i] = 0;
  __syncthreads();
  b.out<float>()[i] = shared[i];
}

__global__ void barrier_after_return(Buffers b) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  b.out<int>()[threadIdx.x] = 1;
}

__global__ void barrier_in_both_branches(Buffers b) {
  if (threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
  b.out<int>()[threadIdx.x] = 1;
}

__global__ void barrier_in_a_loop(Buffers b) {
  for (unsigned i = 0; i < 3 + threadIdx.x / 7; ++i) __syncthreads();
  b.out<int>()[threadIdx.x] = 1;
}

__global__ void barrier_of_some_blocks(Buffers b) {
  if (cg::this_cluster().block_rank() > 0) cg::this_cluster().sync();
  b.out<int>()[threadIdx.x] = 1;
}

__global__ void vote_in_a_branch(Buffers b) {
  if (threadIdx.x < 7) b.out<unsigned>()[threadIdx.x] = __ballot_sync(kAll, 1);
  __syncthreads();
}

__global__ void vote_after_return(Buffers b) {
  if (threadIdx.x == 7) return;
  b.out<unsigned>()[threadIdx.x] = __ballot_sync(kAll, 1);
}

__global__ void vote_with_two_masks(Buffers b) {
  b.out<unsigned>()[threadIdx.x] = __ballot_sync(threadIdx.x < 7 ? 0x7fffffff : kAll, 1);
}

__global__ void vote_without_the_caller(Buffers b) { b.out<unsigned>()[threadIdx.x] = __ballot_sync(0x7fffffff, 1); }

__global__ void vote_of_two_kinds(Buffers b) {
  b.out<int>()[threadIdx.x] = threadIdx.x < 7 ? __any_sync(kAll, 1) : __all_sync(kAll, 1);
}

__global__ void shuffle_from_another_mask(Buffers b) {
  const unsigned i = threadIdx.x;
  b.out<int>()[i] = __shfl_xor_sync(i < 16 ? 0xffff : 0xffff0000, int(i), 16);
}

// Nobody ever sets what it waits for.
__global__ void waits_for_ever(Buffers b) {
  while (atomicAdd(b.out<int>(), 0) == 0) continue;
}

__global__ void rank_beyond_the_cluster(Buffers b) {
  b.out<int>()[0] = *cg::this_cluster().map_shared_rank(shared_memory<int>(), 2);
}

// The neighbour may have ended, and its shared memory with it.
__global__ void neighbour_has_ended(Buffers b) {
  const cg::cluster_group cluster = cg::this_cluster();
  shared_memory<int>()[threadIdx.x] = int(threadIdx.x);
  cluster.sync();
  if (cluster.block_rank() == 0)
    for (int i = 0; i < 100; ++i) __ldcg(b.in<int>());  // gives the neighbour turns
  b.out<int>()[threadIdx.x] = cluster.map_shared_rank(shared_memory<int>(), 1 - int(cluster.block_rank()))[threadIdx.x];
}

// ---- Found by AddressSanitizer and UndefinedBehaviorSanitizer ----

__global__ void shared_write_past_the_end(Buffers b) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x + 1] = int(threadIdx.x);
  __syncthreads();
  b.out<int>()[threadIdx.x] = shared[threadIdx.x];
}

__global__ void global_write_past_the_end(Buffers b) { b.out<int>()[b.n + int(threadIdx.x)] = 1; }

__global__ void global_read_before_the_start(Buffers b) {
  b.out<int>()[threadIdx.x] = b.in<int>()[-1 - int(threadIdx.x)];
}

__global__ void local_write_past_the_end(Buffers b) {
  int local[4] = {};
  volatile int beyond = 4;
  __syncthreads();
  for (int i = 0; i <= beyond; ++i) local[i] = int(threadIdx.x);
  __syncthreads();
  b.out<int>()[threadIdx.x] = local[2];
}

// As above, but the address was asked for in time.
__global__ void neighbour_ends_meanwhile(Buffers b) {
  int* shared = shared_memory<int>();
  const cg::cluster_group cluster = cg::this_cluster();
  const int* other = cluster.map_shared_rank(shared, 1 - int(cluster.block_rank()));
  shared[threadIdx.x] = int(threadIdx.x);
  cluster.sync();
  if (cluster.block_rank() == 0)
    for (int i = 0; i < 100; ++i) __ldcg(b.in<int>());  // gives the neighbour turns
  b.out<int>()[threadIdx.x] = other[threadIdx.x];
}

__global__ void unaligned(Buffers b) {
  const char* bytes = b.in<char>() + 4;
  b.out<int>()[threadIdx.x] = int(*reinterpret_cast<const long long*>(bytes));
}

}  // namespace planted

using namespace planted;
const Kernels faults{
    {"race", race},
    {"race_of_rounds", race_of_rounds},
    {"race_of_a_warp", race_of_a_warp},
    {"race_of_blocks", race_of_blocks},
    {"unwritten", unwritten},
    {"barrier_after_return", barrier_after_return},
    {"barrier_in_both_branches", barrier_in_both_branches},
    {"barrier_in_a_loop", barrier_in_a_loop},
    {"barrier_of_some_blocks", barrier_of_some_blocks},
    {"vote_in_a_branch", vote_in_a_branch},
    {"vote_after_return", vote_after_return},
    {"vote_with_two_masks", vote_with_two_masks},
    {"vote_without_the_caller", vote_without_the_caller},
    {"vote_of_two_kinds", vote_of_two_kinds},
    {"shuffle_from_another_mask", shuffle_from_another_mask},
    {"waits_for_ever", waits_for_ever},
    {"rank_beyond_the_cluster", rank_beyond_the_cluster},
    {"neighbour_has_ended", neighbour_has_ended},
    {"shared_write_past_the_end", shared_write_past_the_end},
    {"global_write_past_the_end", global_write_past_the_end},
    {"global_read_before_the_start", global_read_before_the_start},
    {"local_write_past_the_end", local_write_past_the_end},
    {"neighbour_ends_meanwhile", neighbour_ends_meanwhile},
    {"unaligned", unaligned},
};
