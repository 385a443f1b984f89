// The group that csrc/cuda uses: the cluster.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync(CORRMATCH_WHERE) const {
    corrmatch_emulator::meet(corrmatch_emulator::Scope::cluster, "cluster_group::sync", ~0u, 0, where);
  }
  unsigned block_rank() const { return corrmatch_emulator::block_rank(); }
  unsigned num_blocks() const { return corrmatch_emulator::cluster_blocks(); }
  template <class T>
  T* map_shared_rank(T* address, unsigned rank, CORRMATCH_WHERE) const {
    return static_cast<T*>(corrmatch_emulator::shared_memory_of(address, rank, where));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
