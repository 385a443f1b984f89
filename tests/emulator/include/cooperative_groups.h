// The groups that csrc/cuda uses: the block and the cluster.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

using corrmatch_emulator::Where;

struct thread_block {
  void sync(CORRMATCH_WHERE) const {
    corrmatch_emulator::barrier(corrmatch_emulator::Scope::block, "thread_block::sync", false, where);
  }
  unsigned thread_rank() const { return corrmatch_emulator::thread_rank(); }
  unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
};

struct cluster_group {
  void sync(CORRMATCH_WHERE) const {
    corrmatch_emulator::barrier(corrmatch_emulator::Scope::cluster, "cluster_group::sync", false, where);
  }
  unsigned block_rank() const { return corrmatch_emulator::block_rank(); }
  unsigned num_blocks() const { return corrmatch_emulator::cluster_blocks(); }
  unsigned thread_rank() const { return block_rank() * thread_block{}.num_threads() + thread_block{}.thread_rank(); }
  unsigned num_threads() const { return num_blocks() * thread_block{}.num_threads(); }
  template <class T>
  T* map_shared_rank(T* address, int rank, CORRMATCH_WHERE) const {
    return static_cast<T*>(corrmatch_emulator::shared_memory_of(address, unsigned(rank), where));
  }
};

inline thread_block this_thread_block() { return {}; }
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
