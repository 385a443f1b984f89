// A team is one block, or the blocks of a cluster, that work on one problem: barriers, shared memory and sums of a
// team.
#pragma once

#include <cooperative_groups.h>

#include "launch.cuh"

namespace corrmatch::cuda {

constexpr int kTeamThreads = 1024, kTeamWarps = kTeamThreads / kWarp;  // of a block
constexpr int kMostCluster = 8;

// The blocks of a team.
class Team {
 public:
  __device__ Team() {
#if __CUDA_ARCH__ >= 900
    rank_ = int(cooperative_groups::this_cluster().block_rank());
    blocks_ = int(cooperative_groups::this_cluster().num_blocks());
#endif
  }
  __device__ int rank() const { return rank_; }
  __device__ int blocks() const { return blocks_; }

  __device__ void sync() const {
#if __CUDA_ARCH__ >= 900
    if (blocks_ > 1) return cooperative_groups::this_cluster().sync();
#endif
    __syncthreads();
  }
  // The same address in the shared memory of another block.
  template <class T>
  __device__ T* of(T* place, int rank) const {
#if __CUDA_ARCH__ >= 900
    if (blocks_ > 1) return cooperative_groups::this_cluster().map_shared_rank(place, unsigned(rank));
#endif
    return place;
  }

 private:
  int rank_ = 0, blocks_ = 1;
};

// Sums over all threads of a team. Two sets of cells take turns, so one barrier for each sum (two in a cluster) is
// enough: before a thread writes a set again, it passes a barrier that all readers of its last sum have reached.
class Counter {
 public:
  static constexpr int kMost = 16;  // sums at a time
  static constexpr int kSet = kMost * (kTeamWarps + kMostCluster);
  static constexpr int kCells = 2 * kSet;

  __device__ Counter(const Team& team, uint32_t* cells) : team_(team), cells_(cells) {}

  // Replaces counts[i] by its sum over all threads, for i < n <= kMost.
  __device__ void sum(uint32_t* counts, int n) {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    uint32_t *of_warps = cells_ + (turn_ ? kSet : 0), *of_blocks = of_warps + kMost * kTeamWarps;
    turn_ = !turn_;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= n) break;
      const uint32_t count = __reduce_add_sync(~0u, counts[i]);
      if (lane == 0) of_warps[i * kTeamWarps + warp] = count;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= n) break;
      counts[i] = __reduce_add_sync(~0u, of_warps[i * kTeamWarps + lane]);
    }
    if (team_.blocks() == 1) return;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= n) break;
      if (int(threadIdx.x) < team_.blocks())
        team_.of(of_blocks, int(threadIdx.x))[i * kMostCluster + team_.rank()] = counts[i];
    }
    team_.sync();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (i >= n) break;
      counts[i] = 0;
      for (int rank = 0; rank < team_.blocks(); ++rank) counts[i] += of_blocks[i * kMostCluster + rank];
    }
  }

 private:
  const Team& team_;
  uint32_t* cells_;
  bool turn_ = false;
};

}  // namespace corrmatch::cuda
