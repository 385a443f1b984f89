// What the CUDA names in include/ are made of. emulator.cpp runs it.
//
// Every thread of a block is a fiber. Only one runs at a time, from one synchronising call to the next; which one comes
// next is drawn by lot, from a seed. Several blocks (or clusters) are under way together, in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace corrmatch_emulator {
namespace cuda {

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

}  // namespace cuda

using namespace cuda;

using Where = std::source_location;  // the call in the kernel, for messages

// The calling block's shared memory: exactly as long as the launch says, filled with rubbish.
void* shared_memory();
// The same place in the shared memory of another block of the cluster.
void* shared_memory_of(const void* address, unsigned rank, const Where& where);

unsigned cluster_blocks();
unsigned block_rank();  // in the cluster
unsigned lane();

// What was brought to a call, by lane: 0 where the mask does not name it; of several warps, or'ed.
struct Lanes {
  uint32_t mask;
  uint64_t value[32];
};
enum class Scope { warp, block, cluster };

// Waits until all threads of the scope whose lanes the mask names are in this call, at the same place of the source.
const Lanes& meet(Scope scope, const char* name, uint32_t mask, uint64_t value, const Where& where);

// Lets others run, every other time.
void maybe_yield(const Where& where);

// Ends the launch with an exception that names the calling thread.
[[noreturn]] void fail(const char* what, const Where& where);

// Runs the body once for every thread of the grid. One launch at a time; the others wait.
void run(dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes, const std::function<void()>& body);
inline size_t count(const dim3& size) { return size_t{size.x} * size.y * size.z; }

}  // namespace corrmatch_emulator
